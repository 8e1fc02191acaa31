"""SIGKILL at every storage operation of a copy and a `keep`; then the same call ends the work."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt import Run, keep
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import CHANGES, OPERATIONS, CrashStore, Operation
from tests.crash.saves import go_on, state

STEPS = (1, 2, 3)
KINDS = [
    pytest.param(CHANGES, id="changes"),
    pytest.param(OPERATIONS, id="all", marks=pytest.mark.soak),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("source") / "run"
    for step in STEPS:
        with dist_ckpt.Checkpointer(str(root), state(step)) as ckpt:
            if step > 1:
                go_on(ckpt)
            ckpt.save(step).wait()
    return root


def copy_with_crash(
    source: str, target: str, at: int | None, kinds: frozenset[Operation]
) -> list[tuple[Operation, str]]:
    store = CrashStore(LocalStore(target), at=at, kinds=kinds)
    Run(source).copy(2, store)
    return store.operations


def read_with_crash(source: str, target: str, at: int | None, _: object) -> list[Any]:
    store = CrashStore(LocalStore(source), at=at)
    Run(store).copy(2, target)
    return store.operations


def keep_with_crash(
    _: str, target: str, at: int | None, kinds: frozenset[Operation]
) -> list[tuple[Operation, str]]:
    store = CrashStore(LocalStore(target), at=at, kinds=kinds)
    Run(store).keep(keep.latest(1))
    return store.operations


def sweep(
    work: Callable[..., Any],
    source: Path,
    place: Path,
    kinds: frozenset[Operation],
    check: Callable[[Path], None],
    *,
    begin: Callable[[Path], object] = lambda _: None,
) -> None:
    """Kill `work` before each of its operations, on what `begin` makes, and see what is left."""
    begin(place / "whole")
    (operations,) = run_ranks(1, work, str(source), str(place / "whole"), None, kinds)
    assert len(operations) >= len(STEPS)
    for at in range(1, len(operations) + 1):
        target = place / str(at)
        begin(target)
        run_ranks(1, work, str(source), str(target), at, kinds, expect_killed={0})
        check(target)
        shutil.rmtree(target)


def check_copy(source: Path, target: Path) -> None:
    assert all(Run(str(source)).verify(step).ok for step in STEPS)
    assert Run(str(target)).steps() in ([], [2])
    if Run(str(target)).steps():
        assert Run(str(target)).verify(2).ok
    Run(str(source)).copy(2, str(target))
    assert Run(str(target)).verify(2).ok
    save_id = Run(str(source)).manifest(2).save_id
    names = {path.name for path in target.rglob("*") if path.is_file()}
    written = {path.name for path in source.rglob(f"*/{save_id}/*")}
    assert names >= written > {"index.msgpack"}
    # Half a file of a killed writer goes with the first sweep of who trains there.
    assert [name for name in names if "manifest" in name] == ["manifest.json"]


@pytest.mark.parametrize("kinds", KINDS)
def test_copy(kinds: frozenset[Operation], source: Path, tmp_path: Path) -> None:
    sweep(copy_with_crash, source, tmp_path, kinds, lambda target: check_copy(source, target))


@pytest.mark.soak
def test_copy_while_it_reads(source: Path, tmp_path: Path) -> None:
    sweep(read_with_crash, source, tmp_path, OPERATIONS, lambda each: check_copy(source, each))


@pytest.mark.parametrize("kinds", KINDS)
def test_keep(kinds: frozenset[Operation], source: Path, tmp_path: Path) -> None:
    def check(target: Path) -> None:
        run = Run(str(target))
        # The second one is what the run went on from.
        assert run.steps() in ([1, 2, 3], [2, 3])
        assert all(run.verify(step).ok for step in run.steps())
        run.keep(keep.latest(1))
        assert run.steps() == [2, 3]
        assert not (target / "step-0000000001").exists(), "nothing is left of what went"

    def begin(target: Path) -> None:
        shutil.copytree(source, target)

    sweep(keep_with_crash, source, tmp_path, kinds, check, begin=begin)
