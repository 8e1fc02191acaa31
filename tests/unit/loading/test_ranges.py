"""Ranges of addresses against sets of single bytes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.loading.fetching import bridge, cut
from dist_ckpt.loading.filling import Files, Ranges, merge_ranges


def ranges(pairs: Sequence[tuple[int, int]]) -> Ranges:
    columns = np.array(pairs, np.int64).reshape(len(pairs), 2)
    return Ranges(columns[:, 0], columns[:, 1])


def held(of: Ranges) -> list[int]:
    """Every address, in the order of the rows."""
    return [at for start, stop in of.pairs() for at in range(start, stop)]


PAIRS = st.lists(
    st.tuples(st.integers(0, 60), st.integers(1, 12)).map(lambda p: (p[0], p[0] + p[1])), max_size=9
)
SORTED = PAIRS.map(lambda pairs: merge_ranges(ranges(pairs)))


@given(PAIRS)
def test_joined_ranges_hold_each_byte_once_in_order(pairs: list[tuple[int, int]]) -> None:
    joined = merge_ranges(ranges(pairs))
    assert held(joined) == sorted(set(held(ranges(pairs))))
    # What touches is one: the ends of ranges are where something is missing.
    assert not set(joined.start.tolist()) & set(joined.stop.tolist())
    assert joined.nbytes == len(held(joined))


@given(SORTED, st.integers(1, 20))
def test_cuts_are_at_multiples_wherever_a_range_begins(whole: Ranges, most: int) -> None:
    pieces = cut(whole, most_bytes=most)
    assert held(pieces) == held(whole)
    outer = {*whole.start.tolist(), *whole.stop.tolist()}
    for start, stop in pieces.pairs():
        assert 0 < stop - start <= most
        assert start % most == 0 or start in outer
        assert stop % most == 0 or stop in outer


@given(SORTED, st.integers(0, 20))
def test_bridges_are_over_small_gaps_only(whole: Ranges, gap: int) -> None:
    wide = ranges([(20 * start, 20 * stop) for start, stop in whole.pairs()])
    bridged = bridge(wide, max_gap_bytes=20 * gap)
    added = sorted(set(held(bridged)) - set(held(wide)))
    assert set(held(wide)) <= set(held(bridged))
    assert len(added) * 16 <= len(held(wide))
    for (_, stop), (start, _) in zip(wide.pairs(), wide.pairs()[1:], strict=False):
        assert start - stop <= 20 * gap or not set(range(stop, start)) & set(added)


@given(
    st.lists(st.lists(st.integers(1, 9), max_size=6), min_size=1, max_size=3),
    st.integers(1, 20),
    st.data(),
)
def test_blocks_are_never_cut(lengths: list[list[int]], most: int, data: st.DataObject) -> None:
    blocks = [np.cumsum([0, *each], dtype=np.int64) for each in lengths]
    sizes = [int(each[-1]) for each in blocks]
    files = Files(sizes, unit_bytes=4, apart_bytes=3, blocks=blocks)
    number = data.draw(st.sampled_from(range(len(sizes))))
    if not sizes[number]:
        return
    start = data.draw(st.integers(0, sizes[number] - 1))
    stop = data.draw(st.integers(start + 1, sizes[number]))
    (low, high) = files.address(np.array([number]), np.array([start, stop])[:, None])[:, 0].tolist()
    wide = files.widen(ranges([(low, high)]))
    ((begin, end),) = wide.pairs()
    units = files.units(begin, end)
    assert [unit[0] for unit in units] == [begin, *(unit[1] for unit in units[:-1])]
    assert units[0][0] <= low < units[0][1]
    assert units[-1][0] < high <= units[-1][1] == end
    pieces = cut(wide, most_bytes=most, begin=files.begin)
    assert held(pieces) == held(wide)
    assert {at for pair in pieces.pairs() for at in pair} <= {at for unit in units for at in unit}
    assert all(stop - start < most + max(lengths[number]) for start, stop in pieces.pairs())
    # Whoever wants all of the file cuts it at the same places.
    whole = files.address(np.array([number]), np.array([0, sizes[number]])[:, None])[:, 0].tolist()
    other = cut(ranges([(whole[0], whole[1])]), most_bytes=most, begin=files.begin)
    inside = {start for start, _ in other.pairs() if begin < start < end}
    assert inside == {start for start, _ in pieces.pairs()} - {begin}


def test_a_gap_is_bridged_where_a_request_would_cost_more() -> None:
    two = ranges([(0, 64), (68, 132)])
    assert bridge(two, max_gap_bytes=4).pairs() == [(0, 132)]
    assert bridge(two, max_gap_bytes=3).pairs() == two.pairs()
    small = ranges([(0, 64), (68, 70)])
    assert bridge(small, max_gap_bytes=4).pairs() == small.pairs()


@given(st.lists(st.integers(0, 40), min_size=1, max_size=5), st.integers(1, 9), st.data())
def test_files_lie_in_a_row_and_never_touch(
    sizes: list[int], unit: int, data: st.DataObject
) -> None:
    files = Files(sizes, unit_bytes=unit)
    number = data.draw(st.integers(0, len(sizes) - 1))
    if not sizes[number]:
        return
    offset = data.draw(st.integers(0, sizes[number] - 1))
    stop = data.draw(st.integers(offset + 1, sizes[number]))
    address = files.address(np.array([number]), np.array([offset, stop])[:, None])[:, 0]
    assert files.place(int(address[0])) == (number, offset)
    wide = files.widen(Ranges(address[:1], address[1:]))
    low = files.place(int(wide.start[0]))
    high = files.place(int(wide.stop[0]) - 1)
    assert low == (number, offset // unit * unit)
    assert high == (number, min(-(-stop // unit) * unit, sizes[number]) - 1)
    every = files.address(np.arange(len(sizes)), np.array(sizes))
    begins = files.address(np.arange(len(sizes)), np.zeros(len(sizes), np.int64))
    assert (begins[1:] > every[:-1]).all()
    assert (begins % unit == 0).all()


@pytest.mark.parametrize(("sizes", "unit"), [([4, -1], 1), ([4], 0), ([2**61, 2**61, 2**61], 1)])
def test_impossible_files_are_refused(sizes: list[int], unit: int) -> None:
    with pytest.raises(UsageError):
        Files(sizes, unit_bytes=unit)


def test_nothing_stays_nothing() -> None:
    none = ranges([])
    assert merge_ranges(none).pairs() == bridge(none, max_gap_bytes=9).pairs() == []
    assert cut(none, most_bytes=4).pairs() == []
    assert Files([4], unit_bytes=2).widen(none).pairs() == []


def test_no_gap_between_two_files_is_bridged() -> None:
    for nbytes in (256, 255):  # of whole units, and not
        files = Files([nbytes, nbytes], unit_bytes=4, apart_bytes=8)
        both = np.arange(2)
        start = files.address(both, np.zeros(2, np.int64))
        whole = Ranges(start, files.address(both, np.full(2, nbytes)))
        assert bridge(whole, max_gap_bytes=8).pairs() == whole.pairs()
