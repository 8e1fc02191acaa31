"""One checkpoint, no loop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias, Unpack

from dist_ckpt.engine.handle import SaveHandle
from dist_ckpt.engine.job import Job, Place
from dist_ckpt.engine.loading import Loader
from dist_ckpt.engine.options import SaveKeywords, SaveOptions
from dist_ckpt.engine.report import LoadReport
from dist_ckpt.engine.saving import Saver
from dist_ckpt.errors import NotFound
from dist_ckpt.state.train_state import TrainState

State: TypeAlias = TrainState | Mapping[str, Any]


def save(
    state: State,
    url: Place,
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    timeout_seconds: float = 1800.0,
    **options: Unpack[SaveKeywords],
) -> None:
    """Save `state` as one checkpoint of the run at `url`; return when it is committed.

    The call takes the run over: a `Checkpointer` that was using it can no longer commit.

    Args:
        state: a `TrainState` or a mapping of parts.
        url: the run: a path, a URL, or a `Store`.
        step: under which step; a committed one is never overwritten.
        metrics: numbers by name, stored in the manifest.
        timeout_seconds: after this long the save fails on every rank.
        **options: `staging`, `when_busy`, `memory_limit_bytes`, `check_replicas`: see
            `dist_ckpt.engine.options.SaveOptions`.

    Raises:
        CheckpointError: nothing was committed. The same on every rank.
    """
    async_save(
        state, url, step=step, metrics=metrics, timeout_seconds=timeout_seconds, **options
    ).wait()


def async_save(
    state: State,
    url: Place,
    *,
    step: int = 0,
    metrics: Mapping[str, float] | None = None,
    timeout_seconds: float = 1800.0,
    **options: Unpack[SaveKeywords],
) -> SaveHandle:
    """Begin to save `state`; return as soon as it may change again. Arguments as for `save`.

    The interpreter does not end before the save is over.

    Raises:
        CheckpointError: the save could not begin; later failures are raised by `SaveHandle.wait`.
    """
    job = Job(url, timeout_seconds=timeout_seconds)
    saver = Saver(
        job, TrainState.of(state), keep=None, metadata={}, options=SaveOptions.of(options)
    )
    return saver.start_last(step, metrics or {})


def load(
    state: State, url: Place, *, step: int | None = None, timeout_seconds: float = 1800.0
) -> LoadReport:
    """Restore `state` in place from the newest checkpoint of the run at `url`, or from `step`.

    Args:
        state: a `TrainState` or a mapping of parts that match the stored ones.
        url: the run: a path, a URL, or a `Store`.
        step: which checkpoint; there is no falling back to another.
        timeout_seconds: after this long without all ranks the load fails.

    Raises:
        CheckpointError: the same on every rank; see `Checkpointer.restore`.
    """
    job = Job(url, timeout_seconds=timeout_seconds)
    try:
        report = Loader(job, TrainState.of(state)).load(step, fall_back=False, own=False)
    finally:
        job.leave()
    if report is None:  # `own=False` raises instead
        raise NotFound(f"no checkpoint in {job.url}")
    return report
