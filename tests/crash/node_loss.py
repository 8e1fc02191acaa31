"""A training on two hosts that loses one of them at a chosen moment of a save or of a restore."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, cast
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import CheckpointError
from dist_ckpt.ranks import rendezvous
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from tests.services.hosts import Hosts

T = TypeVar("T")

GLOBAL_BATCH, WIDTH = 4, 16
SAVE_EVERY = 2
# So long a host may say nothing; what is alive answers in the kernel, however busy it is.
SILENCE_SECONDS = 2.0
HOST_OF = (0, 0, 1, 1)


@dataclass(frozen=True)
class Moment:
    """When a host is lost.

    Attributes:
        during: what it is in the middle of.
        what: the storage operation, or "state" where the state is asked for or given back.
        key: what the key of the operation ends with.
        when: "before" it or "after" it was done.
        rank: whose; its host is the one that is lost.
    """

    during: Literal["save", "restore"]
    what: Operation | Literal["state"]
    key: str
    when: Literal["before", "after"]
    rank: int

    def __str__(self) -> str:
        return f"{self.during}, {self.when} {self.what} {self.key} of rank {self.rank}"


MOMENTS = (
    Moment("save", "put", ".safetensors", "before", 2),
    Moment("save", "put", ".safetensors", "after", 3),
    Moment("restore", "read_into", ".safetensors", "after", 2),
    Moment("save", "state", "", "before", 3),
    Moment("save", "put", ".safetensors", "after", 0),
    Moment("save", "put", "manifest.json", "before", 0),
    Moment("save", "put", "manifest.json", "after", 0),
    Moment("restore", "read_into", "manifest.json", "after", 0),
    Moment("restore", "read_into", ".safetensors", "before", 1),
    Moment("restore", "state", "", "after", 3),
)


@dataclass(frozen=True)
class Loss:
    """A host that is lost: when, and whether it is killed or its cable is cut."""

    moment: Moment
    how: Literal["killed", "cut"]

    @property
    def host(self) -> int:
        """Which."""
        return HOST_OF[self.moment.rank]

    @property
    def ranks(self) -> list[int]:
        """Whatever runs there."""
        return [rank for rank, host in enumerate(HOST_OF) if host == self.host]


class Blow:
    """Loses a host at its moment: once, and only when it is armed."""

    def __init__(self, loss: Loss, hosts: Hosts, pids: Path) -> None:
        self.loss, self.hosts, self.pids = loss, hosts, pids
        self.rank = dist.get_rank()
        self.armed: str = ""
        self._lock = threading.Lock()
        (pids / str(self.rank)).write_text(str(os.getpid()))

    def comes(self, what: str, key: str, when: str) -> None:
        """Strike if this is the moment."""
        moment = self.loss.moment
        if self.rank != moment.rank or self.armed != moment.during:
            return
        with self._lock:
            if (what, when) == (moment.what, moment.when) and key.endswith(moment.key):
                self.armed = ""
                if self.loss.how == "cut":
                    self.hosts.cut(self.loss.host)
                else:
                    self.end_host()

    def end_host(self) -> None:
        """Kill every rank of the host; whoever does it last of all, if it is there itself."""
        for rank in sorted(self.loss.ranks, key=lambda rank: rank == self.rank):
            os.kill(int((self.pids / str(rank)).read_text()), signal.SIGKILL)


class Struck(StoreWrapper):
    """A store at one of whose operations a host is lost."""

    def __init__(self, url: str, blow: Blow) -> None:
        super().__init__(resolve(url))
        self._blow = blow

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        self._blow.comes(operation, key, "before")
        result = run()
        self._blow.comes(operation, key, "after")
        return result


class Tripwire:
    """Something stateful, which notes when it is asked."""

    def __init__(self, blow: Blow | None) -> None:
        self._blow = blow

    def state_dict(self) -> dict[str, int]:
        if self._blow:
            self._blow.comes("state", "", "before")
        return {"n": 1}

    def load_state_dict(self, _: dict[str, int]) -> None:
        if self._blow:
            self._blow.comes("state", "", "after")


def enter(hosts: Hosts, world_size: int, *, survivor: int = 0) -> None:
    """Be on the host of this rank; all of half a job are on the one that is left."""
    rank = dist.get_rank()
    host = hosts[HOST_OF[rank] if world_size == 4 else survivor]
    host.enter()
    os.environ.update(LOCAL_WORLD_SIZE="2", GLOO_SOCKET_IFNAME=host.interface)


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(WIDTH, 64), nn.Tanh(), nn.Linear(64, WIDTH))
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    sharded = cast(nn.Module, fully_shard(model, mesh=mesh))
    return sharded, torch.optim.AdamW(sharded.parameters(), lr=1e-2)


def train_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int) -> str:
    """Take one step on this rank's share of the global batch; return the loss over all of it."""
    rows = torch.randn(
        GLOBAL_BATCH, WIDTH, generator=torch.Generator().manual_seed(1000 + step)
    ).chunk(dist.get_world_size())[dist.get_rank()]
    loss = (model(rows) - rows.flip(1)).square().mean()
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()
    total = loss.detach()
    dist.all_reduce(total)
    return (float(total) / dist.get_world_size()).hex()


@dataclass(frozen=True)
class Life:
    """What one start of the job did: where it began, its losses by step, and how it ended."""

    resumed: int
    losses: dict[int, str]
    error: str = ""


def train(
    url: str,
    upto: int,
    hosts: Hosts | None = None,
    survivor: int = 0,
    loss: tuple[Loss, str] | None = None,
) -> Life:
    """Go on with the run up to a step.

    Args:
        url: the run.
        upto: the last step.
        hosts: where the ranks are; None: all on this machine.
        survivor: the host of half a job.
        loss: of a host, and a folder where its ranks say who they are.
    """
    model, optimizer = build()
    losses: dict[int, str] = {}
    resumed = -1
    if hosts is not None:
        enter(hosts, dist.get_world_size(), survivor=survivor)
    blow = Blow(loss[0], cast(Hosts, hosts), Path(loss[1])) if loss else None
    dist.barrier()
    state: dict[str, Any] = {"model": model, "optimizer": optimizer, "wire": Tripwire(blow)}
    place: Any = Struck(url, blow) if blow else url
    with mock.patch.object(rendezvous, "silence_for", return_value=SILENCE_SECONDS):
        try:
            with dist_ckpt.Checkpointer(
                place, state, keep=keep.latest(2), save_last=False, timeout_seconds=3600
            ) as ckpt:
                arm(blow, "restore")
                resumed = ckpt.restore()
                for step in range(resumed + 1, upto + 1):
                    losses[step] = train_step(model, optimizer, step)
                    if step % SAVE_EVERY == 0:
                        arm(blow, "save" if step > resumed + SAVE_EVERY else "")
                        ckpt.save(step).wait()
                if blow and blow.rank in blow.loss.ranks:
                    signal.pause()  # cut off once all was said: until it is ended
        except CheckpointError as error:
            if blow is None:
                raise
            end_the_lost(blow)
            return Life(resumed, losses, f"{type(error).__name__}: {error}")
    return Life(resumed, losses)


def arm(blow: Blow | None, during: str) -> None:
    if blow:
        blow.armed = during


def end_the_lost(blow: Blow) -> None:
    """Where the lost host still runs, without a network: end it, as an operator would."""
    if blow.rank in blow.loss.ranks:
        signal.pause()
    survivors = [rank for rank in range(len(HOST_OF)) if rank not in blow.loss.ranks]
    if blow.loss.how == "cut" and blow.rank == survivors[0]:
        blow.end_host()
