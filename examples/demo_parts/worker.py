"""The training program as the demo runs it: unchanged, but watched, and killed when told to.

Started by torchrun as `-m examples.demo_parts.worker --diary FOLDER [--kill-at STEP] -- ...`, with
the arguments of `train_gpt.py` at the end. Each rank keeps a diary of what happens to
checkpoints, which `records.py` reads.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_model_state_dict, get_optimizer_state_dict
from torch.distributed.tensor import DTensor

from dist_ckpt import events
from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from examples import train_gpt

VICTIM_RANK = 1

_Tree = dict[str, dict[str, object]]


class Diary:
    """Notes of one rank, one JSON line each; every start of the workers appends."""

    def __init__(self, folder: Path) -> None:
        self.rank = int(os.environ["RANK"])
        self.attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
        folder.mkdir(parents=True, exist_ok=True)
        self._file = (folder / f"rank{self.rank}.jsonl").open("a", buffering=1)

    def note(self, what: str, **values: object) -> None:
        """Write one line; it survives a SIGKILL that follows."""
        common = {"what": what, "rank": self.rank, "attempt": self.attempt, "time": time.time()}
        self._file.write(json.dumps({**values, **common}) + "\n")

    def note_event(self, event: events.Event) -> None:
        """Write down an event of dist_ckpt with all of its numbers."""
        fields = dataclasses.asdict(event)
        values = {k: v for k, v in fields.items() if isinstance(v, int | float | str)}
        self.note(type(event).__name__, **{k: v for k, v in values.items() if k != "rank"})


class Assassin:
    """Kills its own process with SIGKILL while the save of one step is in flight.

    It strikes when the first file of its rank is durable. At that moment the checkpoint cannot
    be committed, because rank 0 still waits for this rank's report.
    """

    def __init__(self, url: str, step: int, diary: Diary, *, whole_host: bool = False) -> None:
        self.url, self.step, self.diary, self.whole_host = url, step, diary, whole_host

    def __call__(self, event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and event.step == self.step:
            try:
                self.diary.note("killed", step=self.step, listed=listed_steps(self.url))
            finally:
                if self.whole_host:
                    kill_others_of_host()
                os.kill(os.getpid(), signal.SIGKILL)


def kill_others_of_host() -> None:
    """Kill torchrun, which would start the workers again, and all that it has started but this."""
    agent = os.getppid()
    tasks = Path(f"/proc/{agent}/task").glob("*/children")
    workers = {int(pid) for task in tasks for pid in task.read_text().split()}
    for pid in (agent, *(workers - {os.getpid()})):
        os.kill(pid, signal.SIGKILL)


class Watcher:
    """Writes down a digest of all tensors after the restore and at every save."""

    def __init__(self, options: train_gpt.Options, diary: Diary) -> None:
        self.options, self.diary = options, diary
        self.seen = False

    def __call__(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        restored, self.seen = not self.seen, True
        interval = self.options.checkpoint.checkpoint_interval or self.options.steps
        saved = step % interval == 0 or step == self.options.steps
        # A new run has no optimizer state yet, and asking for it would create one.
        if step and (restored or saved):
            digests = dict(full_digests(model, optimizer))
            at = "restore" if restored else "save"
            self.diary.note("digests", step=step, at=at, digests=digests)


def full_digests(model: nn.Module, optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, str]]:
    """Yield name and digest of every value of model and optimizer, each tensor made whole.

    All ranks must call this together: the shards of a tensor are gathered from all of them.
    """
    for name, value in get_model_state_dict(model).items():
        yield f"model.{name}", _digest(value)
    state = get_optimizer_state_dict(model, optimizer)
    for name, values in sorted(cast(_Tree, state["state"]).items()):
        for key, moment in sorted(values.items()):
            yield f"optimizer.{name}.{key}", _digest(moment)
    for number, group in enumerate(cast(list[dict[str, object]], state["param_groups"])):
        for key, setting in sorted(group.items()):
            yield f"optimizer.group{number}.{key}", _digest(setting)


def listed_steps(url: str) -> list[int]:
    """Return the steps that the run lists now."""
    return Repository(resolve(url)).steps()


def main() -> None:
    """Run one worker."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--diary", type=Path, required=True)
    parser.add_argument("--kill-at", type=int, default=None)
    parser.add_argument("--victim", type=int, default=VICTIM_RANK)
    parser.add_argument("--whole-host", action="store_true")
    parser.add_argument("training", nargs="+")
    arguments = parser.parse_args()
    options = train_gpt.parse_options(arguments.training)
    run = options.checkpoint.checkpoint_dir
    diary = Diary(arguments.diary)
    events.subscribe(diary.note_event)
    if arguments.kill_at and diary.rank == arguments.victim and diary.attempt == 0:
        whole = arguments.whole_host
        events.subscribe(Assassin(run, arguments.kill_at, diary, whole_host=whole))
    diary.note(
        "start",
        listed=listed_steps(run),
        epoch_steps=train_gpt.EPOCH_STEPS,
        samples=train_gpt.EPOCH_STEPS * train_gpt.GLOBAL_BATCH,
    )
    with train_gpt.process_group(options.device) as device:
        train_gpt.train(options, device, watch=Watcher(options, diary))
    diary.note("end")
    # All is done and durable. The teardown of a process that used FSDP2 over gloo aborts now and
    # then on a busy machine (torch 2.13: "terminate called without an active exception").
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _digest(value: object) -> str:
    if isinstance(value, DTensor):
        value = value.full_tensor()
    if not isinstance(value, torch.Tensor):
        return repr(value)
    raw = value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
    return f"{value.dtype} {list(value.shape)} {hashlib.sha256(raw.data).hexdigest()}"


if __name__ == "__main__":
    main()
