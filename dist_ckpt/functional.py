"""One checkpoint, no loop."""

from __future__ import annotations

import glob
from collections.abc import Callable, Mapping
from typing import Any, Literal, SupportsIndex, TypeAlias, Unpack

import torch
from torch import nn

from dist_ckpt.errors import NotFound
from dist_ckpt.format.names import check_part, plain_step
from dist_ckpt.loading.choosing import Which
from dist_ckpt.loading.loader import Loader, LoadReport
from dist_ckpt.loading.opened import which_of
from dist_ckpt.options import TIMEOUT_SECONDS, LoadCallKeywords, SaveKeywords, SaveOptions
from dist_ckpt.ranks.job import JOB_KEYWORDS, JobRanks, job_of_call
from dist_ckpt.repository.ranking import Mode
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.saving.provenance import as_given
from dist_ckpt.saving.saver import Saver, finish_before
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.train_state import TrainState, stoppers_of
from dist_ckpt.storage.resolve import Place
from dist_ckpt.training.early import (
    check_generators_kept,
    check_job_holds_all,
    checked_metadata,
)

# How many models torch's `AveragedModel` has averaged: beside the weights, and none of them.
_NO_WEIGHTS = frozenset({"n_averaged"})

State: TypeAlias = TrainState | Mapping[str, Any]


def save(
    state: State,
    url: Place,
    *,
    step: SupportsIndex = 0,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    **options: Unpack[SaveKeywords],
) -> None:
    """Save `state` as one checkpoint of the run at `url`; return when it is committed.

    The call takes the run over: a `Checkpointer` that was using it can no longer commit.

    Args:
        state: a `TrainState` or a mapping of parts.
        url: the run: a path, a URL, or a `Store`.
        step: under which step; a committed one is never overwritten.
        metrics: numbers by name, stored in the manifest.
        metadata: any JSON, stored in the manifest.
        timeout_seconds: after this long the save fails on every rank.
        **options: `staging`, `when_busy`, `memory_limit_bytes`, `check_replicas`, `command`: see
            `dist_ckpt.options.SaveOptions`. `ranks="alone"`: this process saves alone,
            whatever the others do; `process_group`: the ranks of that group save together;
            `node_local`: each host has a folder of its own there. See
            `dist_ckpt.ranks.rendezvous.JobRanks`.

    Raises:
        CheckpointError: nothing was committed. The same on every rank.
        Exception: what the state of this rank raised, as it was; on other ranks it is a
            `CoordinationError`.
    """
    async_save(
        state,
        url,
        step=step,
        metrics=metrics,
        metadata=metadata,
        timeout_seconds=timeout_seconds,
        **options,
    ).wait()


def async_save(
    state: State,
    url: Place,
    *,
    step: SupportsIndex = 0,
    metrics: Mapping[str, float] | None = None,
    metadata: Mapping[str, Any] | None = None,
    timeout_seconds: float = TIMEOUT_SECONDS,
    **options: Unpack[SaveKeywords],
) -> SaveHandle:
    """Begin to save `state`; return as soon as it may change again. Arguments as for `save`.

    The interpreter does not end before the save is over.

    Raises:
        CheckpointError: the save could not begin; later failures are raised by `SaveHandle.wait`.
    """
    ranks = JobRanks.of(options)
    # It adds to what is there, and nothing goes on from it: no restore is asked for.
    job, failed = job_of_call(url, ranks, timeout_seconds=timeout_seconds, joins=True)
    train_state, chosen = TrainState(rng=None), SaveOptions()
    said: Mapping[str, Any] = {}
    numbers: Mapping[str, Any] = {}
    try:
        chosen = SaveOptions.of(options, besides=("step", "metrics", "metadata", "timeout_seconds"))
        said, numbers = checked_metadata(metadata), as_given(metrics)
        train_state = TrainState.of(state, once=True)
        check_generators_kept(train_state)
        check_job_holds_all(train_state, ranks)
    except Exception as error:
        # Carried to the other ranks, which would wait for this one otherwise.
        failed = failed or error
    # No policy: retention is of a training, and a single save deletes no checkpoint.
    saver = Saver(job, train_state, keep=None, metadata=said, options=chosen)
    return saver.start_last(plain_step(step), numbers, failed=failed)


def load(
    state: State,
    url: Place,
    *,
    step: SupportsIndex | Literal["best"] | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    timeout_seconds: float = TIMEOUT_SECONDS,
    **options: Unpack[LoadCallKeywords],
) -> LoadReport:
    """Restore `state` in place from one checkpoint; there is no falling back to another.

    Modules, optimizers and tensors are filled where they lie, at any depth of dicts and lists, so
    `model.state_dict()` fills the model. Numbers and other plain values cannot change: the loaded
    ones are in `state` afterwards (`state["epoch"]`), and a variable that was given to it keeps
    what it had. A dict that is a copy, as `optimizer.state_dict()` returns one, is refused: give
    the optimizer.

    Nothing is written: a training that uses the run goes on undisturbed. A save to the run that
    this process has in flight, of the same ranks, is waited for first.

    Every rank makes the call, with the same arguments. All that does not fit is found before the
    first byte of a tensor is read, and is one error on every rank.

    Args:
        state: a `TrainState` or a mapping of parts that match the stored ones.
        url: a run, of which the newest checkpoint is loaded; one of its step directories
            (`runs/17/step-0000000100`); or what `torch.distributed.checkpoint`, safetensors or
            `torch.save` wrote, a directory or a file. A path, a URL, or a `Store`. A step directory
            may have been copied, renamed, or be reached by a link.
        step: which checkpoint of the run: its number, or "best".
        metric: by what it is the best; by default that of an early stopping in the state.
        mode: "min" when smaller is better, "max" when larger is.
        timeout_seconds: after this long without all ranks the load fails.
        **options: `strict`, `only`, `skip`, `rename`, `cast`, `device`, `ties`, `verify`,
            `exchange`, `in_flight_bytes`: see `dist_ckpt.options.LoadOptions`;
            `ranks`, `process_group`, `node_local`: as for `save`.

    Returns:
        What was done, and from where.

    Raises:
        CheckpointError: the same on every rank; see `Checkpointer.restore`.
    """
    return _load(
        lambda: TrainState.of(state),
        url,
        which=lambda made: which_of(
            step, metric, mode, [stopper.criterion for stopper in stoppers_of(made)]
        ),
        timeout_seconds=timeout_seconds,
        options=options,
    )


def load_weights(
    model: nn.Module | Mapping[str, torch.Tensor],
    url: Place,
    *,
    step: SupportsIndex | Literal["best"] | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    part: str = "model",
    timeout_seconds: float = TIMEOUT_SECONDS,
    **options: Unpack[LoadCallKeywords],
) -> LoadReport:
    """Load one module, or a dict of tensors, in place; nothing else of the checkpoint is read.

    Arguments and errors are those of `load`. A model that was built on the meta device gets its
    memory here, once, on `device`.

    Args:
        model: where the weights go.
        url: a run, or one checkpoint, of another program too; see `load`.
        step: which checkpoint of the run: its number, "best", or None for the newest.
        metric: by what it is the best.
        mode: "min" when smaller is better, "max" when larger is.
        part: which part of it the weights are: `ema` loads the averaged ones into `model`, whether
            a module was saved there (torch's `AveragedModel`) or a dict of tensors by name.
        timeout_seconds: after this long without all ranks the load fails.
        **options: those of `load`; names begin with `part`, as in `skip=["model/head.*"]`.

    Returns:
        What was done, and from where.

    Raises:
        CheckpointError: the same on every rank; see `Checkpointer.restore`.
    """
    keywords: dict[str, Any] = {**options}
    # What is no name is refused below, where all ranks hear of it.
    if keywords.get("only") is None and isinstance(part, str):
        keywords["only"] = glob.escape(part)  # other parts are neither wanted nor unexpected

    def state() -> TrainState:
        check_part(part)
        weights: ModelPart | TensorsPart
        if isinstance(model, nn.Module):
            weights = ModelPart(model, name=part, passed_over=_NO_WEIGHTS)
        else:
            weights = TensorsPart(model, name=part, passed_over=_NO_WEIGHTS)
        parts: dict[str, Any] = {part: weights}
        # Weights alone: the random numbers of this process are none of theirs.
        return TrainState(rng=None, **parts)

    return _load(
        state,
        url,
        which=lambda _: which_of(step, metric, mode),
        timeout_seconds=timeout_seconds,
        options=keywords,
    )


def _load(
    make_state: Callable[[], TrainState],
    url: Place,
    *,
    which: Callable[[TrainState], Which],
    timeout_seconds: float,
    options: Mapping[str, Any],
) -> LoadReport:
    # Which ranks take part is said to the job, and the rest to the load.
    keywords = {name: value for name, value in options.items() if name not in JOB_KEYWORDS}
    ranks = JobRanks.of(options)
    job, failed = job_of_call(url, ranks, timeout_seconds=timeout_seconds, commits=False)
    chosen: Which = None
    finish_before(job)  # what is asked for may be what this very process is still writing
    try:
        state = make_state()
        check_job_holds_all(state, job.ranks)
        chosen = which(state)
    except Exception as error:
        # Carried to the other ranks, which would wait for this one otherwise.
        state, failed = TrainState(rng=None), failed or error
    try:
        report = Loader(job, state).load(
            chosen,
            # What lies on several hosts is looked for as the run of the job that they form.
            place=None if job.ranks.node_local else url,
            options=keywords,
            fall_back=False,
            own=False,
            failed=failed,
        )
    finally:
        # Also after an error: rank 0 has to know that this rank was told.
        job.leave()
    if report is None:  # `own=False` raises instead
        raise NotFound(f"no checkpoint in {job.url}")
    return report
