"""SIGKILL at every storage operation of an export and an import; then the same call ends it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import dist_ckpt
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.wrapper import OPERATIONS, Operation
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import CrashStore
from dist_ckpt.threads import wait_for_threads
from tests.unit.doors.models import check_equal, load_torch, saved

SHARD_BYTES = 3500
LAST = {"hf": "model.safetensors.index.json", "dcp": ".metadata", "torch": "model.pt"}


def export(source: str, out: Any, kind: Any) -> None:
    options: dict[str, Any] = {"max_shard": SHARD_BYTES} if kind == "hf" else {}
    dist_ckpt.export(source, out, format=kind, **options)


def export_with_crash(
    source: str, out: str, kind: str, at: int | None
) -> list[tuple[Operation, str]]:
    store = CrashStore(LocalStore(out), at=at, kinds=OPERATIONS)
    export(source, store, kind)
    return store.operations


def import_with_crash(source: str, out: str, _: str, at: int | None) -> list[tuple[Operation, str]]:
    store = CrashStore(LocalStore(out), at=at, kinds=OPERATIONS)
    dist_ckpt.import_(source, store, step=5)
    assert wait_for_threads(60.0), "what is tidied up after the commit is swept, too"
    return store.operations


def sweep(
    work: Callable[..., Any], source: str, kind: str, place: Path, check: Callable[[Path], None]
) -> None:
    """Kill `work` before each of its operations and see what `check` finds."""
    (operations,) = run_ranks(1, work, source, str(place / "whole"), kind, None)
    assert {name for name, _ in operations} >= {"put", "read_into"}, "the sweep must cover them"
    check(place / "whole")
    for at in range(1, len(operations) + 1):
        out = place / str(at)
        run_ranks(1, work, source, str(out), kind, at, expect_killed={0})
        check(out)


@pytest.mark.parametrize("kind", ["hf", "dcp", "torch"])
def test_export(kind: str, tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)

    def check(out: Path) -> None:
        assert Repository(LocalStore(run)).verify(5).ok
        if (out / LAST[kind]).exists():
            check_whole(out)
        export(str(run), out, kind)
        check_whole(out)
        assert [name for name in os.listdir(out) if "unfinished" in name or "tmp" in name] == []

    def check_whole(out: Path) -> None:
        if kind == "torch":
            check_equal(load_torch(out / "model.pt"), wanted)
            return
        with dist_ckpt.open_checkpoint(out) as opened:
            check_equal({name: opened[f"model/{name}"].read() for name in wanted}, wanted)

    sweep(export_with_crash, str(run), kind, tmp_path / "out", check)


def test_import(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    source = tmp_path / "source" / "old.pt"
    dist_ckpt.export(run, source, format="torch")
    before = source.read_bytes()

    def check(out: Path) -> None:
        assert source.read_bytes() == before
        repository = Repository(LocalStore(out))
        assert repository.steps() in ([], [5])
        dist_ckpt.import_(source, out, step=5)
        assert repository.steps() == [5]
        assert repository.verify(5).ok
        weights = {name: torch.zeros_like(tensor) for name, tensor in wanted.items()}
        dist_ckpt.load_weights(weights, out)
        check_equal(weights, wanted)

    sweep(import_with_crash, str(source), "", tmp_path / "out", check)


def test_a_kill_while_a_file_is_made(tmp_path: Path) -> None:
    run, wanted = saved(tmp_path)
    out = tmp_path / "out" / "a.safetensors"
    (reads,) = run_ranks(1, export_reading, str(run), str(out), None)
    out.unlink()
    for at in range(1, reads + 1):
        run_ranks(1, export_reading, str(run), str(out), at, expect_killed={0})
        assert not out.exists()
    dist_ckpt.export(run, out)
    check_equal(load_file(out), wanted)
    assert os.listdir(out.parent) == ["a.safetensors"], "what the kills left is swept"


def export_reading(source: str, out: str, at: int | None) -> int:
    """Export, killed at a read of the source: in the middle of a put."""
    store = CrashStore(LocalStore(source), at=at, kinds={"read_into"})
    dist_ckpt.export(store, out)
    return len(store.operations)
