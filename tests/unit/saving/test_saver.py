"""The life of a save in one process: failures told once, interrupts, hung writers, late commits."""

from __future__ import annotations

import atexit
import gc
import itertools
import os
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events, keep
from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, StorageError, UsageError
from dist_ckpt.ranks import job as job_module
from dist_ckpt.ranks.job import Job, JobRanks
from dist_ckpt.repository import Record, Repository
from dist_ckpt.saving.handle import SaveHandle, take_untold
from dist_ckpt.saving.saver import close_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule
from dist_ckpt.threads import WriterThread

SHARDS = "*/weights.*.safetensors"
_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-saving-{next(_names)}")


def state(fill: float = 1.0) -> dict[str, Any]:
    return {"weights": {"w": torch.full((1000, 50), fill)}}


def writers() -> set[threading.Thread]:
    return {each for each in threading.enumerate() if each.name == "dist_ckpt-writer"}


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    yield found
    leave()


def kinds(heard: Sequence[events.Event]) -> list[str]:
    return [type(event).__name__ for event in heard]


def test_the_story_of_a_save(heard: list[events.Event]) -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(3)
        assert handle.wait()
        # By then all is told: who waits may count on it.
        told = [event for event in heard if not isinstance(event, events.SaveProgressed)]
        # A file may be durable while others are still being staged.
        assert sorted(kinds(told)[:-1]) == ["FileWritten", "FileWritten", "SaveStaged"]
        assert kinds(told)[-1] == "SaveCommitted"
    committed = told[-1]
    assert isinstance(committed, events.SaveCommitted)
    stored = Repository(store).open(3)
    assert committed.save_id == handle.save_id == stored.manifest.save_id
    assert committed.nbytes == sum(file.nbytes for file in stored.index.files)


def test_a_failure_is_one_event_and_told_once(heard: list[events.Event]) -> None:
    store = FaultyStore(new_store(), [Rule("put", Fail(StorageError("broken")), key=SHARDS)])
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(StorageError, match="broken"):
            handle.wait()
        ckpt.wait()
        ckpt.save(2).wait()
    assert kinds(heard).count("SaveFailed") == 1
    assert Repository(store).steps() == [2]


def test_an_interrupt_while_waiting_leaves_the_save_in_flight_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("put", hang, key=SHARDS)])
    settle = SaveHandle.settle
    calls: list[str] = []

    def interrupted(self: SaveHandle, timeout: float | None = None) -> bool:
        calls.append("settle")
        if len(calls) == 1:
            raise KeyboardInterrupt
        hang.release()
        return settle(self, timeout)

    live = state(1.0)
    ckpt = dist_ckpt.Checkpointer(store, live, timeout_seconds=600)
    ckpt.save(1)
    hang.reached.wait()  # held before its bytes leave the arena
    monkeypatch.setattr(SaveHandle, "settle", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ckpt.save(2)
    # The emergency save of one who was interrupted must wait for the arena all the same.
    live["weights"]["w"].fill_(2.0)
    ckpt.save(3)
    ckpt.close()
    assert Repository(inner).steps() == [1, 3]
    for step in (1, 3):
        assert Repository(inner).verify(step).ok


@pytest.mark.parametrize("moment", ["before", "after"])
def test_a_save_that_is_interrupted_as_it_is_handed_on_goes_on(
    monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    submit = WriterThread.submit
    calls: list[str] = []

    def interrupted(self: WriterThread, job: Callable[[], None]) -> None:
        calls.append("submit")
        if len(calls) > 1 or moment == "after":
            submit(self, job)
        if len(calls) == 1:
            raise KeyboardInterrupt

    store = new_store()
    with dist_ckpt.Checkpointer(store, state(1.0)) as ckpt:
        monkeypatch.setattr(WriterThread, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.save(1)
        monkeypatch.undo()
        ckpt.save(2)
    assert Repository(store).steps() == [1, 2]


def test_a_save_without_a_thread_to_write_it_fails_and_the_next_one_does_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refused(self: WriterThread, job: Callable[[], None]) -> None:
        raise RuntimeError("can't start new thread")

    store = new_store()
    with dist_ckpt.Checkpointer(store, state(1.0)) as ckpt:
        monkeypatch.setattr(WriterThread, "submit", refused)
        with pytest.raises(RuntimeError, match="new thread"):
            ckpt.save(1)
        monkeypatch.undo()
        ckpt.save(2)
    assert Repository(store).steps() == [2]


def test_a_close_that_is_interrupted_leaves_the_save_to_the_end_of_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hang = Hang()
    inner = new_store()
    ckpt = dist_ckpt.Checkpointer(FaultyStore(inner, [Rule("put", hang, key=SHARDS)]), state())
    ckpt.save(1)

    def interrupted(self: SaveHandle, timeout: float | None = None) -> bool:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(SaveHandle, "settle", interrupted)
        with pytest.raises(KeyboardInterrupt):
            ckpt.close()
    hang.release()
    close_all()
    assert Repository(inner).steps() == [1]


def test_a_hung_writer_is_given_up_and_the_next_save_has_its_own_thread_and_arena(
    heard: list[events.Event],
    jobs: list[Job],
) -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("put", hang, key="step-0000000001/*")])
    before = writers()
    live = state(1.0)
    with dist_ckpt.Checkpointer(store, live, timeout_seconds=0.5) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(CoordinationError, match="writer of rank 0 did not finish") as caught:
            handle.wait()
        assert (caught.value.kind, list(caught.value.ranks)) == (ErrorKind.TIMEOUT, [0])
        (hung,) = writers() - before
        live["weights"]["w"].fill_(2.0)
        jobs[0].timeout_seconds = 60
        ckpt.save(2).wait()
        assert len(writers() - before) == 2
        hang.release()
        hung.join()
    assert Repository(inner).steps() == [2]
    assert Repository(inner).verify(2).ok
    assert kinds(heard).count("SaveFailed") == 1
    assert kinds(heard).count("SaveCommitted") == 1


def test_nothing_is_committed_once_the_deadline_has_passed() -> None:
    hang = Hang()
    inner = new_store()
    store = FaultyStore(inner, [Rule("put", hang, key="*/index.msgpack")])
    before = writers()
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=0.5) as ckpt:
        handle = ckpt.save(1)
        with pytest.raises(CoordinationError):
            handle.wait()
        (hung,) = writers() - before
        hang.release()
        hung.join()
    # Everybody was told that it failed: it must not come into being afterwards.
    assert Repository(inner).steps() == []


class Picky:
    """A policy with a mistake in it."""

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        raise ZeroDivisionError("a mistake")


def test_a_policy_that_fails_costs_neither_the_commit_nor_the_next_save(
    heard: list[events.Event],
) -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state(), keep=Picky(), timeout_seconds=600) as ckpt:
        ckpt.save(1).wait()
        ckpt.save(2).wait()
    assert Repository(store).steps() == [1, 2]
    failures = [event for event in heard if isinstance(event, events.RetentionFailed)]
    assert [event.step for event in failures] == [1, 2]
    assert "ZeroDivisionError: a mistake" in str(failures[0].error)


def test_retention_of_a_job_that_was_replaced_deletes_nothing(heard: list[events.Event]) -> None:
    inner = new_store()
    with dist_ckpt.Checkpointer(inner, state()) as ckpt:
        ckpt.save(1).wait()
        ckpt.save(2).wait()
    repository = Repository(inner)

    class Replaced(FaultyStore):
        def put(self, key: str, *args: Any, **kwargs: Any) -> None:
            super().put(key, *args, **kwargs)
            if key == "step-0000000003/manifest.json":
                repository.claim()

    with dist_ckpt.Checkpointer(Replaced(inner, []), state(), keep=keep.latest(1)) as ckpt:
        assert ckpt.restore() == 2
        ckpt.save(3).wait()
    assert repository.steps() == [1, 2, 3], "the new owner may be restoring one of them"
    assert "RetentionFailed" in kinds(heard)


class Panic(BaseException):
    """What an extension written in another language may raise."""


def test_whatever_a_backend_raises_ends_the_save_and_not_the_writer() -> None:
    inner = new_store()
    store = FaultyStore(inner, [Rule("put", Fail(Panic("no unwinding")), key=SHARDS)])
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=600) as ckpt:
        with pytest.raises(StorageError, match="Panic: no unwinding"):
            ckpt.save(1).wait()
        ckpt.save(2).wait()
    assert Repository(inner).steps() == [2]


def test_a_rank_that_cannot_reach_the_others_waits_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[float] = []

    def unreachable(group: object, *, timeout_seconds: float) -> Any:
        calls.append(timeout_seconds)
        raise CoordinationError("rank 0 cannot be reached")

    # As one of several has it.
    monkeypatch.setattr(JobRanks, "group", lambda ranks: ranks)
    monkeypatch.setattr(JobRanks, "world_size", lambda ranks: 2)
    monkeypatch.setattr(job_module, "join_job", unreachable)
    ckpt = dist_ckpt.Checkpointer(new_store(), state(), timeout_seconds=7)
    with pytest.raises(CoordinationError, match="cannot be reached"):
        ckpt.save(1)
    assert calls == [7]
    ckpt.close()


@pytest.mark.parametrize(
    "metrics",
    [{"loss": "low"}, {"loss": torch.ones(2)}, {"loss": 10**400}, {"loss": None}, {1: 2.0}],
    ids=["text", "two elements", "too large", "None", "no name"],
)
def test_what_is_no_metric_is_refused_at_the_call(metrics: Any) -> None:
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt, pytest.raises(UsageError, match="metric"):
        ckpt.save(1, metrics=metrics)
    assert list(store.list_entries("step-0000000001/")) == []


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), 1e300, "60", None])
def test_what_is_no_timeout_is_refused(seconds: Any) -> None:
    with pytest.raises(UsageError, match="timeout_seconds"):
        dist_ckpt.Checkpointer(new_store(), state(), timeout_seconds=seconds)


def test_metrics_are_taken_at_the_call() -> None:
    store = new_store()
    loss = torch.tensor(0.5)
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1, metrics={"loss": float(loss), "bad": float("nan")})
        loss.fill_(9)
    found = Repository(store).open(1).manifest.metrics
    assert found["loss"] == 0.5
    assert found["bad"] != found["bad"]


def test_a_handle_that_is_kept_keeps_no_model_alive() -> None:
    before = writers()
    model = torch.nn.Linear(3, 3)
    alive = weakref.ref(model)
    handle = dist_ckpt.async_save({"model": model}, new_store())
    assert handle.wait()
    for thread in writers() - before:
        thread.join()
    del model
    gc.collect()
    assert alive() is None
    assert handle.wait()


def test_a_checkpointer_that_is_dropped_unclosed_leaves_no_thread_behind() -> None:
    before = writers()
    ckpt = dist_ckpt.Checkpointer(new_store(), state())
    ckpt.save(1)
    ckpt.wait()
    (thread,) = writers() - before
    del ckpt
    gc.collect()
    thread.join()


def fork_while_saving() -> int:
    hang = Hang()
    store = FaultyStore(new_store(), [Rule("put", hang, key=SHARDS)])
    ckpt = dist_ckpt.Checkpointer(store, state(), timeout_seconds=3600)
    ckpt.save(1)
    hang.reached.wait()
    child = os.fork()
    if child == 0:
        # The save is the parent's: the end of this process may not wait for it.
        atexit._run_exitfuncs()
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    hang.release()
    ckpt.close()
    return code


def test_a_forked_process_ends_without_waiting_for_its_parents_save() -> None:
    assert run_ranks(1, fork_while_saving) == [0]


def use_in_a_child() -> list[str]:
    hang = Hang()
    store = FaultyStore(new_store(), [Rule("put", hang, key=SHARDS)])
    ckpt = dist_ckpt.Checkpointer(store, state(), timeout_seconds=3600)
    handle = ckpt.save(1)
    hang.reached.wait()
    read, write = os.pipe()
    if os.fork() == 0:
        for use in (handle.wait, handle.cancel, lambda: ckpt.save(2), ckpt.restore):
            try:
                use()
            except UsageError as error:
                os.write(write, f"{error}\n".encode())
        ckpt.close()  # and that of another's is nothing to wait for
        os._exit(0)
    os.close(write)
    os.wait()
    with os.fdopen(read) as said:
        lines = said.read().splitlines()
    hang.release()
    ckpt.close()
    assert handle.outcome == "committed"
    return lines


def test_what_belongs_to_another_process_is_refused_in_its_child() -> None:
    (lines,) = run_ranks(1, use_in_a_child)
    assert ["is in flight in process" in line for line in lines] == [True, True, False, False]
    assert ["belongs to process" in line for line in lines] == [False, False, True, True]


def test_two_checkpointers_of_two_runs_do_not_disturb_each_other() -> None:
    places = [new_store(), new_store()]
    hang = Hang()
    first = dist_ckpt.Checkpointer(
        FaultyStore(places[0], [Rule("put", hang, key=SHARDS)]), state(1.0)
    )
    second = dist_ckpt.Checkpointer(places[1], state(2.0))
    held = first.save(1)
    second.save(1).wait()
    second.close()
    assert not held.done()
    hang.release()
    first.close()
    for place in places:
        assert Repository(place).verify(1).ok


def test_a_save_that_tells_of_the_one_before_is_made_all_the_same() -> None:
    broken = Rule("put", Fail(StorageError("broken")), key="step-0000000001/*.safetensors")
    inner = new_store()
    ckpt = dist_ckpt.Checkpointer(FaultyStore(inner, [broken]), state(), every_steps=1)
    ckpt.save(1)
    with pytest.raises(StorageError, match="broken") as told:
        ckpt.save(2)
    assert told.value.__notes__ == ["step 2 is being saved all the same"]
    assert ckpt.step(2) is None, "it was saved: the step need not be saved again"
    ckpt.wait()
    ckpt.close()
    assert Repository(inner).steps() == [2]
    assert take_untold() == []


def test_a_save_that_cannot_begin_tells_of_the_one_before_as_well() -> None:
    broken = Rule("put", Fail(StorageError("broken")), key="step-0000000001/*.safetensors")
    live = state()
    with dist_ckpt.Checkpointer(FaultyStore(new_store(), [broken]), live) as ckpt:
        ckpt.save(1)
        with pytest.raises(UsageError, match="bad step") as told:
            ckpt.save(-1)
        assert told.value.__notes__ == ["besides, the save before failed: broken"]
        ckpt.save(2).wait()


def test_a_failure_that_nobody_was_told_of_is_raised_by_restore() -> None:
    store = FaultyStore(
        new_store(), [Rule("put", Fail(StorageError("broken")), key="step-0000000002/*")]
    )
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1)
        ckpt.save(2)
        with pytest.raises(CheckpointError, match="broken"):
            ckpt.restore()
        assert ckpt.restore() == 1
