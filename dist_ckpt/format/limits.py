"""Bounds on what callers give and bytes claim, and tables of format 2, read within them.

A table is named columns of whole numbers in one zlib stream.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Hashable, Iterable, Sequence
from operator import index
from typing import Any, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError

INT64_MAX = 2**63 - 1
MAX_NDIM = 64
"""Of a tensor of torch, and of an array of numpy."""

_MAX_EQUAL_HASHES = 64
# Fewer keys than this cannot take long, however they collide.
_FEW = 256


def as_integer(value: Any) -> int | None:
    """Return an integer of whatever type, of numpy or torch too, as an `int`; None for all else.

    A boolean is none: where a number is asked for it is a slip.
    """
    # A tensor of torch.bool says that it is an index.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except Exception:  # a foreign __index__ may do anything
        return None


def count_elements(shape: Sequence[object]) -> int:
    """Return how many elements a tensor of `shape` has.

    Raises:
        ValueError: an entry is no whole number from 0 on, there are more than 64 of them, or the
            number of elements, empty dimensions left out, is more than 64 bits hold.
    """
    if len(shape) > MAX_NDIM:
        raise ValueError(f"it claims {len(shape)} dimensions, more than {MAX_NDIM}")
    sizes: list[int] = []
    for size in shape:
        if type(size) is not int or not 0 <= size <= INT64_MAX:
            raise ValueError("it claims a dimension that no tensor has")
        sizes.append(size)
    # Strides are products of sizes, so those of an empty tensor must fit too.
    if math.prod(size for size in sizes if size) > INT64_MAX:
        raise ValueError("it claims more elements than 2**63 bytes hold")
    return math.prod(sizes)


class HashCounts:
    """Finds keys that were made to collide, before a dict or a set compares all with all.

    Hashes of text and bytes are salted by the interpreter; those of numbers and tuples anybody can
    compute backwards. Only equal hashes cost time in proportion to their number.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, keys: Iterable[Hashable]) -> None:
        """Count `keys`.

        Raises:
            ValueError: too many keys have one hash.
            TypeError: one has none.
        """
        for key in keys:
            kind = type(key)
            if kind is str or kind is bytes:
                continue
            number = hash(key)
            count = self._counts[number] = self._counts.get(number, 0) + 1
            if count > _MAX_EQUAL_HASHES:
                raise ValueError("its keys collide, as if they were made to")


def check_hashes(keys: Sequence[Hashable]) -> None:
    """Refuse keys that were made to collide; see `HashCounts`.

    Raises:
        ValueError: too many of them have one hash.
        TypeError: one has none.
    """
    if len(keys) > _FEW:
        HashCounts().add(keys)


# Tables of format 2: named columns of whole numbers in one zlib stream, read without trust.


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


def read_column(data: bytes, *, most: int = INT64_MAX, where: str) -> Column:
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
