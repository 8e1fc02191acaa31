"""The schedule of a load: every byte read once, everyone served, memory bounded, work shared."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.loading.fetching import cut
from dist_ckpt.loading.filling import Files, Ranges, merge_ranges
from dist_ckpt.loading.reading import decide_exchange
from dist_ckpt.loading.schedule import ReadSchedule, cost, group, place_extents, share, survey

PAGE = 4096


def needs_of(*pairs: tuple[int, int]) -> Ranges:
    columns = np.array(pairs, np.int64).reshape(len(pairs), 2)
    return merge_ranges(Ranges(columns[:, 0], columns[:, 1]))


def held(ranges: Ranges) -> list[int]:
    return [at for start, stop in ranges.pairs() for at in range(start, stop)]


def pieces(needs: Sequence[Ranges], extent_bytes: int) -> list[Ranges]:
    """Cut what each group needs, at the same places."""
    return [cut(each, most_bytes=extent_bytes) for each in needs]


@st.composite
def jobs(draw: st.DrawFn) -> tuple[list[Ranges], list[int]]:
    spans = st.tuples(st.integers(0, 50), st.integers(1, 20)).map(lambda p: (p[0], p[0] + p[1]))
    groups = draw(st.lists(st.lists(spans, max_size=4), min_size=1, max_size=4))
    more = draw(st.lists(st.integers(0, len(groups) - 1), max_size=4))
    group_of = draw(st.permutations([*range(len(groups)), *more]))
    return [needs_of(*pairs) for pairs in groups], group_of


def readers(sharing: ReadSchedule) -> list[list[int]]:
    """By rank, every address that it reads."""
    reads = [held(alone) for alone in sharing.alone]
    for window in sharing.windows:
        for extent in window:
            reads[extent.reader] += range(extent.start, extent.stop)
    return reads


@given(jobs(), st.integers(1, 9), st.integers(1, 5))
def test_every_byte_is_read_once_and_reaches_everyone(
    job: tuple[list[Ranges], list[int]], extent_bytes: int, pages: int
) -> None:
    needs, group_of = job
    sharing = share(pieces(needs, extent_bytes), group_of, window_bytes=pages * PAGE)
    reads = readers(sharing)
    present = [needs[group] for group in group_of]
    every = sorted({at for each in present for at in held(each)})
    assert sorted(at for each in reads for at in each) == every
    for rank, mine in enumerate(present):
        served = held(sharing.alone[rank])
        for window in sharing.windows:
            extents = [extent for extent in window if rank in extent.ranks]
            served += [at for each in extents for at in range(each.start, each.stop)]
            assert place_extents(extents)[-1] <= max(pages, 1) * PAGE
            assert len({extent.tag for extent in window}) == len(window)
            assert all(extent.nbytes <= extent_bytes for extent in window)
            assert all(extent.reader in extent.ranks for extent in window)
        assert sorted(served) == held(mine)


@given(st.integers(1, 6), st.integers(1, 400), st.integers(1, 9))
def test_replicas_read_about_the_same(world_size: int, nbytes: int, extent_bytes: int) -> None:
    sharing = share(
        pieces([needs_of((0, nbytes))], extent_bytes),
        [0] * world_size,
        window_bytes=8 * PAGE,
    )
    loads = [len(each) for each in readers(sharing)]
    assert max(loads) - min(loads) <= extent_bytes or world_size == 1


def test_who_reads_much_alone_reads_less_for_others() -> None:
    needs = [needs_of((0, 100)), needs_of((60, 100))]
    sharing = share(pieces(needs, 5), [0, 1], window_bytes=8 * PAGE)
    assert [len(each) for each in readers(sharing)] == [60, 40]


def test_shards_of_hsdp_fill_their_windows_side_by_side() -> None:
    needs = [needs_of((0, 40)), needs_of((50, 90))]
    sharing = share(pieces(needs, 10), [0, 1, 0, 1], window_bytes=2 * PAGE)
    shown = [sorted((each.start, each.ranks) for each in window) for window in sharing.windows]
    left, right = (0, 2), (1, 3)
    assert shown == [
        [(0, left), (10, left), (50, right), (60, right)],
        [(20, left), (30, left), (70, right), (80, right)],
    ]


def test_nothing_in_common_needs_no_window() -> None:
    needs = [needs_of((0, 40)), needs_of((40, 90)), needs_of()]
    sharing = share(pieces(needs, 10), [0, 1, 2, 2], window_bytes=PAGE)
    assert sharing.windows == ()
    assert [held(each) for each in sharing.alone] == [held(needs[n]) for n in (0, 1, 2, 2)]


@given(jobs())
def test_cost_counts_bytes(job: tuple[Sequence[Ranges], Sequence[int]]) -> None:
    needs, group_of = job
    files = Files([70], unit_bytes=1)  # so small that each byte is in the sample
    surveys = [survey(needs[group], files, [70]) for group in group_of]
    apart, once = cost(surveys)
    assert apart == sum(len(held(needs[group])) for group in group_of)
    assert once == len({at for group in group_of for at in held(needs[group])})


@given(st.lists(st.tuples(st.integers(0, 999), st.integers(1, 1000)), min_size=1, max_size=5))
def test_what_large_needs_have_in_common_is_about_known(shares: list[tuple[int, int]]) -> None:
    sizes = [7 << 20, 0, 40 << 20, 12345]
    files = Files(sizes, unit_bytes=PAGE, apart_bytes=1 << 20)
    begin = int(files.address(np.array([2]), np.array([0]))[0])
    thousandth = sizes[2] // 1000
    needs = [
        needs_of((begin + first * thousandth, begin + min(first + length, 1000) * thousandth))
        for first, length in shares
    ]
    apart, once = cost([survey(each, files, sizes) for each in needs])
    every = [np.concatenate([getattr(each, end) for each in needs]) for end in ("start", "stop")]
    assert apart == sum(each.nbytes for each in needs)
    assert abs(once - merge_ranges(Ranges(*every)).nbytes) < 0.01 * len(needs) * sum(sizes)


def test_what_is_told_of_needs_does_not_grow() -> None:
    sizes = [1 << 40]
    files = Files(sizes, unit_bytes=PAGE)
    rng = np.random.default_rng(3)
    edges = np.unique(rng.integers(0, sizes[0], 100_000))[: 2 * 40_000]
    told = survey(Ranges(edges[::2], edges[1::2]), files, sizes)
    assert len(msgspec.msgpack.encode(told)) < 350


def test_ranks_that_need_the_same_are_a_group() -> None:
    files = Files([100], unit_bytes=1)
    needs = [needs_of((0, 40)), needs_of((40, 90)), needs_of((0, 40)), needs_of()]
    assert group([survey(each, files, [100]) for each in needs]) == [0, 1, 0, 2]


@pytest.mark.parametrize(
    ("exchange", "apart", "once", "chosen"),
    [
        ("auto", 400, 100, True),
        ("auto", 106, 100, True),
        ("auto", 105, 100, False),
        ("always", 101, 100, True),
        ("always", 100, 100, False),
        ("never", 400, 100, False),
    ],
)
def test_the_choice_and_its_reason(exchange: str, apart: int, once: int, chosen: bool) -> None:
    found, why = decide_exchange(exchange, apart_bytes=apart, once_bytes=once)  # type: ignore[arg-type]
    assert found is chosen
    assert (str(apart - once) in why) if apart > once else ("no byte" in why)


def test_who_can_read_reads_for_those_who_cannot() -> None:
    """Four ranks want a hundred bytes each; the first two can read the lower half of all."""
    needs = [needs_of((100 * rank, 100 * rank + 100)) for rank in range(4)]

    def can_read(address: int) -> list[int]:
        return [0, 1] if address < 200 else [0]

    sharing = share(needs, [0, 1, 2, 3], window_bytes=PAGE, can_read=can_read)
    assert [each.nbytes for each in sharing.alone] == [100, 100, 0, 0]
    extents = [each for window in sharing.windows for each in window]
    assert [(each.start, each.reader, each.ranks, each.passes_on) for each in extents] == [
        (200, 0, (0, 2), True),
        (300, 0, (0, 3), True),
    ]
    # What a rank passes on takes its memory as well.
    assert len(sharing.windows) == 2


def test_of_those_who_need_and_can_read_one_reads() -> None:
    needs = [needs_of((0, 100))]
    sharing = share(needs, [0, 0, 0], window_bytes=PAGE, can_read=lambda _: [1, 2])
    ((extent,),) = sharing.windows
    assert (extent.reader, extent.ranks, extent.passes_on) == (1, (0, 1, 2), False)
