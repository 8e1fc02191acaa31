"""Which ranks form a job: all, one alone, those of a group; and what is said when some do not."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard

import dist_ckpt
from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks

ROWS = 4096


def state_of(fill: float) -> dict[str, Any]:
    return {"weights": {"w": torch.full((ROWS, 8), fill)}, "n": int(fill)}


def steps(root: Path) -> list[int]:
    return Repository(LocalStore(root)).steps()


# ------------------------------------------------------------------ one rank alone


def rank_zero_alone(root: str) -> float:
    rank = dist.get_rank()
    if rank == 0:
        with dist_ckpt.Checkpointer(f"{root}/run", state_of(3), ranks="alone") as ckpt:
            assert ckpt.restore() == 0
            ckpt.save(1).wait()
        dist_ckpt.save(state_of(4), f"{root}/one", ranks="alone")
        dist_ckpt.async_save(state_of(5), f"{root}/two", ranks="alone").wait()
        model = nn.Linear(8, 8)
        nn.init.constant_(model.weight, 7)
        dist_ckpt.save({"model": model}, f"{root}/model", ranks="alone")
    dist.barrier()
    # A job of all, after jobs of which only one rank knows.
    dist_ckpt.save(state_of(6), f"{root}/all", timeout_seconds=600)
    found = dist_ckpt.TrainState(**state_of(0))
    if rank == 1:
        assert dist_ckpt.load(found, f"{root}/two", ranks="alone").step == 0
        model = nn.Linear(8, 8)
        assert dist_ckpt.load_weights(model, f"{root}/model", ranks="alone").step == 0
        assert (model.weight == 7).all()
    dist.barrier()
    return float(found["weights"]["w"][0, 0])


def test_one_rank_saves_and_loads_alone(tmp_path: Path) -> None:
    assert run_ranks(2, rank_zero_alone, str(tmp_path)) == [0.0, 5.0]
    assert steps(tmp_path / "run") == [1]
    for name, fill in (("one", 4), ("two", 5), ("all", 6)):
        state = dist_ckpt.TrainState(**state_of(0))
        report = dist_ckpt.load(state, tmp_path / name)
        assert (state["weights"]["w"] == fill).all()
        assert report.saved_world_size == (2 if name == "all" else 1)


def each_alone_with_shards(root: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2,))
    model = nn.Linear(8, 8)
    fully_shard(model, mesh=mesh)
    said = []
    calls = (
        lambda: dist_ckpt.Checkpointer(f"{root}/a", {"model": model}, ranks="alone"),
        lambda: dist_ckpt.save({"model": model}, f"{root}/b", ranks="alone"),
        lambda: dist_ckpt.load({"model": model}, f"{root}/c", ranks="alone"),
        lambda: dist_ckpt.load_weights(model, f"{root}/c", ranks="alone"),
    )
    for call in calls:
        with pytest.raises(UsageError) as caught:
            call()
        said.append(caught.value.message)
    # Replicated over all ranks, each of them holds it whole.
    whole = DTensor.from_local(torch.ones(4), mesh, [Replicate()], run_check=False)
    dist_ckpt.save({"t": {"w": whole}}, f"{root}/whole-{dist.get_rank()}", ranks="alone")
    dist.barrier()
    return said


def test_shards_of_others_are_no_state_of_one_rank(tmp_path: Path) -> None:
    for said in run_ranks(2, each_alone_with_shards, str(tmp_path)):
        assert all("model/weight is spread over ranks" in each for each in said)
    assert steps(tmp_path / "whole-0") == steps(tmp_path / "whole-1") == [0]
    assert not (tmp_path / "a").exists()


# ------------------------------------------------------------------ a group


def two_groups(root: str) -> dict[str, Any]:
    rank = dist.get_rank()
    pairs = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    mine, other = pairs[rank % 2], pairs[1 - rank % 2]
    with pytest.raises(UsageError, match="not in the process group"):
        dist_ckpt.Checkpointer(f"{root}/x", state_of(0), process_group=other)
    url, fill = f"{root}/{rank % 2}", float(rank % 2 + 1)
    state = dist_ckpt.TrainState(**state_of(fill), own=dist_ckpt.PerRank(rank))
    with dist_ckpt.Checkpointer(
        url, state, process_group=mine, when=dist_ckpt.policy.every(1), timeout_seconds=600
    ) as ckpt:
        assert ckpt.restore() == 0
        # One group makes more saves than the other.
        for step in range(1, 3 + rank % 2):
            ckpt.step(step)
    back = dist_ckpt.TrainState(**state_of(0), own=dist_ckpt.PerRank(-1))
    report = dist_ckpt.load(back, url, process_group=mine, exchange="always", timeout_seconds=600)
    assert report.exchanged
    assert back["own"] == rank
    dist_ckpt.save(state_of(9), f"{root}/all", timeout_seconds=600)
    return {"fill": float(back["weights"]["w"].mean()), "received": report.nbytes_exchanged}


def test_groups_save_side_by_side_and_all_ranks_after_them(tmp_path: Path) -> None:
    found = run_ranks(4, two_groups, str(tmp_path))
    assert [each["fill"] for each in found] == [1.0, 2.0, 1.0, 2.0]
    assert sum(each["received"] for each in found) > 0
    assert (steps(tmp_path / "0"), steps(tmp_path / "1")) == ([1, 2], [1, 2, 3])
    assert steps(tmp_path / "all") == [0]
    manifests = [
        Repository(LocalStore(tmp_path / name)).open_latest().manifest for name in ("0", "1", "all")
    ]
    assert [each.world_size for each in manifests] == [2, 2, 4]


def hybrid(root: str) -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    rank = dist.get_rank()
    whole = torch.arange(64.0).reshape(8, 8)
    local = whole[4 * (rank % 2) :][:4].clone()
    tensor = DTensor.from_local(
        local, mesh, [Replicate(), Shard(0)], run_check=False, shape=whole.shape, stride=(8, 1)
    )
    module = nn.Module()
    module.register_buffer("w", tensor)
    state = {"t": module}
    shards, replicas = mesh.get_group("shard"), mesh.get_group("replica")
    with pytest.raises(UsageError, match="spread over ranks") as caught:
        dist_ckpt.save(state, f"{root}/bad", process_group=replicas)
    with pytest.raises(UsageError, match="of a device mesh: its get_group"):
        dist_ckpt.save(state, f"{root}/bad", process_group=mesh)  # type: ignore[arg-type]
    # Either of the two groups of shards holds all of it.
    dist_ckpt.save(state, f"{root}/{rank // 2}", process_group=shards, timeout_seconds=600)
    local.zero_()
    dist_ckpt.load(state, f"{root}/{rank // 2}", process_group=shards, timeout_seconds=600)
    assert torch.equal(tensor.to_local(), whole[4 * (rank % 2) :][:4])
    dist.barrier()
    return [caught.value.message]


def test_a_group_that_holds_every_shard_saves(tmp_path: Path) -> None:
    run_ranks(4, hybrid, str(tmp_path))
    for name in ("0", "1"):
        with dist_ckpt.open_checkpoint(tmp_path / name) as opened:
            found = opened["t/w"].read()
        assert torch.equal(found, torch.arange(64.0).reshape(8, 8))
    assert not (tmp_path / "bad").exists()


# ------------------------------------------------------------------ who does not come


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def forgotten(root: str, who: int, what: str) -> tuple[str, list[str]]:
    heard = Heard()
    logging.getLogger("dist_ckpt").addHandler(heard)
    message = ""
    if dist.get_rank() == who:
        calls: dict[str, Callable[[], object]] = {
            "save": lambda: dist_ckpt.save(state_of(1), f"{root}/new", timeout_seconds=2),
            "load": lambda: dist_ckpt.load(state_of(1), f"{root}/new", timeout_seconds=2),
            "restore": lambda: dist_ckpt.Checkpointer(
                f"{root}/new", state_of(1), timeout_seconds=2
            ).restore(),
        }
        with pytest.raises(CoordinationError) as caught:
            calls[what]()
        assert caught.value.kind is ErrorKind.PEER_ABSENT
        message = caught.value.message
    dist.barrier()
    return message, heard.lines


@pytest.mark.parametrize(("who", "missing"), [(0, "rank 1, 2 did"), (2, "rank 0 did")])
@pytest.mark.parametrize("what", ["save", "restore"])
def test_a_call_that_one_rank_makes_is_explained(
    who: int, missing: str, what: str, tmp_path: Path
) -> None:
    message, lines = run_ranks(3, forgotten, str(tmp_path), who, what)[who]
    assert missing in message
    assert "ranks='alone'" in message
    # Said long before the end, which is half an hour away by default.
    assert any(
        f"waiting for {missing.removesuffix(' did')}" in line and "ranks='alone'" in line
        for line in lines
    )


def test_a_load_that_one_rank_makes_is_explained(tmp_path: Path) -> None:
    message, lines = run_ranks(2, forgotten, str(tmp_path), 0, "load")[0]
    assert "rank 1 did not arrive" in message
    assert "ranks='alone'" in message
    assert any("waiting for rank 1" in line for line in lines)


@pytest.fixture
def second_of_two(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun starts a process, which then makes no process group."""
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")


@pytest.mark.usefixtures("second_of_two")
def test_a_rank_without_a_process_group_is_no_job(tmp_path: Path) -> None:
    for call in (
        lambda: dist_ckpt.Checkpointer(tmp_path / "run", state_of(1)),
        lambda: dist_ckpt.save(state_of(1), tmp_path / "run"),
        lambda: dist_ckpt.async_save(state_of(1), tmp_path / "run"),
        lambda: dist_ckpt.Checkpointer.from_args(
            {"checkpoint_dir": str(tmp_path / "run")}, state_of(1)
        ),
    ):
        with pytest.raises(UsageError, match="was started as rank 1 of 2") as caught:
            call()
        assert "torch.distributed.init_process_group" in caught.value.message
        assert "ranks='alone'" in caught.value.message
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("second_of_two")
def test_a_rank_without_a_process_group_may_be_alone_and_may_look(tmp_path: Path) -> None:
    dist_ckpt.save(state_of(1), tmp_path, ranks="alone")
    state = dist_ckpt.TrainState(**state_of(0))
    assert dist_ckpt.load(state, tmp_path).step == 0
    with dist_ckpt.Checkpointer(tmp_path, state, ranks="alone") as ckpt:
        assert ckpt.restore() == 0
        ckpt.save(1)
    assert steps(tmp_path) == [0, 1]


def test_one_process_of_one_is_a_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    for size in ("1", "", "x"):
        monkeypatch.setenv("WORLD_SIZE", size)
        dist_ckpt.save(state_of(1), tmp_path / f"run-{size}")


# ------------------------------------------------------------------ one place


class HostDisk(LocalStore):
    """A folder of this host that has the same path on all of them."""

    def __init__(self, root: Path, host: int) -> None:
        self.host = host
        super().__init__(root / f"host-{host}")

    @property
    def url(self) -> str:
        return "/data/run"


def on_own_disks(root: str, hosts: list[int], what: str) -> list[str]:
    disk = HostDisk(Path(root), hosts[dist.get_rank()])
    with pytest.raises(CheckpointError) as caught:
        if what == "save":
            dist_ckpt.save(state_of(1), disk, timeout_seconds=600)
        else:
            dist_ckpt.Checkpointer(disk, state_of(1), timeout_seconds=600).restore()
    return [type(caught.value).__name__, caught.value.message, str(sorted(caught.value.ranks))]


@pytest.mark.parametrize("what", ["save", "restore"])
def test_hosts_without_a_shared_disk_are_named(what: str, tmp_path: Path) -> None:
    hosts = [0, 1, 0, 1]
    # The other host has been rank 0's once, and has claims of its own.
    dist_ckpt.save(state_of(7), HostDisk(tmp_path, 1))
    for kind, message, ranks in run_ranks(4, on_own_disks, str(tmp_path), hosts, what):
        assert kind == "UsageError"
        assert "do not share one place at /data/run: rank 1, 3 on " in message
        assert "s3://" in message
        assert ranks == "[1, 3]"
    assert steps(tmp_path / "host-0") == []
    assert steps(tmp_path / "host-1") == [0]


def on_one_disk(root: str) -> None:
    disk = HostDisk(Path(root), 0)
    reads: list[str] = []
    read_into = disk.read_into

    def counted(key: str, offset: int, *buffers: memoryview) -> int:
        reads.append(key)
        return read_into(key, offset, *buffers)

    vars(disk)["read_into"] = counted
    with dist_ckpt.Checkpointer(disk, state_of(1)) as ckpt:
        for step in (1, 2, 3):
            ckpt.save(step).wait()
    if dist.get_rank():
        # Asked once for the job, and not at each save.
        assert len([key for key in reads if key.startswith("claims/")]) == 1


def test_one_place_is_asked_for_once(tmp_path: Path) -> None:
    run_ranks(2, on_one_disk, str(tmp_path))
    assert steps(tmp_path / "host-0") == [1, 2, 3]


def in_memory_of_its_own(_: str) -> str:
    with pytest.raises(UsageError) as caught:
        dist_ckpt.save(state_of(1), "memory://part-of-a-job", timeout_seconds=600)
    return caught.value.message


def test_memory_of_each_process_is_no_shared_place(tmp_path: Path) -> None:
    for message in run_ranks(2, in_memory_of_its_own, str(tmp_path)):
        assert "do not share one place" in message
