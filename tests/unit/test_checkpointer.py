"""When the Checkpointer saves, what it keeps and rolls back to, and what the manifests then say."""

from __future__ import annotations

import itertools
import json
import logging
import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import Checkpointer, EarlyStopping, TrainState, events, keep, policy
from dist_ckpt.errors import CheckpointError, FencedError, NotFound, UsageError
from dist_ckpt.format.names import manifest_key
from dist_ckpt.repository import Repository
from dist_ckpt.scalars import Scalars
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.memory import MemoryStore

LOSS = "val/loss"
_names = itertools.count()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(f"unit-checkpointer-{next(_names)}")


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    yield found
    leave()


class Training:
    """A model whose weights tell the step, and all that can be beside it."""

    def __init__(self, *, patience: int = 2) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
        self.stopper = EarlyStopping(LOSS, patience=patience)
        self.at(0)

    def at(self, step: int) -> None:
        with torch.no_grad():
            self.model.weight.fill_(step)
        self.optimizer.param_groups[0]["lr"] = step

    @property
    def where(self) -> tuple[float, float]:
        """The step of the model and that of the optimizer."""
        return self.model.weight[0, 0].item(), self.optimizer.param_groups[0]["lr"]

    def state(self, **more: Any) -> TrainState:
        return TrainState(model=self.model, optimizer=self.optimizer, **more)


def steps(store: MemoryStore) -> list[int]:
    return Repository(store).steps()


def manifest(store: MemoryStore, step: int) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(read_all(store, manifest_key(step)))
    return found


def test_policies_add_up_and_no_step_is_saved_twice(store: MemoryStore) -> None:
    when = policy.at(3) | policy.every(epochs=2) | policy.last(9)
    with Checkpointer(store, {"n": 1}, every_steps=4, when=when) as ckpt:
        for step in range(1, 10):
            if step == 6:
                ckpt.save(6)
            handle = ckpt.step(step)
            assert (handle is not None) is (step in (3, 4, 8, 9))
            if step % 3 == 0:
                ckpt.epoch_end(step // 3)
    assert steps(store) == [3, 4, 6, 8, 9]
    assert [manifest(store, step)["origin"]["reason"] for step in steps(store)] == [
        "at given steps",
        "every 4 steps",
        "asked for",
        "every 4 steps",
        "last step",
    ]
    # Step 6 was saved before its epoch ended; that became known right after.
    assert [each.epoch for each in Repository(store).records()] == [1, None, 2, None, 3]


def test_where_no_steps_are_told_the_epoch_is_the_step(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}, when=policy.every(epochs=1)) as ckpt:
        for epoch in range(ckpt.restore() + 1, 3):
            ckpt.epoch_end(epoch)
    with Checkpointer(store, {"n": 1}, when=policy.every(epochs=1)) as ckpt:
        assert ckpt.restore() == 2
        ckpt.epoch_end(3)
    assert [(each.step, each.epoch) for each in Repository(store).records()] == [
        (1, 1),
        (2, 2),
        (3, 3),
    ]


def test_the_best_is_saved_kept_and_rolled_back_to(store: MemoryStore) -> None:
    training = Training()
    losses = [5.0, 3.0, math.nan, 3.0, 4.0, 9.0]
    state = training.state(stopper=training.stopper)
    with Checkpointer(store, state, keep=keep.latest(1), when=policy.every(2)) as ckpt:
        for step, loss in enumerate(losses, 1):
            training.at(step)
            ckpt.step(step, metrics={LOSS: torch.tensor(loss)})
            if training.stopper.should_stop:
                break
        training.at(99)
        assert ckpt.rollback() == 2
        # The model alone: the optimizer goes on, and early stopping knows that it stopped.
        assert training.where == (2.0, 99.0)
        assert training.stopper.should_stop
        assert ckpt.restore("best") == 2
        assert training.where == (2.0, 2.0)
        assert (training.stopper.best_score, training.stopper.looks) == (3.0, 0)
    assert steps(store) == [2, 4]


def test_a_restart_knows_the_best_and_keeps_it(store: MemoryStore) -> None:
    for part in ([4.0, 2.0], [3.0, 2.5]):
        training = Training(patience=9)
        state = training.state(stopper=training.stopper)
        with Checkpointer(store, state, keep=keep.latest(1)) as ckpt:
            start = ckpt.restore()
            for step, loss in enumerate(part, start + 1):
                training.at(step)
                ckpt.step(step, metrics={LOSS: loss})
            ckpt.save(start + 102)
            assert (training.stopper.best_score, training.stopper.best_step) == (2.0, 2)
    # 3.0 and 2.5 are not better than 2.0 was, so they were not even saved.
    assert steps(store) == [2, 102, 204]
    assert Repository(store).records()[0].metrics == {LOSS: 2.0}


def test_what_is_damaged_is_no_best_to_be_beaten(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}, when=policy.better(LOSS)) as ckpt:
        for step, loss in enumerate([3.0, 1.0], 1):
            ckpt.step(step, metrics={LOSS: loss})
    save_id = manifest(store, 2)["save_id"]
    store.put(f"step-0000000002/{save_id}/extra.r00000.safetensors", [b""], mode="replace")
    with Checkpointer(store, {"n": 1}, when=policy.better(LOSS), keep=keep.latest(1)) as ckpt:
        assert ckpt.restore() == 1
        ckpt.step(3, metrics={LOSS: 2.0})
        ckpt.wait()
        assert ckpt.restore("best") == 3
    # The damaged one is left for people to look at; 1 was the one resumed from.
    assert steps(store) == [1, 2, 3]


def test_a_restore_repeats_what_early_stopping_saw_right_after_the_save(
    store: MemoryStore,
) -> None:
    training = Training()
    state = training.state(stopper=training.stopper)
    with Checkpointer(store, state, every_steps=1) as ckpt:
        for step, loss in enumerate([1.0, 2.0], 1):
            ckpt.step(step)
            ckpt.epoch_end(step, metrics={LOSS: loss})
    again = Training()
    with Checkpointer(store, again.state(stopper=again.stopper)) as ckpt:
        assert ckpt.restore() == 2
        assert again.stopper.state_dict() == training.stopper.state_dict()
        assert again.stopper.looks == 1


def test_without_a_metric_there_is_no_best(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}) as ckpt:
        ckpt.save(1, metrics={"train/loss": 2.0})
        for call in (ckpt.rollback, lambda: ckpt.restore("best")):
            with pytest.raises(UsageError, match="by which metric"):
                call()
        with pytest.raises(UsageError, match="'newest' or 'best'"):
            ckpt.restore("last")  # type: ignore[arg-type]
    message = r"metric 'loss'; there is 'train/loss'"
    other = Checkpointer(store, {"n": 1}, keep=keep.best("loss"))
    with other, pytest.raises(NotFound, match=message):
        other.restore("best")


def test_without_a_module_there_is_nothing_to_roll_back(store: MemoryStore) -> None:
    state = TrainState(weights=nn.Linear(1, 1).state_dict(), n=1)
    with Checkpointer(store, state, keep=keep.best(LOSS)) as ckpt:
        ckpt.save(1, metrics={LOSS: 2.0})
        state["n"] = 2
        with pytest.raises(UsageError, match=r"no part is one \(weights, n, rng\)"):
            ckpt.rollback()
        assert state["n"] == 2


def test_a_metric_that_is_never_a_number_makes_no_best(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}) as ckpt:
        ckpt.save(1, metrics={LOSS: math.nan})
    with pytest.raises(NotFound, match=f"the metric '{LOSS}' is not a number in any"):
        dist_ckpt.load({"n": 0}, store, step="best", metric=LOSS)


def test_a_metric_that_is_missing_is_told_once(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, {"n": 1}, keep=keep.best("val/los"), when=policy.every(epochs=1)) as c:
        for epoch in range(1, 4):
            c.epoch_end(epoch, metrics={LOSS: 1.0})
    told = [each.getMessage() for each in caplog.records if each.levelno == logging.WARNING]
    assert len(told) == 1
    assert "no metric 'val/los' (it has: 'val/loss')" in told[0]


@pytest.mark.parametrize("value", ["low", None, torch.zeros(2), object()])
def test_a_metric_that_is_no_number_is_named(store: MemoryStore, value: object) -> None:
    with Checkpointer(store, {"n": 1}, when=policy.better(LOSS), every_steps=1) as ckpt:
        with pytest.raises(UsageError, match=LOSS):
            ckpt.step(1, metrics={LOSS: value})  # type: ignore[dict-item]
        with pytest.raises(UsageError, match="other"):
            ckpt.step(2, metrics={"other": value})  # type: ignore[dict-item]
    assert steps(store) == []


def test_a_bad_metric_after_the_save_costs_only_the_note(
    store: MemoryStore, heard: list[events.Event]
) -> None:
    with Checkpointer(store, {"n": 1}, every_steps=1) as ckpt:
        ckpt.step(1)
        ckpt.epoch_end(1, metrics={LOSS: "low"})  # type: ignore[dict-item]
        ckpt.step(2)
    (failed,) = [event for event in heard if isinstance(event, events.RetentionFailed)]
    assert LOSS in str(failed.error)
    assert steps(store) == [1, 2]


def test_the_newer_of_two_owns_the_run(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}) as older, Checkpointer(store, {"n": 2}) as newer:
        older.save(1).wait()
        assert newer.restore() == 1
        with pytest.raises(
            FencedError, match=r"claim 1 .* superseded by claim 2.*this very process"
        ):
            older.save(2).wait()
        newer.save(2).wait()
        with pytest.raises(FencedError):
            older.save(3).wait()
    assert steps(store) == [1, 2]
    assert manifest(store, 2)["claim"] == 2


def test_what_a_manifest_says(store: MemoryStore) -> None:
    said = {"config": {"lr": 0.1, "layers": [1, 2]}, "phase": "finetuning", "notes": "a try"}
    for _ in range(2):
        with Checkpointer(store, {"n": 1}, metadata=said, when=policy.every(epochs=1)) as ckpt:
            step = ckpt.restore() + 1
            ckpt.step(step)
            ckpt.epoch_end(step, metrics={LOSS: math.nan})
    first, second = manifest(store, 1), manifest(store, 2)
    assert second["metadata"] == said
    assert second["metrics"] == {LOSS: "nan"}
    assert (second["epoch"], second["parent_step"]) == (2, 1)
    assert set(second["versions"]) >= {"dist_ckpt", "torch", "python"}
    origin = second["origin"]
    assert origin["reason"] == "end of epoch 2"
    assert origin["hosts"]
    assert origin["command"]
    # One run: its start is that of the first, and its age goes on.
    assert origin["started"] == first["origin"]["started"]
    assert origin["elapsed_seconds"] >= first["origin"]["elapsed_seconds"]


def test_one_save_has_metadata_of_its_own(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    with Checkpointer(store, {"n": 1}, metadata={"phase": "a", "notes": "all"}) as ckpt:
        ckpt.save(1, metadata={"notes": "this one"}).wait()
        ckpt.save(2).wait()
        with pytest.raises(UsageError, match="metadata"):
            ckpt.save(3, metadata={"notes": object()})
        assert not caplog.records
        ckpt.save(2, metadata={"late": 1})
        assert "step 2 of" in caplog.text
        assert "late" in caplog.text
    assert manifest(store, 1)["metadata"] == {"phase": "a", "notes": "this one"}
    assert manifest(store, 2)["metadata"] == {"phase": "a", "notes": "all"}
    dist_ckpt.save({"n": 1}, store, step=7, metadata={"source": "somewhere"})
    assert manifest(store, 7)["metadata"] == {"source": "somewhere"}


def test_a_checkpoint_deleted_by_hand_is_no_error(
    store: MemoryStore, heard: list[events.Event]
) -> None:
    with Checkpointer(store, {"n": 1}, keep=keep.latest(2)) as ckpt:
        for step in range(1, 4):
            ckpt.save(step)
        ckpt.wait()
        store.delete([manifest_key(2)])
        ckpt.save(4).wait()
    assert steps(store) == [3, 4]
    assert not [event for event in heard if isinstance(event, events.RetentionFailed)]
    assert [e.step for e in heard if isinstance(e, events.CheckpointDeleted)] == [1]


def test_pinned_and_resumed_from_stay(store: MemoryStore) -> None:
    with Checkpointer(store, {"n": 1}, keep=keep.latest(1)) as ckpt:
        ckpt.save(1).wait()
        Repository(store).pin(1)
        ckpt.save(2)
    with Checkpointer(store, {"n": 1}, keep=keep.latest(1)) as ckpt:
        assert ckpt.restore() == 2
        ckpt.save(3)
        ckpt.save(4)
    assert steps(store) == [1, 2, 4]


def test_costs_as_scalars(store: MemoryStore) -> None:
    class Writer:
        def __init__(self) -> None:
            self.curves: dict[str, list[tuple[int, float]]] = {}

        def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> None:
            self.curves.setdefault(tag, []).append((global_step, scalar_value))

    writer = Writer()
    leave = dist_ckpt.events.subscribe(Scalars(writer))
    try:
        with Checkpointer(store, {"n": 1}, every_steps=1) as ckpt:
            ckpt.step(1)
            ckpt.step(2)
            ckpt.restore()
    finally:
        leave()
    assert [step for step, _ in writer.curves["checkpoint/stall_seconds"]] == [1, 2]
    assert all(value > 0 for _, value in writer.curves["checkpoint/saved_bytes"])
    assert all(value > 0 for _, value in writer.curves["checkpoint/save_seconds"])
    assert [step for step, _ in writer.curves["checkpoint/restore_seconds"]] == [2]


@pytest.mark.parametrize("epoch", [-1, True, 1.0, "1"])
def test_what_is_no_epoch(store: MemoryStore, epoch: object) -> None:
    with Checkpointer(store, {"n": 1}) as ckpt, pytest.raises(UsageError, match="an epoch is"):
        ckpt.epoch_end(epoch)  # type: ignore[arg-type]


def test_closed_is_closed(store: MemoryStore) -> None:
    ckpt = Checkpointer(store, Training().state(), every_steps=1)
    ckpt.close()
    for call in (lambda: ckpt.step(1), lambda: ckpt.epoch_end(1), ckpt.rollback, ckpt.restore):
        with pytest.raises(CheckpointError, match="closed"):
            call()
