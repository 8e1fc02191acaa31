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

from dist_ckpt.engine.coordinator import Coordinator, SoloCoordinator, StoreCoordinator
from dist_ckpt.errors import CoordinationError, ErrorKind, describe

_PROBE_SECONDS = 5.0
_RETRY_SECONDS = 0.2
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
    """This process's client of the store, which lasts as long as the process group."""

    group: ProcessGroup
    # A store may outlive a process group, and with it the address that rank 0 published there.
    # Every rank lives through the same process groups: a number for each keeps addresses apart.
    number: int
    jobs: Iterator[int]
    store: Store | None = None


_connection: _Connection | None = None


def join(*, timeout_seconds: float) -> Coordinators:
    """Set up coordination with the other ranks of the default process group, if there is one.

    For the first job of a process group rank 0 opens a store on a free port and publishes where, in
    the store of the process group, which is used for nothing else. One client per process is enough
    for all jobs and threads, because rounds never block inside it.

    Args:
        timeout_seconds: how long to wait for rank 0 to appear.

    Raises:
        CoordinationError: rank 0 did not publish its store in time, or it cannot be reached.
    """
    global _connection
    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Coordinators(SoloCoordinator(), SoloCoordinator())
    rank, world_size = dist.get_rank(), dist.get_world_size()
    group = dist.group.WORLD
    if group is None:  # pragma: no cover - it is initialized
        raise CoordinationError("the default process group is gone")
    if _connection is None or _connection.group is not group:
        number = 0 if _connection is None else _connection.number + 1
        _connection = _Connection(group, number, itertools.count())
    if _connection.store is None:  # also when a try before this one failed
        _connection.store = _open(rank, _connection.number, timeout_seconds)
    # Every rank sets its jobs up in the same order, so equal numbers meet.
    store = PrefixStore(f"job/{next(_connection.jobs)}", _connection.store)
    absent: set[int] = set()
    return Coordinators(
        StoreCoordinator(store, rank, world_size, absent=absent),
        StoreCoordinator(store, rank, world_size, absent=absent),
    )


def _open(rank: int, number: int, timeout_seconds: float) -> Store:
    shared = PrefixStore(f"dist_ckpt/{number}", _get_default_store())
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
    try:
        shared.wait(["address"], timedelta(seconds=timeout_seconds))
        address: dict[str, str | int] = json.loads(shared.get("address"))
    except RuntimeError as error:  # DistError of most stores, and no finer class of FileStore
        raise CoordinationError(
            f"rank 0 did not open its coordination store within {timeout_seconds:g} s: every rank "
            "must make the same calls in the same order",
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
