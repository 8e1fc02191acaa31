"""Hosts that share no disk: each has a folder of its own, and a job goes on from all of them."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from dist_ckpt.format.names import manifest_key, step_dir
from dist_ckpt.options import MIN_MEMORY_BYTES
from dist_ckpt.ranks.rendezvous import training_store
from dist_ckpt.repository import Repository
from dist_ckpt.repository.commit import Transaction
from dist_ckpt.saving.attempt import Housekeeping
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.distributed import layouts
from tests.services.hosts import Hosts

PER_HOST = 2
build = partial(layouts.build, dtypes=layouts.FEW_DTYPES)
problems = partial(layouts.problems, dtypes=layouts.FEW_DTYPES)


def folder(root: str) -> str:
    """Return the folder of the host of this rank."""
    return f"{root}/host-{dist.get_rank() // PER_HOST}"


def steps(root: Path, host: int) -> list[int]:
    return Repository(LocalStore(root / f"host-{host}")).steps()


def save_steps(root: str, layout: str, seeds: tuple[int, ...]) -> None:
    for seed in seeds:
        dist_ckpt.save(build(layout, seed), folder(root), step=seed, node_local=True)


def restored(root: str, layout: str) -> tuple[int, list[str]]:
    """Restore the newest step; return it, and what is not what it should be."""
    state = build(layout, None)
    with dist_ckpt.Checkpointer(folder(root), state, node_local=True) as ckpt:
        step = ckpt.restore()
    return step, problems(state, step)


def refused(root: str, layout: str, step: int | None) -> tuple[str, str]:
    state = build(layout, None)
    with pytest.raises(CheckpointError) as caught:
        if step is None:
            dist_ckpt.Checkpointer(folder(root), state, node_local=True).restore()
        else:
            dist_ckpt.load(state, folder(root), step=step, node_local=True)
    assert isinstance(caught.value, IntegrityError)
    return caught.value.message, caught.value.kind


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_a_job_goes_on_from_the_folders_of_its_hosts(layout: str, tmp_path: Path) -> None:
    run_ranks(4, save_steps, str(tmp_path), layout, (10, 20))
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == [10, 20]
    assert run_ranks(4, restored, str(tmp_path), layout) == [(20, [])] * 4
    # Once more, with other ranks on each host than saved it.
    assert run_ranks(3, restored, str(tmp_path), layout) == [(20, [])] * 3


@pytest.mark.parametrize("gone", [0, 1])
def test_replicas_are_on_every_host_so_one_may_be_lost(gone: int, tmp_path: Path) -> None:
    run_ranks(4, save_steps, str(tmp_path), "ddp", (10, 20))
    shutil.rmtree(tmp_path / f"host-{gone}")
    if gone == 0:
        (tmp_path / "host-1").rename(tmp_path / "host-0")
    # All of it is there, for anybody who looks; also for one rank alone.
    report = Repository(LocalStore(tmp_path / "host-0")).verify(20)
    assert (report.ok, report.elsewhere) == (True, {})
    for node_local in (False, True):
        state = build("plain", None)
        dist_ckpt.load(state, tmp_path / "host-0", node_local=node_local)
        assert problems(state, 20) == []
    assert run_ranks(2, restored, str(tmp_path), "ddp") == [(20, [])] * 2
    # A new host in its place has an empty disk, and gets what it wants from the other one.
    assert run_ranks(4, restored, str(tmp_path), "ddp") == [(20, [])] * 4


def save_hybrid(root: str) -> None:
    mesh = init_device_mesh("cpu", (2, PER_HOST))
    whole = torch.arange(30000.0).reshape(300, 100)
    state = {"w": distribute_tensor(whole, mesh, [Replicate(), Shard(0)]), "b": torch.ones(7)}
    dist_ckpt.save({"part": state}, folder(root), step=1, node_local=True)


def load_hybrid(root: str) -> None:
    mesh = init_device_mesh("cpu", (1, PER_HOST))
    zeros = distribute_tensor(torch.zeros(300, 100), mesh, [Replicate(), Shard(0)])
    state = {"w": zeros, "b": torch.zeros(7)}
    dist_ckpt.load({"part": state}, folder(root), node_local=True)
    assert torch.equal(zeros.full_tensor(), torch.arange(30000.0).reshape(300, 100))
    assert torch.equal(state["b"], torch.ones(7))


def test_with_hybrid_shards_each_host_has_all_of_them(tmp_path: Path) -> None:
    run_ranks(4, save_hybrid, str(tmp_path))
    # Each host writes its shards once, not twice.
    for host in (0, 1):
        found = list((tmp_path / f"host-{host}").rglob("part.*.safetensors"))
        assert sum(path.stat().st_size for path in found) < 1.2 * 120_000
    shutil.rmtree(tmp_path / "host-0")
    (tmp_path / "host-1").rename(tmp_path / "host-0")
    run_ranks(2, load_hybrid, str(tmp_path))


def test_shards_of_a_lost_host_are_named(tmp_path: Path) -> None:
    run_ranks(4, save_steps, str(tmp_path), "fsdp", (10, 20))
    command = [sys.executable, "-m", "dist_ckpt"]
    for verb, said in (("verify", "4 more files are on"), ("ls", "1 of 2 hosts")):
        done = subprocess.run(
            [*command, verb, str(tmp_path / "host-0")], capture_output=True, text=True, check=True
        )
        assert said in done.stdout
        assert "DAMAGED" not in done.stdout
    shutil.rmtree(tmp_path / "host-1")
    ((message, kind), other) = run_ranks(2, refused, str(tmp_path), "fsdp", None)
    assert other == (message, kind)
    assert kind is ErrorKind.MISSING_FILE
    for step in (10, 20):
        assert f"step {step}: no host that is here has" in message
    assert "model.r00002.safetensors" in message
    assert "written by rank 2, 3 on" in message
    assert "/host-1)" in message
    message, _ = run_ranks(2, refused, str(tmp_path), "fsdp", 20)[0]
    assert message.endswith("No older step is whole either")
    # Whoever looks into one folder alone is told the same.
    with pytest.raises(IntegrityError, match=r"written on .*node_local=True"):
        dist_ckpt.load_weights({"one.weight": torch.zeros(1, 3)}, tmp_path / "host-0", strict=False)


def test_an_older_step_that_is_whole_is_taken_or_named(tmp_path: Path) -> None:
    run_ranks(2, save_steps, str(tmp_path), "fsdp", (5,))
    run_ranks(4, save_steps, str(tmp_path), "fsdp", (10, 20))
    shutil.rmtree(tmp_path / "host-1")
    message, _ = run_ranks(2, refused, str(tmp_path), "fsdp", 20)[0]
    assert message.endswith("The newest older step that is whole is step 5")
    assert run_ranks(2, restored, str(tmp_path), "fsdp") == [(5, [])] * 2


def killed_at(root: str, moment: str, rank: int) -> None:
    """Save steps 10 and 20; at a moment of the second one rank is killed."""
    save_steps(root, "fsdp", (10,))
    complete = Transaction.complete

    def kill(self: Transaction, *args: object, **kwargs: object) -> None:
        if dist.get_rank() == rank:
            if moment == "after":
                complete(self, *args, **kwargs)  # type: ignore[arg-type]
            os.kill(os.getpid(), signal.SIGKILL)
        complete(self, *args, **kwargs)  # type: ignore[arg-type]

    Transaction.complete = kill  # type: ignore[method-assign]
    with pytest.raises(CheckpointError):
        dist_ckpt.save(build("fsdp", 20), folder(root), step=20, node_local=True)


def test_killed_between_the_manifests_of_two_hosts(tmp_path: Path) -> None:
    """Rank 0 has committed, and the leader of the other host dies before it has its manifest."""
    run_ranks(4, killed_at, str(tmp_path), "before", 2, expect_killed=[2])
    assert (steps(tmp_path, 0), steps(tmp_path, 1)) == ([10, 20], [10])
    assert run_ranks(4, restored, str(tmp_path), "fsdp") == [(20, [])] * 4
    # It has it now: its share is no garbage after the next commit.
    assert steps(tmp_path, 1) == [10, 20]
    run_ranks(4, save_steps, str(tmp_path), "fsdp", (30,))
    assert run_ranks(4, loaded_step_20, str(tmp_path)) == [[]] * 4


def loaded_step_20(root: str) -> list[str]:
    state = build("fsdp", None)
    assert dist_ckpt.load(state, folder(root), step=20, node_local=True).step == 20
    return problems(state, 20)


def test_killed_before_the_first_manifest(tmp_path: Path) -> None:
    """All hosts are prepared, and rank 0 dies right before it commits."""
    run_ranks(4, killed_at, str(tmp_path), "before", 0, expect_killed=[0])
    assert (steps(tmp_path, 0), steps(tmp_path, 1)) == ([10], [10])
    assert run_ranks(4, restored, str(tmp_path), "fsdp") == [(10, [])] * 4
    run_ranks(4, save_steps, str(tmp_path), "fsdp", (30,))
    for host in (0, 1):
        assert not (tmp_path / f"host-{host}" / step_dir(20)).exists()


def test_killed_after_the_first_manifest_and_lost(tmp_path: Path) -> None:
    """The host of rank 0 dies right after it committed: others have nothing but their shares."""
    run_ranks(4, killed_at, str(tmp_path), "after", 0, expect_killed=[0])
    assert (steps(tmp_path, 0), steps(tmp_path, 1)) == ([10, 20], [10])
    assert run_ranks(4, restored, str(tmp_path), "fsdp") == [(20, [])] * 4


def trained(root: str, start: int, told: tuple[int, ...]) -> None:
    state = build("ddp", told[0])
    with dist_ckpt.Checkpointer(folder(root), state, node_local=True) as ckpt:
        assert ckpt.restore() == start
        for step in told:
            ckpt.save(step).wait()


def test_a_host_that_comes_back_with_an_older_history(tmp_path: Path) -> None:
    run_ranks(4, trained, str(tmp_path), 0, (10,))
    shutil.copytree(tmp_path / "host-1", tmp_path / "old")
    shutil.rmtree(tmp_path / "host-1")
    # The first host alone goes on and saves; then the other had been alone on a branch of its own.
    run_ranks(2, trained, str(tmp_path), 10, (15,))
    run_ranks(2, trained, str(tmp_path), 15, (16,))
    (tmp_path / "host-0").rename(tmp_path / "new")
    (tmp_path / "old").rename(tmp_path / "host-0")
    run_ranks(2, trained, str(tmp_path), 10, (20,))
    (tmp_path / "host-0").rename(tmp_path / "host-1")
    (tmp_path / "new").rename(tmp_path / "host-0")
    assert (steps(tmp_path, 0), steps(tmp_path, 1)) == ([10, 15, 16], [10, 20])
    # The run was taken over more often where training went on, though it has the lower step.
    run_ranks(4, trained, str(tmp_path), 16, (17, 20))
    assert (steps(tmp_path, 0), steps(tmp_path, 1)) == ([10, 15, 16, 17, 20], [10, 17, 20])
    stores = [LocalStore(tmp_path / f"host-{host}") for host in (0, 1)]
    manifests = {Repository(store).open(20).manifest_bytes for store in stores}
    assert len(manifests) == 1


def kept(root: str) -> None:
    with dist_ckpt.Checkpointer(
        folder(root), build("fsdp", 1), keep=keep.latest(1), node_local=True
    ) as ckpt:
        ckpt.restore()
        for step in (1, 2, 3):
            ckpt.save(step).wait()


def test_each_host_keeps_what_the_policy_keeps(tmp_path: Path) -> None:
    run_ranks(4, kept, str(tmp_path))
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == [3]
    for host in (0, 1):
        assert [path.name for path in (tmp_path / f"host-{host}").glob("step-*")] == [step_dir(3)]


def drifted(root: str) -> str:
    weight = torch.ones(300)
    if dist.get_rank() >= PER_HOST:
        weight[7] = 2
    with pytest.raises(IncompatibleError) as caught:
        dist_ckpt.save({"part": {"w": weight}}, folder(root), node_local=True, check_replicas=False)
    return caught.value.message


def test_copies_that_differ_between_hosts_are_not_committed(tmp_path: Path) -> None:
    for message in run_ranks(4, drifted, str(tmp_path)):
        assert "part.r00000.safetensors differs between rank 0 on" in message
        assert "have drifted apart" in message
    assert steps(tmp_path, 0) == steps(tmp_path, 1) == []
    # What was written is gone at once, on all hosts: there may be no room for another try.
    assert list(tmp_path.rglob("*.safetensors")) == []


def in_one_folder(root: str) -> str:
    with pytest.raises(CheckpointError) as caught:
        dist_ckpt.save({"part": {"w": torch.ones(3)}}, folder(root), node_local=True)
    return caught.value.message


def test_one_folder_is_not_taken_for_several(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    for host in (0, 1):
        (tmp_path / f"host-{host}").symlink_to(tmp_path / "shared")
    for message in run_ranks(4, in_one_folder, str(tmp_path)):
        assert "share one place" in message
        assert "leave node_local out" in message
    assert not (tmp_path / "shared" / manifest_key(0)).exists()


def on_hosts(hosts: Hosts, root: str, layout: str, verb: str) -> tuple[int, list[str]]:
    """Save or restore on the host of this rank, under one path if that may be."""
    host = hosts[dist.get_rank() // PER_HOST]
    host.enter()
    os.environ.update(
        LOCAL_WORLD_SIZE=str(PER_HOST),
        GLOO_SOCKET_IFNAME=host.interface,
        MASTER_ADDR=hosts[0].address,
    )
    if verb == "save":
        save_steps(root, layout, (10, 20))
        return 20, []
    return restored(root, layout)


@pytest.mark.parametrize("layout", ["fsdp", "ddp"])
def test_two_hosts_with_networks_of_their_own(layout: str, hosts: Hosts, tmp_path: Path) -> None:
    arguments = (hosts, str(tmp_path), layout)
    assert run_ranks(4, on_hosts, *arguments, "save") == [(20, [])] * 4
    assert run_ranks(4, on_hosts, *arguments, "restore") == [(20, [])] * 4
    said = Repository(LocalStore(tmp_path / "host-0")).open(20).manifest.hosts
    assert len(set(said.values())) == 2
    if hosts.is_real:
        assert said[0] == said[1] == hosts[0].name


def begun_without_restore(root: str) -> list[str]:
    """Return how saves of a job are refused that goes on from nothing, or goes back."""
    told = []
    state = {"w": torch.ones(3)}
    with dist_ckpt.Checkpointer(folder(root), state, every_steps=5, node_local=True) as ckpt:
        for call in (lambda: ckpt.save(30), lambda: ckpt.restore("none")):
            with pytest.raises(UsageError) as caught:
                call()
            told.append(caught.value.message)
    return told


def test_what_one_host_has_is_not_left_behind(tmp_path: Path) -> None:
    run_ranks(4, save_steps, str(tmp_path), "ddp", (10,))
    # The host of rank 0 is a new one; what the other one has counts all the same.
    shutil.rmtree(tmp_path / "host-0")
    for forgotten, given_up in run_ranks(4, begun_without_restore, str(tmp_path)):
        assert "restore() was not called" in forgotten
        assert "has checkpoints newer than the beginning (10)" in given_up
    assert [path.name for path in (tmp_path / "host-1" / "claims").iterdir()] == ["000001.json"]


def test_one_process_that_saves_alone_has_no_hosts() -> None:
    with pytest.raises(UsageError, match="leave node_local out"):
        dist_ckpt.Checkpointer("unused", {"w": 1}, node_local=True, ranks="alone")


def network(fill: float) -> torch.nn.Sequential:
    net = torch.nn.Sequential(torch.nn.Linear(300, 300), torch.nn.BatchNorm1d(300))
    for tensor in net.state_dict().values():
        tensor.fill_(fill)
    return net


def save_statistics(root: str) -> None:
    net = network(1.0)
    assert isinstance(net[1].running_mean, torch.Tensor)
    net[1].running_mean.fill_(float(dist.get_rank()))
    model = DistributedDataParallel(net, broadcast_buffers=False)
    # In turns, so that a rank writes several files for the one part.
    dist_ckpt.save(
        {"model": model}, folder(root), node_local=True, memory_limit_bytes=MIN_MEMORY_BYTES
    )


def test_buffers_are_those_of_the_lowest_rank_on_every_host(tmp_path: Path) -> None:
    run_ranks(4, save_statistics, str(tmp_path))
    for host in (0, 1):
        net = network(9.0)
        dist_ckpt.load_weights(net, tmp_path / f"host-{host}")
        for name, tensor in net.state_dict().items():
            assert (tensor == (0 if name == "1.running_mean" else 1)).all(), name


def rows(value: float) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(torch.full((400, 300), value), mesh, [Shard(0)])


def save_apart(root: str) -> None:
    dist_ckpt.save({"part": {"a": rows(1), "b": rows(1)}}, folder(root), node_local=True)


def load_tied(root: str) -> str:
    """Load two names into one tensor; return why that cannot be done here, "" if it can."""
    tied = rows(0)
    try:
        dist_ckpt.load({"part": {"a": tied, "b": tied}}, folder(root), node_local=True)
    except IncompatibleError as error:
        return error.message
    assert torch.equal(tied.full_tensor(), torch.ones(400, 300))
    return ""


def test_names_of_one_memory_are_compared_by_each_rank(tmp_path: Path) -> None:
    run_ranks(4, save_apart, str(tmp_path))
    assert run_ranks(4, load_tied, str(tmp_path)) == [""] * 4
    # Three ranks do not find all of their rows on their own host.
    for message in run_ranks(3, load_tied, str(tmp_path)):
        assert "is on another host, and names that share memory in the state" in message


def written_before_the_leader_knows(root: str) -> bool:
    """Return, on the rank that leads the second host, whether it heard of an attempt too late."""
    store, leader = training_store(), PER_HOST
    protect, put_file = Housekeeping.protect, Transaction.put_file
    late = False

    def watch_protect(self: Housekeeping, save_id: str) -> None:
        nonlocal late
        if dist.get_rank() == leader:
            with suppress(RuntimeError):  # nobody writes meanwhile
                store.wait(["written"], timedelta(seconds=1))
                late = True
        protect(self, save_id)

    def watch_put(self: Transaction, *args: Any, **kwargs: Any) -> str:
        store.set("written", "")
        return put_file(self, *args, **kwargs)

    Housekeeping.protect, Transaction.put_file = watch_protect, watch_put  # type: ignore[method-assign]
    save_steps(root, "fsdp", (10,))
    return late


def test_no_file_is_written_before_it_is_known_to_be_no_garbage(tmp_path: Path) -> None:
    assert run_ranks(4, written_before_the_leader_knows, str(tmp_path)) == [False] * 4


def flipped(path: Path, at: float) -> None:
    """Flip a bit of a file, at a share of its length."""
    data = bytearray(path.read_bytes())
    data[int(at * (len(data) - 1))] ^= 1
    path.write_bytes(data)


def told_of(root: str, layout: str, step: int | None) -> tuple[int, list[str], dict[int, str], str]:
    """Restore, or load a step; return it, what is not as it should be, and what the report says."""
    state = build(layout, None)
    if step is None:
        with dist_ckpt.Checkpointer(folder(root), state, node_local=True) as ckpt:
            ckpt.restore()
            report = ckpt.restored
    else:
        report = dist_ckpt.load(state, folder(root), step=step, node_local=True)
    assert report is not None
    return report.step, problems(state, report.step), dict(report.refused), "\n".join(report.notes)


# Of tensors several files: which of the ranks that have them reads which is not known.
DAMAGED = [
    ("[mo]*.safetensors", "host-1", 1.0),
    ("[mo]*.safetensors", "host-0", 1.0),
    ("extra.r00003.safetensors", "host-1", 1.0),
    ("extra.r00000.safetensors", "host-0", 1.0),
    ("index.r00001.msgpack", "host-1", 0.5),
    ("index.r00001.msgpack", "host-0", 0.5),
    ("index.msgpack", "host-0", 0.5),
]


def told_of_each(root: str) -> list[list[tuple[int, list[str], dict[int, str], str]]]:
    """Save, and damage a copy of that in each way; return what is told of each."""
    save_steps(f"{root}/whole", "ddp", (10, 20))
    found = []
    for number, (names, host, at) in enumerate(DAMAGED):
        place = Path(root) / str(number)
        dist.barrier()  # on all hosts it is saved
        if dist.get_rank() == 0:
            shutil.copytree(Path(root) / "whole", place)
            for each in (place / host / step_dir(20)).glob(f"*/{names}"):
                flipped(each, at)
        dist.barrier()
        found.append([told_of(str(place), "ddp", step) for step in (None, 20)])
    return found


def test_a_copy_that_is_damaged_on_one_host_is_read_from_another(tmp_path: Path) -> None:
    for results in run_ranks(4, told_of_each, str(tmp_path)):
        for (names, host, _), found in zip(DAMAGED, results, strict=True):
            for told, wrong, refused, notes in found:
                assert (told, wrong, refused) == (20, [], {}), (names, host)
                assert "is damaged on" in notes, (names, host)
                assert host in notes, (names, host)


def test_several_damaged_copies_on_several_hosts(tmp_path: Path) -> None:
    """Each host has something that is damaged there, and whole on the other."""
    run_ranks(4, save_steps, str(tmp_path), "ddp", (10, 20))
    for names, host, at in (DAMAGED[0], DAMAGED[3], DAMAGED[4]):
        for found in (tmp_path / host / step_dir(20)).glob(f"*/{names}"):
            flipped(found, at)
    (cut,) = (tmp_path / "host-1" / step_dir(20)).glob("*/bag.r00000.safetensors")
    cut.write_bytes(cut.read_bytes()[:-1])
    flipped(tmp_path / "host-1" / manifest_key(20), 0.0)
    for told, wrong, refused, notes in run_ranks(4, told_of, str(tmp_path), "ddp", 20):
        assert (told, wrong, refused) == (20, [], {})
        for name in ("extra.r00000.safetensors", "index.r00001.msgpack", "bag.r00000.safetensors"):
            assert f"{name} is damaged on" in notes


@pytest.mark.parametrize("name", ["model.r00000.safetensors", "extra.r00000.safetensors"])
def test_what_is_damaged_on_all_hosts_is_passed_over(name: str, tmp_path: Path) -> None:
    run_ranks(4, save_steps, str(tmp_path), "ddp", (10, 20))
    for found in tmp_path.glob(f"*/{step_dir(20)}/*/{name}"):
        flipped(found, 1.0)
    for told, wrong, refused, _ in run_ranks(4, told_of, str(tmp_path), "ddp", None):
        assert (told, wrong, list(refused)) == (10, [], [20])


LOSSES = {10: 3.0, 20: 1.0, 30: 2.0}


def trained_with_losses(root: str) -> None:
    state = build("ddp", 10)
    with dist_ckpt.Checkpointer(folder(root), state, node_local=True) as ckpt:
        ckpt.restore()
        for step, loss in LOSSES.items():
            ckpt.save(step, metrics={"loss": loss}).wait()


def best_restored(root: str, call: str) -> int:
    state = build("ddp", None)
    if call == "load":
        return dist_ckpt.load(state, folder(root), step="best", metric="loss", node_local=True).step
    keeps, every = keep.best("loss", 1), 5 if call == "refused" else None
    with dist_ckpt.Checkpointer(
        folder(root), state, every_steps=every, node_local=True, keep=keeps
    ) as ckpt:
        if call == "rollback":
            ckpt.restore()
            return ckpt.rollback()
        if call == "refused":
            with pytest.raises(UsageError, match=r"newer than step 20 \(30\)"):
                ckpt.restore("best")
            return 20
        return ckpt.restore("best", discard_newer=True)


@pytest.mark.parametrize("call", ["load", "rollback", "refused", "discard"])
def test_the_best_is_found_in_all_folders(call: str, tmp_path: Path) -> None:
    run_ranks(4, trained_with_losses, str(tmp_path))
    shutil.rmtree(tmp_path / "host-0")  # of rank 0, which has a new disk
    assert run_ranks(4, best_restored, str(tmp_path), call) == [20] * 4


def gone_back(root: str, hosts: int) -> tuple[int, list[int]]:
    """Go back to step 10 and save step 15, or go on; return both."""
    state = build("ddp", None)
    with dist_ckpt.Checkpointer(folder(root), state, node_local=True) as ckpt:
        if hosts == 1:
            return ckpt.restore(step=10, discard_newer=True), []
        begun = ckpt.restore()
        ckpt.save(15).wait()
        return begun, Repository(LocalStore(folder(root))).steps()


def test_what_is_given_up_is_hidden_on_hosts_that_were_away(tmp_path: Path) -> None:
    run_ranks(4, trained_with_losses, str(tmp_path))
    (tmp_path / "host-1").rename(tmp_path / "away")
    assert run_ranks(2, gone_back, str(tmp_path), 1) == [(10, [])] * 2
    (tmp_path / "away").rename(tmp_path / "host-1")
    # What host 1 still lists was given up while it was away.
    assert steps(tmp_path, 1) == [10, 20, 30]
    for begun, _ in run_ranks(4, gone_back, str(tmp_path), 2):
        assert begun == 10


def gone_back_twice(root: str, saves: bool) -> list[int]:
    """Go back past what the job saved itself, and again; or go on in a start of its own."""
    with dist_ckpt.Checkpointer(folder(root), build("ddp", None), node_local=True) as ckpt:
        begun = [ckpt.restore()]
        for step in (10, 20, 30) if saves else ():
            ckpt.save(step).wait()
        if saves:
            begun += [ckpt.restore(step=step, discard_newer=True) for step in (20, 10)]
            return begun + Repository(LocalStore(folder(root))).steps()
        ckpt.save(15).wait()
    return begun + Repository(LocalStore(folder(root))).steps()


def test_what_a_job_saved_itself_is_given_up_in_all_folders(tmp_path: Path) -> None:
    assert run_ranks(4, gone_back_twice, str(tmp_path), True) == [[0, 20, 10, 10]] * 4
    assert run_ranks(4, gone_back_twice, str(tmp_path), False) == [[10, 10, 15]] * 4


def unlike(root: str, call: str) -> str:
    """Make a call that not all ranks make alike; nobody waits for a deadline."""
    odd = dist.get_rank() == 3
    state = build("ddp", 10)
    with pytest.raises(UsageError) as caught:
        if call == "save":
            dist_ckpt.save(state, folder(root), step=1, node_local=not odd)
        elif call == "load":
            dist_ckpt.load(state, folder(root), node_local=odd)
        else:
            kept = keep.best("loss", 1)
            with dist_ckpt.Checkpointer(folder(root), state, node_local=True, keep=kept) as ckpt:
                if call == "best":
                    ckpt.restore("best" if odd else "newest")
                elif odd:
                    ckpt.save(1)
                else:
                    ckpt.restore()
    return caught.value.message


@pytest.mark.parametrize(
    ("call", "says"),
    [
        ("save", "node_local is True on rank 0 and False on rank 3"),
        ("load", "node_local is False on rank 0 and True on rank 3"),
        ("best", "the call is restore() on rank 0 and restore('best') on rank 3"),
        ("kind", "the call is restore() on rank 0 and save on rank 3"),
    ],
)
def test_ranks_that_make_different_calls_hear_of_it_at_once(
    call: str, says: str, tmp_path: Path
) -> None:
    for message in run_ranks(4, unlike, str(tmp_path), call):
        assert "the ranks make different calls" in message
        assert says in message


def alone(root: str) -> str:
    state = build("ddp", 10)
    given = {"node_local": True, "exclusive": True, "status_seconds": 0.05}
    with dist_ckpt.Checkpointer(folder(root), state, **given) as first:  # type: ignore[arg-type]
        first.restore()
        first.save(10).wait()
        with pytest.raises(UsageError) as caught:
            dist_ckpt.Checkpointer(folder(root), state, **given).restore()  # type: ignore[arg-type]
        first.save(20).wait()  # nobody has taken the run over
    with dist_ckpt.Checkpointer(folder(root), state, **given) as second:  # type: ignore[arg-type]
        assert second.restore() == 20
    return caught.value.message


def test_a_job_that_wants_to_be_alone_looks_in_all_folders(tmp_path: Path) -> None:
    for message in run_ranks(4, alone, str(tmp_path)):
        assert "exclusive=True, and another job is at work on" in message
