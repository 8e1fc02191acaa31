"""The object of the training loop. Thin: it decides when, the engine does the rest."""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self, Unpack

import msgspec

from dist_ckpt.engine.handle import SaveHandle
from dist_ckpt.engine.job import Job, Place
from dist_ckpt.engine.load_options import LoadKeywords
from dist_ckpt.engine.loading import Loader
from dist_ckpt.engine.report import LoadReport
from dist_ckpt.engine.saving import Saver
from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.policy import every
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.state.train_state import TrainState


class Checkpointer:
    """Saves and restores the state of a training run.

    ::

        with Checkpointer("runs/17", state, every_steps=500, keep=keep.latest(3)) as ckpt:
            for step in range(ckpt.restore() + 1, total_steps + 1):
                loss = train_step()
                ckpt.step(step, metrics={"train/loss": loss})

    Every rank of the default process group makes the same calls in the same order. Leaving the
    `with` block finishes the save in flight.

    Attributes:
        restored: what the last `restore` did, None before it and for a new run.
    """

    def __init__(
        self,
        url: Place,
        state: TrainState | Mapping[str, Any],
        *,
        every_steps: int | None = None,
        keep: KeepPolicy | None = None,
        timeout_seconds: float = 1800.0,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        """Describe the run; nothing is read, written or asked of other ranks yet.

        Args:
            url: the run: a path, a URL, or a `Store`.
            state: what to save and restore; a plain mapping of parts becomes a `TrainState`.
            every_steps: let `step` save at every multiple of this; None for never by itself.
            keep: which checkpoints to keep after each commit, from `dist_ckpt.keep`; None for all.
            timeout_seconds: after this long a save or a restore fails on every rank.
            metadata: any JSON, stored in the manifest of every checkpoint.

        Raises:
            UsageError: an argument is malformed.
        """
        self._when = every(every_steps)
        self._job = Job(url, timeout_seconds=timeout_seconds)
        train_state = TrainState.of(state)
        self._saver = Saver(
            self._job, train_state, keep=keep, metadata=checked_metadata(metadata or {})
        )
        self._loader = Loader(self._job, train_state)
        self._closed = False
        self.restored: LoadReport | None = None

    def restore(
        self,
        *,
        step: int | None = None,
        url: Place | None = None,
        **options: Unpack[LoadKeywords],
    ) -> int:
        """Take the run over and restore the state in place; return the step to go on from.

        Without `step` and `url` that is the newest checkpoint, or the one before when it is
        damaged, and 0 for a new run (the state is then unchanged). `restored.refused` tells what
        was passed over.

        Args:
            step: restore exactly this one, with no falling back.
            url: restore from elsewhere, with no falling back: another run, one step directory of
                it, or what another program wrote; see `dist_ckpt.load`. The run that is taken over
                is this Checkpointer's own all the same.
            **options: `strict`, `only`, `skip`, `rename`, `cast`, `device`, `verify`, `exchange`,
                `in_flight_bytes`: see `dist_ckpt.engine.load_options.LoadOptions`. With
                `skip=["optimizer", "scheduler"]` training begins anew on the restored model.

        Raises:
            IncompatibleError: the checkpoint does not fit the state; nothing was changed.
            IntegrityError: every checkpoint (or the one asked for) is damaged.
            NotFound: `step` is not committed, or there is nothing at `url`.
            UsageError: an option is malformed, differs between ranks, or matches no name.
            CoordinationError: a rank failed or did not arrive.
            CheckpointError: the save before failed, and nobody was told yet.
        """
        self._check_open()
        failed = self._saver.settle()
        self.restored = self._loader.load(
            step,
            place=url,
            options=options,
            fall_back=step is None and url is None,
            own=True,
            failed=failed,
        )
        return 0 if self.restored is None else self.restored.step

    def step(self, step: int, *, metrics: Mapping[str, float] | None = None) -> SaveHandle | None:
        """Tell that `step` is done: saves when due, see `save`; returns None otherwise."""
        return self.save(step, metrics=metrics) if self._when(step) else None

    def save(self, step: int, *, metrics: Mapping[str, float] | None = None) -> SaveHandle:
        """Save now; return as soon as the state may change again, the rest runs in the background.

        Args:
            step: the training step that the state stands after.
            metrics: numbers by name, stored in the manifest.

        Raises:
            CheckpointError: the save could not begin, or the one before failed and nobody was told
                yet. The same on every rank.
        """
        self._check_open()
        return self._saver.start(step, metrics or {})

    def wait(self) -> None:
        """Wait until the save in flight, and the retention after it, are over.

        Raises:
            CheckpointError: the save failed.
        """
        self._saver.drain()

    def close(self) -> None:
        """Finish the save in flight and release everything; a second call does nothing.

        Raises:
            CheckpointError: the save failed.
        """
        if not self._closed:
            self._closed = True
            self._saver.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.close()
        except CheckpointError as failure:
            if error is None:
                raise
            # The exception that ended the loop is the news; the failed save is a note to it.
            error.add_note(f"besides, the save in flight failed: {failure}")

    def _check_open(self) -> None:
        if self._closed:
            raise UsageError("this Checkpointer is closed: make a new one to go on")


def checked_metadata(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Return `metadata` if it is JSON.

    Raises:
        UsageError: it is not.
    """
    try:
        msgspec.json.encode(metadata)
    except (TypeError, ValueError, msgspec.MsgspecError) as error:
        raise UsageError(f"metadata must be plain JSON values: {error}") from error
    return dict(metadata)
