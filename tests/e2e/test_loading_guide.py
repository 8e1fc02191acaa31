"""The loading guide is right: its Python runs, and does what the text around it says."""

from __future__ import annotations

from pathlib import Path

import torch

import dist_ckpt
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides

GUIDE = guides.guide("loading")

# What the text says of what its code does; it follows the code in the same program.
CLAIMS = """
trained = dist_ckpt.open_checkpoint("/data/runs/17")
first, last = (trained[f"model/{name}.weight"].read() for name in (0, 2))
assert torch.equal(larger[2].weight, last) and torch.equal(other_head[0].weight, first)
assert torch.equal(outer["backbone"][2].weight, last)
assert torch.equal(half[0].weight, first.bfloat16())
assert torch.equal(weights["0.weight"], first) and torch.equal(rows, first[2:4])
assert torch.equal(bias, trained["model/2.bias"].read()) and values
assert torch.equal(model[0].weight, first) and step == 100
assert optimizer.state[model[0].weight]["step"] == 1
"""


def test_python_runs(tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    said = guides.run((code + CLAIMS).replace("/data", str(tmp_path)), tmp_path)
    for expected in (
        "missing in the checkpoint: model/3.bias, model/3.weight\n",
        "('model/3.bias', 'model/3.weight')\n",
        "model/0.weight: stored float32[64, 16], wanted bfloat16[64, 16]",
        "16 tensors of model, optimizer, rng: 15.8 KiB, verified\n",
        "  15.8 KiB read, 0 B received (no byte is needed by more than one rank)\n",
        "100 {}\n",
    ):
        assert expected in said
    assert said.count(" False\n") == 3, "nothing of another program is verified"
    # A start on another run's weights took nothing of its optimizer over, and left it alone.
    assert Repository(resolve(tmp_path / "runs" / "17")).steps() == [100]
    with dist_ckpt.open_checkpoint(tmp_path / "runs" / "18") as ckpt:
        assert not [name for name in ckpt if name.startswith("optimizer/")]
        assert ckpt["model/0.weight"].dtype == torch.float32
