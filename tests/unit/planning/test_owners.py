"""Who writes what: every element once, by somebody who has it, about the same for everybody."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.files import itemsize
from dist_ckpt.format.index import Box, Held, intersect, volume
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.planning.owners import MIN_PIECE_BYTES, Owned, decide
from tests.unit.planning.boxes import grids, held, whole

SHAPES = st.lists(st.integers(0, 6), max_size=3)
MIB = 1 << 20


@st.composite
def jobs(draw: st.DrawFn) -> list[list[Held]]:
    """What each rank of a job holds: every box of every tensor on at least one rank."""
    world_size = draw(st.integers(1, 6))
    by_rank: list[list[Held]] = [[] for _ in range(world_size)]
    for number in range(draw(st.integers(1, 4))):
        shape = draw(SHAPES)
        unequal = draw(st.booleans())
        # Large items, so that small boxes are worth splitting.
        dtype = draw(st.sampled_from(["float32", "int8"]))
        scale = draw(st.sampled_from([1, 200_000])) if shape and all(shape) else 1
        for box in draw(grids(shape)):
            if scale > 1:
                box = Box((*box.offsets, 0), (*box.sizes, scale))
            description = held(
                f"t{number}", [*shape, scale] if scale > 1 else shape, box, dtype=dtype
            )
            description = msgspec.structs.replace(description, unequal=unequal)
            holders = draw(st.sets(st.integers(0, world_size - 1), min_size=1))
            for rank in holders:
                by_rank[rank].append(description)
    return by_rank


def cells(held_by_rank: Sequence[Sequence[Held]], owned: Sequence[Sequence[Owned]]) -> None:
    """Check that each element is owned once, by a rank that holds it."""
    counts = {each.name: np.zeros(each.shape, np.int8) for one in held_by_rank for each in one}
    empty: dict[str, int] = {name: 0 for name, count in counts.items() if count.size == 0}
    for rank, boxes in enumerate(owned):
        for box in boxes:
            source = held_by_rank[rank][box.held]
            if source.name in empty:
                assert box.sizes == source.shape
                empty[source.name] += 1
                continue
            assert intersect(source.box, box.box) == box.box, "nobody writes what it has not"
            region = zip(box.offsets, box.sizes, strict=True)
            counts[source.name][tuple(slice(a, a + n) for a, n in region)] += 1
    assert all((count == 1).all() for count in counts.values())
    assert set(empty.values()) <= {1}, "what has no element is written once too"


@given(jobs())
def test_every_element_is_written_once_by_a_holder(held_by_rank: list[list[Held]]) -> None:
    owned = decide(held_by_rank)
    cells(held_by_rank, owned)
    assert decide(held_by_rank) == owned, "ranks that ask again are told the same"
    for boxes in owned:
        assert boxes == sorted(boxes, key=lambda box: (box.held, box.offsets))


def loads(held_by_rank: Sequence[Sequence[Held]], owned: Sequence[Sequence[Owned]]) -> list[int]:
    return [
        sum(volume(box.box) * itemsize(held_by_rank[rank][box.held].dtype) for box in boxes)
        for rank, boxes in enumerate(owned)
    ]


@given(
    st.integers(2, 8),
    st.lists(st.tuples(st.integers(1, 700), st.integers(1, 700)), min_size=40, max_size=60),
)
def test_replicas_are_shared_out_evenly(world_size: int, shapes: list[tuple[int, int]]) -> None:
    # At least several MiB for each rank, as the promise is made for.
    shapes = [*shapes, *[(1024, 512)] * world_size]
    everything = [whole(f"t{number}", shape) for number, shape in enumerate(shapes)]
    held_by_rank = [everything] * world_size
    found = loads(held_by_rank, decide(held_by_rank))
    assert max(found) <= 1.1 * sum(found) / world_size


def test_what_one_rank_alone_can_write_is_evened_out_by_what_all_can() -> None:
    small = [whole(f"t{number}", (100, 100)) for number in range(100)]
    own = whole("own", (128, 1024))
    unequal = msgspec.structs.replace(whole("stats", (64, 1024)), unequal=True)
    held_by_rank = [[*small, unequal], [*small, unequal, own], [*small, unequal], small]
    found = loads(held_by_rank, decide(held_by_rank))
    assert max(found) <= 1.05 * sum(found) / 4


def test_values_that_may_differ_are_written_whole_by_the_lowest_holder() -> None:
    stats = msgspec.structs.replace(whole("stats", (4 * MIB,)), unequal=True)
    other = whole("w", (4 * MIB,))
    owned = decide([[other], [other, stats], [stats, other], [stats, other]])
    writers = [
        (rank, box.box)
        for rank, boxes in enumerate(owned)
        for box in boxes
        if [[other], [other, stats], [stats, other], [stats, other]][rank][box.held] == stats
    ]
    assert writers == [(1, stats.box)]


def test_one_holder_that_says_unequal_is_enough() -> None:
    stats = whole("stats", (4 * MIB,))
    owned = decide([[stats], [msgspec.structs.replace(stats, unequal=True)]])
    assert [len(boxes) for boxes in owned] == [1, 0]


def test_small_boxes_are_not_cut() -> None:
    small = whole("t", (MIN_PIECE_BYTES // 4,))
    owned = decide([[small]] * 4)
    assert sorted(len(boxes) for boxes in owned) == [0, 0, 0, 1]
    twice = whole("t", (MIN_PIECE_BYTES // 2,))
    assert sorted(len(boxes) for boxes in decide([[twice]] * 4)) == [0, 0, 1, 1]


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2, 5)])
def test_without_elements_there_is_one_chunk_of_the_whole_shape(shape: tuple[int, ...]) -> None:
    cut = [held("t", shape, Box(tuple(0 for _ in shape), tuple(0 for _ in shape)))]
    owned = decide([[], cut, cut])
    assert owned == [[], [Owned(0, (0,) * len(shape), shape)], []]


def test_an_empty_shard_of_a_tensor_with_elements_is_nothing_to_write() -> None:
    empty = held("t", (2,), Box((2,), (0,)))
    assert decide([[held("t", (2,), Box((0,), (2,)))], [empty]])[1] == []


@pytest.mark.parametrize(
    ("boxes", "says"),
    [
        ([Box((0,), (3,)), Box((2,), (2,))], "overlap"),
        ([Box((0,), (4,)), Box((0,), (2,))], "overlap"),
        ([Box((0,), (1,)), Box((2,), (2,))], "missing"),
        ([Box((0,), (2,)), Box((2,), (3,))], ""),
    ],
    ids=["overlapping", "inside one another", "gap", "outside"],
)
def test_boxes_that_do_not_tile_are_refused_by_name(boxes: list[Box], says: str) -> None:
    ranks = [[held("decoder.weight", (4,), box)] for box in boxes]
    with pytest.raises(IncompatibleError, match=r"'decoder.weight' of part 'model'") as caught:
        decide(ranks)
    assert says in str(caught.value)
    assert caught.value.kind == ErrorKind.COVERAGE


def test_one_name_means_one_tensor() -> None:
    with pytest.raises(
        IncompatibleError, match=r"float32\[4\] on rank 0 and float32\[5\] on rank 2"
    ):
        decide([[whole("w", (4,))], [whole("w", (4,))], [whole("w", (5,))]])
    with pytest.raises(IncompatibleError, match=r"float32\[4\] on rank 0 and int8\[4\] on rank 1"):
        decide([[whole("w", (4,))], [whole("w", (4,), dtype="int8")]])


def tied(name: str, to: str, shape: tuple[int, ...] = (40, 1000)) -> Held:
    return msgspec.structs.replace(whole(name, shape), tie=to)


def test_one_memory_under_two_names_is_written_once() -> None:
    ranks = [[whole("a", (40, 1000)), tied("b", "a")]] * 3
    holdings = Holdings.of(ranks)
    assert holdings.ties == {("model", "b"): "a"}
    written = [ranks[rank][box.held].name for rank, one in enumerate(decide(ranks)) for box in one]
    assert set(written) == {"a"}
    # What is written once is also compared once.
    assert holdings.replicas() == [{0: [0]}] * 3


@pytest.mark.parametrize(
    "other",
    [
        [whole("a", (40, 1000)), whole("b", (40, 1000))],
        [whole("a", (40, 1000))],
        [whole("b", (40, 1000)), tied("a", "b")],
    ],
    ids=["not tied", "only one of them", "the other way round"],
)
def test_a_tie_that_not_all_ranks_have_is_none(other: list[Held]) -> None:
    ranks = [[whole("a", (40, 1000)), tied("b", "a")], other]
    assert Holdings.of(ranks).ties == {}
    cells(ranks, decide(ranks))
