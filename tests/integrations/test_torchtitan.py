"""The manager for torchtitan, with the containers, wrappers and configs of torchtitan itself."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils.data import IterableDataset

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import IncompatibleError, IntegrityError, NotFound, UsageError
from dist_ckpt.testing.ranks import run_ranks

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("ignore")]

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("torchtitan")
    from torchtitan.components.checkpointer import CheckpointManager
    from torchtitan.components.dataloader import ParallelAwareDataloader
    from torchtitan.components.optimizer import LRSchedulersContainer, default_adamw

    from dist_ckpt.integrations.torchtitan import DistCkptManager

WIDTH = 6
SECONDS = 300.0


class Chunk(nn.Module):
    """Some layers of a model of four, under the names that they have in the whole of it."""

    def __init__(self, layers: range | tuple[int, ...] = range(4)) -> None:
        super().__init__()
        self.layers = nn.ModuleDict()
        for number in layers:
            torch.manual_seed(number)
            self.layers[str(number)] = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        for layer in self.layers.values():
            inputs = layer(inputs).tanh()
        return inputs


class Numbers(IterableDataset[torch.Tensor]):
    """An endless stream that can be gone on with."""

    def __init__(self) -> None:
        self.next = 0

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.next += 1
            yield torch.full((WIDTH,), self.next / 100)

    def state_dict(self) -> dict[str, int]:
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class Forgetful(IterableDataset[torch.Tensor]):
    """The same, from its beginning each time."""

    def __iter__(self) -> Iterator[torch.Tensor]:
        return iter(Numbers())


class Steps:
    """What the trainer of torchtitan says of itself."""

    def __init__(self) -> None:
        self.step = 0
        self.ntokens_seen = 0

    def state_dict(self) -> dict[str, int]:
        return {"step": self.step, "ntokens_seen": self.ntokens_seen}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.step, self.ntokens_seen = state["step"], state["ntokens_seen"]


class Training:
    """The loop of torchtitan's trainer, and no more of it than concerns checkpoints."""

    def __init__(
        self,
        run: str | Path,
        parts: list[nn.Module],
        *,
        config: type = DistCkptManager.Config,
        data: type[IterableDataset[torch.Tensor]] = Numbers,
        batch: int = 4,
        **k: Any,
    ) -> None:
        options = {"enable": True, "folder": str(run), "interval": 2, "keep_latest_k": 2, **k}
        self.parts = parts
        optimizer = default_adamw(lr=0.1)
        optimizer.implementation = "for-loop"
        self.optimizers = optimizer.build(model_parts=parts)
        schedule = LRSchedulersContainer.Config(warmup_steps=2)
        self.schedulers = schedule.build(optimizers=self.optimizers, training_steps=20)
        self.state = Steps()
        self.loader = ParallelAwareDataloader(data(), dp_rank=0, dp_world_size=1, batch_size=batch)
        self.taken: list[int] = []
        self.manager = config(**options).build(
            dataloader=self.loader,
            model_parts=parts,
            optimizers=self.optimizers,
            lr_schedulers=self.schedulers,
            states={"train_state": self.state},
            sd_adapter=None,
            base_folder="",
        )

    def train(self, steps: int, *, load_step: int = -1) -> list[float]:
        torch.manual_seed(5)
        self.manager.load(step=load_step)
        batches = iter(self.loader)
        losses = []
        while self.state.step < steps:
            self.state.step += 1
            batch = next(batches)
            self.taken += [round(each * 100) for each in batch[:, 0].tolist()]
            # Chunks are not chained: a pipeline would pass on what comes out of each.
            loss = sum((part(batch).square().mean() for part in self.parts), torch.zeros(()))
            loss.backward()
            losses.append(float(loss))
            self.manager.maybe_wait_for_staging()
            self.optimizers.step()
            self.optimizers.zero_grad()
            self.schedulers.step()
            self.manager.save(self.state.step, last_step=self.state.step == steps)
        self.manager.close()
        return losses


def steps(run: str | Path) -> list[int]:
    return dist_ckpt.Run(str(run)).steps()


def weights(parts: list[nn.Module]) -> dict[str, Any]:
    found = {name: value for part in parts for name, value in part.state_dict().items()}
    return {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in found.items()
    }


def train_whole(run: str, until: int, die_at: int = 0, **options: Any) -> list[float]:
    warnings.simplefilter("ignore")

    def die(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == die_at:
            os.kill(os.getpid(), signal.SIGKILL)

    events.subscribe(die)
    return Training(run, [Chunk()], **options).train(until)


def test_killed_in_a_save_it_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    (whole,) = run_ranks(1, train_whole, str(tmp_path / "whole"), 8, timeout_seconds=SECONDS)
    run = str(tmp_path / "run")
    run_ranks(1, train_whole, run, 8, 6, expect_killed=[0], timeout_seconds=SECONDS)
    assert steps(run) == [2, 4]
    (again,) = run_ranks(1, train_whole, run, 8, timeout_seconds=SECONDS)
    assert again == whole[4:]
    assert steps(run) == [4, 6, 8], "two are kept, and the one that it went on from"


@pytest.mark.parametrize("batch", [2, 6])
def test_another_batch_takes_each_sample_once(tmp_path: Path, batch: int) -> None:
    first = Training(tmp_path / "run", [Chunk()])
    first.train(4)
    again = Training(tmp_path / "run", [Chunk()], batch=batch)
    again.train(7)
    assert first.taken == list(range(1, 17))
    assert again.taken == list(range(17, 17 + 3 * batch))


def test_data_without_a_position_is_skipped_by_batches_and_that_is_said(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Training(tmp_path / "run", [Chunk()], data=Forgetful).train(4)
    assert "fast-forwarding" not in caplog.text
    again = Training(tmp_path / "run", [Chunk()], data=Forgetful, batch=6)
    again.train(5)
    assert again.taken == list(range(25, 31)), "4 batches of 6, where there were 4 of 4"
    assert "fast-forwarding your dataset by 4 steps" in caplog.text
    third = Training(tmp_path / "run", [Chunk()], data=Forgetful, batch=6)
    third.train(6)
    assert third.taken == list(range(55, 61)), "9 batches: those that were skipped count twice"
    assert "fast-forwarding your dataset by 9 steps" in caplog.text


def interleaved(run: str, until: int, ranks: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    rank = torch.distributed.get_rank()
    parts: list[nn.Module] = [Chunk((number,)) for number in range(rank, 4, ranks)]
    Training(run, parts).train(until)
    return weights(parts)


def sharded(run: str, until: int) -> dict[str, Any]:
    warnings.simplefilter("ignore")
    model = Chunk()
    fully_shard(model, mesh=init_device_mesh("cpu", (torch.distributed.get_world_size(),)))
    Training(run, [model]).train(until)
    return weights([model])


def test_pieces_of_a_model_are_one_part_for_any_number_of_ranks(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    both = run_ranks(2, interleaved, run, 2, 2, timeout_seconds=SECONDS)
    there = {**both[0], **both[1]}
    whole = Chunk()
    dist_ckpt.load_weights(whole, run)
    assert weights([whole]).keys() == there.keys()
    assert all(torch.equal(value, there[name]) for name, value in weights([whole]).items())
    one = Training(run, [Chunk()])
    one.train(3)
    assert one.state.step == 3
    run_ranks(4, interleaved, run, 4, 4, timeout_seconds=SECONDS)
    run_ranks(2, sharded, run, 6, timeout_seconds=SECONDS)
    assert steps(run) == [4, 6]


def stock(run: str, until: int) -> list[float]:
    warnings.simplefilter("ignore")
    options: dict[str, Any] = {"last_save_model_only": False, "keep_latest_k": 0}
    return Training(run, [Chunk()], config=CheckpointManager.Config, **options).train(until)


def test_what_torchtitan_wrote_is_read_by_torchtitan_once(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    run_ranks(1, stock, run, 4, timeout_seconds=SECONDS)
    run_ranks(1, train_whole, run, 6, timeout_seconds=SECONDS)
    run_ranks(1, train_whole, run, 8, timeout_seconds=SECONDS)
    assert steps(run) == [6, 8]
    assert (Path(run) / "step-4" / ".metadata").exists(), "nothing of theirs is deleted"


def test_the_newest_cut_in_half_and_steps_by_number(tmp_path: Path) -> None:
    run = tmp_path / "run"
    Training(run, [Chunk()]).train(6)
    (shard,) = run.glob("step-0000000006/*/model.r00000.safetensors")
    os.truncate(shard, shard.stat().st_size // 2)
    with pytest.raises(IntegrityError):
        Training(run, [Chunk()]).train(8, load_step=6)
    model = Chunk()
    Training(run, [model], initial_load_path=None).train(8)
    assert steps(run) == [4, 6, 8], "two are kept, and the one that it went on from"
    with pytest.raises(UsageError, match="newer"):
        Training(run, [Chunk()]).train(8, load_step=6)
    fresh = Training(tmp_path / "fresh", [Chunk()], initial_load_path=str(run), load_only=True)
    fresh.train(1)
    assert fresh.state.step == 1, "the model alone was loaded"
    with pytest.raises(ValueError, match="export"):
        DistCkptManager.Config(enable=True, last_save_model_only=True)


def test_when_it_saves_is_as_torchtitan_has_it(tmp_path: Path) -> None:
    every: dict[str, Any] = {"keep_latest_k": 0}
    Training(tmp_path / "third", [Chunk()], interval=3, **every).train(7)
    assert steps(tmp_path / "third") == [3, 6, 7], "each third step, and the last one"
    first = Training(
        tmp_path / "first", [Chunk()], interval=4, enable_first_step_checkpoint=True, **every
    )
    first.train(5)
    assert steps(tmp_path / "first") == [1, 4, 5]
    Training(tmp_path / "none", [Chunk()], load_only=True, **every).train(4)
    assert steps(tmp_path / "none") == []


def test_nothing_is_loaded_where_nothing_is(tmp_path: Path) -> None:
    assert Training(tmp_path / "run", [Chunk()]).manager.load() is False
    with pytest.raises(FileNotFoundError, match="load_step=5"):
        Training(tmp_path / "run", [Chunk()]).manager.load(step=5)
    Training(tmp_path / "run", [Chunk()]).train(2)
    with pytest.raises(NotFound, match="5"):
        Training(tmp_path / "run", [Chunk()]).manager.load(step=5)


def test_what_was_saved_is_loaded_into_what_has_changed(tmp_path: Path) -> None:
    one = Training(tmp_path / "run", [Chunk()])
    one.train(4)
    there = weights(one.parts)
    again = Training(tmp_path / "run", [Chunk()])
    with torch.no_grad():
        for parameter in again.parts[0].parameters():
            parameter.zero_()
    assert again.manager.load(step=4) is True
    assert all(torch.equal(value, there[name]) for name, value in weights(again.parts).items())
    assert again.state.step == 4
    assert again.optimizers.state_dict().keys() == one.optimizers.state_dict().keys()


def test_a_start_elsewhere_counts_until_the_run_has_a_checkpoint(tmp_path: Path) -> None:
    Training(tmp_path / "elsewhere", [Chunk()]).train(6)
    start: dict[str, Any] = {
        "initial_load_path": str(tmp_path / "elsewhere"),
        "initial_load_model_only": False,
    }
    begun = Training(tmp_path / "run", [Chunk()], **start)
    begun.train(8)
    assert steps(tmp_path / "run") == [8]
    again = Training(tmp_path / "run", [Chunk()], **start)
    assert again.manager.load() is True
    assert again.state.step == 8


def test_a_seed_gives_the_model_alone(tmp_path: Path) -> None:
    seed = Training(tmp_path / "run", [Chunk()])
    next(iter(seed.loader))
    seed.state.ntokens_seen = 3
    with torch.no_grad():
        for parameter in seed.parts[0].parameters():
            parameter.fill_(0.5)
    there = weights(seed.parts)
    seed.manager.load()
    seed.manager.save(0, last_step=True)
    seed.manager.close()
    for step in (-1, 0):
        begun = Training(tmp_path / "run", [Chunk()])
        assert begun.manager.load(step=step) is True
        assert all(torch.equal(value, there[name]) for name, value in weights(begun.parts).items())
        assert begun.state.ntokens_seen == 0
    Training(tmp_path / "run", [Chunk()]).train(2)
    assert steps(tmp_path / "run") == [0, 2]


class Rotated(Chunk):
    """Has a buffer that is not to be saved."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.ones(3), persistent=False)


def test_a_run_of_another_program_is_told_by_its_parts(tmp_path: Path) -> None:
    dist_ckpt.save({"model": Chunk()}, tmp_path / "run", step=5)
    with pytest.raises(IncompatibleError) as raised:
        Training(tmp_path / "run", [Chunk()]).train(8)
    (note,) = raised.value.__notes__
    assert "the parts model, rng, and not 'train_state'" in note


def test_buffers_that_are_made_anew_are_not_saved(tmp_path: Path) -> None:
    Training(tmp_path / "run", [Rotated()]).train(2)
    with dist_ckpt.open_checkpoint(str(tmp_path / "run")) as opened:
        names = {name for name in opened if name.startswith("model/")}
    assert names == {f"model/{name}" for name in Chunk().state_dict()}


def test_a_manager_that_is_switched_off_does_nothing(tmp_path: Path) -> None:
    off = Training(tmp_path / "run", [Chunk()], enable=False)
    off.train(4)
    off.manager.maybe_wait_for_saving()
    assert not (tmp_path / "run").exists()


def test_a_config_is_checked_as_that_of_torchtitan(tmp_path: Path) -> None:
    for wrong, said in (
        ({"folder": "  "}, "folder"),
        ({"interval": 0}, "interval"),
        ({"keep_latest_k": -1}, "keep_latest_k"),
        ({"exclude_from_loading": ["model"]}, "exclude_from_loading"),
        ({"initial_load_path": "relative/path"}, "initial_load_path"),
    ):
        with pytest.raises(ValueError, match=said):
            DistCkptManager.Config(enable=True, **wrong)
