"""Which byte ranges of which files to read, so that few requests carry all wanted pieces. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dist_ckpt.errors import UsageError


@dataclass(frozen=True, slots=True)
class Piece:
    """Wanted bytes: `start` up to, not including, `stop` of file number `file`."""

    file: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class Segment:
    """One read: bytes `start` up to `stop` of `file`; `pieces` are the numbers of those inside."""

    file: int
    start: int
    stop: int
    pieces: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes this reads: its cost."""
        return self.stop - self.start


def coalesce(
    pieces: Sequence[Piece],
    *,
    block_bytes: int,
    max_gap_bytes: int,
    max_segment_bytes: int,
    file_sizes: Sequence[int],
) -> list[Segment]:
    """Merge `pieces` into few reads of whole blocks; each piece is inside exactly one of them.

    A segment starts at a multiple of `block_bytes` and stops at one or at the end of its file, so
    that every block of it can be verified. Neighbours are merged while at most `max_gap_bytes`
    unwanted bytes lie between their blocks and the whole is at most `max_segment_bytes`; only a
    piece whose own blocks are more makes a longer segment. Two segments may share blocks where
    merging them would be too long.

    Args:
        pieces: in any order; they may overlap and repeat.
        block_bytes: what digests are taken over.
        max_gap_bytes: unwanted bytes that cost less than one more request.
        max_segment_bytes: what one request should carry at most.
        file_sizes: bytes of each file, by its number.

    Returns:
        Segments sorted by file and start; `pieces` of each sorted by their start.

    Raises:
        UsageError: a piece is empty or not inside its file, or a limit is out of range.
    """
    if block_bytes < 1 or max_gap_bytes < 0 or max_segment_bytes < 1:
        raise UsageError(
            f"bad limits: block_bytes={block_bytes}, max_gap_bytes={max_gap_bytes}, "
            f"max_segment_bytes={max_segment_bytes}"
        )
    for piece in pieces:
        _check(piece, file_sizes)
    # Equal pieces keep the caller's order: sorting is stable, so the result is deterministic.
    order = sorted(
        range(len(pieces)), key=lambda n: (pieces[n].file, pieces[n].start, pieces[n].stop)
    )
    growing: list[_Growing] = []
    for number in order:
        piece = pieces[number]
        start = piece.start - piece.start % block_bytes
        stop = min(-(-piece.stop // block_bytes) * block_bytes, file_sizes[piece.file])
        last = growing[-1] if growing else None
        if (
            last is not None
            and last.file == piece.file
            and start - last.stop <= max_gap_bytes
            # Where one holds the other, merging them reads no byte more than the longer alone.
            and max(last.stop, stop) - last.start
            <= max(max_segment_bytes, last.stop - last.start, stop - start)
        ):
            last.stop = max(last.stop, stop)
            last.pieces.append(number)
        else:
            growing.append(_Growing(piece.file, start, stop, [number]))
    return [Segment(each.file, each.start, each.stop, tuple(each.pieces)) for each in growing]


@dataclass(slots=True)
class _Growing:
    file: int
    start: int
    stop: int
    pieces: list[int]


def _check(piece: Piece, file_sizes: Sequence[int]) -> None:
    if not 0 <= piece.file < len(file_sizes):
        raise UsageError(f"{piece} names a file that is not among the {len(file_sizes)} known")
    if not 0 <= piece.start < piece.stop <= file_sizes[piece.file]:
        raise UsageError(f"{piece} is empty or outside its file of {file_sizes[piece.file]} bytes")
