"""What saves and restores cost, as scalars: for TensorBoard, or anything else with `add_scalar`."""

from __future__ import annotations

from typing import Any, Protocol

from dist_ckpt.events import CheckpointRestored, Event, SaveCommitted


class ScalarWriter(Protocol):
    """What is needed of a writer; `torch.utils.tensorboard.SummaryWriter` is one."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any:
        """Write one value of the curve `tag`."""
        ...


class Scalars:
    """A listener that writes each save and each restore down.

    ```python
    import dist_ckpt
    import torch


    class Lines:  # or a SummaryWriter("logs")
        def add_scalar(self, tag, scalar_value, global_step):
            print(global_step, tag, scalar_value)


    leave = dist_ckpt.events.subscribe(dist_ckpt.scalars.Scalars(Lines()))
    dist_ckpt.save({"model": torch.nn.Linear(4, 1)}, "runs/17")
    leave()
    ```

    The values are those of the rank that subscribes, so one rank is enough. The curves are, in
    seconds and bytes: `stall_seconds` (how long the training step waited), `save_seconds` (from
    the call to the commit), `write_seconds` and `commit_seconds` (shares of that), `saved_bytes`,
    `restore_seconds` and `restored_bytes`.

    Args:
        writer: gets the values, on the background thread of the saves.
        prefix: of all tags.
    """

    def __init__(self, writer: ScalarWriter, *, prefix: str = "checkpoint") -> None:
        self._writer = writer
        self._prefix = prefix

    def __call__(self, event: Event) -> None:
        """Write what `event` says, if it is of a save or a restore."""
        if isinstance(event, SaveCommitted):
            seconds = event.stall_seconds + event.write_seconds + event.commit_seconds
            values = {
                "stall_seconds": event.stall_seconds,
                "save_seconds": seconds,
                "write_seconds": event.write_seconds,
                "commit_seconds": event.commit_seconds,
                "saved_bytes": event.nbytes,
            }
            self._write(event.step, values)
        elif isinstance(event, CheckpointRestored):
            values = {"restore_seconds": event.seconds, "restored_bytes": event.nbytes}
            self._write(event.step, values)

    def _write(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(f"{self._prefix}/{name}", value, step)
