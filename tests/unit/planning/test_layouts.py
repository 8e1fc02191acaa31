"""Random states in random layouts, through DCP's planning: written once, and evenly."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch
import torch.distributed as dist
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Placement, Replicate, Shard, empty
from torch.testing._internal.distributed.fake_pg import FakeStore

from dist_ckpt.format.files import itemsize
from dist_ckpt.format.index import Held
from dist_ckpt.planning.describe import local_boxes
from dist_ckpt.planning.owners import MIN_PIECE_BYTES, Owned, decide
from tests.unit.planning.test_owners import cells, loads

MESHES = [(1,), (2,), (3,), (8,), (2, 2), (2, 3), (4, 2)]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a job: `placements` None for a plain one, `ranks` None for all of them."""

    shape: tuple[int, ...]
    placements: tuple[Placement, ...] | None
    ranks: tuple[int, ...] | None


@contextmanager
def rank_of(rank: int, mesh_shape: tuple[int, ...]) -> Iterator[None]:
    """Be one rank of a job whose process group does nothing: planning needs only the numbers."""
    dist.init_process_group("fake", rank=rank, world_size=math.prod(mesh_shape), store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def held_by(mesh_shape: tuple[int, ...], tensors: Sequence[Tensor]) -> list[list[Held]]:
    """What each rank says it holds."""
    by_rank = []
    for rank in range(math.prod(mesh_shape)):
        with rank_of(rank, mesh_shape):
            mesh = init_device_mesh("cpu", mesh_shape)
            named: dict[str, torch.Tensor] = {}
            for number, one in enumerate(tensors):
                if one.ranks is not None and rank not in one.ranks:
                    continue
                if one.placements is None:
                    named[f"t{number}"] = torch.empty(one.shape, dtype=torch.uint8)
                else:
                    named[f"t{number}"] = empty(
                        one.shape,
                        dtype=torch.uint8,
                        device_mesh=mesh,
                        placements=list(one.placements),
                    )
            by_rank.append([box.held for box in local_boxes({"model": named})])
    return by_rank


@st.composite
def jobs(draw: st.DrawFn, *, largest: int) -> tuple[tuple[int, ...], list[Tensor]]:
    """A mesh, and tensors plain, replicated, sharded, or on a few ranks only."""
    mesh_shape = draw(st.sampled_from(MESHES))
    world_size = math.prod(mesh_shape)
    tensors = []
    for _ in range(draw(st.integers(1, 6))):
        shape = tuple(draw(st.lists(st.integers(0, largest), max_size=3)))
        placement = st.one_of(
            st.just(Replicate()), *[st.just(Shard(dim)) for dim in range(len(shape))]
        )
        kind = draw(st.sampled_from(["plain", "some ranks", "placed"]))
        placements = tuple(draw(placement) for _ in mesh_shape) if kind == "placed" else None
        ranks = None
        if kind == "some ranks":
            ranks = tuple(draw(st.sets(st.integers(0, world_size - 1), min_size=1)))
        tensors.append(Tensor(shape, placements, ranks))
    return mesh_shape, tensors


@settings(max_examples=60)
@given(jobs(largest=7))
def test_every_element_is_written_once_by_a_holder(
    job: tuple[tuple[int, ...], list[Tensor]],
) -> None:
    held_by_rank = held_by(*job)
    cells(held_by_rank, decide(held_by_rank))
    cells(held_by_rank, decide(held_by_rank, max_piece_bytes=3))


@settings(max_examples=60)
@given(jobs(largest=500))
def test_nobody_writes_much_more_than_it_must(
    job: tuple[tuple[int, ...], list[Tensor]],
) -> None:
    held_by_rank = held_by(*job)
    boxes, sizes = holders_of(held_by_rank)
    sets = set(boxes.values())
    # The promise is for sets of holders of which no two overlap without one being in the other.
    assume(all(a <= b or b <= a or not a & b for a in sets for b in sets))
    # What only the ranks of some set hold is written by them: one of them has the mean at least.
    unions = sets | {a | b for a in sets for b in sets}
    least = max(
        sum(sizes[box] for box, ranks in boxes.items() if ranks <= one) / len(one) for one in unions
    )
    found = loads(held_by_rank, decide(held_by_rank))
    assert max(found) <= 1.1 * least + 2 * MIN_PIECE_BYTES


def holders_of(
    held_by_rank: Sequence[Sequence[Held]],
) -> tuple[dict[object, frozenset[int]], dict[object, int]]:
    """By box, the ranks that hold it and its size in bytes."""
    holders: dict[object, set[int]] = defaultdict(set)
    nbytes: dict[object, int] = {}
    for rank, held in enumerate(held_by_rank):
        for one in held:
            box = (one.name, one.offsets, one.sizes)
            holders[box].add(rank)
            nbytes[box] = math.prod(one.sizes) * itemsize(one.dtype)
    return {box: frozenset(ranks) for box, ranks in holders.items()}, nbytes


# By name: a mesh, and how a tensor of so many dimensions is placed on it.
Place = Callable[[int], tuple[Placement, ...] | None]
LAYOUTS: dict[str, tuple[tuple[int, ...], Place]] = {
    "replicas": ((8,), lambda ndim: None),
    "HSDP": ((4, 2), lambda ndim: (Replicate(), Shard(0))),
    "TP x FSDP": ((4, 2), lambda ndim: (Shard(0), Shard(ndim - 1))),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_transformer_is_even_within_a_tenth(layout: str) -> None:
    d = 192
    shapes = [(3 * d, d), (d, d), (4 * d, d), (d, 4 * d), (d,), (4 * d,), (3 * d,)] * 12
    mesh_shape, placements = LAYOUTS[layout]
    tensors = [Tensor(shape, placements(len(shape)), None) for shape in [(5003, d), *shapes]]
    held_by_rank = held_by(mesh_shape, tensors)
    found = loads(held_by_rank, decide(held_by_rank))
    assert max(found) <= 1.1 * sum(found) / len(found)


def test_experts_and_stages_are_evened_out_by_what_all_hold() -> None:
    shared = Tensor((3000, 1000), None, None)
    experts = [Tensor((600, 1000), None, (rank,)) for rank in (0, 0, 1)]
    pair = Tensor((800, 1000), None, (2, 3))
    held_by_rank = held_by((4,), [shared, *experts, pair])
    found = loads(held_by_rank, decide(held_by_rank))
    assert max(found) <= 1.1 * sum(found) / 4


def test_a_few_long_rows_are_cut_themselves() -> None:
    held_by_rank = held_by((4,), [Tensor((5, 3_000_000), None, None)])
    owned = decide(held_by_rank)
    cells(held_by_rank, owned)
    found = loads(held_by_rank, owned)
    assert max(found) <= 1.1 * sum(found) / 4


@given(st.integers(1, 2000), st.lists(st.integers(1, 40), max_size=3))
def test_no_owned_box_is_larger_than_the_limit(limit: int, shape: list[int]) -> None:
    held = Held("m", "t", "float32", tuple(shape), (0,) * len(shape), tuple(shape))
    by_rank = [[held], [held]]
    owned = decide(by_rank, max_piece_bytes=limit)
    cells(by_rank, owned)
    assert max(map(size_of, [box for boxes in owned for box in boxes])) <= max(limit, 4)


def size_of(box: Owned) -> int:
    return 4 * math.prod(box.sizes)
