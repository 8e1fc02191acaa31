"""What one rank alone refuses before any word with the others: all are told at once, and go on."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import dist_ckpt
from dist_ckpt import events, policy
from dist_ckpt.errors import CheckpointError, CoordinationError, NotFound, UsageError
from dist_ckpt.testing.ranks import run_ranks

WORLD = 3
# No test waits for it: a rank that is not told is stopped long before.
DEADLINE_SECONDS = 3600.0
PATIENCE_SECONDS = 120.0

State = dict[str, Any]


class Moody:
    """Stateful; raises what it is given when it is asked for its state, or gets it back."""

    def __init__(self, saving: BaseException | None = None) -> None:
        self.saving = saving
        self.loading: BaseException | None = None

    def state_dict(self) -> dict[str, int]:
        if self.saving is not None:
            raise self.saving
        return {"n": 1}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if self.loading is not None:
            raise self.loading


def whole() -> State:
    torch.manual_seed(0)
    return {"model": nn.Linear(2, 2)}


def of_another_model() -> State:
    return {"model": nn.Linear(2, 2), "opt": torch.optim.AdamW(nn.Linear(3, 3).parameters())}


def told(call: Callable[[], object], *, failing: int, own: type[BaseException], says: str) -> None:
    """Check that `call` raises on this rank, its own class on the failing one."""
    fails = dist.get_rank() == failing
    with pytest.raises(own if fails else CheckpointError) as caught:
        call()
    error = caught.value
    if not fails and not issubclass(own, CheckpointError):
        assert isinstance(error, CoordinationError)
    if isinstance(error, CheckpointError):
        assert list(error.ranks) == [failing], error
    assert says in f"{type(error).__name__}: {error}", error
    dist.barrier()  # nobody makes the next call before all were told of this one


# By what is refused: the arguments of the save on that rank, and what is said.
SAVES: dict[str, tuple[Callable[[], State], dict[str, Any], str]] = {
    "parameters": (of_another_model, {}, "in no part of the state"),
    "name": (lambda: {"a b": 1}, {}, "bad part name 'a b'"),
    "state": (lambda: {1: 2}, {}, "names are strings"),  # type: ignore[dict-item]
    "metrics": (whole, {"metrics": 3}, "metrics are a dict"),
    "metadata": (whole, {"metadata": {"a": object()}}, "metadata['a']"),
    "option": (whole, {"stagin": "blocking"}, "unknown option 'stagin'"),
    "place": (whole, {"url": "nowhere://x"}, "unknown scheme 'nowhere'"),
    "deadline": (whole, {"timeout_seconds": -1}, "timeout_seconds must be"),
}


def refuse_saves(root: str, failing: int, *, node_local: bool) -> None:
    step = 0
    for make, wrong, says in SAVES.values():
        step += 1
        fails = dist.get_rank() == failing
        keywords: dict[str, Any] = {
            "url": root,
            "step": step,
            "timeout_seconds": DEADLINE_SECONDS,
            "node_local": node_local,
            **(wrong if fails else {}),
        }
        state = make() if fails else whole()
        told(
            partial(dist_ckpt.save, state, **keywords),
            failing=failing,
            own=UsageError,
            says=says,
        )
    dist_ckpt.save(whole(), root, step=step, node_local=node_local)
    assert dist_ckpt.load(whole(), root, node_local=node_local).step == step


@pytest.mark.parametrize(("failing", "node_local"), [(0, False), (1, False), (2, True)])
def test_a_save_that_one_rank_refuses_ends_on_all(
    tmp_path: Path, failing: int, node_local: bool
) -> None:
    work = refuse_in_folders if node_local else refuse_in_one
    run_ranks(WORLD, work, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def refuse_in_one(root: str, failing: int) -> None:
    refuse_saves(root, failing, node_local=False)


def refuse_in_folders(root: str, failing: int) -> None:
    refuse_saves(root, failing, node_local=True)


def refuse_loads(root: str, failing: int) -> None:
    dist_ckpt.save(whole(), root, step=1)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"url": "nowhere://x"}, "unknown scheme 'nowhere'"),
        ({"timeout_seconds": 0}, "timeout_seconds must be"),
        ({"state": of_another_model()}, "in no part of the state"),
    ]
    for wrong, says in wrongs:
        keywords: dict[str, Any] = {"state": whole(), "url": root}
        keywords["timeout_seconds"] = DEADLINE_SECONDS
        keywords |= wrong if dist.get_rank() == failing else {}
        told(
            partial(dist_ckpt.load, **keywords),
            failing=failing,
            own=UsageError,
            says=says,
        )
    assert dist_ckpt.load(whole(), root).step == 1


@pytest.mark.parametrize("failing", [0, 1])
def test_a_load_that_one_rank_refuses_ends_on_all(tmp_path: Path, failing: int) -> None:
    run_ranks(WORLD, refuse_loads, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def refuse_state(root: str, failing: int) -> None:
    fails = dist.get_rank() == failing
    stopper = dist_ckpt.EarlyStopping("loss", patience=3)
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"state": of_another_model() | {"stopper": stopper}}, "in no part of the state"),
        ({"url": "nowhere://x"}, "unknown scheme 'nowhere'"),
        ({"metadata": {"a": object()}}, "metadata['a']"),
    ]
    for wrong, says in wrongs:
        keywords: dict[str, Any] = {"url": root, "state": whole() | {"stopper": stopper}}
        keywords |= wrong if fails else {}
        ckpt = dist_ckpt.Checkpointer(**keywords, every_steps=1, timeout_seconds=DEADLINE_SECONDS)
        calls: list[Callable[[], object]] = [
            ckpt.restore,
            partial(ckpt.restore, "none"),
            ckpt.rollback,
            partial(ckpt.step, 1, metrics={"loss": 1.0}),
            partial(ckpt.save, 2),
        ]
        for call in calls:
            told(call, failing=failing, own=UsageError, says=says)
        ckpt.close()
    with dist_ckpt.Checkpointer(root, whole(), every_steps=1) as ckpt:
        ckpt.step(3)


@pytest.mark.parametrize("failing", [0, 1])
def test_what_the_constructor_refuses_on_one_rank_the_first_call_tells_all(
    tmp_path: Path, failing: int
) -> None:
    run_ranks(WORLD, refuse_state, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def refuse_calls(root: str, failing: int) -> None:
    with dist_ckpt.Checkpointer(root, whole(), every_steps=1) as ckpt:
        ckpt.step(1)
        ckpt.step(2)
    fails = dist.get_rank() == failing
    # The others begin by another round than the one that the failing rank would come to.
    rights: list[dict[str, Any]] = [
        {},
        {"step": 2},
        {"which": "none", "discard_newer": True},
        {"url": f"{root}/other"},
    ]
    wrongs: list[tuple[dict[str, Any], str]] = [
        ({"which": "bset"}, "'bset'"),
        ({"step": "2"}, "step= is a number"),
        ({"url": "nowhere://x"}, "unknown scheme 'nowhere'"),
        ({"which": "none", "strict": False}, "strict say nothing"),
    ]
    for right in rights:
        for wrong, says in wrongs:
            with dist_ckpt.Checkpointer(
                root, whole(), when=dist_ckpt.policy.never(), timeout_seconds=DEADLINE_SECONDS
            ) as ckpt:
                told(
                    partial(ckpt.restore, **(wrong if fails else right)),
                    failing=failing,
                    own=UsageError,
                    says=says,
                )
    with dist_ckpt.Checkpointer(
        root, whole(), every_steps=1, timeout_seconds=DEADLINE_SECONDS
    ) as ckpt:
        assert ckpt.restore() == 2
        wrongs = [({"metadata": {"a": object()}}, "metadata['a']"), ({"metrics": 3}, "metrics are")]
        for wrong, says in wrongs:
            told(
                partial(ckpt.save, 3, **(wrong if fails else {})),
                failing=failing,
                own=UsageError,
                says=says,
            )
        # What is done takes no round, and so nobody is waited for.
        assert ckpt.save(2, **(wrongs[0][0] if fails else {})).outcome == "committed"
        ckpt.save(3).wait()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_call_that_one_rank_refuses_ends_on_all(tmp_path: Path, failing: int) -> None:
    run_ranks(WORLD, refuse_calls, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def interrupt(root: str, failing: int) -> None:
    fails = dist.get_rank() == failing
    moody = Moody()
    ckpt = dist_ckpt.Checkpointer(
        root, {**whole(), "moody": moody}, every_steps=1, timeout_seconds=DEADLINE_SECONDS
    )
    ckpt.step(1)
    for error in (KeyboardInterrupt(), SystemExit(3), MemoryError("today")):
        moody.saving = error if fails else None
        told(lambda: ckpt.save(2), failing=failing, own=type(error), says=type(error).__name__)
    moody.saving = None
    ckpt.save(2).wait()
    for error in (KeyboardInterrupt(), SystemExit(3), MemoryError("today")):
        moody.loading = error if fails else None
        told(ckpt.restore, failing=failing, own=type(error), says=type(error).__name__)
    moody.loading = None
    assert ckpt.restore() == 2
    with pytest.raises(NotFound):
        dist_ckpt.load(whole(), root, step=9)
    ckpt.save(3).wait()
    ckpt.close()


@pytest.mark.parametrize("failing", [0, 1])
def test_an_interrupt_of_one_rank_is_told_to_all(tmp_path: Path, failing: int) -> None:
    """It may be caught there, as a notebook does: the other ranks do not wait until it is gone."""
    run_ranks(WORLD, interrupt, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def stop_by_listener(root: str, failing: int) -> None:
    fails = dist.get_rank() == failing
    with dist_ckpt.Checkpointer(
        root, whole(), every_steps=1, timeout_seconds=DEADLINE_SECONDS
    ) as ckpt:
        for step, kind in enumerate((events.SaveStaged, events.SaveProgressed), start=1):

            def stops(event: events.Event, kind: type[events.Event] = kind) -> None:
                if isinstance(event, kind):
                    raise SystemExit(4)

            leave = events.subscribe(stops) if fails else lambda: None
            told(
                lambda step=step: ckpt.save(step).wait(),  # type: ignore[misc]
                failing=failing,
                own=SystemExit,
                says="SystemExit: 4",
            )
            leave()
        ckpt.save(3).wait()


@pytest.mark.parametrize("failing", [0, 1])
def test_a_listener_that_ends_the_program_on_one_rank_ends_the_save_on_all(
    tmp_path: Path, failing: int
) -> None:
    run_ranks(WORLD, stop_by_listener, str(tmp_path), failing, timeout_seconds=PATIENCE_SECONDS)


def decide_on_some(root: str, other: int) -> None:
    differs = dist.get_rank() == other
    every = policy.every(2)
    stopper = dist_ckpt.EarlyStopping("loss", patience=2)
    kinds: list[tuple[policy.SavePolicy, State, str]] = [
        (every | policy.on_signal(), {}, "policy.on_signal"),
        (every | policy.every(seconds=3600), {}, "policy.every"),
        (every, {"stopper": stopper}, "policy.better"),
    ]
    for when, more, name in kinds:
        ckpt = dist_ckpt.Checkpointer(
            root,
            whole() | (more if differs else {}),
            when=when if differs else every,
            timeout_seconds=DEADLINE_SECONDS,
        )
        # Who waits for a word that never comes is told at its first step, all others by its end.
        with pytest.raises(CheckpointError) as caught, ckpt:
            for step in range(1, 4):
                ckpt.step(step, metrics={"loss": 1.0})
        if differs or other == 0:
            assert isinstance(caught.value, UsageError)
            # As a program says it, in both messages.
            assert f" {name}" in str(caught.value)
        assert other in caught.value.ranks
        dist.barrier()


@pytest.mark.parametrize("other", [0, 1])
def test_a_policy_that_only_some_ranks_have_is_named(tmp_path: Path, other: int) -> None:
    run_ranks(WORLD, decide_on_some, str(tmp_path), other, timeout_seconds=PATIENCE_SECONDS)
