"""SIGKILL at every storage operation, and at every system call that changes the disk, of a save.

A kill before and a kill after a call that changes nothing leave the same disk, so the suite leaves
those calls out; the soak has the operations that only read as well.
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt.errors import CheckpointError
from dist_ckpt.saving import attempt
from dist_ckpt.storage import disk, local
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import CHANGES, OPERATIONS, CrashStore, Operation
from tests.crash.saves import (
    BASE_STEP,
    CRASH_STEP,
    OLD_STEP,
    check_after_crash,
    check_run,
    go_on,
    save,
    state,
)

CALLS = ("mkdir", "writev", "pwrite", "link", "rename", "replace", "unlink", "rmdir")
LARGE_BYTES = 64 << 10  # so that the shards of these small states go as those of large ones do


class CrashingOs:
    """The `os` module, until call number `at` of those that change the disk."""

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.count = 0
        self._lock = threading.Lock()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name == "open":
            return self._opened
        return self._counted(real) if name in CALLS else real

    def _opened(self, path: str, flags: int, *args: Any, **kwargs: Any) -> int:
        opened = self._counted(os.open) if flags & os.O_CREAT else os.open
        return int(opened(path, flags, *args, **kwargs))

    def _counted(self, real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with self._lock:
                self.count += 1
                reached = self.count == self.at
            if reached:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        return call


def save_with_crash(
    root: str, at: int | None, when: str, kinds: frozenset[Operation]
) -> list[tuple[Operation, str]]:
    store = CrashStore(
        LocalStore(root), at=at, when="after" if when == "after" else "before", kinds=kinds
    )
    save(store, CRASH_STEP)
    return store.operations


def save_with_crashing_os(root: str, at: int | None) -> int:
    crashing = CrashingOs(at)
    for module in (disk, local):
        setattr(module, "os", crashing)  # noqa: B010 - mypy will not have it otherwise
    # Files one after another: side by side they would race for their directory, and every run would
    # come to another number of calls.
    attempt.FILES_AT_ONCE = 1
    disk.DIRECT_BYTES = LARGE_BYTES
    disk.__dict__["PIECE_BYTES"] = LARGE_BYTES
    save(root, CRASH_STEP)
    return crashing.count


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("base") / "run"
    save(str(root), OLD_STEP)
    save(str(root), BASE_STEP)
    assert check_run(root) == [OLD_STEP, BASE_STEP]
    return root


def copy_of(base: Path, tmp_path: Path, name: str) -> Path:
    return Path(shutil.copytree(base, tmp_path / name))


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(
    ("kinds", "expected"),
    [
        pytest.param(CHANGES, {"put", "delete"}, id="changes"),
        pytest.param(
            OPERATIONS,
            {"put", "delete", "list_children", "size"},
            id="all",
            marks=pytest.mark.soak,
        ),
    ],
)
def test_at_every_storage_operation(
    kinds: frozenset[Operation], expected: set[str], when: str, base: Path, tmp_path: Path
) -> None:
    whole = copy_of(base, tmp_path, "whole")
    (operations,) = run_ranks(1, save_with_crash, str(whole), None, when, kinds)
    assert expected <= {kind for kind, _ in operations}, "the sweep must cover them all"
    for at in range(1, len(operations) + 1):
        root = copy_of(base, tmp_path, f"{at}")
        run_ranks(1, save_with_crash, str(root), at, when, kinds, expect_killed={0})
        check_after_crash(root)
        shutil.rmtree(root)


@pytest.mark.parametrize("step", [pytest.param(1, marks=pytest.mark.soak), 2], ids=str)
def test_at_every_system_call_that_changes_the_disk(step: int, base: Path, tmp_path: Path) -> None:
    whole = copy_of(base, tmp_path, "whole")
    (count,) = run_ranks(1, save_with_crashing_os, str(whole), None)
    assert count > 20, "the calls must have been seen: a save makes about thirty"
    for at in range(1, count + 1, step):
        root = copy_of(base, tmp_path, f"{at}")
        run_ranks(1, save_with_crashing_os, str(root), at, expect_killed={0})
        check_after_crash(root)
        shutil.rmtree(root)


def save_with_victim(
    root: str, victim: int, at: int | None, kinds: frozenset[Operation]
) -> int | str:
    rank = int(os.environ["RANK"])
    store = CrashStore(LocalStore(root), at=at if rank == victim else None, kinds=kinds)
    try:
        with dist_ckpt.Checkpointer(store, state(CRASH_STEP), timeout_seconds=600) as ckpt:
            go_on(ckpt)
            ckpt.save(CRASH_STEP).wait()
    except CheckpointError as error:
        return ",".join(map(str, sorted(error.ranks)))
    return len(store.operations)


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize(
    ("kinds", "step"),
    [
        pytest.param(CHANGES, 2, id="changes"),
        pytest.param(OPERATIONS, 1, id="all", marks=pytest.mark.soak),
    ],
)
def test_one_of_two_ranks(
    kinds: frozenset[Operation], step: int, victim: int, base: Path, tmp_path: Path
) -> None:
    whole = copy_of(base, tmp_path, "whole")
    counts = run_ranks(2, save_with_victim, str(whole), victim, None, kinds)
    assert isinstance(counts[victim], int)
    # Of two that follow one another the one for the one victim, the other for the other.
    for at in range(1 + victim % step, int(counts[victim]) + 1, step):
        root = copy_of(base, tmp_path, f"{at}")
        results = run_ranks(
            2, save_with_victim, str(root), victim, at, kinds, expect_killed={victim}
        )
        if CRASH_STEP not in check_run(root):
            assert results[1 - victim] == str(victim), "the survivor names the dead rank"
        check_after_crash(root)
        shutil.rmtree(root)
