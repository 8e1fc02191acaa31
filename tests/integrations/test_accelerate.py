"""A training that Accelerate prepared, saved and resumed with all that it would save itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration, DistributedType
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, TensorDataset

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.integrations.accelerate import state_of

# torchdata calls what torch 2.13 no longer has.
pytestmark = pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning")

SAMPLES, BATCH, ACCUMULATED = 24, 4, 3


class Training:
    """Two models and two optimizers, batches of a shuffled loader that are accumulated."""

    def __init__(self, *, stateful: bool = True) -> None:
        torch.manual_seed(1)
        loading = DataLoaderConfiguration(
            use_stateful_dataloader=stateful, use_seedable_sampler=True
        )
        self.accelerator = Accelerator(
            cpu=True, gradient_accumulation_steps=ACCUMULATED, dataloader_config=loading
        )
        nets = [torch.nn.Linear(4, 4), torch.nn.Linear(4, 1)]
        steppers = [torch.optim.AdamW(net.parameters(), lr=0.1) for net in nets]
        data = TensorDataset(torch.arange(SAMPLES * 4.0).reshape(SAMPLES, 4))
        loader: Any = DataLoader(data, BATCH, shuffle=True)
        schedule = StepLR(steppers[0], 2)
        self.body, self.head, self.first, self.second, self.loader, self.schedule = (
            self.accelerator.prepare(*nets, *steppers, loader, schedule)
        )
        self.counts = dist_ckpt.Progress()
        self.accelerator.register_for_checkpointing(self.counts)

    def batches(self) -> list[float]:
        """Train to the end of the epoch; return what each batch gave."""
        given = []
        for (batch,) in self.loader:
            given.append(self.take(batch))
        return given

    def take(self, batch: torch.Tensor) -> float:
        with self.accelerator.accumulate(self.body, self.head):
            loss = self.head(self.body(batch)).square().mean()
            self.accelerator.backward(loss)
            for each in (self.first, self.second, self.schedule):
                each.step()
            self.first.zero_grad()
            self.second.zero_grad()
        self.counts.add(steps=1, samples=len(batch))
        return float(loss.detach())


def test_a_resumed_training_gives_the_same(tmp_path: Path) -> None:
    one = Training()
    state = state_of(one.accelerator, notes={"a": 1})
    assert set(state) == {
        *("model", "model_1", "optimizer", "optimizer_1", "scheduler", "custom", "accelerate"),
        *("dataloader", "notes", "rng"),
    }
    given = []
    for number, (batch,) in enumerate(one.loader):
        given.append(one.take(batch))
        if number == ACCUMULATED - 1:
            dist_ckpt.save(state, tmp_path / "run", step=ACCUMULATED)
    other = Training()
    dist_ckpt.load(state_of(other.accelerator, notes={}), tmp_path / "run")
    assert other.counts == dist_ckpt.Progress(step=ACCUMULATED, samples=ACCUMULATED * BATCH)
    assert other.accelerator.step == ACCUMULATED
    assert other.batches() == given[ACCUMULATED:]
    assert other.schedule.get_last_lr() == one.schedule.get_last_lr()


def begun(save: Callable[[Accelerator], object]) -> list[float]:
    """Train an epoch and call `save` within; return what the batches after that gave."""
    one = Training()
    given = []
    for number, (batch,) in enumerate(one.loader):
        given.append(one.take(batch))
        if number == ACCUMULATED - 1:
            save(one.accelerator)
    return given[ACCUMULATED:]


def test_a_position_that_was_restored_is_saved_again_before_any_batch(tmp_path: Path) -> None:
    rest = begun(lambda at: dist_ckpt.save(state_of(at), tmp_path / "run", step=ACCUMULATED))
    other = Training()
    dist_ckpt.load(state_of(other.accelerator), tmp_path / "run")
    dist_ckpt.save(state_of(other.accelerator), tmp_path / "again", step=ACCUMULATED)
    third = Training()
    dist_ckpt.load(state_of(third.accelerator), tmp_path / "again")
    assert third.batches() == other.batches() == rest


def test_what_accelerate_saved_itself_is_loaded_by_it_once(tmp_path: Path) -> None:
    rest = begun(lambda at: at.save_state(str(tmp_path / "theirs")))
    other = Training()
    with pytest.raises(IncompatibleError, match="missing in the checkpoint: accelerate"):
        dist_ckpt.load(state_of(other.accelerator), tmp_path / "theirs")
    with dist_ckpt.Checkpointer(tmp_path / "run", state_of(other.accelerator)) as ckpt:
        assert ckpt.restore() == 0
        other.accelerator.load_state(str(tmp_path / "theirs"))
        assert other.batches() == rest
        ckpt.save(SAMPLES // BATCH)
    assert dist_ckpt.Run(str(tmp_path / "run")).steps() == [SAMPLES // BATCH]


def test_loaders_without_a_position_are_said(caplog: pytest.LogCaptureFixture) -> None:
    made = Training(stateful=False)
    assert "dataloader" not in state_of(made.accelerator)
    assert "none of the 1 dataloaders" in caplog.text
    caplog.clear()
    state_of(made.accelerator, dataloaders=False)
    assert caplog.text == ""


def test_a_scaler_is_a_part_while_it_scales() -> None:
    made = Training()
    for enabled in (False, True):
        made.accelerator.scaler = torch.amp.GradScaler("cpu", enabled=enabled)
        assert ("scaler" in state_of(made.accelerator)) is enabled


@pytest.mark.parametrize("part", ["model", "optimizer"])
def test_a_part_may_be_given_in_the_place_of_one(part: str) -> None:
    made = Training()
    another: Callable[[], Any] = {"model": lambda: made.body, "optimizer": lambda: made.first}[part]
    given = another()
    assert state_of(made.accelerator, **{part: given}, rng=None)[part] is given


def test_what_another_framework_holds_is_refused() -> None:
    class Elsewhere(Accelerator):
        distributed_type = DistributedType.DEEPSPEED

    with pytest.raises(UsageError, match="DDP or FSDP2"):
        state_of(Elsewhere(cpu=True))
