"""A save and a load over S3 while, in turn, each of their requests goes wrong in each way.

The faults are put in between a real server and the store, by a proxy. A fault that happens once
must not be noticed; one that no retry gets past must end the call with an error, and then nothing
may be listed and no unfinished upload be left.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import CheckpointError, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import Store, resolve
from tests.services.proxy import FAULTS, LOSE, RESET, SLOW_DOWN, STALL, Fault, FaultProxy
from tests.services.s3 import S3Service

PART_BYTES = 5 << 20  # the least that S3 takes
# Once: what one retry gets past. For ever: what none does.
ONCE = [(fault, False) for fault in FAULTS]
FOR_EVER = [(fault, True) for fault in (SLOW_DOWN, LOSE)]


def state(step: int) -> dict[str, Any]:
    """Return a state of one tensor that goes up in two parts, and of small things."""
    weights = torch.full((PART_BYTES // 4 + 1000,), float(step))
    return {"model": {"weights": weights, "bias": torch.arange(3)}, "progress": {"step": step}}


def same(found: dict[str, Any], step: int) -> bool:
    wanted = state(step)
    equal = [torch.equal(found["model"][name], wanted["model"][name]) for name in wanted["model"]]
    return all(equal) and found["progress"] == wanted["progress"]


def save(store: Store, step: int) -> None:
    """Save, and wait also for what is done after the commit."""
    with dist_ckpt.Checkpointer(store, state(step), timeout_seconds=600) as ckpt:
        if step > 1:
            ckpt.restore(only=["rng"])  # it goes on from what is there
        ckpt.save(step)


@dataclass(frozen=True)
class Sweep:
    """A run of its own, through a proxy of its own and past it."""

    service: S3Service
    name: str
    proxy: FaultProxy
    store: Store
    direct: Repository
    stride: int = 1

    def each_request(
        self, work: Callable[[int], None], fault: Fault, *, for_ever: bool
    ) -> Iterator[tuple[int, CheckpointError | None, str]]:
        """Spoil request after request of `work`; yield which, what came of it, and a label."""
        # Each fault begins at another one, so that together they miss none.
        first = 1 + FAULTS.index(fault) % self.stride
        for at in itertools.count(first, self.stride):
            self.proxy.arm(fault, at=at, then="equal" if for_ever else "nothing")
            error = None
            try:
                work(at)
            except CheckpointError as caught:
                error = caught
            if not self.proxy.fired:
                assert at > 6, "there are more requests than that"
                return
            how_long = "for ever" if for_ever else "once"
            where = f"{fault} {how_long} at {at}, {self.proxy.requests[at - 1]}: {error!r}"
            assert for_ever or error is None, where
            assert error is None or isinstance(error, StorageError), where
            yield at, error, where

    def saves(self, fault: Fault, *, for_ever: bool) -> None:
        for at, error, where in self.each_request(
            lambda at: save(self.store, at), fault, for_ever=for_ever
        ):
            assert self.direct.steps() == ([] if error else [at]), where
            assert self.service.uploads(self.name) == [], where
            if error is None:
                assert self.direct.verify(at).ok, where
            # The next one shall make the same requests, as in a new run.
            store = self.direct.store
            store.delete([entry.key for entry in store.list_entries()])

    def loads(self, fault: Fault, *, for_ever: bool) -> None:
        save(self.direct.store, 1)
        found: dict[str, Any] = {}

        def load(_: int) -> None:
            found.update(state(0))
            dist_ckpt.load(found, self.store, timeout_seconds=600)

        for _, error, where in self.each_request(load, fault, for_ever=for_ever):
            assert error or same(found, 1), where


@contextmanager
def new_sweep(
    service: S3Service, name: str, *, attempts: int, patience_seconds: float, stride: int = 1
) -> Iterator[Sweep]:
    with FaultProxy(service.endpoint) as proxy:
        options = {
            "endpoint_url": proxy.endpoint,
            "default_block_size": PART_BYTES,
            "config_kwargs": {
                "read_timeout": patience_seconds,
                "retries": {"total_max_attempts": attempts},
            },
        }
        store = resolve(service.url(name), storage_options=options)
        direct = resolve(service.url(name))
        try:
            # To connect may take longer than the patience that only requests are meant to have.
            store.list_children()
            yield Sweep(service, name, proxy, store, Repository(direct), stride)
        finally:
            store.close()
            direct.close()


@pytest.mark.parametrize("kind", ["saves", "loads"])
@pytest.mark.parametrize("stride", [pytest.param(1, marks=pytest.mark.soak), 8], ids=str)
def test_faults_at_each_request(
    s3_service: S3Service, s3_name: str, kind: str, stride: int
) -> None:
    def run(number: int, fault: Fault, for_ever: bool) -> None:
        # A busy machine may be silent too, for several tries: that must not look like a fault.
        attempts = 3 if for_ever else 20
        patience = 0.6 if fault is STALL else 30.0
        with new_sweep(
            s3_service,
            f"{s3_name}-{number}",
            attempts=attempts,
            patience_seconds=patience,
            stride=stride,
        ) as sweep:
            getattr(sweep, kind)(fault, for_ever=for_ever)

    # Most of the time is spent in waiting for a retry or a silent server, so all at once.
    with ThreadPoolExecutor(8) as pool:
        jobs = [pool.submit(run, n, *case) for n, case in enumerate([*ONCE, *FOR_EVER])]
    for job in jobs:
        job.result()


def test_server_that_goes_away_and_comes_back(s3_service: S3Service, s3_name: str) -> None:
    """From the middle of an upload on nothing answers, not even to the clearing up."""
    with new_sweep(s3_service, s3_name, attempts=3, patience_seconds=30) as sweep:
        save(sweep.store, 1)
        sweep.proxy.arm(None)
        save(sweep.store, 2)
        first_part = next(n for n, one in enumerate(sweep.proxy.requests, 1) if "partNumber" in one)
        sweep.proxy.arm(RESET, at=first_part, then="all")
        with pytest.raises(StorageError):
            save(sweep.store, 3)
        assert sweep.direct.steps() == [1, 2]
        sweep.proxy.arm(None)
        save(sweep.store, 3)
        assert sweep.direct.steps() == [1, 2, 3]
        assert sweep.direct.verify(3).ok
        if s3_service.kind == "moto":
            return  # it dates every upload to the year 2010
        # What could not be cleared up is left to later jobs, which wait until nobody can need it.
        left = s3_service.uploads(s3_name)
        assert left
        sweep.direct.collect(claim=99, in_flight=[])
        assert s3_service.uploads(s3_name) == left
        later = resolve(s3_service.url(s3_name), storage_options={"abandoned_seconds": 0})
        Repository(later).collect(claim=99, in_flight=[])
        later.close()
        assert s3_service.uploads(s3_name) == []
        assert sweep.direct.verify(3).ok
