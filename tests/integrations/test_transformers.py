"""transformers' `Trainer` on a run of dist_ckpt: what its users know, and nothing lost."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from peft import PeftModel
from transformers import EarlyStoppingCallback, GPT2LMHeadModel, Trainer, TrainerCallback

import dist_ckpt
from dist_ckpt import Run
from dist_ckpt.errors import IncompatibleError, NotFound, UsageError
from dist_ckpt.integrations.transformers import DistCkptMixin
from dist_ckpt.testing.ranks import run_ranks
from tests.arch.source import ROOT
from tests.e2e import guides
from tests.integrations.training import (
    Tokens,
    arguments,
    equal,
    lora,
    losses,
    net,
    train_until_killed,
    trainer,
    weights,
)

# peft 0.21 asks transformers 5.24 for what that calls otherwise by now.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning"),
    # torchdata calls what torch 2.13 no longer has.
    pytest.mark.filterwarnings("ignore:.set_vital. is deprecated:UserWarning"),
]


def run_of(folder: Path) -> Run:
    return Run(str(folder))


class Straight:
    """A run that nothing happened to."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.folder = folder
        self.trainer = trainer(folder, **settings)
        self.trainer.train()
        self.losses = losses(self.trainer)
        self.weights = weights(self.trainer.model)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """So little is there to compute that a second thread only waits for the first one."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("OMP_NUM_THREADS", "1")  # else accelerate chooses a number for ranks
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Straight:
    return Straight(tmp_path_factory.mktemp("straight") / "run")


@pytest.fixture
def run(straight: Straight, tmp_path: Path) -> Path:
    """A copy of its run, up to step 12."""
    shutil.copytree(straight.folder, tmp_path / "run")
    return tmp_path / "run"


class Raise(TrainerCallback):
    """Ends a training by an exception in the middle of a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.step:
            raise KeyError("the program is at fault")


class Ask(TrainerCallback):
    """Asks at a step for the save that SIGTERM asks for some seconds later."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.others: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        (jit,) = (each for each in self.others if hasattr(each, "jit_manager"))
        self.manager = jit.jit_manager

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.manager.is_checkpoint_requested = state.global_step == self.step


def test_a_save_at_a_signal_leaves_no_empty_folder(tmp_path: Path) -> None:
    ask = Ask(3)
    asked = trainer(tmp_path / "run", callbacks=[ask], enable_jit_checkpoint=True)
    ask.others = asked.callback_handler.callbacks
    asked.train()
    assert 3 in run_of(tmp_path / "run").steps()
    assert list((tmp_path / "run").glob("checkpoint-*")) == []


def test_killed_in_a_save_it_goes_on_bit_by_bit(straight: Straight, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_ranks(1, train_until_killed, str(out), 8, {}, expect_killed={0}, timeout_seconds=300)
    assert run_of(out).steps() == [2, 4, 6]
    assert (out / "step-0000000008").is_dir(), "it died in the middle of that save"
    resumed = trainer(out)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == straight.losses
    assert equal(weights(resumed.model), straight.weights)
    # In the middle of the second epoch: none of the first 6 batches is taken again but to skip.
    assert run_of(out).steps() == [2, 4, 6, 8, 10, 12]


def test_the_run_is_as_everybodys(straight: Straight, tmp_path: Path) -> None:
    fresh = net()
    torch.nn.init.zeros_(fresh.lm_head.weight)
    dist_ckpt.load_weights(fresh, straight.folder)
    assert equal(weights(fresh), straight.weights)
    manifest = run_of(straight.folder).manifest(12)
    assert manifest.metrics["loss"] == straight.losses[12]
    assert manifest.metrics.keys() == {"loss", "grad_norm", "learning_rate"}
    assert manifest.metadata["config"]["learning_rate"] == 0.01
    dist_ckpt.export(straight.folder, tmp_path / "out", format="hf", like=straight.folder / "hf")
    exported = GPT2LMHeadModel.from_pretrained(tmp_path / "out")
    assert equal(weights(exported), straight.weights)


def test_a_damaged_newest_checkpoint_is_passed_over(straight: Straight, run: Path) -> None:
    for file in run.glob("step-0000000012/*/model.*"):
        file.write_bytes(file.read_bytes()[:-100])
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == straight.losses
    assert equal(weights(resumed.model), straight.weights)


BEST: dict[str, Any] = {
    "eval_strategy": "steps",
    "eval_steps": 2,
    "metric_for_best_model": "loss",
    "load_best_model_at_end": True,
    # So fast that the loss gets worse, and the worst one is called the best: none at either end.
    "greater_is_better": True,
    "learning_rate": 1.0,
    "lr_scheduler_type": "constant",
}


@pytest.mark.parametrize("limit", [1, 3])
def test_what_stays_and_what_is_best_is_as_transformers_has_it(limit: int, tmp_path: Path) -> None:
    theirs = trainer(tmp_path / "theirs", kind=Trainer, save_total_limit=limit, **BEST)
    theirs.train()
    ours = trainer(tmp_path / "ours", save_total_limit=limit, **BEST)
    ours.train()
    best = theirs.state.best_global_step
    assert 2 < best < 12
    assert (ours.state.best_metric, ours.state.best_global_step) == (theirs.state.best_metric, best)
    assert ours.state.best_model_checkpoint == f"{tmp_path}/ours/step-{best:010d}"
    assert equal(weights(ours.model), weights(theirs.model)), "the best one was loaded"
    left = sorted(int(each.name[11:]) for each in (tmp_path / "theirs").glob("checkpoint-*"))
    # The newest is never deleted here; with a limit of 1 transformers ends with the best alone.
    assert run_of(tmp_path / "ours").steps() == ([best, 12] if limit == 1 else left)
    assert run_of(tmp_path / "ours").best("eval_loss", "max") == best


class OwnEvaluation(Trainer):
    """A trainer whose evaluation gives a metric and logs nothing, best at step 4."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"eval_score": numpy.float32(0.5 if self.state.global_step == 4 else 0.25)}


class OwnEvaluationInARun(DistCkptMixin, OwnEvaluation):
    pass


@pytest.mark.parametrize("every", [2, 4])
def test_a_metric_counts_whether_it_was_logged_or_not(every: int, tmp_path: Path) -> None:
    settings = {
        **BEST,
        "metric_for_best_model": "score",
        "load_best_model_at_end": False,
        "save_total_limit": 1,
        "eval_steps": every,
    }
    made = trainer(tmp_path / "run", kind=OwnEvaluationInARun, **settings)
    made.train()
    run = run_of(tmp_path / "run")
    assert run.steps() == [4, 12]
    assert run.manifest(4).metrics["eval_score"] == 0.5
    assert made.state.best_model_checkpoint == f"{tmp_path}/run/step-0000000004"


def test_a_metric_counts_at_its_own_step_alone(tmp_path: Path) -> None:
    settings = {**BEST, "metric_for_best_model": "score", "load_best_model_at_end": False}
    made = trainer(tmp_path / "run", kind=OwnEvaluationInARun, save_steps=3, **settings)
    made.train()
    run = run_of(tmp_path / "run")
    assert {step for step in run.steps() if "eval_score" in run.manifest(step).metrics} == {6, 12}


class BestAtFirst(OwnEvaluationInARun):
    """Its evaluation at step 6, the end of the first epoch, is the best."""

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return {"eval_score": 0.5 if self.state.global_step == 6 else 0.25}


@pytest.mark.parametrize("epochs", [2, 1])
def test_an_epoch_is_evaluated_after_its_last_step_was_saved(epochs: int, tmp_path: Path) -> None:
    settings = {
        **BEST,
        "metric_for_best_model": "score",
        "load_best_model_at_end": False,
        "eval_strategy": "epoch",
        "save_total_limit": 1,
        "num_train_epochs": epochs,
    }
    made = trainer(tmp_path / "run", kind=BestAtFirst, **settings)
    made.train()
    run = run_of(tmp_path / "run")
    assert run.steps() == ([6, 12] if epochs == 2 else [6])
    assert run.best("eval_score", "max") == 6
    if epochs == 2:
        assert made.state.best_model_checkpoint == f"{tmp_path}/run/step-0000000006"


@pytest.mark.soak
def test_the_best_of_what_was_imported_is_the_best(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole", kind=Trainer, **BEST)
    whole.train()
    assert whole.state.best_global_step < 9
    with pytest.raises(KeyError):
        trainer(tmp_path / "run", kind=Trainer, callbacks=[Raise(9)], **BEST).train()
    imported = trainer(tmp_path / "run", **BEST)
    imported.train(resume_from_checkpoint=True)
    best = f"checkpoint-{whole.state.best_global_step}"
    assert imported.state.best_model_checkpoint == str(tmp_path / "run" / best)
    assert equal(weights(imported.model), weights(whole.model))


@pytest.mark.soak
def test_only_the_best_are_saved(tmp_path: Path) -> None:
    settings: dict[str, Any] = {**BEST, "save_strategy": "best"}
    theirs = trainer(tmp_path / "theirs", kind=Trainer, **settings)
    theirs.train()
    ours = trainer(tmp_path / "ours", **settings)
    ours.train()
    left = sorted(int(each.name[11:]) for each in (tmp_path / "theirs").glob("checkpoint-*"))
    assert run_of(tmp_path / "ours").steps() == left
    assert equal(weights(ours.model), weights(theirs.model))


def test_early_stopping_goes_on_counting(tmp_path: Path) -> None:
    def made(*more: TrainerCallback) -> Any:
        # No loss gets better by so much: it stops at the fourth look, and not at the fourth anew.
        early = EarlyStoppingCallback(early_stopping_patience=3, early_stopping_threshold=100.0)
        settings: dict[str, Any] = {**BEST, "restore_callback_states_from_checkpoint": True}
        return trainer(tmp_path / "run", callbacks=[early, *more], **settings)

    with pytest.raises(KeyError):
        made(Raise(7)).train()
    resumed = made()
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 8
    assert run_of(tmp_path / "run").steps() == [2, 4, 6, 8]


def test_an_exception_ends_the_training_after_the_save_in_flight(tmp_path: Path) -> None:
    settings: dict[str, Any] = {
        "save_strategy": "epoch",
        "gradient_accumulation_steps": 2,
        "num_train_epochs": 3,
    }
    whole = Straight(tmp_path / "whole", **settings)
    failed = trainer(tmp_path / "run", callbacks=[Raise(6)], **settings)
    with pytest.raises(KeyError, match="at fault"):
        failed.train()
    assert run_of(tmp_path / "run").steps() == [3, 6]
    resumed = trainer(tmp_path / "run", **settings)
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "step-0000000006"))
    assert losses(resumed) == whole.losses


def test_a_run_is_never_left_behind(run: Path) -> None:
    for resume in (None, 6):
        with pytest.raises(UsageError, match="has checkpoints newer") as caught:
            trainer(run).train(resume_from_checkpoint=resume)
        assert "discard_newer=True" in caught.value.__notes__[0]
    assert run_of(run).steps() == [2, 4, 6, 8, 10, 12]


@pytest.mark.parametrize("resume", ["6", "checkpoint-6"])
def test_an_older_step_is_gone_on_from_where_the_rest_is_given_up(
    resume: str, straight: Straight, run: Path
) -> None:
    named = f"{run}/{resume}" if "-" in resume else resume
    resumed = trainer(run)
    resumed.train(resume_from_checkpoint=named, discard_newer=True)
    assert losses(resumed) == straight.losses


def test_another_run_is_gone_on_from_in_this_one(straight: Straight, tmp_path: Path) -> None:
    resumed = trainer(tmp_path / "run")
    resumed.train(resume_from_checkpoint=str(straight.folder / "step-0000000008"))
    assert losses(resumed) == straight.losses
    assert run_of(tmp_path / "run").steps() == [10, 12]


def test_nothing_to_go_on_from(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="'auto' begins"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    with pytest.raises(NotFound):
        trainer(tmp_path / "run").train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    with pytest.raises(UsageError, match=r"not 1\.5"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=1.5)
    begun = trainer(tmp_path / "run", max_steps=1)
    begun.train(resume_from_checkpoint="auto")
    assert run_of(tmp_path / "run").steps() == [1]


def test_what_transformers_wrote_is_imported_once(
    straight: Straight, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs = trainer(tmp_path / "run", kind=Trainer, callbacks=[Raise(7)])
    with pytest.raises(KeyError):
        theirs.train()
    imported = trainer(tmp_path / "run", callbacks=[Raise(9)])
    with pytest.raises(KeyError):
        imported.train(resume_from_checkpoint=True)
    assert "checkpoint-6 was written by transformers" in caplog.text
    caplog.clear()
    resumed = trainer(tmp_path / "run", save_total_limit=1)
    resumed.train(resume_from_checkpoint=True)
    assert "written by transformers" not in caplog.text
    assert losses(resumed) == straight.losses
    assert equal(weights(resumed.model), straight.weights)
    left = sorted(each.name for each in (tmp_path / "run").glob("checkpoint-*"))
    assert left == ["checkpoint-2", "checkpoint-4", "checkpoint-6"], "theirs are left alone"


def test_adapters_are_saved_alone(straight: Straight, tmp_path: Path) -> None:
    whole = Straight(tmp_path / "whole", model=lora(64))
    model = whole.trainer.model
    assert isinstance(model, PeftModel)
    trained = sum(each.nbytes for each in model.parameters() if each.requires_grad)
    everything = sum(each.nbytes for each in model.parameters())
    files = {
        part: sum(file.stat().st_size for file in whole.folder.glob(f"step-*12/*/{part}.*"))
        for part in ("model", "optimizer")
    }
    header = 4096 * 2
    assert trained <= files["model"] < trained + header < everything / 5
    assert files["optimizer"] < 2 * trained + header
    again = trainer(tmp_path / "run", model=lora(64), callbacks=[Raise(6)])
    with pytest.raises(KeyError):
        again.train()
    resumed = trainer(tmp_path / "run", model=lora(64))
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == whole.losses
    assert (tmp_path / "run" / "hf" / "adapter_config.json").is_file()
    fresh = lora(64)
    dist_ckpt.load_weights(fresh, tmp_path / "run", strict=False)
    assert equal(weights(fresh), whole.weights)


def test_a_url_is_an_output_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    made = trainer("memory://of-a-trainer/run", max_steps=2)
    made.train(resume_from_checkpoint="auto")
    assert Run("memory://of-a-trainer/run").steps() == [2]
    assert [each.name for each in tmp_path.iterdir()] == ["trainer_output"]
    made.save_model()
    assert (tmp_path / "trainer_output" / "run" / "model.safetensors").is_file()


def test_the_run_may_lie_elsewhere(tmp_path: Path) -> None:
    options = {"metadata": {"notes": "mine"}, "keep": dist_ckpt.keep.every(4)}
    made = trainer(
        tmp_path / "out",
        checkpoint_url=str(tmp_path / "run"),
        checkpoint_options=options,
        save_total_limit=1,
    )
    made.train()
    assert run_of(tmp_path / "run").steps() == [4, 8, 12]
    assert run_of(tmp_path / "run").manifest(12).metadata["notes"] == "mine"
    assert not list((tmp_path / "out").glob("*/manifest.json"))
    with pytest.raises(UsageError, match="TrainingArguments say"):
        trainer(tmp_path / "out", checkpoint_options={"every_steps": 5}).train()


def test_a_model_alone(straight: Straight, tmp_path: Path) -> None:
    made = trainer(tmp_path / "run", save_only_model=True)
    made.train()
    assert set(run_of(tmp_path / "run").manifest(12).parts) == {"model", "trainer"}
    with pytest.raises(IncompatibleError, match="optimizer"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    resumed = trainer(tmp_path / "run", save_only_model=True, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.global_step == 18


def test_a_run_of_another_program_is_told_by_its_parts(tmp_path: Path) -> None:
    model = net()
    dist_ckpt.save({"model": model, "progress": dist_ckpt.Progress()}, tmp_path / "run", step=5)
    with pytest.raises(IncompatibleError, match="trainer"):
        trainer(tmp_path / "run").train(resume_from_checkpoint=True)
    # As plugins of others save an optimizer: it is refused before any names are compared.
    optimizer = torch.optim.AdamW(model.parameters()).state_dict()
    state = {"model": model, "optimizer": optimizer, "lightning": {"epoch": 1}}
    dist_ckpt.save(state, tmp_path / "other", step=5)
    with pytest.raises(IncompatibleError) as raised:
        trainer(tmp_path / "other").train(resume_from_checkpoint=True)
    (note,) = raised.value.__notes__
    assert "the parts model, optimizer, lightning, rng, and not 'trainer'" in note


def test_another_batch_is_said(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    resumed = trainer(run, per_device_train_batch_size=2)
    resumed.train(resume_from_checkpoint=True)
    assert "trained with 4 samples a step, and the training goes on with 2" in caplog.text
    assert resumed.state.global_step == 24


class TooLarge(TrainerCallback):
    """Memory that is too small for batches of so many samples."""

    def __init__(self, size: int) -> None:
        self.size = size

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.train_batch_size >= self.size:
            raise RuntimeError("CUDA out of memory.")


FINDING: dict[str, Any] = {"per_device_train_batch_size": 16, "auto_find_batch_size": True}


@pytest.fixture
def found(tmp_path: Path) -> Path:
    """A run of two steps, for which a batch was found that fits."""
    first = trainer(tmp_path / "run", callbacks=[TooLarge(16)], max_steps=2, **FINDING)
    first.train()
    assert first.state.train_batch_size == 14
    return tmp_path / "run"


def test_the_batch_that_was_found_is_gone_on_with(
    found: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = trainer(found, max_steps=4, **FINDING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.train_batch_size == 14
    assert list(losses(resumed)) == [1, 2, 3, 4]
    assert run_of(found).manifest(4).metrics["loss"] == losses(resumed)[4]
    assert "samples a step" not in caplog.text


def test_a_batch_that_fits_no_more_is_made_smaller(
    found: Path, caplog: pytest.LogCaptureFixture
) -> None:
    resumed = trainer(found, callbacks=[TooLarge(14)], max_steps=4, **FINDING)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.train_batch_size == 12
    assert list(losses(resumed)) == [1, 2, 3, 4]
    assert "14 samples a step, and the training goes on with 12" in caplog.text


def test_the_size_of_a_batch_is_of_the_arguments_where_none_is_looked_for(found: Path) -> None:
    resumed = trainer(found, max_steps=4, per_device_train_batch_size=2)
    resumed.train(resume_from_checkpoint=True)
    assert resumed.state.train_batch_size == 2


def test_a_batch_found_before_the_first_save_begins_where_it_was_said(
    straight: Straight, tmp_path: Path
) -> None:
    resumed = trainer(tmp_path / "run", callbacks=[TooLarge(4)], auto_find_batch_size=True)
    resumed.train(resume_from_checkpoint=str(straight.folder / "step-0000000008"))
    assert resumed.state.train_batch_size == 3
    assert run_of(tmp_path / "run").steps() == [10, 12, 14, 16]


def test_more_epochs_go_on(straight: Straight, run: Path) -> None:
    resumed = trainer(run, num_train_epochs=3)
    resumed.train(resume_from_checkpoint=True)
    told = losses(resumed)
    assert list(told) == list(range(1, 19))
    assert {step: told[step] for step in straight.losses} == straight.losses


def test_what_cannot_be_is_said_at_once(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="hub_strategy='every_save'"):
        trainer(tmp_path, push_to_hub=True)
    with pytest.raises(ValueError, match="metric_for_best_model"):
        trainer(tmp_path, save_strategy="best", eval_strategy="steps", eval_steps=2)


def test_any_subclass_takes_the_mixin(straight: Straight, tmp_path: Path) -> None:
    class Weighted(Trainer):
        def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().compute_loss(*args, **kwargs)

    class Mine(DistCkptMixin, Weighted):
        pass

    made = trainer(tmp_path / "run", kind=Mine, max_steps=2)
    made.train()
    assert losses(made)[1] == 2 * straight.losses[1]
    assert run_of(tmp_path / "run").steps() == [2]


def test_the_block_of_the_readme_and_the_guide_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = (
        each
        for each in guides.blocks((ROOT / "README.md").read_text(), "python")
        if "DistCkptTrainer" in each
    )
    names = {"model": net(), "args": arguments("runs/16", max_steps=1), "dataset": Tokens()}
    exec(compile(block, "README.md", "exec"), names)  # noqa: S102 - our own README
    assert Run("runs/16").steps() == [1]
    exec(compile(guides.program(guides.guide("transformers")), "guide", "exec"), {})  # noqa: S102
    assert Run("elsewhere/18").steps() == [4]
    assert Run("runs/19").steps() == [4, 8]


def test_tries_of_one_process_are_no_starts_in_vain(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    finding = trainer(tmp_path / "run", callbacks=[TooLarge(2)], max_steps=2, **FINDING)
    finding.train()
    assert run_of(tmp_path / "run").manifest(2).claim > 4, "it was tried several times"
    assert "one after the other, ended without a checkpoint" not in caplog.text
