"""`coalesce` against what it promises, and against trying every way to cut."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import Piece, Segment, coalesce

BLOCK = 4
MIB = 1 << 20


def merge(
    pieces: Sequence[Piece],
    *,
    gap: int = 0,
    most: int = 1 << 40,
    sizes: Sequence[int] = (100, 100),
    block: int = BLOCK,
) -> list[Segment]:
    return coalesce(
        pieces, block_bytes=block, max_gap_bytes=gap, max_segment_bytes=most, file_sizes=sizes
    )


def window(piece: Piece, sizes: Sequence[int], block: int = BLOCK) -> tuple[int, int]:
    """The whole blocks that hold a piece."""
    first = max(start for start in range(0, piece.start + 1, block))
    last = min(stop for stop in range(first, piece.stop + block, block) if stop >= piece.stop)
    return first, min(last, sizes[piece.file])


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[Piece], list[int]]:
    sizes = draw(st.lists(st.integers(1, 60), min_size=1, max_size=3))
    pieces = []
    for _ in range(draw(st.integers(0, 8))):
        file = draw(st.integers(0, len(sizes) - 1))
        start = draw(st.integers(0, sizes[file] - 1))
        pieces.append(Piece(file, start, draw(st.integers(start + 1, sizes[file]))))
    return pieces, sizes


LIMITS = (st.integers(0, 20), st.integers(1, 50), st.integers(1, 9))


@given(problems(), *LIMITS)
def test_keeps_every_promise(
    problem: tuple[list[Piece], list[int]], gap: int, most: int, block: int
) -> None:
    pieces, sizes = problem
    segments = merge(pieces, gap=gap, most=most, sizes=sizes, block=block)

    inside = sorted(itertools.chain.from_iterable(s.pieces for s in segments))
    assert inside == list(range(len(pieces))), "each piece is in exactly one segment"
    assert segments == sorted(segments, key=lambda s: (s.file, s.start))
    for segment in segments:
        members = [pieces[number] for number in segment.pieces]
        windows = [window(piece, sizes, block) for piece in members]
        assert {piece.file for piece in members} == {segment.file}
        assert segment.start == min(first for first, _ in windows)
        assert segment.stop == max(last for _, last in windows)
        assert segment.nbytes <= max(most, *(last - first for first, last in windows))
        assert [p.start for p in members] == sorted(p.start for p in members)
        wanted = set(itertools.chain.from_iterable(range(*w) for w in windows))
        unwanted = "".join(".x"[n not in wanted] for n in range(segment.start, segment.stop))
        assert all(len(run) <= gap for run in unwanted.split("."))


@given(problems(), *LIMITS)
def test_neighbours_stay_apart_only_for_a_reason(
    problem: tuple[list[Piece], list[int]], gap: int, most: int, block: int
) -> None:
    pieces, sizes = problem
    for one, two in itertools.pairwise(merge(pieces, gap=gap, most=most, sizes=sizes, block=block)):
        if one.file == two.file:
            first = window(pieces[two.pieces[0]], sizes, block)
            far = first[0] - one.stop > gap
            long = max(one.stop, first[1]) - one.start > max(most, one.nbytes, first[1] - first[0])
            assert far or long


@given(problems(), st.integers(0, 20), st.integers(1, 9))
def test_without_a_limit_no_other_cut_has_fewer_reads(
    problem: tuple[list[Piece], list[int]], gap: int, block: int
) -> None:
    pieces, sizes = problem
    expected = 0
    for file, size in enumerate(sizes):
        wanted = [False] * size
        for piece in pieces:
            if piece.file == file:
                first, last = window(piece, sizes, block)
                wanted[first:last] = [True] * (last - first)
        text = "".join("x" if want else "." for want in wanted).strip(".")
        expected += len([run for run in _split_at_gaps(text, gap) if run])
    assert len(merge(pieces, gap=gap, sizes=sizes, block=block)) == expected


def _split_at_gaps(text: str, gap: int) -> list[str]:
    """Cut at each run of more than `gap` dots."""
    runs = ["".join(run) for _, run in itertools.groupby(text)]
    marked = "".join("|" if run[0] == "." and len(run) > gap else run for run in runs)
    return marked.split("|")


@given(problems(), st.randoms(use_true_random=False), *LIMITS)
def test_order_of_the_pieces_does_not_matter(
    problem: tuple[list[Piece], list[int]],
    random: Random,
    gap: int,
    most: int,
    block: int,
) -> None:
    pieces, sizes = problem
    shuffled = list(pieces)
    random.shuffle(shuffled)
    plain = merge(pieces, gap=gap, most=most, sizes=sizes, block=block)
    other = merge(shuffled, gap=gap, most=most, sizes=sizes, block=block)
    assert [(s.file, s.start, s.stop) for s in plain] == [(s.file, s.start, s.stop) for s in other]


def test_examples() -> None:
    assert merge([]) == []
    assert merge([Piece(0, 5, 6)]) == [Segment(0, 4, 8, (0,))]
    assert merge([Piece(0, 97, 99)], sizes=[99]) == [Segment(0, 96, 99, (0,))]
    # Blocks that touch are one read; a block between them is one only when the gap allows it.
    touching = [Piece(0, 4, 6), Piece(0, 1, 2)]
    assert merge(touching) == [Segment(0, 0, 8, (1, 0))]
    apart = [Piece(0, 1, 2), Piece(0, 9, 10)]
    assert merge(apart, gap=3) == [Segment(0, 0, 4, (0,)), Segment(0, 8, 12, (1,))]
    assert merge(apart, gap=4) == [Segment(0, 0, 12, (0, 1))]
    assert merge([Piece(1, 0, 4), Piece(0, 0, 4)]) == [
        Segment(0, 0, 4, (1,)),
        Segment(1, 0, 4, (0,)),
    ]


def test_limit_and_the_pieces_over_it() -> None:
    rows = [Piece(0, n * 4, n * 4 + 4) for n in range(5)]
    assert [s.pieces for s in merge(rows, most=8)] == [(0, 1), (2, 3), (4,)]
    # A piece over the limit is one read, and what lies inside it costs nothing more.
    long = [Piece(0, 0, 40), Piece(0, 0, 1), Piece(0, 20, 21), Piece(0, 40, 44)]
    assert merge(long, most=8) == [Segment(0, 0, 40, (1, 0, 2)), Segment(0, 40, 44, (3,))]


def test_a_hundred_thousand_pieces_of_a_huge_file() -> None:
    pieces = [Piece(0, n * 3 * MIB + 5, n * 3 * MIB + 9) for n in range(100_000)]
    segments = merge(pieces, gap=2 * MIB, most=64 * MIB, sizes=[1 << 40], block=MIB)
    assert len(segments) == -(-100_000 // 22)
    assert all(segment.nbytes <= 64 * MIB for segment in segments)


@pytest.mark.parametrize(
    "piece",
    [
        Piece(0, 5, 5),
        Piece(0, 6, 5),
        Piece(0, -1, 5),
        Piece(0, 5, 101),
        Piece(2, 0, 1),
        Piece(-1, 0, 1),
    ],
)
def test_piece_outside_its_file_is_refused(piece: Piece) -> None:
    with pytest.raises(UsageError, match=r"Piece\("):
        merge([Piece(0, 0, 1), piece])


@pytest.mark.parametrize("limits", [{"block": 0}, {"gap": -1}, {"most": 0}])
def test_bad_limits_are_refused(limits: dict[str, int]) -> None:
    with pytest.raises(UsageError, match="bad limits"):
        merge(
            [], block=limits.get("block", 1), gap=limits.get("gap", 0), most=limits.get("most", 1)
        )
