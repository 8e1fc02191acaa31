"""A host that was cut off in the middle of a commit comes back when others own the run.

Cut off before it looks at the claims, it commits nothing. Between that look and its manifest lies
the protocol's only window (spec/commit-v1): there it is too late if its step was committed since.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CheckpointError, FencedError
from dist_ckpt.format.names import INDEX, step_dir
from dist_ckpt.ranks.rendezvous import training_store
from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from dist_ckpt.testing.ranks import run_ranks
from tests.services.hosts import Hosts
from tests.services.proxy import FaultProxy
from tests.services.s3 import S3Service

T = TypeVar("T")

ZOMBIES_STEP = 4
BEFORE_THE_LOOK, IN_THE_WINDOW = INDEX, "manifest.json"


class CutOff(StoreWrapper):
    """A store of rank 0, whose cable is out from one put of a commit until it is too late."""

    def __init__(self, url: str, hosts: Hosts, at: str) -> None:
        super().__init__(resolve(url))
        self._hosts, self._at = hosts, at

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        of_step = key.startswith(step_dir(ZOMBIES_STEP))
        if operation == "put" and of_step and key.endswith(self._at):
            if self._hosts.is_real:
                self._hosts.cut(0)
            store = training_store()
            store.set("cut", "")
            store.wait(["superseded"])
            if self._hosts.is_real:
                self._hosts.mend(0)
        return run()


def come_back(hosts: Hosts, urls: tuple[str, str], at: str, steps: list[int]) -> str:
    """Rank 0 is cut off in the middle of a commit; rank 1 goes on alone, and commits."""
    rank = dist.get_rank()
    hosts[rank].enter()
    os.environ.update(LOCAL_WORLD_SIZE="1", GLOO_SOCKET_IFNAME=hosts[rank].interface)
    place: Any = CutOff(urls[0], hosts, at) if rank == 0 else urls[0]
    state = {"part": {"w": torch.ones(100)}}
    if rank == 0:
        with pytest.raises(FencedError) as caught:
            save_twice(place, state)
        return str(caught.value)
    with pytest.raises(CheckpointError), dist_ckpt.Checkpointer(place, state) as ckpt:
        ckpt.restore()
        ckpt.save(ZOMBIES_STEP - 1).wait()
        handle = ckpt.save(ZOMBIES_STEP)
        training_store().wait(["cut"])
        # Not waited for: a new start of the job takes the run over.
        with dist_ckpt.Checkpointer(urls[1], state, ranks="alone", save_last=False) as new:
            new.restore()
            for step in steps:
                new.save(step).wait()
        training_store().set("superseded", "")
        handle.wait()
    return ""


def save_twice(place: Any, state: dict[str, Any]) -> None:
    with dist_ckpt.Checkpointer(place, state) as ckpt:
        ckpt.restore()
        ckpt.save(ZOMBIES_STEP - 1).wait()
        ckpt.save(ZOMBIES_STEP).wait()


def check(hosts: Hosts, urls: tuple[str, str], at: str, steps: list[int]) -> None:
    run_ranks(2, come_back, hosts, urls, at, steps)
    repository = Repository(resolve(urls[1]))
    assert repository.steps() == [ZOMBIES_STEP - 1, *steps]
    saves = [repository.open(step).manifest.save_id for step in repository.steps()]
    claims = [save_id.split("-")[0] for save_id in saves]
    assert len(set(claims)) == 2, f"none but its first is the zombie's: {saves}"
    assert len(set(claims[1:])) == 1
    assert all(repository.verify(step).ok for step in repository.steps())


CASES = pytest.mark.parametrize(
    ("at", "steps"),
    [
        pytest.param(BEFORE_THE_LOOK, [5], id="later"),
        pytest.param(BEFORE_THE_LOOK, [4, 5], id="same", marks=pytest.mark.soak),
        pytest.param(IN_THE_WINDOW, [4, 5], id="window", marks=pytest.mark.soak),
    ],
)


@CASES
def test_local(at: str, steps: list[int], hosts: Hosts, tmp_path: Path) -> None:
    run = str(tmp_path / "run")
    check(hosts, (run, run), at, steps)


@pytest.mark.soak
@CASES
def test_cephfs(
    at: str,
    steps: list[int],
    hosts: Hosts,
    shared_folder: Callable[[int], Path],
) -> None:
    check(hosts, (str(shared_folder(0)), str(shared_folder(1))), at, steps)


@CASES
def test_s3(
    at: str,
    steps: list[int],
    cables: Hosts,
    s3_service: S3Service,
    s3_name: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with FaultProxy(s3_service.endpoint, cables.outside) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        run = s3_service.url(s3_name)
        check(cables, (run, run), at, steps)
