"""Retention and garbage beside the saves that follow: nothing is held up, nothing taken away."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events, keep
from dist_ckpt.errors import StorageError
from dist_ckpt.format.names import step_dir
from dist_ckpt.ranks.job import Job
from dist_ckpt.repository import Repository, Transaction
from dist_ckpt.saving.attempt import Housekeeping
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule

_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-tidy-{next(_names)}")


def state() -> dict[str, Any]:
    return {"weights": {"w": torch.ones(1000)}}


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    yield found
    leave()


def test_a_retention_that_hangs_holds_up_no_save() -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("delete", hang, key="step-0000000001/manifest.json")])
    # Who waited for the retention would wait for an hour.
    with dist_ckpt.Checkpointer(store, state(), keep=keep.latest(1), timeout_seconds=3600) as ckpt:
        for step in (1, 2, 3, 4):
            ckpt.save(step).wait()
            if step == 2:
                hang.reached.wait()
        assert Repository(inner).steps() == [1, 2, 3, 4]
        hang.release()
        ckpt.wait()
        assert Repository(inner).steps() == [4], "who waits for all of it finds it done"


def test_close_waits_for_a_retention_and_not_for_ever(jobs: list[Job]) -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("delete", hang, key="step-0000000001/manifest.json")])
    ckpt = dist_ckpt.Checkpointer(store, state(), keep=keep.latest(1), timeout_seconds=600)
    ckpt.save(1).wait()
    ckpt.save(2).wait()
    hang.reached.wait()
    jobs[0].timeout_seconds = 0.05
    ckpt.close()
    hang.release()
    assert Repository(inner).verify(2).ok


def test_what_is_being_written_is_no_garbage() -> None:
    hang = Hang()
    inner = new_store()
    root = FaultyStore(inner, [Rule("list_children", hang, key="step-*", nth=1)])
    job = Job(root, timeout_seconds=600)
    housekeeping = Housekeeping(job, None)
    dead = Transaction(inner, 1, housekeeping.begin(1))
    dead.put_file("model.r00000.safetensors", [b"dead"])
    Transaction(inner, 2, housekeeping.begin(2))  # so that the first is over
    housekeeping.tidy(2)
    hang.reached.wait()
    # Begun and written while the garbage is being looked for.
    living = Transaction(inner, 1, housekeeping.begin(1))
    key = living.put_file("model.r00000.safetensors", [b"alive"])
    hang.release()
    assert housekeeping.thread.wait_idle(60)
    assert [entry.key for entry in inner.list_entries("step-0000000001/")] == [key]
    assert read_all(inner, key) == b"alive"
    housekeeping.thread.stop()


def test_what_other_ranks_write_is_no_garbage_though_no_lock_tells_so(tmp_path: Path) -> None:
    """On many mounts a host sees only its own locks: what is in flight has to be known."""
    store = LocalStore(tmp_path)
    job = Job(store, timeout_seconds=600)
    housekeeping = Housekeeping(job, None)
    dead = housekeeping.begin(1)
    living = housekeeping.begin(2)
    unfinished = {}
    for step, save_id in ((1, dead), (2, living)):
        folder = tmp_path / step_dir(step) / save_id
        folder.mkdir(parents=True)
        unfinished[save_id] = folder / ".tmp-0123456789abcdef"
        unfinished[save_id].write_bytes(b"of a rank on another host")
    housekeeping.run(2)
    assert not unfinished[dead].exists()
    assert unfinished[living].exists()
    housekeeping.thread.stop()


def test_what_could_not_be_tidied_up_is_tried_again(
    heard: list[events.Event], tmp_path: Path
) -> None:
    inner = LocalStore(tmp_path)
    away = Rule("list_children", Fail(StorageError("away")), key="step-0000000001/")
    store = FaultyStore(inner, [away])
    left = Transaction(inner, 1, Job(inner, timeout_seconds=600).begin(1))
    left.put_file("model.r00000.safetensors", [b"of a dead job"])
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=600) as ckpt:
        ckpt.save(2)
        ckpt.wait()
        assert store.fired == [1]
        assert len(list(inner.list_entries("step-0000000001/"))) == 1
        ckpt.save(3)
    told = [event for event in heard if isinstance(event, events.RetentionFailed)]
    assert [(event.step, str(event.error)) for event in told] == [(2, "away")]
    assert list(inner.list_entries("step-0000000001/")) == []
