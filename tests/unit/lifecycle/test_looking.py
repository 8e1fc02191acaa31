"""Looking takes nothing over; loading nothing is an error."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import Checkpointer, EarlyStopping, keep, policy
from dist_ckpt.errors import (
    FencedError,
    IncompatibleError,
    NotFound,
    UsageError,
)
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.lifecycle.training import (
    LOSS,
    claims,
    keys,
    new_store,
    run_of,
    state,
    steps,
    warnings,
)


@pytest.fixture
def store() -> MemoryStore:
    return new_store()


# ---------------------------------------------------------------- looking is not taking over


def looks() -> dict[str, Callable[[MemoryStore], int]]:
    model = {**state(), "model": nn.Linear(1, 1)}
    return {
        "restore best": lambda s: Checkpointer(s, model, keep=keep.best(LOSS)).restore("best"),
        "restore a step": lambda s: Checkpointer(s, model).restore(step=1),
        "restore elsewhere": lambda s: Checkpointer(new_store(), model).restore(url=s, step=1),
        "load": lambda s: dist_ckpt.load(model, s, step="best", metric=LOSS).step,
        "load by the stopper": lambda s: (
            dist_ckpt.load(
                {**model, "stop": EarlyStopping(LOSS, patience=1)}, s, step="best", skip="stop"
            ).step
        ),
        "load_weights": lambda s: (
            dist_ckpt.load_weights(nn.Linear(1, 1), s, step="best", metric=LOSS).step
        ),
        "open": lambda s: dist_ckpt.open_checkpoint(s, step="best", metric=LOSS).step,
    }


@pytest.mark.parametrize("look", list(looks()))
def test_looking_takes_nothing_over(store: MemoryStore, look: str) -> None:
    parts = {**state(), "model": nn.Linear(1, 1)}
    with Checkpointer(store, parts, every_steps=1) as training:
        training.step(1, metrics={LOSS: 1.0})
        training.step(2, metrics={LOSS: 2.0})
        training.wait()
        before = keys(store)
        assert looks()[look](store) == 1
        assert keys(store) == before
        training.step(3)
    assert steps(store) == [1, 2, 3]


def test_a_copy_of_the_training_that_would_look_at_the_best_is_refused_and_harms_nobody(
    store: MemoryStore,
) -> None:
    with Checkpointer(store, state(), when=policy.better(LOSS), every_steps=1) as training:
        training.step(1, metrics={LOSS: 1.0})
        training.step(2, metrics={LOSS: 2.0})
        training.wait()
        with (
            Checkpointer(store, state(), when=policy.better(LOSS), every_steps=1) as copy,
            pytest.raises(UsageError, match=r"only to look, dist_ckpt\.load"),
        ):
            copy.restore("best")
        training.step(3)
    assert steps(store) == [1, 2, 3]


def test_a_restart_takes_over_at_once(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1) as old:
        old.step(1)
        old.wait()
        with Checkpointer(store, state(), every_steps=1) as new:
            assert new.restore() == 1
            with pytest.raises(FencedError):
                old.save(2).wait()
            new.step(2)
    assert steps(store) == [1, 2]


def test_who_looked_and_then_saves_is_asked_what_it_means(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    with Checkpointer(store, state()) as ckpt:
        assert ckpt.restore(step=1) == 1
        with pytest.raises(UsageError, match=r"newer than step 1 \(2\)"):
            ckpt.save(3)
        assert len(claims(store)) == 2
        assert ckpt.restore(step=2) == 2
        ckpt.save(3).wait()
    assert steps(store) == [1, 2, 3]


def test_what_was_committed_since_it_looked_is_not_left_behind(store: MemoryStore) -> None:
    run_of(store, 1)
    with Checkpointer(store, state()) as ckpt:
        assert ckpt.restore(step=1) == 1
        run_of(store, 2)  # another job, meanwhile
        with pytest.raises(UsageError, match=r"newer than step 1 \(2\)"):
            ckpt.save(3)


@pytest.mark.parametrize(
    ("how", "error", "message"),
    [
        ({"step": "best"}, UsageError, "Give metric="),
        ({"step": "last"}, UsageError, "a number or 'best'"),
        ({"metric": LOSS}, UsageError, "step='best'"),
        ({"mode": "max"}, UsageError, "step='best'"),
        ({"step": "best", "metric": "val/los"}, NotFound, "did you mean 'val/loss'"),
        ({"step": "best", "metric": LOSS, "mode": "most"}, UsageError, "mode is"),
    ],
)
def test_which_is_best_is_to_be_said(
    store: MemoryStore, how: dict[str, Any], error: type[Exception], message: str
) -> None:
    run_of(store, 1, **{LOSS: 1.0})
    with pytest.raises(error, match=message):
        dist_ckpt.load(state(), store, **how)
    with pytest.raises(error, match=message):
        dist_ckpt.open_checkpoint(store, **how)


def test_the_highest_can_be_the_best(store: MemoryStore) -> None:
    for step, value in ((1, 0.5), (2, 0.9), (3, 0.7)):
        run_of(store, step, acc=value)
    report = dist_ckpt.load(state(), store, step="best", metric="acc", mode="max")
    assert report.step == 2
    empty = new_store()
    with pytest.raises(NotFound, match="is no run"):
        dist_ckpt.load(state(), empty, step="best", metric="acc")


# ---------------------------------------------------------------- nothing in common


def named(prefix: str) -> dict[str, Any]:
    return {"model": {f"{prefix}{name}": torch.ones(2) for name in ("a", "b")}}


class Wrapped(nn.Module):
    def __init__(self, name: str) -> None:
        super().__init__()
        self.add_module(name, nn.Linear(2, 2))


def test_what_has_no_name_in_common_is_not_loaded_silently(store: MemoryStore) -> None:
    saved = Wrapped("encoder")
    dist_ckpt.save({"model": saved}, store)
    live = Wrapped("backbone")
    message = "have not one name in common"
    with pytest.raises(IncompatibleError, match=message) as caught:
        dist_ckpt.load({"model": live}, store, strict=False)
    for name in ("model/encoder.weight", "model/backbone.weight", "rename="):
        assert name in str(caught.value)
    with pytest.raises(IncompatibleError, match=message):
        dist_ckpt.load_weights(live, store, strict=False)
    with pytest.raises(IncompatibleError, match=message):
        dist_ckpt.load({"net": saved}, store, strict=False)
    with (
        Checkpointer(store, {"model": live}) as ckpt,
        pytest.raises(IncompatibleError, match=message),
    ):
        ckpt.restore(strict=False)
    report = dist_ckpt.load(
        {"model": live}, store, strict=False, rename={"model/encoder": "model/backbone"}
    )
    assert report.tensors == 2


def test_a_part_that_nothing_goes_into_is_named(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    dist_ckpt.save({"model": Wrapped("a"), "ema": Wrapped("b"), "count": {"n": 1}}, store)
    live = {"model": Wrapped("a"), "ema": Wrapped("c"), "count": {"n": 0}}
    dist_ckpt.load(live, store, strict=False)
    (said,) = warnings(caplog)
    assert "goes into ema of the state" in said
    assert live["count"] == {"n": 1}


def test_values_alone_are_something(store: MemoryStore) -> None:
    dist_ckpt.save({"count": {"n": 1}}, store)
    live = {"count": {"n": 0}, "more": {"m": 1}}
    dist_ckpt.load(live, store, strict=False)
    assert live == {"count": {"n": 1}, "more": {"m": 1}}
