"""A place may be any path, in every call that takes one; the types say so too."""

from __future__ import annotations

import os
from pathlib import Path

import torch

import dist_ckpt
from dist_ckpt import Checkpointer, Run
from dist_ckpt.dcp import Reader, Writer


class Folder:
    """A path of another library, as those of py and of pytest are."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __fspath__(self) -> str:
        return str(self._path)


def test_every_call_takes_a_path_of_any_kind(tmp_path: Path) -> None:
    def at(name: str) -> os.PathLike[str]:
        return Folder(tmp_path / name)

    model = torch.nn.Linear(2, 1)
    run = at("run")
    dist_ckpt.save({"model": model}, run, step=1)
    dist_ckpt.async_save({"model": model}, at("second"), step=2).wait()
    assert dist_ckpt.load({"model": model}, run).step == 1
    assert dist_ckpt.load_weights(model, run).step == 1
    with dist_ckpt.open_checkpoint(run) as stored:
        assert stored.step == 1
    dist_ckpt.export(run, at("weights.safetensors"))
    dist_ckpt.import_(at("weights.safetensors"), at("imported"))
    dist_ckpt.average([run, (at("second"), 2)], at("averaged"))
    assert Run(run).copy(1, at("copied")).step == 1
    assert len(Run(run).mirror(at("mirror")).copied) == 1
    with Checkpointer(at("trained"), {"model": model}) as ckpt:
        assert ckpt.restore(url=run) == 1
    assert isinstance(Reader(run), Reader)
    assert isinstance(Writer(at("dcp")), Writer)
    names = ["run", "second", "imported", "averaged", "copied", "mirror"]
    assert all(Run(at(name)).latest() is not None for name in names)
