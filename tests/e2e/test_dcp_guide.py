"""The guide to torch.distributed.checkpoint is right: its Python runs, on a disk and on S3."""

from __future__ import annotations

from pathlib import Path

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from tests.e2e import guides
from tests.services.s3 import S3Service

GUIDE = guides.guide("dcp")

PROGRAM = """
import torch
model = torch.nn.Linear(1000, 700)
state_dict = {"model": model.state_dict(), "epoch": 3}
"""
MORE = """
loaded = {"model": torch.nn.Linear(1000, 700).state_dict(), "epoch": 0}
dcp.load(loaded, storage_reader=dist_ckpt.dcp.Reader("s3://bucket/run-17"))
assert loaded["epoch"] == 3
assert torch.equal(loaded["model"]["weight"], model.weight)
writer = dist_ckpt.dcp.Writer("runs/18")
"""


def test_python_runs(s3_service: S3Service, s3_name: str, tmp_path: Path) -> None:
    saves, planner, weights, whole, causes = guides.blocks(GUIDE, "python")
    # The last one saves with the Writer of the one before it, under a step that exists by then.
    check = "assert type(causes[0]) is dist_ckpt.errors.AlreadyExists\n"
    check += "assert everything.keys() == {'model'} and not optimizer_alone\n"
    check += "assert torch.equal(torch.load('everything.pt')['model']['bias'], model.bias)\n"
    check += "exported = torch.load('weights.pt', weights_only=True)\n"
    check += "assert torch.equal(exported['weight'], model.weight)\n"
    code = f"{PROGRAM}{saves}{MORE}{planner}{weights}{whole}{causes}{check}"
    guides.run(code.replace("s3://bucket", s3_service.url(s3_name)), tmp_path)
    assert Repository(resolve(tmp_path / "runs" / "17")).steps() == [1000]
    assert Repository(resolve(s3_service.url(f"{s3_name}/run-17"))).steps() == [2000]
