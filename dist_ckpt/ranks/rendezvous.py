"""Which ranks form a job, and setting up its coordinators: a connection of each rank to rank 0."""

from __future__ import annotations

import hmac
import ipaddress
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal, Self, TypeAlias, TypedDict

import msgspec
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store
from torch.distributed.tensor import DTensor

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CoordinationError, ErrorKind, UsageError, describe, from_wire, to_wire
from dist_ckpt.ranks.addresses import host_addresses
from dist_ckpt.ranks.channels import SILENCE_SECONDS, framed, receive, set_options
from dist_ckpt.ranks.coordinator import JobCoordinator, Line
from dist_ckpt.ranks.greeting import GREETING_LIMIT_BYTES, hello, proof, seals
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rounds import Coordinator, SoloCoordinator
from dist_ckpt.ranks.seals import Seals
from dist_ckpt.ranks.waiting import ALIKE, Waiting

_log = logging.getLogger("dist_ckpt")

# Most addresses answer at once or not at all; only when none does is one waited for longer.
_QUICK_SECONDS = 1.0
CONNECT_SECONDS = 5.0
"""How long an address of rank 0 that does not answer at once is waited for."""

GREETING_SECONDS = 20.0
"""How long rank 0 is waited for to greet: longer, as it may be greeting thousands."""

_RETRY_SECONDS = 0.2
_FIRST_NAP_SECONDS = 0.005
# How often, at most, all ranks together ask the store of the training whether rank 0 is there.
_QUESTIONS_PER_SECOND = 1000
DOUBT_SECONDS = 5.0
"""How long a failure of rank 0 is not believed: one that was started anew replaces it."""

# Even where the deadline of a save is near, a host may be out of reach for a moment.
_LEAST_SILENCE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Coordinators:
    """Two coordinators of one job, one for each thread that takes part in rounds."""

    training: Coordinator
    writer: Coordinator


@dataclass(slots=True)
class _Connection:
    """This process's link to the ranks of one group, which lasts as long as that group."""

    group: ProcessGroup
    # A store may outlive a process group, and with it the address that rank 0 published there.
    # The ranks of a group set up their jobs together: a number for each group that was known by
    # one name keeps addresses apart.
    number: int
    jobs: Iterator[int]
    link: Hub | Line | None = None


_WORLD = "world"
_connections: dict[str, _Connection] = {}
# The connections of the parent are closed in a forked child, which has to make its own.
os.register_at_fork(after_in_child=_connections.clear)


def join_job(*, timeout_seconds: float, ranks: JobRanks | None = None) -> Coordinators:
    """Set up coordination with the other ranks of the job, if there are any.

    For the first job of a process group its rank 0 opens a port and publishes where, in the store
    of the default group, which is used for nothing else. One connection of each rank is enough for
    all jobs and threads of a group.

    Args:
        timeout_seconds: how long to wait for rank 0 to appear.
        ranks: which ranks form the job; None for those of the default process group.

    Raises:
        CoordinationError: rank 0 did not open its port in time, or it cannot be reached.
    """
    ranks = ranks or JobRanks()
    group = ranks.group()
    if group is None:
        return Coordinators(SoloCoordinator(), SoloCoordinator())
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)
    name = _name(group)
    known = _connections.get(name)
    if known is None or known.group is not group:
        number = 0 if known is None else known.number + 1
        known = _connections[name] = _Connection(group, number, itertools.count())
    if known.link is None:  # also when a try before this one failed
        prefix = f"dist_ckpt/{known.number}" + ("" if name == _WORLD else f"/{name}")
        known.link = open_link(rank, world_size, prefix, timeout_seconds)
    # Every rank sets its jobs up in the same order, so equal numbers meet.
    job = next(known.jobs)
    return Coordinators(JobCoordinator(known.link, job), JobCoordinator(known.link, job))


def _name(group: ProcessGroup) -> str:
    """Return what its own ranks call a group alike, and no other ranks any other."""
    if group is dist.group.WORLD:
        return _WORLD
    # Groups that exist at one time may have the same ranks, or bear one name on other ranks.
    members = "-".join(map(str, dist.get_process_group_ranks(group)))
    return f"{group.group_name}/{members}"


@decodable
class Address(msgspec.Struct, frozen=True):
    """What rank 0 publishes: where it may be reached and by whom, or why it cannot be.

    Attributes:
        master: what the training calls the host of its store, which most often is rank 0's.
        hostname: of rank 0, as it calls itself.
        hosts: its addresses.
        port: where it listens.
        secret: what a rank has to know to be let in, in hexadecimal.
        failure: why it does not listen, as `errors.to_wire` puts it.
    """

    master: str = ""
    hostname: str = ""
    hosts: tuple[str, ...] = ()
    port: int = 0
    secret: str = ""
    failure: dict[str, object] = {}

    @classmethod
    def of(cls, hub: Hub) -> Self:
        """Return the address of a hub of this process."""
        master = os.environ.get("MASTER_ADDR", "")
        hosts = tuple(host_addresses())
        return cls(master, socket.gethostname(), hosts, hub.port, hub.secret.hex())


def training_store() -> Store:
    """Return the store of the default process group, by which the ranks of a training meet."""
    return _get_default_store()


def open_link(rank: int, world_size: int, prefix: str, timeout_seconds: float) -> Hub | Line:
    """Open the port of rank 0 and publish where, or connect another rank to it.

    Args:
        rank: this one.
        world_size: how many there are.
        prefix: of the keys in the store of the training.
        timeout_seconds: how long to wait for rank 0 to appear.

    Raises:
        CoordinationError: rank 0 did not open its port in time, or it cannot be reached.
    """
    shared = PrefixStore(prefix, training_store())
    if rank == 0:
        _warn_of_old_store()
        return _serve(shared, world_size, silence_seconds=silence_for(timeout_seconds))
    begun = time.monotonic()
    while True:
        address = _await_address(shared, world_size, timeout_seconds)
        try:
            if address.failure:
                raise from_wire(address.failure)
            until, silence = begun + timeout_seconds, silence_for(timeout_seconds)
            return connect(address, rank, world_size, until=until, silence_seconds=silence)
        except CoordinationError:
            # A store that outlives a restart of the job may still hold the address of a dead rank
            # 0: the living one replaces it as soon as it gets here.
            patience = min(timeout_seconds, DOUBT_SECONDS) if address.failure else timeout_seconds
            if time.monotonic() > begun + patience:
                raise
            time.sleep(_RETRY_SECONDS)


def silence_for(timeout_seconds: float) -> float:
    """Return how long a host may say nothing: so that it is known to be gone by the deadline."""
    return min(SILENCE_SECONDS, max(_LEAST_SILENCE_SECONDS, timeout_seconds / 2))


def _warn_of_old_store() -> None:
    """Say it before the first restart, which may end before anything of ours is called."""
    # "True" where torchrun shares its own store with the workers.
    shares = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    if shares and os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") != "0":
        _log.warning(
            "torchrun will hand restarted workers the store of those before them, where they find "
            "the addresses of dead processes and may fail to join: set "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 where torchrun is started"
        )


def _serve(shared: Store, world_size: int, *, silence_seconds: float) -> Hub:
    try:
        # Where torchrun has started all ranks on this host, nobody else has to reach the port.
        everybody = os.environ.get("WORLD_SIZE", "")
        loopback = os.environ.get("LOCAL_WORLD_SIZE") == everybody != ""
        hub = Hub(world_size, loopback=loopback, silence_seconds=silence_seconds)
    except CoordinationError as error:
        shared.set("address", msgspec.json.encode(Address(failure=to_wire(error))).decode())
        raise
    shared.set("address", msgspec.json.encode(Address.of(hub)).decode())
    return hub


def _await_address(shared: Store, world_size: int, timeout_seconds: float) -> Address:
    until = time.monotonic() + timeout_seconds
    # One word for all ranks that wait for rank 0: that of the first.
    first = shared.add("waiting", 1) == 1
    waiting = Waiting("the first save or load", timeout_seconds, lambda: (0,) if first else ())
    nap, longest = _FIRST_NAP_SECONDS, max(_RETRY_SECONDS, world_size / _QUESTIONS_PER_SECOND)
    try:
        # Looked for and not waited for: the training may need the client of this store meanwhile,
        # and c10d says nothing until the end, and then too much.
        while not shared.check(["address"]):
            if time.monotonic() > until:
                raise TimeoutError("it has published no address")
            waiting.say()
            time.sleep(nap)
            nap = min(2 * nap, longest)
        return msgspec.json.decode(shared.get("address"), type=Address)
    except (RuntimeError, TimeoutError) as error:  # of FileStore there is no finer class
        raise CoordinationError(
            f"rank 0 did not open its coordination port within {timeout_seconds:g} s: {ALIKE}",
            kind=ErrorKind.PEER_ABSENT,
            ranks={0: describe(error)},
        ) from error


def connect(
    address: Address,
    rank: int,
    world_size: int,
    *,
    until: float,
    silence_seconds: float = SILENCE_SECONDS,
) -> Line:
    """Connect `rank` to the first of rank 0's addresses that answers and is the right one.

    Args:
        address: what rank 0 has published.
        rank: this one.
        world_size: how many there are.
        until: when to give up, on the monotonic clock; each address gets a few seconds at least.
        silence_seconds: how long rank 0's host may say nothing until it counts as gone.

    Raises:
        CoordinationError: none of them is.
    """
    failures: dict[str, str] = {}
    hosts = hosts_of(address)
    for patience in (_QUICK_SECONDS, CONNECT_SECONDS):
        silent: list[str] = []
        for host in hosts:
            try:
                connection = socket.create_connection((host, address.port), timeout=patience)
            except OSError as error:
                failures[host] = describe(error)
                if isinstance(error, TimeoutError):
                    silent.append(host)
                continue
            try:
                greeted = _greet(connection, address, rank, world_size, until)
                set_options(connection, silence_seconds)
                return Line(connection, greeted, rank, world_size)
            except (OSError, ValueError) as error:
                failures[host] = describe(error)
        hosts = silent
    tried = "; ".join(f"{host}: {why}" for host, why in failures.items())
    raise CoordinationError(
        f"cannot reach the coordination port of rank 0, {address.port} ({tried}): "
        "set MASTER_ADDR to an address of rank 0's host that every rank can reach",
        kind=ErrorKind.PEER_ABSENT,
        ranks={0: "not reachable"},
    )


def _greet(
    connection: socket.socket, address: Address, rank: int, world_size: int, until: float
) -> Seals:
    """Prove to each other that both sides are of one job; return the seals of what follows."""
    try:
        patience = min(GREETING_SECONDS, max(until - time.monotonic(), CONNECT_SECONDS))
        connection.settimeout(patience)
        secret = bytes.fromhex(address.secret)
        asked = receive(connection, GREETING_LIMIT_BYTES)
        said = hello(rank, world_size, secret, asked)
        connection.sendall(framed(msgspec.msgpack.encode(said)))
        # Another host may listen on that port too: a loopback name is everybody's.
        answer = receive(connection, GREETING_LIMIT_BYTES)
        if not hmac.compare_digest(answer, proof("hub", secret, asked, said)):
            raise ValueError("another server")
        return seals("rank", secret, asked, said)
    except BaseException:
        connection.close()
        raise


def hosts_of(address: Address) -> list[str]:
    """Return where rank 0's host may be reached from here, the likeliest first.

    Names come last: to ask for one that this host does not know may take many seconds.

    Args:
        address: what rank 0 has published.
    """
    here = ("127.0.0.1", "::1") if address.hostname == socket.gethostname() else ()
    masters = (address.master,) if address.master else ()
    first = masters if masters and _is_literal(address.master) else ()
    # The host of the store is rank 0's by the definition of env://, and need not be in fact.
    return list(dict.fromkeys((*here, *first, *address.hosts, *masters, address.hostname)))


def _is_literal(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


# Which ranks form the job that saves and loads together.


Ranks: TypeAlias = Literal["all", "alone"]


class JobKeywords(TypedDict, total=False):
    """The keywords of `JobRanks`, for the signatures of the calls that take them."""

    ranks: Ranks
    process_group: ProcessGroup | None
    node_local: bool


JOB_KEYWORDS = frozenset(JobKeywords.__annotations__)


@dataclass(frozen=True, slots=True)
class JobRanks:
    """Which ranks form a job.

    Attributes:
        ranks: "all": those of the process group, and each of them makes the call. "alone": this
            process makes it alone, whatever the others do, and holds all of the state.
        process_group: the group whose ranks form the job; None for the default one. Ranks in
            messages and files are numbered within it.
        node_local: whether each host has a folder of its own there, on a disk that no other host
            sees: the path may be one and the same, or another on each. See
            docs/guides/storage.md.

    Raises:
        UsageError: an argument is malformed, or this process is not in the group.
    """

    ranks: Ranks = "all"
    process_group: ProcessGroup | None = None
    node_local: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Take what is about the job from the keywords of a call."""
        return cls(**{name: keywords[name] for name in JOB_KEYWORDS & keywords.keys()})

    def __post_init__(self) -> None:
        if self.ranks not in ("all", "alone"):
            raise UsageError(
                f"ranks is 'all' or 'alone', not {self.ranks!r}: give some of the ranks as "
                "process_group="
            )
        if not isinstance(self.node_local, bool):
            raise UsageError(f"node_local is True or False, not {self.node_local!r}")
        if self.node_local and self.ranks == "alone":
            raise UsageError("ranks='alone' has one folder: leave node_local out")
        group: object = self.process_group
        if group is None:
            return
        if self.ranks == "alone":
            raise UsageError("ranks='alone' is this process without a process_group: give one")
        # What `new_group` returns to the ranks that are outside of it is no group.
        outside = group == dist.GroupMember.NON_GROUP_MEMBER
        if not outside and not isinstance(group, ProcessGroup):
            hint = " (of a device mesh: its get_group(...))" if hasattr(group, "get_group") else ""
            raise UsageError(f"process_group is a torch process group{hint}, not {group!r}")
        if outside or dist.get_rank(self.process_group) < 0:
            raise UsageError(
                "this process is not in the process group that it was given: only the ranks of "
                "the group make the call"
            )

    def check_joined(self) -> None:
        """Check that this process does not take itself for a job, being one of several.

        Raises:
            UsageError: it was started as one of several ranks, and there is no process group.
        """
        started = os.environ.get("WORLD_SIZE", "")
        several = started.isdecimal() and int(started) > 1 and "RANK" in os.environ
        if self.ranks == "alone" or not several or _initialized():
            return
        raise UsageError(
            f"this process was started as rank {os.environ['RANK']} of {started} (RANK and "
            "WORLD_SIZE are set, as torchrun does), but there is no process group, so each of them "
            "would save for itself and take the run from the others: call "
            "torch.distributed.init_process_group first, or give ranks='alone' if this process "
            "alone saves there"
        )

    def group(self) -> ProcessGroup | None:
        """Return the process group of the job, None where this process is all of it."""
        if self.ranks == "alone" or not _initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return None if group is None or dist.get_world_size(group) == 1 else group

    def world_size(self) -> int:
        """Return how many ranks the job has."""
        group = self.group()
        return 1 if group is None else dist.get_world_size(group)

    def members(self) -> tuple[int, ...] | None:
        """Return the ranks in the default process group; None where the job is all of that."""
        if not _initialized():
            return None
        group = self.group()
        here = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        return None if len(here) == dist.get_world_size() else tuple(here)

    def lacks(self, tensor: object) -> bool:
        """Tell whether a part of `tensor` lies on ranks outside of the job alone."""
        if not isinstance(tensor, DTensor):
            return False
        members = self.members()
        if members is None:
            return False
        mesh = tensor.device_mesh.mesh
        held = sum((mesh == rank for rank in members), start=mesh.new_zeros(mesh.shape)) > 0
        # Along a dimension of replicas one of them is enough; along any other all are needed.
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                held = held.any(dim, keepdim=True)
        return not bool(held.all())


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()
