"""Random lives of a run against an in-memory model of what must exist.

Saves with and without metrics, changing policies, crashes at any change of the store, restarts,
deletions by hand (also in the middle of retention), pins, damage, and jobs that were replaced.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_ckpt.errors import FencedError, NotFound
from dist_ckpt.format.names import manifest_key
from dist_ckpt.repository import Repository, keep
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Mode
from dist_ckpt.storage.base import Store
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import commit, keys, new_store

SEQUENCES, SOAK_SEQUENCES = 300, 5000
FOREIGN = ("notes.txt", "step-0000000004/README", "step-7/manifest.json")


class Crash(BaseException):
    """The end of the process, as far as the store is concerned."""


@dataclass(frozen=True)
class Rules:
    """A policy in numbers; 0 leaves a member out."""

    latest: int
    best: int
    mode: Mode
    every: int

    def policy(self) -> KeepPolicy:
        policy: KeepPolicy = keep.latest(self.latest or 1)
        if not self.latest:
            policy = keep.best("other", 1)  # a metric that no checkpoint has keeps nothing
        if self.best:
            policy = keep.either(policy, keep.best("loss", self.best, mode=self.mode))
        if self.every:
            policy = keep.either(policy, keep.every(self.every))
        return policy

    def wants(self, step: int, good: dict[int, float]) -> bool:
        """Whether `step` is to be kept, said differently than the package says it."""
        newer = sum(other > step for other in good)
        sign = 1 if self.mode == "min" else -1
        better = sum(
            (sign * loss, other) < (sign * good[step], step)
            for other, loss in good.items()
            if not math.isnan(loss)
        )
        multiple = math.ceil(step / self.every) * self.every if self.every else 0
        return (
            newer == 0
            or newer < self.latest
            or (not math.isnan(good[step]) and better < self.best)
            or (self.every > 0 and not any(step < other <= multiple for other in good))
        )


@dataclass
class Life:
    """A run, the job that owns it, and what the model knows of them."""

    store: Store = field(default_factory=new_store)
    rules: Rules = Rules(1, 0, "min", 0)
    losses: dict[int, float] = field(default_factory=dict)
    pinned: set[int] = field(default_factory=set)
    damaged: set[int] = field(default_factory=set)
    origin: int | None = None
    claim: int = 0
    step: int = 0

    def __post_init__(self) -> None:
        for key in FOREIGN:
            self.store.put(key, [b"mine"])
        self.restart()

    @property
    def run(self) -> Repository:
        """The run as a process sees it that knows nothing but what is stored."""
        return Repository(self.store)

    def going(self) -> set[int]:
        """What retention may delete now, and must."""
        good = {step: loss for step, loss in self.losses.items() if step not in self.damaged}
        stay = self.pinned | {self.origin}
        return {step for step in good if step not in stay and not self.rules.wants(step, good)}

    def forget(self, steps: set[int]) -> None:
        for step in steps:
            del self.losses[step]
        self.pinned -= steps
        self.damaged -= steps

    def restart(self) -> None:
        self.claim = self.run.claim()
        good = self.losses.keys() - self.damaged
        self.origin = max(good, default=None)

    def save(self, gap: int, loss: float | None, store: Store | None = None) -> None:
        """Save and retain, as rank 0 does it; `store` is where things may go wrong."""
        self.step += gap
        repository = Repository(store or self.store)
        metrics = {} if loss is None else {"loss": loss}
        commit(repository.begin(self.step, self.claim), metrics=metrics)
        self.losses[self.step] = math.nan if loss is None else loss
        # Not the step itself: the newest stays even then.
        origin = set() if self.origin is None else {self.origin}
        gone = repository.retain(
            self.rules.policy(),
            claim=self.claim,
            protected=origin,
            damaged=self.damaged,
        )
        expected = self.going()
        assert set(gone) == expected
        self.forget(expected)

    def crash(self, gap: int, loss: float | None, operation: str, nth: int) -> None:
        """Save until the process ends at a change of the store, then start again."""
        rule = Rule(operation, Fail(Crash(), after=nth % 2 == 0), nth=1 + nth // 2)  # type: ignore[arg-type]
        before = dict(self.losses)
        number = math.nan if loss is None else loss
        try:
            self.save(gap, loss, FaultyStore(self.store, [rule]))
        except Crash:
            self.losses = {**before, self.step: number}
            must = self.losses.keys() - self.going() - {self.step}
            found = set(self.run.steps())
            # A crash loses nothing that was to stay, and lists nothing that was not saved.
            assert must <= found <= self.losses.keys()
            self.forget(self.losses.keys() - found)
        self.restart()

    def delete_by_hand(self, pick: int) -> None:
        if self.losses:
            step = sorted(self.losses)[pick % len(self.losses)]
            self.store.delete([manifest_key(step)])
            self.forget({step})

    def save_while_one_is_deleted(self, gap: int, loss: float | None, pick: int) -> None:
        """Delete a checkpoint between the listing and the reading of the manifests."""
        victim = sorted(self.losses)[pick % len(self.losses)] if self.losses else None
        outer = self

        class Meanwhile(FaultyStore):
            def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
                nonlocal victim
                if victim is not None and key.endswith("manifest.json"):
                    self.inner.delete([manifest_key(victim)])
                    outer.forget({victim})
                    gone, victim = victim, None
                    if key == manifest_key(gone):
                        raise NotFound("deleted by hand")
                return super().read_into(key, offset, *buffers)

        self.save(gap, loss, Meanwhile(self.store, []))

    def pin(self, pick: int) -> None:
        if self.losses:
            step = sorted(self.losses)[pick % len(self.losses)]
            change = self.run.unpin if step in self.pinned else self.run.pin
            change(step)
            self.pinned ^= {step}

    def damage(self, pick: int) -> None:
        """Let a restore of this job find a checkpoint damaged."""
        if self.losses:
            self.damaged.add(sorted(self.losses)[pick % len(self.losses)])

    def be_replaced(self) -> None:
        """Another job takes over: this one can neither commit nor delete, then is gone."""
        old = self.claim
        attempt = self.run.begin(self.step + 1, old)
        self.restart()
        with pytest.raises(FencedError):
            commit(attempt)
        before = keys(self.store)
        # Where nothing would be deleted, nothing is asked either.
        with suppress(FencedError):
            assert self.run.retain(keep.best("other"), claim=old, damaged=self.damaged) == {}
        assert keys(self.store) == before

    def check(self) -> None:
        assert self.run.steps() == sorted(self.losses)
        assert self.run.pinned() == sorted(self.pinned)

    def check_whole(self) -> None:
        self.run.collect(claim=self.claim, in_flight=())
        assert self.run.steps() == sorted(self.losses)
        assert all(self.run.verify(step).ok for step in self.losses)
        assert set(FOREIGN) <= set(keys(self.store))
        left = {key.split("/")[0] for key in keys(self.store)} - {"notes.txt", "claims", "step-7"}
        # Nothing is left of what was deleted, the foreign file in step 4 excepted.
        assert left <= {f"step-{step:010d}" for step in [*self.losses, 4]}


GAPS = st.integers(1, 3)
LOSS = st.sampled_from([None, math.nan, 0.0, 1.0, 2.0])
PICK = st.integers(0, 9)
RULES = st.builds(
    Rules,
    st.integers(0, 2),
    st.integers(0, 2),
    st.sampled_from(["min", "max"]),
    st.sampled_from([0, 4]),
)
Operation = Callable[[Life], None]
OPERATIONS: st.SearchStrategy[Operation] = st.one_of(
    st.builds(lambda gap, loss: lambda life: life.save(gap, loss), GAPS, LOSS),
    st.builds(lambda gap, loss: lambda life: life.save(gap, loss), GAPS, LOSS),
    st.builds(lambda rules: lambda life: setattr(life, "rules", rules), RULES),
    st.builds(
        lambda gap, loss, what, nth: lambda life: life.crash(gap, loss, what, nth),
        *(GAPS, LOSS, st.sampled_from(["put", "delete"]), st.integers(0, 9)),
    ),
    st.just(Life.restart),
    st.builds(lambda pick: lambda life: life.delete_by_hand(pick), PICK),
    st.builds(
        lambda gap, loss, pick: lambda life: life.save_while_one_is_deleted(gap, loss, pick),
        *(GAPS, LOSS, PICK),
    ),
    st.builds(lambda pick: lambda life: life.pin(pick), PICK),
    st.builds(lambda pick: lambda life: life.damage(pick), PICK),
    st.just(Life.be_replaced),
)


LIVES = {"rules": RULES, "operations": st.lists(OPERATIONS, min_size=3, max_size=14)}


@settings(max_examples=SEQUENCES, deadline=None)
@given(**LIVES)
def test_what_exists_is_what_must(rules: Rules, operations: list[Operation]) -> None:
    check(rules, operations)


@pytest.mark.soak
@settings(max_examples=SOAK_SEQUENCES, deadline=None)
@given(**LIVES)
def test_what_exists_is_what_must_many_times(rules: Rules, operations: list[Operation]) -> None:
    check(rules, operations)


def check(rules: Rules, operations: list[Operation]) -> None:
    life = Life(rules=rules)
    for operation in operations:
        operation(life)
        life.check()
    life.check_whole()
