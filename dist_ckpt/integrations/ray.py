"""Ray Train: checkpoints where Ray keeps those of the experiment, reported when they are committed.

```python
import dist_ckpt
from dist_ckpt.integrations.ray import Reports, run_of_experiment


def train_worker(config):
    state = dist_ckpt.TrainState(model=model, optimizer=optimizer)
    ckpt = dist_ckpt.Checkpointer(run_of_experiment(), state, every_steps=500)
    with ckpt, Reports() as reports:
        for step in range(ckpt.restore() + 1, 1501):
            loss = train_step()
            reports.add(ckpt.step(step), {"loss": float(loss)})
```

Ray itself copies nothing and deletes nothing; `restore` finds the newest checkpoint that is whole.
Needs `ray[train]` with its second version of Train, which is the one by default; loaded by nobody
else.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Any, Self

from ray import train

from dist_ckpt.errors import UsageError
from dist_ckpt.format.names import check_part, step_dir
from dist_ckpt.integrations.versions import warn_if_untested
from dist_ckpt.saving.handle import SaveHandle

TESTED = "2.60"
"""The release of Ray that this was tried with."""

# By `FileSystem.type_name` of pyarrow.
_SCHEMES = {"local": "", "s3": "s3://", "gcs": "gs://", "abfs": "az://"}


def run_of_experiment(name: str = "run") -> str:
    """Return the place of a run in the storage of this experiment: `storage_path` and its name.

    Args:
        name: the folder in it.

    Raises:
        UsageError: it is a file system that no URL names.
    """
    warn_if_untested("ray", first=TESTED, last=TESTED)
    storage = train.get_context().get_storage()
    return _url(storage.storage_filesystem, f"{storage.experiment_fs_path}/{check_part(name)}")


def url_of(checkpoint: train.Checkpoint) -> str:
    """Return the place of a checkpoint that Ray was told of, such as `result.checkpoint`.

    Ray keeps its path without a scheme, so on S3 `checkpoint.path` alone names no place.

    Args:
        checkpoint: what `Reports` reported.

    Raises:
        UsageError: it is on a file system that no URL names.
    """
    return _url(checkpoint.filesystem, checkpoint.path)


def _url(filesystem: Any, path: str) -> str:
    kind = filesystem.type_name
    if kind not in _SCHEMES:
        raise UsageError(
            f"the storage of this experiment is a file system of type {kind!r}, which no URL "
            "names: give storage_path as a path or an s3:// URL"
        )
    return f"{_SCHEMES[kind]}{path}"


class Reports:
    """Tells Ray of each checkpoint once it is committed. Every worker makes the same calls.

    A save goes on in the background while training does: it is reported at the next save, or at
    the end of the `with` block. What `Checkpointer.close` saves after that is not reported: let
    the last step be one that is due.

    Args:
        name: as for `run_of_experiment`.
    """

    def __init__(self, name: str = "run") -> None:
        self._run = run_of_experiment(name)
        self._waiting: tuple[SaveHandle, dict[str, Any]] | None = None

    def add(self, handle: SaveHandle | None, metrics: Mapping[str, Any]) -> None:
        """Report the save before, and wait with this one.

        Args:
            handle: what `Checkpointer.step` or `save` returned; None, where nothing was due, is
                not reported.
            metrics: by name; Ray takes those of rank 0.

        Raises:
            CheckpointError: the save before failed.
        """
        if handle is not None and handle.outcome != "skipped":
            self.flush()
            self._waiting = handle, dict(metrics)

    def flush(self) -> None:
        """Wait until the last save is committed, and report it.

        Raises:
            CheckpointError: it failed.
        """
        if self._waiting is None:
            return
        # Taken out first: a save that failed is told once, and not again at the end.
        (handle, metrics), self._waiting = self._waiting, None
        # Ray is told of nothing that may still fail.
        handle.wait()
        storage = train.get_context().get_storage()
        # As Ray has it: a path without a scheme, and the file system beside it.
        folder = self._run.partition("://")[2] or self._run
        train.report(
            metrics,
            checkpoint=train.Checkpoint(
                f"{folder}/{step_dir(handle.step)}", filesystem=storage.storage_filesystem
            ),
            # It lies where Ray would have put it.
            checkpoint_upload_mode=train.CheckpointUploadMode.NO_UPLOAD,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        # After an error other workers may not come, and `train.report` waits for all of them.
        if error is None:
            self.flush()
