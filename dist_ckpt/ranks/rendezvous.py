"""Setting up the coordinators of a job: a TCP store of our own, beside the training's."""

from __future__ import annotations

import itertools
import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # public, not in its stubs
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store, _get_default_store

from dist_ckpt.errors import CoordinationError, ErrorKind, describe
from dist_ckpt.ranks.coordinator import StoreCoordinator
from dist_ckpt.ranks.job_ranks import JobRanks
from dist_ckpt.ranks.rounds import Coordinator, SoloCoordinator
from dist_ckpt.ranks.waiting import ALIKE, Waiting

_PROBE_SECONDS = 5.0
_RETRY_SECONDS = 0.2
_FIRST_NAP_SECONDS = 0.005
# Generous: while connecting, c10d looks the address up in the DNS by its number, for its log only,
# and a resolver that drops one answer holds it up for 5 s.
_CONNECT_SECONDS = 120.0


@dataclass(frozen=True, slots=True)
class Coordinators:
    """Two coordinators of one job, one for each thread that takes part in rounds."""

    training: Coordinator
    writer: Coordinator


@dataclass(slots=True)
class _Connection:
    """This process's client of the store of one group, which lasts as long as that group."""

    group: ProcessGroup
    # A store may outlive a process group, and with it the address that rank 0 published there.
    # The ranks of a group set up their jobs together: a number for each group that was known by
    # one name keeps addresses apart.
    number: int
    jobs: Iterator[int]
    store: Store | None = None


_WORLD = "world"
_connections: dict[str, _Connection] = {}


def join_job(*, timeout_seconds: float, ranks: JobRanks | None = None) -> Coordinators:
    """Set up coordination with the other ranks of the job, if there are any.

    For the first job of a process group its rank 0 opens a store on a free port and publishes
    where, in the store of the default group, which is used for nothing else. One client per group
    is enough for all jobs and threads, because rounds never block inside it.

    Args:
        timeout_seconds: how long to wait for rank 0 to appear.
        ranks: which ranks form the job; None for those of the default process group.

    Raises:
        CoordinationError: rank 0 did not publish its store in time, or it cannot be reached.
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
    if known.store is None:  # also when a try before this one failed
        prefix = f"dist_ckpt/{known.number}" + ("" if name == _WORLD else f"/{name}")
        known.store = _open(rank, prefix, timeout_seconds)
    # Every rank sets its jobs up in the same order, so equal numbers meet.
    store = PrefixStore(f"job/{next(known.jobs)}", known.store)
    absent: set[int] = set()
    return Coordinators(
        StoreCoordinator(store, rank, world_size, absent=absent),
        StoreCoordinator(store, rank, world_size, absent=absent),
    )


def _name(group: ProcessGroup) -> str:
    """Return what its own ranks call a group alike, and no other ranks any other."""
    if group is dist.group.WORLD:
        return _WORLD
    # Groups that exist at one time may have the same ranks, or bear one name on other ranks.
    members = "-".join(map(str, dist.get_process_group_ranks(group)))
    return f"{group.group_name}/{members}"


def _open(rank: int, prefix: str, timeout_seconds: float) -> Store:
    shared = PrefixStore(prefix, _get_default_store())
    if rank == 0:
        return _serve(shared)
    until = time.monotonic() + timeout_seconds
    while True:
        try:
            return _connect(_await_address(shared, timeout_seconds))
        except CoordinationError:
            # A store that outlives a restart of the job may still hold the address of a dead rank
            # 0: the living one replaces it as soon as it gets here.
            if time.monotonic() > until:
                raise
            time.sleep(_RETRY_SECONDS)


def _serve(shared: Store) -> Store:
    # The port is the system's choice: nothing to configure, nothing to collide with.
    server: Store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    nonce = secrets.token_hex(8)
    server.set("nonce", nonce)
    address = {
        "master": os.environ.get("MASTER_ADDR", ""),
        "hostname": socket.gethostname(),
        "port": server.port,  # type: ignore[attr-defined]
        "nonce": nonce,
    }
    shared.set("address", json.dumps(address))
    return server


def _await_address(shared: Store, timeout_seconds: float) -> dict[str, str | int]:
    until = time.monotonic() + timeout_seconds
    # One word for all ranks that wait for rank 0: that of the first.
    first = shared.add("waiting", 1) == 1
    waiting = Waiting("the first save or load", timeout_seconds, lambda: (0,) if first else ())
    nap = _FIRST_NAP_SECONDS
    try:
        # Looked for and not waited for: c10d says nothing until the end, and then too much.
        while not shared.check(["address"]):
            if time.monotonic() > until:
                raise TimeoutError("it has published no address")
            waiting.in_vain()
            time.sleep(nap)
            nap = min(2 * nap, _RETRY_SECONDS)
        address: dict[str, str | int] = json.loads(shared.get("address"))
    except (RuntimeError, TimeoutError) as error:  # of FileStore there is no finer class
        raise CoordinationError(
            f"rank 0 did not open its coordination store within {timeout_seconds:g} s: {ALIKE}",
            kind=ErrorKind.PEER_ABSENT,
            ranks={0: describe(error)},
        ) from error
    return address


def _connect(address: Mapping[str, str | int]) -> Store:
    """Connect to the first of rank 0's addresses that answers and is the right server."""
    port = int(address["port"])
    failures: list[str] = []
    for host in _candidates(str(address["master"]), str(address["hostname"])):
        try:
            # A plain probe first: c10d would retry, and log, for as long as its timeout.
            socket.create_connection((host, port), timeout=_PROBE_SECONDS).close()
            store: Store = TCPStore(
                host, port, is_master=False, timeout=timedelta(seconds=_CONNECT_SECONDS)
            )
            # Another host may listen on that port too: a loopback name is everybody's.
            if store.check(["nonce"]) and store.get("nonce").decode() == address["nonce"]:
                return store
            failures.append(f"{host}: another server")
        except (OSError, dist.DistError) as error:
            failures.append(f"{host}: {describe(error)}")
    raise CoordinationError(
        f"cannot reach the coordination store of rank 0 on port {port} ({'; '.join(failures)}): "
        "set MASTER_ADDR to an address of rank 0's host that every rank can reach",
        kind=ErrorKind.PEER_ABSENT,
        ranks={0: "not reachable"},
    )


def _candidates(master: str, hostname: str) -> Iterator[str]:
    """Names under which rank 0's host may be reached from here, the most likely first."""
    if master:
        yield master  # rank 0's host by the definition of the env:// rendezvous
    if hostname == socket.gethostname():
        yield "127.0.0.1"
    yield hostname
