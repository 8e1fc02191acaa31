"""All ranks decide alike when to save, whatever only one of them knows."""

from __future__ import annotations

import math
import os
import signal
import threading
from collections.abc import Callable, Mapping, Sequence

import pytest

from dist_ckpt import policy
from dist_ckpt.errors import CoordinationError, UsageError
from dist_ckpt.policy import Moment, SavePolicy, Scope
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Coordinators
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.handle import Outlook
from dist_ckpt.training import trigger as trigger_module
from dist_ckpt.training.trigger import Decision, SaveTrigger, SignalNote
from tests.unit.ranks.rounds import long, members, on_every_rank

WORLD = 3
LOSS = Criterion("loss")


def nothing(criteria: Sequence[Criterion]) -> Mapping[Criterion, float]:
    return {}


def job_of(member: JobCoordinator | None = None, *, seconds: float = 60.0) -> Job:
    job = Job("memory://unit-pace", timeout_seconds=seconds)
    if member is not None:
        job.__dict__["coordinators"] = Coordinators(member, member)
    return job


def alone(when: SavePolicy, best: Mapping[Criterion, float] | None = None) -> SaveTrigger:
    return SaveTrigger(job_of(), when, best=lambda criteria: best or {})


class Clock:
    """Time that goes on only when told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(trigger_module.time, "monotonic", lambda: self.now)  # type: ignore[attr-defined]


def test_what_all_know_is_decided_without_a_word() -> None:
    job = job_of()
    pace = SaveTrigger(job, policy.every(2) | policy.every(epochs=1), best=nothing)
    assert [pace.at(step, None, {"loss": object()}).reason for step in (1, 2, 3)] == [  # type: ignore[dict-item]
        None,
        "every 2 steps",
        None,
    ]
    assert pace.at(3, 1, {}) == Decision("end of epoch 1")
    assert "coordinators" not in job.__dict__, "no rank was asked"


def test_time_counts_from_the_last_save(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = alone(policy.every(seconds=10))
    due = []
    for step in range(1, 8):
        clock.now += 4
        if pace.at(step, None, {}).reason:
            pace.saved()
            due.append(step)
        if step == 4:
            pace.saved()  # a save that was asked for
    assert due == [3, 7]


def test_better_than_what_was_saved_before_this_start() -> None:
    pace = alone(policy.better("loss"), best={LOSS: 2.0})
    values: list[float | None] = [3.0, math.nan, 1.5, None, 1.5, 1.0]
    told = [pace.at(n, None, {} if v is None else {"loss": v}) for n, v in enumerate(values)]
    assert [bool(verdict.reason) for verdict in told] == [False, False, True, False, False, True]
    assert told[2].reason == "better loss: 1.5, before 2"
    assert told[4].metrics == {"loss": 1.5}


class EachHasItsOwn:
    """Ranks as threads that take the same steps, each with metrics of its own."""

    def __init__(self, when: SavePolicy, steps: int) -> None:
        self.jobs = [job_of(each) for each in members(WORLD)]
        self.paces = [SaveTrigger(each, when, best=nothing) for each in self.jobs]
        self.steps = steps

    def run(self, metrics: Callable[[int, int], dict[str, float]]) -> list[list[Decision]]:
        def steps_of(rank: int) -> list[Decision]:
            told = []
            for step in range(1, self.steps + 1):
                told.append(self.paces[rank].at(step, None, metrics(rank, step)))
                if told[-1].reason:
                    self.paces[rank].meet(step)  # as in a save all ranks do
                    self.paces[rank].saved()
            return told

        found = on_every_rank([lambda rank=rank: steps_of(rank) for rank in range(WORLD)])  # type: ignore[misc]
        assert not [each for each in found if isinstance(each, BaseException)], found
        return found  # type: ignore[return-value]


def test_the_metrics_of_rank_0_count_for_all_ranks() -> None:
    # More steps than there are between two meetings, and ranks far from one another.
    steps = 600
    job = EachHasItsOwn(policy.better("loss") | policy.every(100), steps)

    def metrics(rank: int, step: int) -> dict[str, float]:
        if rank == 0:
            return {"loss": 1.0 / (step // 50), "other": 5.0} if step % 50 == 0 else {}
        return {"loss": float(rank + step)} if rank == 1 else {}

    first, *others = job.run(metrics)
    assert others == [first] * (WORLD - 1)
    assert [step for step, told in enumerate(first, 1) if told.reason] == [*range(50, 601, 50)]
    assert first[49].metrics == {"loss": 1.0}
    assert first[50].metrics == {}
    word = job.paces[0].decisions
    assert len(word.entries) <= trigger_module.MEET_CALLS, "nothing is kept for ever"


def test_all_ranks_save_at_the_same_step_by_the_clock_of_rank_0(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = Clock(monkeypatch)
    job = EachHasItsOwn(policy.every(seconds=10), 40)
    gate = threading.Barrier(WORLD)

    def metrics(rank: int, step: int) -> dict[str, float]:
        gate.wait()
        if rank == 0:
            clock.now += 1.0
        gate.wait()
        return {}

    first, *others = job.run(metrics)
    assert others == [first] * (WORLD - 1)
    due = [step for step, told in enumerate(first, 1) if told.reason]
    # One step late each, since the decision is told ahead.
    assert due == [11, 22, 33]


def test_a_signal_to_any_rank_saves_on_all_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trigger_module, "AHEAD_SECONDS", 0.0)  # as when steps are slow
    job = EachHasItsOwn(policy.on_signal(signal.SIGUSR1), 30)
    gate = threading.Barrier(WORLD)

    def metrics(rank: int, step: int) -> dict[str, float]:
        gate.wait()
        if step == 8 and rank in (1, 2):
            job.paces[rank].note.write("SIGUSR1")
        if step == 9 and rank == 0:  # sent at 8, and where it comes later it is heeded later
            training = job.jobs[0].training
            training.wait_for(lambda: training.look(trigger_module.SIGNAL), long())
        return {}

    first, *others = job.run(metrics)
    assert others == [first] * (WORLD - 1)
    due = [step for step, told in enumerate(first, 1) if told.reason]
    for pace in job.paces:
        assert pace.signaled == "SIGUSR1"
        pace.close()
    assert due in ([9], [10]), "at the next step that can be agreed on"


def test_fast_steps_are_decided_many_at_a_time() -> None:
    steps = 200
    job = EachHasItsOwn(policy.every(seconds=1000), steps)
    looks = []
    follower = job.jobs[1].training
    look = follower.look
    follower.look = lambda name: looks.append(name) or look(name)  # type: ignore[method-assign,func-returns-value]
    gate = threading.Barrier(WORLD)

    def metrics(rank: int, step: int) -> dict[str, float]:
        gate.wait()  # in step with one another, as training is
        return {}

    job.run(metrics)
    assert len(looks) < steps / 2


def test_what_rank_0_cannot_decide_is_everybodys_error() -> None:
    job = EachHasItsOwn(policy.better("loss"), 1)
    found = on_every_rank(
        [
            lambda pace=pace, rank=rank: pace.at(1, None, {"loss": "low" if rank == 0 else 1.0})  # type: ignore[misc]
            for rank, pace in enumerate(job.paces)
        ]
    )
    assert {type(each) for each in found} == {UsageError}
    assert {"metric 'loss' is str" in str(each) for each in found} == {True}


class Broken:
    """A policy with a mistake in it."""

    scope = Scope.AT_ONCE

    def due(self, moment: Moment) -> str | None:
        raise ZeroDivisionError("a mistake")

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return policy.never() | self | other


def test_a_policy_that_fails_is_everybodys_error_too() -> None:
    job = EachHasItsOwn(Broken(), 1)
    found = on_every_rank([lambda pace=pace: pace.at(1, None, {}) for pace in job.paces])  # type: ignore[misc]
    assert [type(each) for each in found] == [ZeroDivisionError, *[CoordinationError] * 2]
    assert all("a mistake" in str(each) for each in found)
    assert all("failed on rank 0: ZeroDivisionError" in str(each) for each in found[1:])


def test_a_rank_0_that_says_nothing_is_named() -> None:
    _, member = members(2)
    pace = SaveTrigger(job_of(member, seconds=0.05), policy.better("loss"), best=nothing)
    with pytest.raises(CoordinationError, match="rank 0 did not say within") as caught:
        pace.at(1, None, {})
    assert caught.value.ranks == {0: "said nothing"}


def test_a_handler_takes_a_note_and_calls_the_one_before() -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, frame: heard.append(number))
    try:
        ours = signal.getsignal(signal.SIGUSR1)
        note = SignalNote([signal.SIGUSR1])
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (note.take(), note.take(), heard) == ("SIGUSR1", "", [signal.SIGUSR1])
        note.close()
        assert signal.getsignal(signal.SIGUSR1) is ours
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_the_first_interrupt_asks_for_a_save_and_the_second_interrupts() -> None:
    note = SignalNote([signal.SIGINT])
    os.kill(os.getpid(), signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    assert note.take() == "SIGINT"
    note.close()


def test_signals_are_taken_on_the_main_thread_only() -> None:
    (error,) = on_every_rank([lambda: SignalNote([signal.SIGUSR1])])
    assert isinstance(error, UsageError)
    assert "main thread" in str(error)
    (pace,) = on_every_rank([lambda: SignalNote([])])
    assert isinstance(pace, SignalNote)


def ending(pace: SaveTrigger, name: str = "SIGTERM") -> Decision:
    """Return what is decided when a signal arrives before the next step."""
    pace.note.write(name)
    return pace.at(1, None, {})


@pytest.mark.parametrize(
    ("outlook", "waits", "saves", "said"),
    [
        (Outlook(), 10, True, ""),
        (Outlook(19.0), 10, True, ""),
        (Outlook(20.5), 10, False, "20.0 of 30 s of grace are left, a save takes 20.5 s"),
        (Outlook(19.0), 31, False, "0.0 of 30 s of grace are left"),
        (Outlook(), 31, False, "0.0 of 30 s of grace are left: none is begun at step 1"),
        (Outlook(25.0, 7), 10, False, "the save of step 7 is waited for instead"),
    ],
)
def test_what_cannot_be_done_in_time_is_not_begun(
    outlook: Outlook,
    waits: float,
    saves: bool,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    clock = Clock(monkeypatch)
    # Another policy wants a save at this very step: there is no time for that one either.
    when = policy.on_signal(grace_seconds=30) | policy.every(1)
    pace = SaveTrigger(job_of(), when, best=nothing, outlook=lambda: outlook)
    pace.note.write("SIGTERM")
    clock.now += waits
    decision = pace.at(1, None, {})
    assert decision.urgent
    assert (decision.reason is not None) is saves
    assert pace.out_of_time is not saves
    assert (pace.signaled, pace.exit_code) == ("SIGTERM", 143)
    assert said in caplog.text
    if saves:
        assert decision.within_seconds == 30 - waits
        assert caplog.messages == []
    # What is due later is saved: the job was not ended after all.
    assert pace.at(2, None, {}).reason == "every 1 steps"
    pace.close()


def test_the_time_runs_from_the_first_of_several(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    pace = SaveTrigger(job_of(), policy.on_signal(grace_seconds=30), best=nothing)
    pace.note.write("SIGTERM")
    clock.now += 20
    assert ending(pace).within_seconds == 10
    pace.close()


def test_the_exit_code_is_that_of_what_was_heeded() -> None:
    when = policy.on_signal(signal.SIGUSR1) | policy.on_signal(exit_code=75)
    pace = SaveTrigger(job_of(), when | policy.on_notice("/nowhere/notice"), best=nothing)
    assert pace.exit_code == 0
    for name, code in {"SIGUSR1": 138, "SIGTERM": 75, "notice": 143}.items():
        assert ending(pace, name).reason in (name, f"signal {name}")
        assert (pace.signaled, pace.exit_code) == (name, code)
    pace.close()


def test_a_signal_after_the_last_step_is_known_when_all_is_over() -> None:
    pace = SaveTrigger(job_of(), policy.on_signal(), best=nothing)
    pace.at(1, None, {})
    pace.end()
    os.kill(os.getpid(), signal.SIGTERM)
    assert pace.signaled == ""
    pace.close()
    assert (pace.signaled, pace.exit_code) == ("SIGTERM", 143)


def test_ctrl_c_at_the_end_does_not_wait_for_a_step() -> None:
    pace = SaveTrigger(job_of(), policy.on_signal(signal.SIGINT), best=nothing)
    pace.end()
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
    pace.close()


def test_what_was_best_in_a_save_that_failed_is_no_best() -> None:
    pace = alone(policy.better("loss"), best={LOSS: 5.0})
    due = []
    # The save of 2.0 is lost, as the next one, of 1.9, is told.
    for value, lost in [(3.0, False), (2.0, False), (1.9, True), (2.5, False), (1.0, False)]:
        if pace.at(1, None, {"loss": value}).reason:
            due.append(value)
            pace.saved(lost=lost)
    assert due == [3.0, 2.0, 1.9, 1.0]
    # That of 1.0 is lost, too, and one that was asked for meanwhile could not begin.
    pace.saved(lost=True, begun=False)
    assert pace.at(1, None, {"loss": 1.5}).reason == "better loss: 1.5, before 1.9"
