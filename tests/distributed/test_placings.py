"""Which elements of a DTensor lie where: as `full_tensor` has it, or refused."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec, TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard

import dist_ckpt
from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.testing.ranks import run_ranks

try:
    from torch.distributed.tensor._dtensor_spec import ShardOrderEntry
except ImportError:  # of a torch that has no order but that of the mesh
    ShardOrderEntry = None  # type: ignore[assignment,misc]

FEW = ((7, 2),)
SHAPES = (*FEW, (8,), (16, 3), (8, 8), (7, 5), (1, 9), (13,), (2, 2, 6))
Order = tuple[tuple[int, tuple[int, ...]], ...]
Case = tuple[tuple[int, ...], tuple[Placement, ...], Order | None]


class Shown(Shard):
    """Places as `Shard` does, and only prints another way."""

    def __repr__(self) -> str:
        return f"Shown({self.dim})"


class Dealt(Shard):
    """Deals rows out like cards: each rank has every second one."""

    def _split_tensor(self, tensor: torch.Tensor, num_chunks: int, **_: Any) -> Any:
        return [tensor[start::num_chunks].contiguous() for start in range(num_chunks)], []


def whole_of(shape: tuple[int, ...]) -> torch.Tensor:
    return torch.arange(float(torch.Size(shape).numel())).reshape(shape)


def cases(shapes: tuple[tuple[int, ...], ...]) -> list[Case]:
    found: list[Case] = []
    for shape in shapes:
        each = [Replicate(), *(Shard(dim) for dim in range(len(shape)))]
        found += [(shape, pair, None) for pair in itertools.product(each, each)]
        for dim in range(len(shape)):
            strided = _StridedShard(dim, split_factor=2)
            found.append((shape, (strided, Shard(dim)), None))
            found.append((shape, (strided, Replicate()), None))
            found.append((shape, (Replicate(), strided), None))
            if ShardOrderEntry is not None:
                found.append((shape, (Shard(dim), Shard(dim)), ((dim, (1, 0)),)))
            found.append((shape, (Shown(dim), Replicate()), None))
    return found


def placed(
    mesh: DeviceMesh, shape: tuple[int, ...], placements: tuple[Placement, ...], order: Order | None
) -> DTensor | None:
    """Return a DTensor whose elements lie where torch says; None where torch does not know."""
    whole, coordinate = whole_of(shape), mesh.get_coordinate()
    assert coordinate is not None
    local, dims = whole, [0, 1] if order is None else list(order[0][1])
    for dim in dims:
        placement = placements[dim]
        if isinstance(placement, Shard | _StridedShard):
            split: Any = placement._split_tensor
            pieces, _ = split(local, mesh.size(dim), with_padding=False, contiguous=True)
            local = pieces[coordinate[dim]]
    meta = TensorMeta(torch.Size(shape), whole.stride(), whole.dtype)
    more: dict[str, Any] = {}
    if order is not None:
        more["shard_order"] = tuple(ShardOrderEntry(dim, by) for dim, by in order)
    spec = DTensorSpec(mesh, placements, tensor_meta=meta, **more)
    kind: Any = DTensor
    made: DTensor = kind(local.clone(), spec, requires_grad=False)
    try:
        return made if torch.equal(made.full_tensor(), whole) else None
    except Exception:
        return None


def save_all(root: str, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, int, list[str]]:
    mesh = init_device_mesh("cpu", (2, 2))
    state, unknown, wrong = {}, 0, []
    for number, (shape, placements, order) in enumerate(cases(shapes)):
        tensor = placed(mesh, shape, placements, order)
        if tensor is None:
            unknown += 1
        else:
            state[f"t{number}"] = tensor
    dist_ckpt.save({"m": state}, root, step=1)
    for tensor in state.values():
        tensor.to_local().zero_()
    dist_ckpt.load({"m": state}, root)
    for name, tensor in state.items():
        if not torch.equal(tensor.full_tensor(), whole_of(tuple(tensor.shape))):
            wrong.append(f"{name}: {tensor.placements} of {list(tensor.shape)} came back wrong")
    refuse_what_may_lie_anywhere(f"{root}/refused")
    return len(state), unknown, wrong


def refuse_what_may_lie_anywhere(url: str) -> None:
    mesh = init_device_mesh("cpu", (4,))
    rows = torch.ones(4, 2)
    for placement in (Dealt(0), Partial(), Partial("max")):
        held = DTensor.from_local(rows, mesh, [placement], run_check=False)
        with pytest.raises(CheckpointError, match=r"partial sums|of the class Dealt"):
            dist_ckpt.save({"m": {"w": held}}, url, step=1)
    # A shape that no placement explains: other ranks' rows would be taken for these.
    lying = DTensor.from_local(
        rows, mesh, [Shard(0)], run_check=False, shape=torch.Size([9, 2]), stride=(2, 1)
    )
    with pytest.raises(UsageError, match=r"\[\d, 2\] of \[9, 2\] would lie on this rank"):
        dist_ckpt.save({"m": {"w": lying}}, url, step=1)


@pytest.mark.parametrize("shapes", [FEW, pytest.param(SHAPES, marks=pytest.mark.soak)])
def test_every_layout_that_torch_knows_is_written_where_it_lies(
    shapes: tuple[tuple[int, ...], ...], tmp_path: Path
) -> None:
    root = str(tmp_path)
    results = run_ranks(4, save_all, root, shapes)
    known, unknown, wrong = results[0]
    assert [each[2] for each in results] == [wrong] * 4 == [[]] * 4
    # Strided shards of uneven tensors, of which torch itself makes no whole again, are few.
    assert known > 8 * unknown
    with dist_ckpt.open_checkpoint(root) as opened:
        names = [name for name in opened if name.startswith("m/")]
        assert len(names) == known
        for name in names:
            tensor = opened[name].read()
            assert torch.equal(tensor, whole_of(tuple(tensor.shape))), name
