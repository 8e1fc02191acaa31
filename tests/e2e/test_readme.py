"""Every command and every code block of the README does what it says."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from dist_ckpt import ElasticSampler
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from tests.e2e import guides

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def training() -> dict[str, Any]:
    """What the README supposes: a model that is being trained on some data."""
    torch.manual_seed(1)
    model = torch.nn.Linear(4, 1)
    optimizer = torch.optim.AdamW(model.parameters())
    data = TensorDataset(torch.randn(24, 4))
    sampler = ElasticSampler(len(data), global_batch=4)

    def train_step(batch: list[torch.Tensor]) -> float:
        loss = model(batch[0]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    return {
        "model": model,
        "optimizer": optimizer,
        "scheduler": CosineAnnealingLR(optimizer, 10),
        "sampler": sampler,
        "loader": DataLoader(data, batch_sampler=sampler),
        "train_step": train_step,
        "total_steps": 1200,
    }


def test_every_python_block_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names = training()
    # What needs another framework is run where that is imported anyway: tests/integrations.
    code = [each for each in guides.blocks(README, "python") if "integrations" not in each]
    assert len(code) >= 3
    for block in code:
        exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert sorted(path.name for path in Path("runs/17").glob("step-*")) == [
        "step-0000000500",
        "step-0000001000",
        "step-0000001200",
    ]
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(names["weights"][name], tensor), "the model file is the model"
    assert names["weights"].keys() == names["model"].state_dict().keys()

    # The same block again goes on from where it stands: nothing is left to do.
    again = training()
    again["train_step"] = lambda batch: pytest.fail("there is no step left to take")
    exec(compile(code[0], "README.md", "exec"), again)  # noqa: S102
    assert again["start"] == 1200
    for name, tensor in names["model"].state_dict().items():
        assert torch.equal(again["model"].state_dict()[name], tensor)


def commands() -> list[str]:
    lines = "\n".join(guides.blocks(README, "console")).splitlines()
    return [line.split("#")[0].strip() for line in lines if line.strip()]


def test_the_commands_are_those_that_are_tested() -> None:
    # `make test` is what runs this very test.
    assert commands() == ["make demo", "make test"]


@pytest.mark.timeout(1800)  # 18 workers, and the machine may have other things to do
def test_make_demo_proves_what_it_says() -> None:
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST", "MAKE"))}
    done = subprocess.run(
        ["make", "demo"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1700,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(re.findall(r"^proved ", done.stdout, re.MULTILINE)) == 9, done.stdout
    output = ROOT / "demo-output"
    assert (output / "report.png").stat().st_size > 10_000
    assert Repository(LocalStore(output / "killed" / "run")).steps()[-1] == 60, "for a look"


def test_every_link_leads_somewhere() -> None:
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
