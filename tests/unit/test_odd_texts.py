"""Texts that UTF-8 cannot hold: names with one are refused by name, messages with one are told."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, NotFound, UsageError, describe, to_wire
from dist_ckpt.loading.opened import open_checkpoint

HALF = "half \ud800"
STATE = {"progress": {"step": 1}}


def module() -> torch.nn.Module:
    made = torch.nn.Module()
    made.register_buffer(HALF, torch.ones(1))
    return made


CALLS: dict[str, Callable[[Path], Any]] = {
    "metadata": lambda run: dist_ckpt.Checkpointer(run, STATE, metadata={"note": [HALF]}),
    "name in metadata": lambda run: dist_ckpt.Checkpointer(run, STATE, metadata={HALF: 1}),
    "metric": lambda run: dist_ckpt.save(STATE, run, step=2, metrics={HALF: 1.0}),
    "best": lambda run: dist_ckpt.load(STATE, run, step="best", metric=HALF),
    "keep": lambda run: dist_ckpt.keep.best(HALF),
    "early stopping": lambda run: dist_ckpt.EarlyStopping(HALF, patience=1),
    "pattern": lambda run: dist_ckpt.load(STATE, run, only=HALF),
    "rename": lambda run: dist_ckpt.load(STATE, run, rename={HALF: "progress/step"}),
    "renaming function": lambda run: dist_ckpt.load(STATE, run, rename=lambda name: HALF),
    "buffer": lambda run: dist_ckpt.save({"model": module()}, run, step=2),
    "path": lambda run: dist_ckpt.save(STATE, run / HALF),
    "path of an older disk": lambda run: dist_ckpt.Checkpointer(os.fsdecode(b"run\xff"), STATE),
    "file": lambda run: dist_ckpt.load_weights(torch.nn.Linear(1, 1), f"{HALF}.safetensors"),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_names_that_utf8_cannot_hold_are_refused_by_name(
    call: Callable[[Path], Any], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    dist_ckpt.save({"progress": {"step": 1}}, run, step=1)
    with pytest.raises(UsageError):
        call(run)
    # Nothing was written, and the run goes on.
    dist_ckpt.save({"progress": {"step": 1}}, run, step=2)


def test_a_file_of_which_nothing_can_be_read_is_named(tmp_path: Path) -> None:
    torch.save(HALF, tmp_path / "note.pt")
    with pytest.raises(IncompatibleError, match=r"nothing can be imported: .*lone surrogate"):
        dist_ckpt.import_(tmp_path / "note.pt", tmp_path / "run")


def test_a_run_in_a_folder_of_an_older_disk_is_saved_loaded_and_told_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = os.fsencode(tmp_path) + b"/old\xff"
    os.mkdir(folder)
    monkeypatch.chdir(os.fsdecode(folder))
    dist_ckpt.save({"weights": {"a": torch.ones(2)}}, "run", step=1)
    loaded = {"weights": {"a": torch.zeros(2)}}
    report = dist_ckpt.load(loaded, "run")
    assert torch.equal(loaded["weights"]["a"], torch.ones(2))
    assert report.url.encode() == os.fsencode(tmp_path) + rb"/old\udcff/run"
    with open_checkpoint("run") as stored:
        assert repr(stored).encode()
    dist_ckpt.save(STATE, "memory://run?token=secret")
    with open_checkpoint("memory://run?token=secret") as stored:
        assert "secret" not in repr(stored)
    with pytest.raises(NotFound, match="old"):
        dist_ckpt.load(loaded, "run", step=3)


def test_an_error_of_others_crosses_ranks_whatever_its_text() -> None:
    error = OSError(f"cannot read {HALF}")
    assert describe(error) == r"OSError: cannot read half \ud800"
    assert str(to_wire(error)).encode()
    assert UsageError(f"no {HALF}", ranks={1: HALF}).ranks == {1: r"half \ud800"}


@pytest.mark.parametrize("seconds", [10**400, 1e300, 1e11, float("nan"), float("inf"), 0, True])
def test_nobody_waits_longer_than_a_lock_can(seconds: float, tmp_path: Path) -> None:
    policy = dist_ckpt.policy
    for call in (
        lambda: policy.every(seconds=seconds),
        lambda: policy.on_signal(grace_seconds=seconds),
        lambda: policy.on_notice("/run/notice", every=seconds),
        lambda: dist_ckpt.save(STATE, tmp_path, timeout_seconds=seconds),
        lambda: dist_ckpt.Checkpointer(tmp_path, STATE, status_seconds=seconds),
    ):
        with pytest.raises(UsageError, match="must be a finite number above 0, and at most"):
            call()
