"""`torch.distributed.checkpoint` of several ranks on our storage, with either planner."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.optimizer import load_sharded_optimizer_state_dict
from torch.distributed.checkpoint.planner import SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from dist_ckpt.dcp import Planner, Reader, Writer
from dist_ckpt.repository import Checkpoint, Repository
from dist_ckpt.storage import LocalStore
from dist_ckpt.testing.ranks import run_ranks

CPU = torch.device("cpu")
HAS_CACHE = hasattr(SavePlanner, "_cached_global_plan")
ROWS = 1013  # prime: no number of ranks divides it
PLANNERS: dict[str, Callable[[], DefaultSavePlanner]] = {
    "stock": DefaultSavePlanner,
    "lowest": lambda: DefaultSavePlanner(dedup_save_to_lowest_rank=True),
    "ours": Planner,
}


def values(rows: int = ROWS) -> torch.Tensor:
    return torch.arange(rows * 96.0).reshape(rows, 96)


def placed(tensor: torch.Tensor, *placements: Placement) -> DTensor:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return distribute_tensor(tensor, mesh, placements)


def state(*, blank: bool = False) -> dict[str, Any]:
    """Return replicated, sharded, and unevenly sharded tensors, and a value."""
    factor = 0.0 if blank else 1.0
    return {
        "model": {
            "same": values() * factor,
            "rows": placed(values() * factor, Shard(0)),
            "columns": placed(values() * factor, Shard(1)),
            "few": placed(values(2) * factor, Shard(0)),
            "none": placed(torch.empty(0, 4), Shard(1)),
            "everywhere": placed(values(3) * factor, Replicate()),
        },
        "epoch": 0 if blank else 7,
    }


def problems(found: dict[str, Any]) -> list[str]:
    wanted = {"few": values(2), "everywhere": values(3), "none": torch.empty(0, 4)}
    wrong = []
    for name, tensor in found["model"].items():
        full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
        if not torch.equal(full, wanted.get(name, values())):
            wrong.append(name)
    return wrong + ([] if found["epoch"] == 7 else ["epoch"])


def save_all(root: str) -> None:
    for name, planner in PLANNERS.items():
        save(state(), storage_writer=Writer(f"{root}/{name}"), planner=planner())
    future = async_save(state(), storage_writer=Writer(f"{root}/async", step=3), planner=Planner())
    future.result()  # type: ignore[union-attr]  # a response only where a stager is given
    # Our planner does not need our writer.
    save(state(), checkpoint_id=f"{root}/files", planner=Planner())


def load_all(root: str) -> list[str]:
    wrong = []
    for name in (*PLANNERS, "async", "files"):
        found = state(blank=True)
        if name == "files":
            load(found, checkpoint_id=f"{root}/{name}")
        else:
            load(found, storage_reader=Reader(f"{root}/{name}"))
        wrong += [f"{name}: {each}" for each in problems(found)]
    return wrong


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("stock")
    run_ranks(4, save_all, str(root))
    return root


@pytest.mark.parametrize("world_size", [1, 3, 4])
def test_what_four_ranks_save_is_loaded_by(world_size: int, saved: Path) -> None:
    assert run_ranks(world_size, load_all, str(saved)) == [[]] * world_size


def opened(root: Path) -> Checkpoint:
    checkpoint = Repository(LocalStore(root)).open_latest()
    assert Repository(LocalStore(root)).verify(checkpoint.step).problems == ()
    assert checkpoint.manifest.world_size == 4
    return checkpoint


def test_our_planner_shares_replicas_out_by_rows(saved: Path) -> None:
    def largest_share(name: str) -> float:
        nbytes = [each.nbytes for each in opened(saved / name).manifest.timings.values()]
        return max(nbytes) / sum(nbytes)

    assert largest_share("lowest") > 0.4
    assert largest_share("ours") < 0.28
    assert largest_share("async") < 0.28
    index = opened(saved / "ours").index
    pieces = {
        entry.name: len(index.chunks_of(number).file) for number, entry in enumerate(index.tensors)
    }
    assert pieces["same"] == 4
    assert pieces["few"] == 2  # two ranks have a row, the others have nothing to write
    assert pieces["none"] == 1


def fail_alone(root: str) -> list[str]:
    """Fail on rank 1 in each place where a rank can; then save."""
    rank, said = dist.get_rank(), []
    bad: Any = object() if rank == 1 else 1
    attempts: list[tuple[dict[str, Any], Writer]] = [
        # Rank 1 is the only one that has `own`, so it has to write it.
        ({**state(), **({"own": bad} if rank == 1 else {})}, Writer(root, step=1)),
        (state(), Writer(root, step=2 + (rank == 1))),
        (state(), Writer(root if rank != 1 else f"{root}-other", step=4)),
        ({"model": {"same": values(ROWS + (rank == 1))}}, Writer(root, step=5)),
    ]
    for found, writer in attempts:
        try:
            save(found, storage_writer=writer, planner=Planner())
        except CheckpointException as error:
            said += [f"{where}: {cause[0]}" for where, cause in error.failures.items()]
    assert Repository(LocalStore(root)).steps() == []
    dist.barrier()  # nobody saves before everybody has looked
    save(state(), storage_writer=Writer(root, step=6), planner=Planner())
    return said


def test_failure_of_one_rank_is_told_on_all_and_commits_nothing(tmp_path: Path) -> None:
    said = run_ranks(4, fail_alone, str(tmp_path / "run"))
    assert said[1:] == said[:-1]
    first, second, third, fourth = said[0]
    assert first.startswith("1: cannot store own, a object")
    assert second.startswith("0: rank 0 was asked to save step 2")
    assert "rank 1 step 3" in second
    assert "run-other" in third
    assert fourth.startswith("0: tensor 'same' of part 'model' is float32[1013, 96] on rank 0")
    assert Repository(LocalStore(tmp_path / "run")).steps() == [6]


def save_with_cached_plans(root: str) -> list[float]:
    """Save through our writers and torch's by planners that cache; the plan of rank 1 changes."""
    rank, found = dist.get_rank(), []
    for step in range(6):
        tensors = {"same": torch.full((4,), float(step)), "own": torch.ones(1 + (step > 2))}
        tensors = {name if name == "same" else f"{name}{rank}": t for name, t in tensors.items()}
        planner = DefaultSavePlanner(enable_plan_caching=True)
        if step in (3, 4):
            save(tensors, checkpoint_id=f"{root}/stock-{step}", planner=planner)
            load(tensors, checkpoint_id=f"{root}/stock-{step}")
        else:
            save(tensors, storage_writer=Writer(root, step=step), planner=planner)
            found.append(wiped(tensors, Reader(root, step=step)))
    return found


def wiped(tensors: dict[str, torch.Tensor], reader: Reader) -> float:
    for tensor in tensors.values():
        tensor.zero_()
    load(tensors, storage_reader=reader)
    return float(sum(tensor.sum() for tensor in tensors.values()))


def load_fsdp1_optimizer(root: str) -> bool:
    """Save a model of FSDP1 and its optimizer, and load that as torch's documentation does."""
    model = FullyShardedDataParallel(
        torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Linear(16, 3)), device_id=CPU
    )
    optimizer = torch.optim.Adam(model.parameters())
    torch.autograd.backward(model(torch.ones(4, 8)).sum())
    optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its own calls
        FullyShardedDataParallel.set_state_dict_type(model, StateDictType.SHARDED_STATE_DICT)
        moments = FullyShardedDataParallel.optim_state_dict(model, optimizer)
        save({"model": model.state_dict(), "optim": moments}, storage_writer=Writer(root))
        found = load_sharded_optimizer_state_dict(model.state_dict(), "optim", Reader(root))[
            "optim"
        ]
    same = [
        torch.equal(local(found["state"][name][key]), local(value))
        for name, state in moments["state"].items()
        for key, value in state.items()
    ]
    return len(same) == 12 and all(same) and len(found["param_groups"]) == 1


def local(tensor: Any) -> torch.Tensor:
    shards = tensor.local_shards() if hasattr(tensor, "local_shards") else None
    held: torch.Tensor = shards[0].tensor if shards else tensor
    return held


def with_planners_of_torch(root: str) -> tuple[list[float], bool]:
    cached = save_with_cached_plans(f"{root}/cached") if HAS_CACHE else [1.0, 5.0, 9.0, 22.0]
    return cached, load_fsdp1_optimizer(f"{root}/fsdp1")


def test_planners_of_torch_that_need_more_than_tensors(tmp_path: Path) -> None:
    wanted = [step * 4 + 1.0 + (step > 2) for step in (0, 1, 2, 5)]
    assert run_ranks(2, with_planners_of_torch, str(tmp_path)) == [(wanted, True)] * 2


def load_alone(root: str) -> list[str]:
    rank, said = dist.get_rank(), []
    for reader in (
        Reader(root, step=0 if rank else 9),
        Reader(root if rank else f"{root}-none"),
        Reader(root, step=None if rank else 0),
        Reader(root, step=1 if rank else 0),
    ):
        found = state(blank=True)
        try:
            load(found, storage_reader=reader)
        except CheckpointException as error:
            said += [f"{where}: {cause[0]}" for where, cause in error.failures.items()]
        else:
            said += problems(found) or ["loaded"]
    return said


def test_ranks_that_read_different_checkpoints_are_told_so(saved: Path) -> None:
    root = str(saved / "ours")
    run_ranks(2, save_next, root)
    said = run_ranks(2, load_alone, root)
    assert said[0] == said[1]
    absent, nothing, newest, other = said[0]
    assert absent.startswith("0: no checkpoint of step 9")
    assert "is no run" in nothing
    assert "give every rank's Reader the same arguments" in newest
    assert "give every rank's Reader the same arguments" in other


def save_next(root: str) -> None:
    save(state(), storage_writer=Writer(root, step=1))
