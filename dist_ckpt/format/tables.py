"""Tables of format 2: named columns of whole numbers in one zlib stream, read without trust."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Sequence
from typing import TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError

FORMAT = 2
LIMIT_BYTES = 1 << 28
"""How large a table may be, and a segment."""

MOST_NAMES = 1 << 22
"""How many texts there may be in a row: of each an object is made."""

Column = NDArray[np.int64]

# Kept for what is coming: checkpoints that have them are of a newer release, not damaged.
_RESERVED = ("earlier", "packed")

_T = TypeVar("_T")


def column(numbers: ArrayLike) -> bytes:
    """Return whole numbers of 64 bits as a column: each as the difference to the one before."""
    values = np.asarray(numbers, np.int64).reshape(-1)
    return np.diff(values, prepend=np.int64(0)).astype("<i8").tobytes()


def read_column(data: bytes, *, most: int = 2**63 - 1, where: str) -> Column:
    """Return the numbers of a column.

    Raises:
        IntegrityError: it is none, or a number is negative or above `most`.
    """
    if len(data) % 8:
        raise bad_index(f"{where} of {len(data)} bytes is no column")
    numbers: Column = np.cumsum(np.frombuffer(data, "<i8"), dtype=np.int64)
    if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) > most):
        raise bad_index(f"{where} has a number that cannot be")
    return numbers


def check_lengths(where: str, *pairs: tuple[int, int]) -> None:
    """Check that lengths are what they should be.

    Raises:
        IntegrityError: the two numbers of a pair differ.
    """
    if any(found != expected for found, expected in pairs):
        raise bad_index(f"the columns of {where} do not fit one another")


def check_distinct(texts: Sequence[str], where: str) -> None:
    """Check that no text is there twice.

    Raises:
        IntegrityError: one is.
    """
    if len(set(texts)) != len(texts):
        raise bad_index(f"{where} has a text twice")


def positions(first: Column) -> Column:
    """Return where each run begins, given the lengths of all, and behind them the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(first)])


def runs(first: Column, count: Column) -> Column:
    """Return the numbers from each of `first` on, as many as its `count` says."""
    ends = np.cumsum(count)
    step = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count, count)
    return np.repeat(first, count) + step


def deflate(table: msgspec.Struct) -> bytes:
    """Return the bytes of a table.

    Raises:
        UsageError: a name is not Unicode text, or the table is too large.
    """
    raw = encode_map(table)
    if len(raw) > LIMIT_BYTES:
        raise UsageError(
            f"a description of {len(raw)} bytes is over {LIMIT_BYTES}: save fewer tensors, or by "
            "more ranks"
        )
    return zlib.compress(raw)


def inflate(data: bytes, kind: type[_T], *, where: str) -> _T:
    """Return the table in `data`, of which no more than `LIMIT_BYTES` are ever made.

    Raises:
        IntegrityError: it is none.
        IncompatibleError: a newer release wrote it.
    """
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, LIMIT_BYTES)
    except zlib.error as error:
        raise bad_index(f"{where} cannot be inflated ({error})") from error
    if not stream.eof or stream.unused_data:
        raise bad_index(f"{where} is cut short, too large, or followed by something")
    return decode_map(raw, kind, where=where)


def encode_map(table: msgspec.Struct) -> bytes:
    """Return the MessagePack map of `table`.

    Raises:
        UsageError: a name is not Unicode text.
    """
    try:
        return msgspec.msgpack.encode(table)
    except UnicodeEncodeError as error:
        raise UsageError(f"the index cannot hold this state: {error}") from error


def decode_map(data: bytes, kind: type[_T], *, where: str) -> _T:
    """Return the map in `data`, which has the fields of `kind` and no other.

    Raises:
        IntegrityError: it has not.
        IncompatibleError: it has one that is kept for newer releases.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    # RecursionError: how deep the bytes nest is chosen by whoever wrote them.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        newer = [name for name in _keys(data) if name in _RESERVED]
        if newer:
            raise IncompatibleError(
                f"{where} has {newer[0]!r}, which this program does not know: use the release that "
                "wrote it or a newer one",
                kind=ErrorKind.VERSION,
            ) from error
        raise bad_index(f"{where} cannot be decoded ({error})") from error


def _keys(data: bytes) -> Iterable[str]:
    try:
        return msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ()


def bad_index(problem: str) -> IntegrityError:
    """Return the error of an index that breaks a rule."""
    return IntegrityError(f"index: {problem}. Use another checkpoint", kind=ErrorKind.MALFORMED)
