"""The ways to begin a training, as its flags say them."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import StepLR

import dist_ckpt
from dist_ckpt import Checkpointer, TrainState, keep, policy
from dist_ckpt.errors import IncompatibleError, NotFound, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.state.train_state import main_model
from dist_ckpt.storage.memory import MemoryStore

_names = itertools.count()


@pytest.fixture
def run() -> str:
    return f"memory://unit-starting-{next(_names)}"


class Training:
    """What a script makes anew at each start; all of it tells the step that it is of."""

    def __init__(self, fill: float = 0.0) -> None:
        self.model = nn.Linear(3, 2)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.5, momentum=0.9)
        self.scheduler = StepLR(self.optimizer, 10)
        self.count = {"step": fill}
        with torch.no_grad():
            self.model.weight.fill_(fill)
        self.optimizer.param_groups[0]["momentum"] = fill
        self.scheduler.last_epoch = int(fill)

    @property
    def state(self) -> TrainState:
        return TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            count=self.count,
        )

    @property
    def where(self) -> tuple[float, float, int, float]:
        """The step of the model, the optimizer, the scheduler and the count."""
        momentum = self.optimizer.param_groups[0]["momentum"]
        weight = self.model.weight[0, 0].item()
        return weight, momentum, self.scheduler.last_epoch, self.count["step"]


def saved(run: str, *steps: int) -> None:
    for step in steps:
        dist_ckpt.save(Training(step).state, run, step=step)


def begin(run: str, **said: Any) -> tuple[int, tuple[float, float, int, float]]:
    training = Training(0.25)
    args = {"checkpoint_dir": run, **said}
    # Saves nothing by itself, so it may look at any of them.
    with Checkpointer.from_args(args, training.state, when=policy.never()) as ckpt:
        return ckpt.restore(), training.where


FRESH = (0.25, 0.25, 0, 0.25)


def test_a_new_run_begins(run: str) -> None:
    assert begin(run) == begin(run, auto_resume=True) == (0, FRESH)


def test_a_run_is_gone_on_with(run: str) -> None:
    saved(run, 3, 7)
    whole = (7, (7.0, 7.0, 7, 7.0))
    assert begin(run, auto_resume=True) == begin(run, resume="newest") == whole
    assert begin(run, resume=3) == begin(run, resume="3") == (3, (3.0, 3.0, 3, 3.0))


def test_the_best_is_gone_on_with_where_the_newer_ones_are_given_up(run: str) -> None:
    for step, loss in ((3, 1.0), (7, 2.0)):
        training = Training(step)
        with Checkpointer(run, training.state, when=policy.never()) as ckpt:
            ckpt.restore("none" if step == 3 else "newest")
            training.count["step"] = step
            ckpt.save(step, metrics={"loss": loss})
    args = {"checkpoint_dir": run, "resume": "best", "best_metric": "loss"}
    with (
        Checkpointer.from_args(args, Training().state) as ckpt,
        pytest.raises(UsageError, match="newer than step 3"),
    ):
        ckpt.restore()
    with Checkpointer.from_args({**args, "discard_newer": True}, Training().state) as ckpt:
        assert ckpt.restore() == 3
    with (
        Checkpointer.from_args({**args, "best_metric": "f1"}, Training().state) as ckpt,
        pytest.raises(NotFound, match="f1"),
    ):
        ckpt.restore()


def test_new_hyperparameters(run: str) -> None:
    saved(run, 3)
    assert begin(run, resume="newest", reset_optimizer=True) == (3, (3.0, 0.25, 0, 3.0))


def test_a_run_goes_on_elsewhere(run: str) -> None:
    saved(f"{run}/old", 3, 7)
    new = f"{run}/new"
    assert begin(new, resume=f"{run}/old") == (7, (7.0, 7.0, 7, 7.0))
    assert begin(new, resume=f"{run}/old/step-0000000003") == (3, (3.0, 3.0, 3, 3.0))
    assert begin(new, resume=f"{run}/old/", reset_optimizer=True) == (7, (7.0, 0.25, 0, 7.0))
    saved(new, 1)
    with pytest.raises(UsageError, match="has checkpoints up to step 1"):
        begin(new, resume=f"{run}/old")


def test_weights_alone_begin_a_run_and_a_restart_goes_on(run: str) -> None:
    saved(f"{run}/old", 7)
    new = f"{run}/new"
    weights = (0, (7.0, 0.25, 0, 0.25))
    assert begin(new, pretrained_checkpoint=f"{run}/old") == weights
    # The line of a job that may be restarted at any time: the weights are for the first start.
    said: dict[str, Any] = {"pretrained_checkpoint": f"{run}/old", "auto_resume": True}
    assert begin(new, **said) == weights
    saved(new, 2)
    assert begin(new, **said) == (2, (2.0, 2.0, 2, 2.0))
    with pytest.raises(UsageError, match="has checkpoints up to step 2"):
        begin(new, pretrained_checkpoint=f"{run}/old")
    # What else is there, or is not, does not matter.
    dist_ckpt.save({"model": Training(5).model, "ema": nn.Linear(9, 9)}, f"{run}/other")
    assert begin(f"{run}/third", pretrained_checkpoint=f"{run}/other") == (0, (5.0, *FRESH[1:]))


@pytest.mark.parametrize(
    ("steps", "said", "error", "message"),
    [
        ((), {"resume": "newest"}, NotFound, "--auto-resume to begin"),
        ((), {"resume": 5}, NotFound, "no committed checkpoint"),
        ((5,), {"resume": 6}, NotFound, "nearest are 5"),
        ((5,), {}, UsageError, "up to step 5: give --auto-resume or --resume"),
        ((), {"resume": "memory://nowhere-at-all"}, NotFound, "nowhere-at-all"),
        ((), {"pretrained_checkpoint": "memory://nowhere-at-all"}, NotFound, "nowhere-at-all"),
    ],
)
def test_what_cannot_begin_says_why(
    run: str, steps: tuple[int, ...], said: dict[str, Any], error: type[Exception], message: str
) -> None:
    saved(run, *steps)
    with pytest.raises(error, match=message):
        begin(run, **said)


def test_weights_that_do_not_fit_change_nothing(run: str) -> None:
    dist_ckpt.save({"model": nn.Linear(4, 2)}, f"{run}/other")
    training = Training(0.25)
    args = {"checkpoint_dir": run, "pretrained_checkpoint": f"{run}/other"}
    with Checkpointer.from_args(args, training.state) as ckpt, pytest.raises(IncompatibleError):
        ckpt.restore()
    assert training.where == FRESH


def test_what_flags_and_script_say_adds_up(run: str) -> None:
    args = {"checkpoint_dir": run, "checkpoint_interval": 4, "keep_last": 1, "no_async": True}
    more = {"when": policy.at(5), "keep": keep.every(4)}
    with Checkpointer.from_args(args, {"n": 1}, **more) as ckpt:  # type: ignore[arg-type]
        assert ckpt.restore() == 0
        for step in range(1, 10):
            handle = ckpt.step(step)
            assert handle is None or handle.done(), "--no-async waits"
    assert Repository(MemoryStore(run.removeprefix("memory://"))).steps() == [4, 8, 9]


def test_weights_are_for_one_model() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    assert main_model(TrainState(net=one, n=1)) == "net"
    assert main_model(TrainState(model=one, ema=two)) == "model"
    with pytest.raises(UsageError, match="student, teacher"):
        main_model(TrainState(student=one, teacher=two))
    with pytest.raises(UsageError, match="none"):
        main_model(TrainState(n=1))


def test_nothing_is_left_behind(run: str) -> None:
    before = threading.active_count()
    saved(f"{run}/old", 3)
    starts: list[Callable[[], object]] = [
        lambda: begin(run, resume=f"{run}/old"),
        lambda: begin(run, pretrained_checkpoint=f"{run}/old"),
    ]
    for start in starts:
        start()
    alive = [each for each in threading.enumerate() if each.name != "dist_ckpt-origin"]
    assert len(alive) <= before
