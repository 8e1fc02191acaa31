"""Planning by columns: what was decided box by box, to the last box, and what travels for it."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from dist_ckpt.errors import CoordinationError, IncompatibleError
from dist_ckpt.format.index import Box, Held, TensorEntry
from dist_ckpt.format.structure import Cut, encode, structure_of
from dist_ckpt.planning.columns import (
    HeldByRank,
    Table,
    numbers_of,
    pack_numbers,
    pack_runs,
    unpack_numbers,
    unpack_runs,
)
from dist_ckpt.planning.files import plan_index
from dist_ckpt.planning.holdings import Holdings
from dist_ckpt.planning.owners import decide, read_owned, share_out
from tests.unit.planning import by_boxes
from tests.unit.planning.boxes import held, whole
from tests.unit.planning.test_layouts import held_by
from tests.unit.planning.test_layouts import jobs as meshes
from tests.unit.planning.test_owners import jobs


@st.composite
def careless(draw: st.DrawFn) -> list[list[Held]]:
    """Any job, and what ranks may say besides: ties, another order, a box left out."""
    by_rank = draw(jobs())
    names = sorted({each.name for one in by_rank for each in one}) or ["t0"]
    tied = draw(st.sampled_from(names))
    tie = draw(st.sampled_from(["", *(name for name in names if name < tied)]))
    twins = draw(st.booleans())
    for rank, boxes in enumerate(by_rank):
        if twins:
            boxes.extend(
                msgspec.structs.replace(each, name=f"{tied}'", tie=tied)
                for each in list(boxes)
                if each.name == tied and all(each.shape)  # nothing has no memory to share
            )
        by_rank[rank] = [
            msgspec.structs.replace(each, tie=tie)
            if each.name == tied and all(each.shape)
            else each
            for each in draw(st.permutations(boxes))
        ]
    if draw(st.integers(0, 3)) == 0:
        rank = draw(st.integers(0, len(by_rank) - 1))
        by_rank[rank] = by_rank[rank][1:]
    return by_rank


def outcome(decision: Callable[[], object]) -> object:
    try:
        return decision()
    except IncompatibleError as error:
        return error.kind, str(error)


@given(careless(), st.sampled_from([None, 100_000]))
def test_it_is_decided_as_box_by_box(by_rank: list[list[Held]], most: int | None) -> None:
    found = outcome(lambda: decide(by_rank, max_piece_bytes=most))
    assert found == outcome(lambda: by_boxes.decide(by_rank, max_piece_bytes=most))


@given(meshes(largest=40))
def test_layouts_of_meshes_are_decided_as_box_by_box(job: tuple[object, ...]) -> None:
    by_rank = held_by(*job)  # type: ignore[arg-type]
    assert decide(by_rank) == by_boxes.decide(by_rank)


@given(careless())
def test_replicas_and_ties_are_found_as_box_by_box(by_rank: list[list[Held]]) -> None:
    def of(holdings: type[Holdings] | type[by_boxes.Holdings]) -> object:
        found = holdings.of(by_rank)
        replicas = found.replicas()
        groups: dict[int, set[tuple[Held, ...]]] = {}
        for mine, groups_of in zip(by_rank, replicas, strict=True):
            for number, positions in groups_of.items():
                boxes = tuple(mine[position] for position in positions)
                groups.setdefault(number, set()).add(boxes)
        assert all(len(orders) == 1 for orders in groups.values()), "in one order on all ranks"
        by_members = [
            {frozenset(positions): _members(replicas, number) for number, positions in one.items()}
            for one in replicas
        ]
        return by_members, dict(found.ties)

    assert outcome(lambda: of(Holdings)) == outcome(lambda: of(by_boxes.Holdings))


def _members(replicas: Sequence[dict[int, list[int]]], number: int) -> list[int]:
    return [rank for rank, groups in enumerate(replicas) if number in groups]


@given(careless())
def test_what_ranks_hold_is_the_same_after_it_was_put_together(by_rank: list[list[Held]]) -> None:
    together = HeldByRank.of(by_rank)
    assert len(together) == len(by_rank)
    assert list(together) == by_rank
    assert together[-1] == by_rank[-1]
    assert together[1:] == by_rank[1:]


@given(jobs())
def test_a_rank_reads_what_it_was_told(by_rank: list[list[Held]]) -> None:
    together = HeldByRank.of(by_rank)
    owned = share_out(together, Holdings.of(together))
    told = [read_owned(owned.share(rank), mine) for rank, mine in enumerate(by_rank)]
    assert told == list(owned) == owned[:]


@given(careless())
def test_the_structure_is_that_of_all_the_boxes(by_rank: list[list[Held]]) -> None:
    together = HeldByRank.of(by_rank)
    try:
        holdings = Holdings.of(together)
    except IncompatibleError:
        return
    owned = share_out(together, holdings, max_piece_bytes=1_000_000)
    cuts: dict[TensorEntry, list[Cut]] = {each.tensor: [] for one in by_rank for each in one}
    for rank, boxes in enumerate(owned):
        for box in boxes:
            cuts[by_rank[rank][box.held].tensor].append((rank, box.offsets, box.sizes))
    by_name = {(each.part, each.name): each for each in cuts}
    owners = {by_name[key]: by_name[key[0], name] for key, name in holdings.ties.items()}
    # A rank names the first of two: one that is tied to a later one cannot be.
    numbers = {tensor: number for number, tensor in enumerate(cuts)}
    assume(all(numbers[owner] < numbers[tensor] for tensor, owner in owners.items()))
    index = plan_index(together, owned, holdings)
    assert index.structure == encode(structure_of(cuts, owners))
    tensors = list(cuts)
    pairs = zip(index.tensors, by_rank, strict=True)
    told = [unpack_runs(each, most=len(mine)) for each, mine in pairs]
    found = [[tensors[number] for number in mine] for mine in told]
    assert found == [[each.tensor for each in mine] for mine in by_rank]


def test_ranks_alike_share_one_table_and_say_their_share_in_a_bit() -> None:
    shape = (64, 8)
    by_rank = [[whole(f"t{number}", shape) for number in range(80)]]
    together = HeldByRank.of(by_rank * 4)
    assert [group.ranks.tolist() for group in together.groups] == [[0, 1, 2, 3]]
    alone = HeldByRank.of(by_rank)
    share = share_out(alone, Holdings.of(alone)).share(0)
    assert zlib.decompress(share.whole) == b"\xff" * 10
    assert unpack_numbers(share.pieces).size == 0


@given(jobs())
def test_numbers_travel_shape_by_shape(by_rank: list[list[Held]]) -> None:
    for mine in by_rank:
        table, numbers = Table.of(mine), numbers_of(mine)
        assert table.unpack(table.pack(numbers)).tolist() == numbers.tolist()


def test_of_tensors_cut_alike_the_numbers_take_no_room() -> None:
    """Thousands of boxes are told in a few bytes, though shapes alternate."""
    shapes = [(4096, 4096), (11008, 4096), (4096,)]

    def rank(number: int, count: int) -> list[Held]:
        return [
            held(f"t{at}", shape, Box((number * 4, *rest), (4, *shape[1:])))
            for at in range(count)
            for shape in [shapes[at % 3]]
            for rest in [(0,) * (len(shape) - 1)]
        ]

    few, many = (rank(7, count) for count in (30, 3000))
    told = [len(Table.of(each).pack(numbers_of(each))) for each in (few, many)]
    assert told[1] < told[0] + 200


def test_numbers_of_another_table_are_refused() -> None:
    one, other = [whole("a", (4, 4))], [whole("a", (4,))]
    with pytest.raises(CoordinationError, match="one version"):
        Table.of(one).unpack(Table.of(other).pack(numbers_of(other)))


def test_the_same_ranks_in_pairs_and_all_together_are_two_things() -> None:
    halves = [Box((row, 0), (1, 2)) for row in (0, 1)]
    by_rank = [[held("pairs", (2, 2), halves[rank // 2]), whole("all", (2,))] for rank in range(4)]
    assert Holdings.of(by_rank).replicas() == [{rank // 2: [0], 2: [1]} for rank in range(4)]


@given(st.lists(st.integers(-(2**63), 2**63 - 1)))
def test_numbers_travel(numbers: Sequence[int]) -> None:
    sent = np.array(numbers, np.int64)
    assert unpack_numbers(pack_numbers(sent), count=len(sent)).tolist() == list(numbers)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"\0" + pack_numbers(np.arange(3))[1:],
        b"\2" + pack_numbers(np.arange(3))[1:],
        pack_numbers(np.arange(3))[:-1],
        pack_numbers(np.arange(4)),
        pack_numbers(np.arange(2)),
    ],
)
def test_other_numbers_than_were_announced_are_refused(data: bytes) -> None:
    with pytest.raises(CoordinationError, match="one version"):
        unpack_numbers(data, count=3)


@pytest.mark.parametrize("value", [0, 1 << 60])
def test_nobody_unpacks_more_than_was_announced(value: int) -> None:
    width, many = (1 if value == 0 else 8), pack_numbers(np.full(1 << 24, value, np.int64))
    for limit in ({"count": 1 << 20}, {"most": 1 << 20}):
        with pytest.raises(CoordinationError, match=f"{width << 20 | 1} bytes"):
            unpack_numbers(many, **limit)


@given(
    st.lists(st.tuples(st.integers(-(2**40), 2**40), st.integers(1, 50)))
    | st.lists(st.tuples(st.integers(0, 9), st.just(1)))
)
def test_runs_travel(runs: list[tuple[int, int]]) -> None:
    numbers = [each for start, length in runs for each in range(start, start + length)]
    assert unpack_runs(pack_runs(numbers), most=len(numbers)) == numbers


def test_runs_between_two_places_take_no_room() -> None:
    """As of a rank that has some of the experts of each layer, beside what all have."""

    def rank(layers: int) -> list[int]:
        everywhere = [range(30 * at, 30 * at + 6) for at in range(layers)]
        here = [range(100_000 + 12 * at, 100_012 + 12 * at) for at in range(layers)]
        pairs = zip(everywhere, here, strict=True)
        return [number for pair in pairs for each in pair for number in each]

    few, many = (pack_runs(rank(layers)) for layers in (20, 2000))
    assert len(many) < len(few) + 100


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([0, 1 << 60], "more than 8"),  # of which no list can be made
        ([0, 0, 1 << 62, 1 << 62], "more than 8"),  # twice that is less than 0
        ([0] * 4 + [3, 3, 3, 0], "more than 8"),
        ([0, 0, 5, 4], "more than 8"),
        ([0, -1], "more than 8"),
        ([0, 1, 2], "no pairs"),
        ([0] * 17, "17 bytes"),
    ],
)
def test_runs_that_cannot_be_are_refused(told: list[int], why: str) -> None:
    with pytest.raises(CoordinationError, match=why):
        unpack_runs(pack_numbers(np.array(told)), most=8)
