"""The guide of the doors is right: its Python runs, and does what the text around it says."""

from __future__ import annotations

from pathlib import Path

from tests.e2e import guides

GUIDE = guides.guide("doors")

# What the text says of what its code does; it follows the code in the same program.
CLAIMS = """
parts = [dist_ckpt.open_checkpoint("/data/runs/17", step=step) for step in (100, 200, 300)]
first, second, third = (each["model/0.weight"].read().double() for each in parts)
averaged = (first + second + 2 * third) / 4
torch.testing.assert_close(model[0].weight.double(), averaged, rtol=1e-6, atol=1e-6)
uniform = load_file("/data/averaged.safetensors")["0.weight"].double()
torch.testing.assert_close(uniform, (first + second + third) / 3, rtol=1e-6, atol=1e-6)
assert sorted(torch.load("/data/weights.pt", weights_only=True)) == [
    "encoder.bias", "encoder.weight", "head.bias", "head.weight"
]
"""


def test_python_runs(tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    said = guides.run((code + CLAIMS).replace("/data", str(tmp_path)), tmp_path)
    for expected in (
        "exported step 300 to ",
        "step 1200 of ",
        "  model, called 'model_state_dict' there\n",
        "  metric loss: 0.25\n",
    ):
        assert expected in said
