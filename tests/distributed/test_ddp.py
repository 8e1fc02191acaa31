"""DDP: buffers of rank 0, equal shares, and errors that name who is to blame."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import CheckpointError, CoordinationError, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule

SHARDS = "*.safetensors"


def net() -> torch.nn.Module:
    torch.manual_seed(5)
    return torch.nn.Sequential(
        torch.nn.Linear(6, 40_000), torch.nn.BatchNorm1d(40_000), torch.nn.Linear(40_000, 2)
    )


def train_and_save(root: str) -> list[float]:
    # Each rank sees other data, so the running means come to differ.
    model = DistributedDataParallel(net(), broadcast_buffers=False)
    torch.manual_seed(dist.get_rank())
    model(torch.randn(8, 6)).sum().backward()
    state = dist_ckpt.TrainState(model=model, rng=None)
    for part in state.parts.values():
        assert part.capture().unequal == {
            "1.running_mean",
            "1.running_var",
            "1.num_batches_tracked",
        }
    dist_ckpt.save(state, root)
    mean = model.module[1].running_mean
    assert isinstance(mean, torch.Tensor)
    return [float(value) for value in mean[:: 40_000 // 100]]


def test_buffers_that_differ_are_those_of_rank_0_whole(tmp_path: Path) -> None:
    by_rank = run_ranks(3, train_and_save, str(tmp_path))
    assert by_rank[0] != by_rank[1]
    index = Repository(LocalStore(tmp_path)).open(0).index
    names = [tensor.name for tensor in index.tensors]
    for name in ("1.running_mean", "1.running_var", "1.num_batches_tracked"):
        rows = index.chunks_of(names.index(name))
        assert [index.files[int(file)].name for file in rows.file] == ["model.r00000.safetensors"]
    assert len(index.chunks_of(names.index("0.weight")).file) == 3, "all else is shared out"
    fresh = net()
    dist_ckpt.load(dist_ckpt.TrainState(model=fresh, rng=None), tmp_path)
    mean = dict(fresh.named_buffers())["1.running_mean"]
    assert [float(value) for value in mean[:: 40_000 // 100]] == by_rank[0]


def save_large(root: str) -> int:
    torch.manual_seed(1)
    layers = [torch.nn.Linear(256, 256) for _ in range(24)]
    model = DistributedDataParallel(torch.nn.Sequential(*layers))
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(2, 256)).sum().backward()
    optimizer.step()
    written: list[int] = []

    def note(event: events.Event) -> None:
        if isinstance(event, events.FileWritten):
            written.append(event.nbytes)

    leave = events.subscribe(note)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root)
    leave()
    return sum(written)


def test_four_ranks_write_a_quarter_each(tmp_path: Path) -> None:
    nbytes = run_ranks(4, save_large, str(tmp_path))
    manifest = Repository(LocalStore(tmp_path)).open(0).manifest
    assert sum(nbytes) == manifest.files.nbytes > 16 << 20
    assert max(nbytes) <= 0.27 * sum(nbytes)


def hang_then_save(root: str) -> list[list[int]]:
    store: Store = LocalStore(root)
    hang = Hang()
    if dist.get_rank() == 1:
        store = FaultyStore(store, [Rule("put", hang, key="step-0000000001/*", nth=None)])
    state = {"weights": {"w": torch.arange(100_000.0)}}
    named: list[list[int]] = []
    with dist_ckpt.Checkpointer(store, state, timeout_seconds=10.0) as ckpt:
        ckpt.save(1)
        with pytest.raises(CheckpointError) as caught:
            ckpt.save(2)  # at once: nearly all of its time goes by while save 1 hangs
        named.append(sorted(caught.value.ranks))
        assert "step 1" in str(caught.value)
        ckpt.save(3).wait()
    hang.release()
    return named


def test_a_save_right_after_a_hung_one_still_names_the_hung_rank(tmp_path: Path) -> None:
    assert run_ranks(3, hang_then_save, str(tmp_path)) == [[[1]]] * 3
    assert Repository(LocalStore(tmp_path)).steps() == [2, 3], "made all the same"


def told_on_one_rank_only(root: str) -> tuple[str, int]:
    store: Store = LocalStore(root)
    if dist.get_rank() == 1:
        broken = Fail(StorageError("disk full"))
        store = FaultyStore(store, [Rule("put", broken, key="step-0000000002/*")])
    state = {"weights": {"w": torch.arange(100_000.0)}}
    with dist_ckpt.Checkpointer(store, state, timeout_seconds=600) as ckpt:
        ckpt.save(1).wait()
        handle = ckpt.save(2)
        if dist.get_rank() == 0:
            with pytest.raises(StorageError):
                handle.wait()
        with pytest.raises(StorageError) as caught:
            ckpt.restore()
        return str(caught.value), ckpt.restore()


def test_a_failure_that_some_ranks_know_already_does_not_keep_them_waiting(tmp_path: Path) -> None:
    results = run_ranks(2, told_on_one_rank_only, str(tmp_path))
    assert results[0] == results[1]
    assert "disk full" in results[0][0]
    assert results[0][1] == 1


def restore_different(root: str) -> str:
    state = {"weights": {"w": torch.arange(1000.0)}}
    with dist_ckpt.Checkpointer(root, state, timeout_seconds=600) as ckpt:
        ckpt.save(1)
        ckpt.save(2).wait()
        with pytest.raises(UsageError) as caught:
            ckpt.restore(step=1 if dist.get_rank() == 1 else None)
        assert ckpt.restore(step=1) == 1
        return str(caught.value)


def test_ranks_that_are_asked_to_restore_different_steps_are_told(tmp_path: Path) -> None:
    results = run_ranks(2, restore_different, str(tmp_path))
    assert results[0] == results[1]
    assert "load different things (step: rank 0: None, rank 1: 1)" in results[0]


def several_jobs(root: str) -> list[str]:
    rank = dist.get_rank()
    state: dict[str, Any] = {"weights": {"w": torch.arange(1000.0)}}
    first = dist_ckpt.Checkpointer(f"{root}/first", state, timeout_seconds=600)
    second = dist_ckpt.Checkpointer(f"{root}/second", state, timeout_seconds=600)
    handles = [first.save(1), second.save(1), first.save(2), second.save(2)]
    for handle in handles:
        handle.wait()
    first.close()
    dist_ckpt.save(state, f"{root}/third", step=7)
    second.close()
    # A process group that is made anew has a store of its own.
    dist.destroy_process_group()
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/rendezvous", rank=rank, world_size=2
    )
    dist_ckpt.save(state, f"{root}/first", step=3)
    with dist_ckpt.Checkpointer(f"{root}/second", state, timeout_seconds=600) as again:
        assert again.restore() == 2
    return [handle.save_id for handle in handles]


def test_jobs_side_by_side_and_in_a_new_process_group(tmp_path: Path) -> None:
    ids = run_ranks(2, several_jobs, str(tmp_path))
    assert ids[0] == ids[1]
    assert [Repository(LocalStore(tmp_path / n)).steps() for n in ("first", "second", "third")] == [
        [1, 2, 3],
        [1, 2],
        [7],
    ]


def never_joined() -> tuple[str, list[int]]:
    if dist.get_rank() == 0:
        return "", []
    with pytest.raises(CoordinationError) as caught:
        dist_ckpt.save({"n": {"v": 1}}, "memory://nowhere", timeout_seconds=0.5)
    return str(caught.value), sorted(caught.value.ranks)


def test_without_rank_0_there_is_one_clear_error() -> None:
    message, ranks = run_ranks(2, never_joined)[1]
    assert "rank 0 did not open its coordination port within 0.5 s" in message
    assert ranks == [0]


def join_late(root: str) -> None:
    state = {"n": {"v": 1}}
    if dist.get_rank() == 1:
        with pytest.raises(CoordinationError, match="rank 0 did not open"):
            dist_ckpt.save(state, root, timeout_seconds=0.5)
    dist.barrier()
    dist_ckpt.save(state, root, timeout_seconds=600)


def test_a_rank_that_was_there_too_early_may_try_again(tmp_path: Path) -> None:
    run_ranks(2, join_late, str(tmp_path))
    assert Repository(LocalStore(tmp_path)).steps() == [0]


def slow_exit(root: str) -> None:
    """Save as the last thing that a program does."""
    dist_ckpt.async_save({"weights": {"w": torch.arange(1000.0)}}, root, timeout_seconds=600)


def test_a_save_as_the_last_statement_is_committed(tmp_path: Path) -> None:
    run_ranks(2, slow_exit, str(tmp_path))
    assert Repository(LocalStore(tmp_path)).steps() == [0]
