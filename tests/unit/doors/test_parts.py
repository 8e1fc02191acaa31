"""Some parts of a checkpoint as a checkpoint that never had any others."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import dist_ckpt
from dist_ckpt import Run
from dist_ckpt.doors.parts import copy_parts
from dist_ckpt.errors import AlreadyExists, IntegrityError, UsageError
from dist_ckpt.repository.history import EpochNote, put_epoch_note
from dist_ckpt.storage.local import LocalStore


def fill(root: Path) -> LocalStore:
    """Save a model with a tie, and a value with tensors inside of it."""
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(3, 3), "b": torch.nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    ema = {"decay": 0.5, "shadow": [torch.ones(2)]}
    state = {"model": model, "ema": ema, "other": {"n": 1}}
    dist_ckpt.save(state, root, step=7, metrics={"loss": 2.0}, metadata={"note": "x"})
    return LocalStore(root)


def test_it_holds_them_and_says_where_the_rest_is(tmp_path: Path) -> None:
    store = fill(tmp_path / "run")
    save_id = Run(store).manifest(7).save_id
    put_epoch_note(store, 7, save_id, EpochNote(3, {"f1": 0.5}))
    report = copy_parts(store, tmp_path / "copy", step=7, parts=["ema", "model"])
    assert (report.step, report.parts, report.was_there) == (7, ("ema", "model"), False)
    copied = Run(str(tmp_path / "copy"))
    assert copied.verify(7).ok
    manifest = copied.manifest(7)
    assert set(manifest.parts) == {"ema", "model"}
    assert manifest.metrics == {"loss": 2.0, "f1": 0.5}
    assert manifest.metadata["note"] == "x"
    origin = manifest.metadata["copied_from"]
    assert origin["epoch"] == 3
    assert set(origin["parts"]) >= {"model", "ema", "other", "rng"}
    with (
        dist_ckpt.open_checkpoint(tmp_path / "run") as one,
        dist_ckpt.open_checkpoint(tmp_path / "copy") as other,
    ):
        assert {info.part for info in other.info.values()} == {"ema", "model"}
        assert other.ties("model") == one.ties("model")
        for name in other:
            assert torch.equal(one[name].read(), other[name].read())
        values = other.read_values("ema")["value"]
        assert (values["decay"], values["shadow"][0].tolist()) == (0.5, [1.0, 1.0])
    assert copy_parts(store, tmp_path / "copy", step=7, parts=["ema", "model"]).was_there
    with pytest.raises(AlreadyExists):
        copy_parts(store, tmp_path / "copy", step=7, parts=["model"])


def test_an_older_one_is_not_brought_in_behind_a_newer_one(tmp_path: Path) -> None:
    store = fill(tmp_path / "run")
    dist_ckpt.save({"n": 1}, tmp_path / "copy", step=8)
    with pytest.raises(UsageError, match="bring in the older one first, or into another run") as no:
        copy_parts(store, tmp_path / "copy", step=7, parts=["ema"])
    assert "restore()" not in no.value.message
    assert Run(str(tmp_path / "copy")).steps() == [8]


def test_what_cannot_be_committed_truthfully_is_refused(tmp_path: Path) -> None:
    store = fill(tmp_path / "run")
    for parts, says in (([], "name the parts"), (["modle"], "'model'"), (["rng"], "of its own")):
        with pytest.raises(UsageError, match=says):
            copy_parts(store, tmp_path / "copy", step=7, parts=parts)
    (file,) = (tmp_path / "run").rglob("model.*")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(IntegrityError):
        copy_parts(store, tmp_path / "copy", step=7, parts=["model"])
    assert not (tmp_path / "copy").exists()
