"""Saved in one random layout and loaded in another: every element tells its place, to the last.

What is stored by rows of an odd number and wanted by columns, or as any slice, from our own
checkpoints and from stock ones, each rank reading for itself or several for one another.
"""

from __future__ import annotations

import math
import random
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as stock_save
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import dist_ckpt
from dist_ckpt.testing.ranks import ranks, run_ranks

# Those that came back wrong, and shapes of all kinds.
SHAPES = ((3, 4), (5, 8), (3, 4, 5), (7,), (1, 9), (9, 1), (1,), (2, 3, 2, 5), (0, 3), (13, 6), ())
SAVES, LOADS, SLICES = 1, 2, 4


def content(number: int, shape: tuple[int, ...]) -> torch.Tensor:
    return (torch.arange(math.prod(shape), dtype=torch.int64) + 10_000 * number).reshape(shape)


def tensors() -> dict[str, torch.Tensor]:
    shapes = SHAPES
    return {f"t{number}": content(number, shape) for number, shape in enumerate(shapes)}


def mesh_of() -> DeviceMesh:
    size = dist.get_world_size()
    return init_device_mesh("cpu", (2, 2) if size == 4 else (size,))


def share(whole: torch.Tensor, mesh: DeviceMesh, placements: Sequence[Placement]) -> torch.Tensor:
    """Return what this rank has of `whole`, without a word to the others."""
    place = mesh.get_coordinate()
    assert place is not None
    for size, at, each in zip(mesh.shape, place, placements, strict=True):
        if isinstance(each, Shard):
            rows = -(-whole.shape[each.dim] // size)
            first = min(at * rows, whole.shape[each.dim])
            whole = whole.narrow(each.dim, first, min(rows, whole.shape[each.dim] - first))
    return whole.contiguous()


def placed(seed: int) -> Iterator[tuple[str, torch.Tensor, DeviceMesh, list[Placement]]]:
    """Give each tensor a place at random: sharded in one or two dimensions, or whole."""
    rng, mesh = random.Random(seed), mesh_of()
    for name, whole in tensors().items():
        kinds: list[Placement] = [Replicate(), *(Shard(dim) for dim in range(whole.ndim))]
        yield name, whole, mesh, [rng.choice(kinds) for _ in range(mesh.ndim)]


def module(seed: int, *, blank: bool = False) -> nn.Module:
    made = nn.Module()
    for name, whole, mesh, placements in placed(seed):
        local = share(torch.full_like(whole, -1) if blank else whole, mesh, placements)
        shape, stride = whole.shape, whole.stride()
        made.register_buffer(
            name, DTensor.from_local(local.clone(), mesh, placements, shape=shape, stride=stride)
        )
    return made


def wrong_in(found: nn.Module, seed: int) -> list[str]:
    wrong = []
    for name, whole, mesh, placements in placed(seed):
        tensor = found.get_buffer(name)
        assert isinstance(tensor, DTensor)
        if not torch.equal(tensor.to_local(), share(whole, mesh, placements)):
            wrong.append(name)
    return wrong


def save_all(root: str) -> None:
    size = dist.get_world_size()
    for seed in range(SAVES):
        saved = module(seed)
        dist_ckpt.save({"model": saved}, f"{root}/ours-{size}-{seed}")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            stock_save({"model": saved.state_dict()}, checkpoint_id=f"{root}/stock-{size}-{seed}")


def load_all(root: str) -> list[str]:
    wrong = []
    for place in sorted(Path(root).iterdir()):
        for seed in range(10, 10 + LOADS):
            found = module(seed, blank=True)
            dist_ckpt.load_weights(found, place, exchange="always" if seed % 2 else "never")
            wrong += [f"{place.name} into {seed}: {name}" for name in wrong_in(found, seed)]
    return wrong


@pytest.mark.parametrize(
    ("saved", "loaded"),
    [((3,), (2,)), pytest.param((2, 3, 4), (2, 3, 4), marks=pytest.mark.soak)],
    ids=["three into two", "all"],
)
def test_any_layout_into_any_other_and_every_slice(
    saved: tuple[int, ...], loaded: tuple[int, ...], tmp_path: Path
) -> None:
    for size in saved:
        run_ranks(size, save_all, str(tmp_path))
    for size in loaded:
        assert run_ranks(size, load_all, str(tmp_path)) == [[]] * size
    rng = random.Random(5)
    for place in sorted(tmp_path.iterdir()):
        with dist_ckpt.open_checkpoint(place) as opened:
            for name, whole in tensors().items():
                for _ in range(SLICES):
                    subscript = _subscript(rng, whole.shape)
                    found = opened[f"model/{name}"][subscript]
                    assert torch.equal(found, whole[subscript]), (place.name, name, subscript)


def _subscript(rng: random.Random, shape: torch.Size) -> tuple[int | slice, ...]:
    items: list[int | slice] = []
    for size in shape:
        if size and rng.random() < 0.2:
            items.append(rng.randrange(-size, size))
        else:
            first, last = sorted(rng.randint(0, size) for _ in range(2))
            items.append(slice(first, last, rng.choice((1, 1, 2, 3))))
    return tuple(items)


@ranks(2)
def test_rows_of_fsdp_come_back_as_columns(tmp_path: Path) -> None:
    """GPT-2 has 50257 rows: two ranks hold 25129 and 25128 of them."""
    mesh = init_device_mesh("cpu", (2,))
    for number, (rows, columns) in enumerate(((3, 4), (50257, 16))):
        whole = content(number, (rows, columns)).float()
        saved = nn.Linear(columns, rows, bias=False)
        saved.weight.data.copy_(whole)
        fully_shard(saved, mesh=mesh)
        dist_ckpt.save({"model": saved}, tmp_path / f"{rows}")
        blank = nn.Linear(columns, rows, bias=False)
        blank.weight = nn.Parameter(distribute_tensor(torch.zeros_like(whole), mesh, [Shard(1)]))
        dist_ckpt.load_weights(blank, tmp_path / f"{rows}")
        weight = blank.weight.detach()
        assert isinstance(weight, DTensor)
        assert torch.equal(weight.to_local(), share(whole, mesh, [Shard(1)]))


@pytest.mark.soak
def test_every_slice_of_many_checkpoints(tmp_path: Path) -> None:
    run_ranks(4, save_all, str(tmp_path))
    rng = random.Random(6)
    for place in sorted(tmp_path.iterdir()):
        with dist_ckpt.open_checkpoint(place) as opened:
            for name, whole in tensors().items():
                for _ in range(200):
                    subscript = _subscript(rng, whole.shape)
                    assert torch.equal(opened[f"model/{name}"][subscript], whole[subscript])
