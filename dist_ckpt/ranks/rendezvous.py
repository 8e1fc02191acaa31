"""Setting up the coordinators of a job of several ranks: a connection of each of them to rank 0."""

from __future__ import annotations

import hmac
import ipaddress
import itertools
import logging
import os
import socket
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import msgspec
import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import PrefixStore, Store, _get_default_store

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CoordinationError, ErrorKind, describe, from_wire, to_wire
from dist_ckpt.ranks.addresses import host_addresses
from dist_ckpt.ranks.channels import SILENCE_SECONDS, framed, receive, set_options
from dist_ckpt.ranks.coordinator import JobCoordinator, Line
from dist_ckpt.ranks.greeting import GREETING_LIMIT_BYTES, hello, proof, seals
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rounds import Coordinators
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


def join_job(group: ProcessGroup, *, timeout_seconds: float) -> Coordinators:
    """Set up coordination with the other ranks of a job of several.

    For the first job of a process group its rank 0 opens a port and publishes where, in the store
    of the default group, which is used for nothing else. One connection of each rank is enough for
    all jobs and threads of a group.

    Args:
        group: the ranks that form the job.
        timeout_seconds: how long to wait for rank 0 to appear.

    Raises:
        CoordinationError: rank 0 did not open its port in time, or it cannot be reached.
    """
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
