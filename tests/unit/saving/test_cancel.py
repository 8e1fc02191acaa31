"""Saves that are given up, skipped or replaced, and how far they are, in one process."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import CoordinationError, ErrorKind, StorageError
from dist_ckpt.ranks.job import Job
from dist_ckpt.repository import Repository
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.storage import Backoff, RetryStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule
from tests.unit.saving.slow_store import EndlessPut

FIRST = "step-0000000001/*/weights.*"
_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-cancel-{next(_names)}")


def state() -> dict[str, Any]:
    return {"weights": {"w": torch.ones(1000, 50)}, "moments": {"m": torch.zeros(9)}}


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    yield found
    leave()


def named(heard: list[events.Event], kind: type[events.Event]) -> list[Any]:
    return [event for event in heard if isinstance(event, kind)]


def phase_of(handle: SaveHandle) -> str:
    return handle.progress.phase


def test_a_cancel_ends_the_put_under_way(heard: list[events.Event]) -> None:
    inner = new_store()
    store = EndlessPut(inner, FIRST)
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(1)
        store.reached.wait()
        assert phase_of(handle) == "writing"
        assert handle.cancel()
        with pytest.raises(
            CoordinationError, match="save of step 1 was cancelled on rank 0"
        ) as told:
            handle.wait()
        assert (told.value.kind, list(told.value.ranks)) == (ErrorKind.CANCELLED, [0])
        assert handle.outcome == "cancelled"
        assert phase_of(handle) == "done"
        # Not told again: it was wanted.
        ckpt.save(2).wait()
    assert Repository(inner).steps() == [2]
    assert list(inner.list_entries("step-0000000001/")) == []
    assert [event.save_id for event in named(heard, events.SaveCancelled)] == [handle.save_id]
    assert named(heard, events.SaveFailed) == []


def test_a_cancel_counts_until_the_manifest_is_put() -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("put", hang, key="step-0000000001/*/index.msgpack")])
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(1)
        hang.reached.wait()  # every file is written
        assert handle.progress.phase == "committing"
        assert handle.progress.nbytes_done == handle.progress.nbytes_total > 0
        assert handle.cancel()
        hang.release()
        with pytest.raises(CoordinationError, match="cancelled"):
            handle.wait()
        assert Repository(inner).steps() == []
        ckpt.save(2).wait()
    # What was written for it is garbage now, and was collected.
    assert list(inner.list_entries("step-0000000001/")) == []


def test_a_cancel_after_the_commit_changes_nothing() -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(1)
        handle.wait()
        assert not handle.cancel()
        assert handle.outcome == "committed"
    assert Repository(store).verify(1).ok


def test_a_failure_ends_the_other_put_and_is_the_one_that_is_told() -> None:
    inner = EndlessPut(new_store(), FIRST)
    full = StorageError("disk full")
    full.__cause__ = OSError(28, "No space left on device")
    store = FaultyStore(inner, [Rule("put", Fail(full), key="*/moments.*.safetensors")])
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=3600) as ckpt:
        # The large file never ends by itself; the small one fails beside it.
        with pytest.raises(StorageError, match="disk full") as told:
            ckpt.save(1).wait()
        assert isinstance(told.value.__cause__, OSError)
        ckpt.save(2).wait()


def test_progress_is_told_and_repetitions_are_not_counted(heard: list[events.Event]) -> None:
    inner = new_store()
    flaky = FaultyStore(
        inner, [Rule("put", Fail(StorageError("lost"), after=True), key=FIRST, nth=1)]
    )
    store = RetryStore(flaky, Backoff(attempts=3), sleep=lambda seconds: None)
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(1)
        handle.wait()
    assert store.retries == 1
    told = named(heard, events.SaveProgressed)
    nbytes = sum(file.nbytes for file in Repository(inner).open(1).index.files)
    assert (told[0].phase, told[-1].phase) == ("staging", "done")
    assert {event.save_id for event in told} == {handle.save_id}
    done = [event.nbytes_done for event in told]
    assert done == sorted(done)
    assert done[-1] == told[-1].nbytes_total == handle.progress.nbytes_total == nbytes
    assert len(told) <= 20


def test_a_busy_save_is_skipped(heard: list[events.Event]) -> None:
    inner = new_store()
    store = EndlessPut(inner, FIRST)
    with dist_ckpt.Checkpointer(store, state(), when_busy="skip") as ckpt:
        first = ckpt.save(1)
        store.reached.wait()
        skipped = ckpt.save(2)
        assert (skipped.outcome, skipped.step) == ("skipped", 2)
        assert skipped.wait()
        assert first.outcome is None
        store.let_go.set()
        first.wait()
        ckpt.save(3).wait()
    assert Repository(inner).steps() == [1, 3]
    assert [event.step for event in named(heard, events.SaveSkipped)] == [2]


def test_a_failure_is_told_though_saves_were_skipped_meanwhile() -> None:
    inner = EndlessPut(new_store(), FIRST)
    store = FaultyStore(inner, [Rule("put", Fail(StorageError("lost"), after=True), key=FIRST)])
    with dist_ckpt.Checkpointer(store, state(), when_busy="skip") as ckpt:
        first = ckpt.save(1)
        inner.reached.wait()
        assert ckpt.save(2).outcome == "skipped"
        inner.let_go.set()
        first.settle()
        with pytest.raises(StorageError, match="lost"):
            ckpt.save(3)
        ckpt.save(4).wait()


def test_a_busy_save_is_replaced() -> None:
    inner = new_store()
    store = EndlessPut(inner, FIRST)
    with dist_ckpt.Checkpointer(store, state(), when_busy="replace") as ckpt:
        first = ckpt.save(1)
        store.reached.wait()
        second = ckpt.save(2)
        assert first.outcome == "cancelled"
        assert second.wait()
    assert Repository(inner).steps() == [2]


def test_what_was_committed_before_it_could_be_replaced_counts() -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state(), when_busy="replace") as ckpt:
        first = ckpt.save(1)
        first.settle()
        ckpt.save(2).wait()
    assert first.outcome == "committed"
    assert Repository(store).steps() == [1, 2]


def test_a_share_that_goes_through_a_small_arena_is_written_in_turns(
    heard: list[events.Event],
) -> None:
    store = new_store()
    large = {"weights": {f"w{n}": torch.full((400_000,), float(n)) for n in range(6)}}
    with dist_ckpt.Checkpointer(store, large, memory_limit_bytes=4 << 20) as ckpt:
        handle = ckpt.save(1)
        handle.wait()
    report = Repository(store).verify(1)
    assert report.ok
    nbytes = sum(file.nbytes for file in Repository(store).open(1).index.files)
    told = named(heard, events.SaveProgressed)
    done = [event.nbytes_done for event in told]
    assert done == sorted(done)
    assert handle.progress.nbytes_done == handle.progress.nbytes_total == nbytes
    assert next(event.nbytes_done for event in told if event.phase == "writing") > nbytes // 2
    assert len(told) <= 20


def test_a_turn_that_hangs_does_not_hold_up_the_training_for_ever(jobs: list[Job]) -> None:
    inner = new_store()
    store = EndlessPut(inner, FIRST)
    large = {"weights": {f"w{n}": torch.full((400_000,), float(n)) for n in range(6)}}
    with dist_ckpt.Checkpointer(
        store, large, memory_limit_bytes=4 << 20, timeout_seconds=0.5
    ) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(CoordinationError, match="writer of rank 0 did not finish") as told:
            handle.wait()
        assert told.value.kind is ErrorKind.TIMEOUT
        jobs[0].timeout_seconds = 60
        ckpt.save(2).wait()
    assert Repository(inner).steps() == [2]
    assert Repository(inner).verify(2).ok
