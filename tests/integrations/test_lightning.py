"""Lightning as its users know it, its checkpoints in runs as everybody's are."""

from __future__ import annotations

import functools
import os
import signal
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import IncompatibleError, NotFound, UsageError
from dist_ckpt.testing.ranks import run_ranks
from tests.e2e import guides
from tests.services.s3 import S3Service

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("lightning")
    from lightning.pytorch import Callback, Trainer
    from lightning.pytorch.callbacks import ModelCheckpoint
    from lightning.pytorch.strategies import (
        DeepSpeedStrategy,
        FSDPStrategy,
        ModelParallelStrategy,
    )

    from dist_ckpt.integrations.lightning import (
        DistCkptDDPStrategy,
        DistCkptIO,
        DistCkptModelParallelStrategy,
        DistCkptSingleDeviceStrategy,
        DistCkptStrategy,
        RandomState,
        as_file,
        newest_in,
    )
    from tests.integrations import lightning_runs as runs
    from tests.integrations.lightning_runs import Sharded, Small, equal, fit, state_of, trainer

# Lightning gives advice by warnings: workers of loaders, loggers, what it calls itself.
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Sums as the rank processes have them, which are given one thread each."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def names(run: Path) -> set[str]:
    return {path.name for path in run.glob("*.ckpt")}


def steps(run: Path) -> list[int]:
    return dist_ckpt.Run(str(run)).steps()


def checkpoints(by: Trainer) -> ModelCheckpoint:
    found = by.checkpoint_callback
    assert isinstance(found, ModelCheckpoint)
    return found


def test_top_k_best_and_last_are_those_of_lightning(tmp_path: Path) -> None:
    run = tmp_path / "run"
    by = trainer(run, 4)
    at = {}

    class Watch(Callback):
        def on_validation_end(self, trainer: Trainer, pl_module: Any) -> None:
            at[trainer.global_step] = state_of(pl_module)

    by.callbacks.insert(0, Watch())
    fit(by, Small(scores=[3.0, 1.0, 2.0, 4.0]))
    assert names(run) == {"epoch=1-step=16.ckpt", "epoch=2-step=24.ckpt", "last.ckpt"}
    assert steps(run) == [16, 24], "last is a name of the newest of them, and no copy"
    assert checkpoints(by).best_model_path == str(run / "epoch=1-step=16.ckpt")
    listed = dist_ckpt.Run(str(run))
    assert listed.best("val_loss") == 16
    model = Small()
    assert dist_ckpt.load_weights(model, run, step="best", metric="val_loss").step == 16
    assert equal(state_of(model), at[16])
    model = Small()
    by.validate(model, torch.utils.data.DataLoader(runs.data()), ckpt_path="best", verbose=False)
    assert equal(state_of(model), at[16])
    loaded = Small.load_from_checkpoint(as_file(run / "last.ckpt"), weights_only=False)
    assert equal(state_of(loaded), at[24])
    by.save_checkpoint(run / "best.ckpt")
    by.strategy.teardown()
    loaded = Small.load_from_checkpoint(as_file(run / "best.ckpt"), weights_only=False)
    assert equal(state_of(loaded), at[16]), "what was looked at can be saved again"


def die_in_a_save(run: str, strategy: str) -> None:
    warnings.simplefilter("ignore")

    def die(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == 24:
            os.kill(os.getpid(), signal.SIGKILL)

    events.subscribe(die)
    chosen = DistCkptSingleDeviceStrategy() if strategy else "auto"
    fit(trainer(run, 4, strategy=chosen))


def test_last_may_be_a_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    by = trainer(run, 2, save_last="link", save_top_k=1)
    checkpoints(by).CHECKPOINT_NAME_LAST = "last-{epoch}"
    fit(by)
    assert names(run) == {"epoch=1-step=16.ckpt", "last-epoch=1.ckpt"}
    assert steps(run) == [16]
    fit(trainer(run, 3), resume=run / "last-epoch=1.ckpt")
    assert max(steps(run)) == 24


@pytest.mark.parametrize("strategy", [pytest.param("", marks=pytest.mark.soak), "strategy"])
def test_a_run_killed_in_a_save_goes_on_as_if_it_had_not_stopped(
    strategy: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    whole = fit(trainer(tmp_path / "whole", 4, strategy=of(strategy)))
    run_ranks(1, die_in_a_save, str(run), strategy, expect_killed=[0], timeout_seconds=300.0)
    assert steps(run) == [8, 16]
    again = fit(trainer(run, 4, strategy=of(strategy)), resume="last", seed=7)
    assert again.losses == whole.losses[-len(again.losses) :]
    assert again.losses[0][0] == 16
    assert equal(state_of(again), state_of(whole))


def of(strategy: str) -> Any:
    return DistCkptSingleDeviceStrategy() if strategy else "auto"


def cut(run: Path, step: int) -> None:
    (shard,) = run.glob(f"step-{step:010d}/*/model.r00000.safetensors")
    os.truncate(shard, shard.stat().st_size // 2)


@pytest.mark.parametrize("strategy", ["", "strategy"])
def test_last_falls_back_where_the_newest_is_cut_in_half(
    strategy: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = tmp_path / "run"
    first = fit(trainer(run, 3, strategy=of(strategy)))
    cut(run, 24)
    with pytest.raises(dist_ckpt.errors.IntegrityError):
        fit(trainer(run, 4, strategy=of(strategy)), resume=run / "epoch=2-step=24.ckpt")
    again = fit(trainer(run, 3, strategy=of(strategy)), resume="last", seed=7)
    assert again.losses == first.losses[16:], "it went on from step 16"
    assert steps(run) == [16, 24]
    assert dist_ckpt.Run(str(run)).verify(24).ok


def test_a_used_folder_is_not_begun_anew_unless_that_is_meant(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert newest_in(run) is None
    fit(trainer(run, 2))
    with pytest.raises(UsageError, match="restore"):
        fit(trainer(run, 1))
    old = run / "epoch=0-step=8.ckpt"
    with pytest.raises(UsageError, match="discard_newer"):
        fit(trainer(run, 2), resume=old)
    assert steps(run) == [8, 16]
    by = trainer(run, 2, plugin=DistCkptIO(discard_newer=True))
    fit(by, resume=old)
    assert steps(run) == [8, 16]
    fit(trainer(run, 3), resume=newest_in(run))
    fit(trainer(run, 4), resume=f"{run}@24")
    assert steps(run) == [24, 32], "two are the best, and the newest is one of them"
    with pytest.raises(NotFound):
        fit(trainer(run, 4), resume=f"{run}@7")


def test_weights_alone_are_for_looking_and_not_for_going_on(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = fit(trainer(run, 1, save_weights_only=True, save_last=False))
    with dist_ckpt.open_checkpoint(run) as opened:
        assert not [name for name in opened.names if name.startswith("optimizer/")]
    for strategy in "", "strategy":
        with pytest.raises(KeyError, match="save_weights_only"):
            fit(trainer(run, 2, strategy=of(strategy)), resume=run / "epoch=0-step=8.ckpt")
    other = Small()
    trainer(run, 1).validate(
        other, torch.utils.data.DataLoader(runs.data()), ckpt_path=str(run), verbose=False
    )
    assert equal(state_of(other), state_of(model))


def test_two_names_of_one_step_have_each_its_own_values(tmp_path: Path) -> None:
    run = tmp_path / "run"
    by = trainer(run, 1, strategy=DistCkptSingleDeviceStrategy(), save_last=None)
    fit(by)
    by.save_checkpoint(run / "asked.ckpt")
    by.save_checkpoint(run / "weights.ckpt", weights_only=True)
    assert steps(run) == [8], "nothing was saved twice"
    first, asked = (
        DistCkptIO().load_checkpoint(run / name) for name in ("epoch=0-step=8.ckpt", "asked.ckpt")
    )
    of_epoch = [each["loops"]["fit_loop"]["epoch_progress"] for each in (first, asked)]
    assert of_epoch[0]["total"]["completed"] == 0
    assert of_epoch[1]["total"]["completed"] == 1
    assert "callbacks" not in DistCkptIO().load_checkpoint(run / "weights.ckpt")
    by.strategy.remove_checkpoint(run / "asked.ckpt")
    by.strategy.remove_checkpoint(run / "weights.ckpt")
    by.strategy.remove_checkpoint(run / "epoch=0-step=8.ckpt")
    assert steps(run) == [8], "the newest is protected"
    assert names(run) == set()


def test_a_state_that_changed_without_a_step_is_saved_beside_the_other(tmp_path: Path) -> None:
    run = tmp_path / "run"
    by = trainer(run, 1, save_last=None)
    model = fit(by)
    with torch.no_grad():
        model.get_parameter("net.0.bias").add_(1.0)
    by.save_checkpoint(run / "changed.ckpt")
    by.strategy.teardown()
    assert steps(run) == [8, 9]
    loaded = DistCkptIO().load_checkpoint(run / "changed.ckpt")
    assert torch.equal(loaded["state_dict"]["net.0.bias"], model.get_parameter("net.0.bias"))
    assert loaded["global_step"] == 8


def test_what_lightning_wrote_is_read_by_lightning_once(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = fit(trainer(tmp_path / "whole", 3))
    theirs = Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=[
            ModelCheckpoint(dirpath=tmp_path / "theirs", save_last=True),
            RandomState(),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    fit(theirs)
    for strategy in "", "strategy":
        by = trainer(tmp_path / f"ours{strategy}", 3, strategy=of(strategy))
        went_on = fit(by, resume=tmp_path / "theirs" / "last.ckpt")
        if not strategy:
            assert went_on.losses == whole.losses[16:]
        assert "written by Lightning itself" in caplog.text
        caplog.clear()
        assert steps(tmp_path / f"ours{strategy}") == [24]


def test_a_save_is_finished_though_training_ends_by_an_exception(tmp_path: Path) -> None:
    class Fail(Callback):
        def on_train_batch_start(self, trainer: Trainer, *_: Any) -> None:
            if trainer.global_step == 12:
                raise RuntimeError("the loss is no number")

    for strategy in "", "strategy":
        run = tmp_path / f"run{strategy}"
        by = trainer(run, 3, strategy=of(strategy), callbacks=[Fail()], save_on_exception=True)
        with pytest.raises(RuntimeError, match="no number"):
            fit(by)
        assert steps(run) == [8, 12]
        assert dist_ckpt.Run(str(run)).verify(12).ok


def test_a_run_of_another_program_is_told_by_its_parts(tmp_path: Path) -> None:
    run = tmp_path / "run"
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, run, step=5)
    for strategy in "", "strategy":
        with pytest.raises(IncompatibleError, match="lightning") as raised:
            fit(trainer(run, 2, strategy=of(strategy)), resume=newest_in(run))
        assert "parts model, optimizer, rng" in str(raised.value)
    assert steps(run) == [5]


class Flat(DistCkptStrategy, FSDPStrategy):
    """FSDP1, which flattens parameters."""


class Engine(DistCkptStrategy, DeepSpeedStrategy):
    """DeepSpeed, which keeps everything itself."""


def test_strategies_that_keep_tensors_nameless_are_refused_before_any_training() -> None:
    with pytest.raises(UsageError, match="DistCkptModelParallelStrategy"):
        Flat()
    with pytest.raises(UsageError, match="other-trainers"):
        Engine()


def plugin_beside(strategy: str, run: str) -> str:
    """Begin to train with the plugin and a strategy which saves by itself; return the error."""
    warnings.simplefilter("ignore")
    # A class of its own: Lightning lets its own FSDPStrategy run on GPUs only.
    kind = {"fsdp1": FSDPStrategy, "fsdp2": ModelParallelStrategy}[strategy]
    by = trainer(run, 1, strategy=type("Theirs", (kind,), {})(), devices=2)
    by.strategy.checkpoint_io = DistCkptIO()
    by.callbacks.append(RandomState())
    try:
        fit(by, make=lambda: Sharded(dropout=0.0))
    except UsageError as error:
        return str(error)
    return f"it trained, into {os.listdir(run)}"


@pytest.mark.parametrize("strategy", ["fsdp1", "fsdp2"])
def test_a_plugin_that_is_never_asked_is_refused_before_any_training(
    strategy: str, tmp_path: Path
) -> None:
    run = str(tmp_path / "run")
    for found in run_ranks(2, plugin_beside, strategy, run, timeout_seconds=240.0):
        assert "take DistCkptModelParallelStrategy in its place" in found
    assert not Path(run).exists()


def sharded(run: str, epochs: int, shards: int) -> tuple[list[tuple[int, float]], dict[str, Any]]:
    """Train with FSDP2, go on where there is something to go on from; no random numbers."""
    warnings.simplefilter("ignore")
    strategy = DistCkptModelParallelStrategy(data_parallel_size=shards, tensor_parallel_size=1)
    by = trainer(run, epochs, strategy=strategy, devices=shards)
    model = fit(by, resume=newest_in(run), shuffle=False, make=lambda: Sharded(dropout=0.0))
    return model.losses, {
        name: (each.full_tensor() if hasattr(each, "full_tensor") else each).detach().clone()
        for name, each in model.state_dict().items()
    }


def data_parallel(run: str, epochs: int, ranks: int) -> tuple[list[tuple[int, float]], str]:
    warnings.simplefilter("ignore")
    by = trainer(run, epochs, strategy=DistCkptDDPStrategy(), devices=ranks)
    model = fit(by, resume=newest_in(run))
    return model.losses, str(by.strategy.model is not None)


@pytest.mark.soak
def test_ranks_come_and_go(tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    (_, weights), _ = run_ranks(2, sharded, run, 1, 2, timeout_seconds=240.0)
    with dist_ckpt.open_checkpoint(run) as opened:
        assert opened.manifest is not None
        assert opened.manifest.world_size == 2
    model = Small()
    dist_ckpt.load_weights(model, run)
    stored = state_of(model)
    assert all(torch.equal(stored[name], weights[name]) for name in stored if "running" not in name)
    one = fit(trainer(run, 2, strategy=of("strategy")), resume=newest_in(run), shuffle=False)
    assert one.losses[0][0] == 4
    run_ranks(4, sharded, run, 4, 4, timeout_seconds=240.0)
    assert max(steps(Path(run))) == 16


@pytest.mark.soak
def test_ddp_goes_on_bit_for_bit_at_the_same_size(tmp_path: Path) -> None:
    whole = run_ranks(2, data_parallel, str(tmp_path / "whole"), 3, 2, timeout_seconds=240.0)
    run_ranks(2, data_parallel, str(tmp_path / "run"), 2, 2, timeout_seconds=240.0)
    again = run_ranks(2, data_parallel, str(tmp_path / "run"), 3, 2, timeout_seconds=240.0)
    for rank in range(2):
        assert again[rank][0] == whole[rank][0][-len(again[rank][0]) :]
        assert again[rank][0]


def test_the_guide_and_the_readme_do_what_they_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(guides.program(guides.guide("lightning")), "lightning.md", "exec"), {})  # noqa: S102
    assert steps(Path("runs/fabric")) == [2, 4]
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (block,) = [e for e in guides.blocks(readme, "python") if "integrations.lightning" in e]
    model = Small()
    loader = torch.utils.data.DataLoader(runs.data(), batch_size=4)
    monkeypatch.setattr(model, "train_dataloader", lambda: loader)
    known = {
        "model": model,
        "ModelCheckpoint": ModelCheckpoint,
        "Trainer": functools.partial(
            Trainer,
            accelerator="cpu",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        ),
    }
    for _ in range(2):
        exec(compile(block, "README.md", "exec"), dict(known))  # noqa: S102
    assert steps(Path("runs/18")) == [24]


@pytest.mark.soak
def test_a_folder_on_s3_is_one_as_any_other(s3_service: S3Service, s3_name: str) -> None:
    run = s3_service.url(s3_name)
    whole = fit(trainer(run, 2, filename="{epoch}", every_n_epochs=1))
    for strategy in "", "strategy":
        assert newest_in(run) == run
        epochs = 4 if strategy else 3
        again = fit(
            trainer(run, epochs, strategy=of(strategy), filename="{epoch}"),
            resume=newest_in(run),
            seed=7,
        )
        assert again.losses[0][0] == (24 if strategy else 16)
    assert whole.losses
    assert dist_ckpt.Run(run).steps() == [24, 32]
    keys = {key for key in s3_service.keys(s3_name) if key.endswith(".ckpt")}
    assert keys == {"epoch=2.ckpt", "epoch=3.ckpt", "last.ckpt"}
    by = trainer(run, 4, filename="{epoch}")
    other = Small()
    by.validate(
        other,
        torch.utils.data.DataLoader(runs.data()),
        ckpt_path=f"{run}/epoch=2.ckpt",
        verbose=False,
    )
    model = Small()
    dist_ckpt.load_weights(model, run, step=24)
    assert equal(state_of(other), state_of(model))
