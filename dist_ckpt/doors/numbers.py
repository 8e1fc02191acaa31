"""Numbers about tensors that are never in memory as a whole: their range, how far two differ."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import numpy as np
import torch

from dist_ckpt.doors.image import boxes_of_range
from dist_ckpt.errors import UsageError, near
from dist_ckpt.loading.opened import BoxTarget, OpenedCheckpoint
from dist_ckpt.state.layout import dtype_name

PIECE_BYTES = 32 << 20
"""How much of the tensors is in memory at once, about."""

# Two numbers in a byte: they mean something only with the scales beside them.
_NO_NUMBERS = tuple(each for each in (getattr(torch, "float4_e2m1fn_x2", None),) if each)


@dataclass(frozen=True, slots=True)
class TensorStats:
    """What the elements of one tensor are like; of complex ones, their magnitudes.

    Attributes:
        name: `part/name`.
        dtype: its dtype.
        shape: in elements.
        least: the smallest finite element, None where there is none.
        most: the largest.
        mean: of all finite elements, summed as float64.
        nans: how many are not a number.
        infs: how many are infinite.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    least: float | None
    most: float | None
    mean: float | None
    nans: int
    infs: int


@dataclass(frozen=True, slots=True)
class ValueDifference:
    """How far two tensors of one dtype and shape are apart.

    Attributes:
        name: `part/name`.
        differing: how many elements differ; NaN equals NaN here.
        absolute: the largest absolute difference, infinite where a number became none.
        relative: the largest one as a share of the larger of the two magnitudes.
    """

    name: str
    differing: int
    absolute: float
    relative: float


def matching(opened: OpenedCheckpoint, patterns: Sequence[str]) -> list[str]:
    """Return the names that a pattern matches, `part/name` or the name alone; all without any.

    Raises:
        UsageError: a pattern matches nothing.
    """
    found: dict[str, None] = {}
    for pattern in patterns or ("*",):
        matched = [
            full
            for full, info in opened.info.items()
            if fnmatchcase(full, pattern) or fnmatchcase(info.name, pattern)
        ]
        # Nothing found would read as nothing to find, as in a script that looks for NaN.
        if not matched:
            known = [*opened.info, *(info.name for info in opened.info.values())]
            raise UsageError(f"no tensor of {opened.where} is {pattern!r}{near(pattern, known)}")
        found |= dict.fromkeys(matched)
    return list(found)


def tensor_stats(opened: OpenedCheckpoint, names: Iterable[str]) -> Iterator[TensorStats]:
    """Yield what each tensor is like, in some 100 MB of memory whatever it measures.

    Raises:
        IntegrityError: its bytes are damaged or missing.
    """
    for name, pieces in _by_name(opened, names):
        info = opened.info[name]
        sums = _Sums()
        for piece in pieces:
            sums.add(piece)
        yield TensorStats(
            name,
            dtype_name(info.dtype),
            tuple(info.shape),
            sums.least,
            sums.most,
            sums.total / sums.finite if sums.finite else None,
            sums.nans,
            sums.infs,
        )


def value_differences(
    one: OpenedCheckpoint, other: OpenedCheckpoint, names: Iterable[str]
) -> Iterator[ValueDifference]:
    """Yield how far tensors of two checkpoints are apart; equal ones have nothing that differs.

    Args:
        one: the first checkpoint.
        other: the second one.
        names: of tensors that have one dtype and shape in both.

    Raises:
        IntegrityError: bytes are damaged or missing.
    """
    listed = list(names)
    # Both are read in the same batches, as names, dtypes and shapes are the same.
    pairs = zip(_by_name(one, listed), _by_name(other, listed), strict=True)
    for (name, mine), (_, theirs) in pairs:
        differing, absolute, relative = 0, 0.0, 0.0
        for a, b in zip(mine, theirs, strict=True):
            count, far, share = _apart(a, b)
            differing += count
            absolute, relative = max(absolute, far), max(relative, share)
        yield ValueDifference(name, differing, absolute, relative)


class _Sums:
    """What was seen of a tensor so far."""

    def __init__(self) -> None:
        self.least: float | None = None
        self.most: float | None = None
        self.total = 0.0
        self.finite = self.nans = self.infs = 0

    def add(self, values: np.ndarray[Any, Any]) -> None:
        if values.dtype.kind == "c":
            # Complex numbers have no order, and so no least.
            values = np.abs(values)
        if values.dtype.kind == "f":
            nan = np.isnan(values)
            finite = np.isfinite(values)
            self.nans += int(nan.sum())
            self.infs += int(values.size - finite.sum() - nan.sum())
            # One NaN would be the least, the most and the mean.
            values = values[finite]
        if not values.size:
            return
        self.finite += values.size
        # In its own dtype a sum of float16 ends at 65,504.
        self.total += float(values.sum(dtype=np.float64))
        least, most = values.min().item(), values.max().item()
        self.least = least if self.least is None else min(self.least, least)
        self.most = most if self.most is None else max(self.most, most)


def _apart(a: np.ndarray[Any, Any], b: np.ndarray[Any, Any]) -> tuple[int, float, float]:
    unlike = a != b
    if a.dtype.kind in "fc":
        # NaN is unequal to itself: of two diverged runs every element would seem to differ.
        unlike &= ~(np.isnan(a) & np.isnan(b))
    if not unlike.any():
        return 0, 0.0, 0.0
    wide = np.complex128 if a.dtype.kind == "c" else np.float64
    # Widened first: unsigned numbers would wrap around, and numpy subtracts no booleans.
    mine, theirs = a[unlike].astype(wide), b[unlike].astype(wide)
    with np.errstate(invalid="ignore", over="ignore"):
        far = np.abs(mine - theirs)
        share = far / np.maximum(np.abs(mine), np.abs(theirs))
    # Where one is no number, or infinite, no figure is large enough.
    largest = [float(np.nan_to_num(each, nan=np.inf).max()) for each in (far, share)]
    return int(unlike.sum()), largest[0], largest[1]


def _by_name(
    opened: OpenedCheckpoint, names: Iterable[str]
) -> Iterator[tuple[str, Iterator[np.ndarray[Any, Any]]]]:
    """Yield each name with its elements, which are to be gone through before the next one."""
    listed = list(names)
    # One stream for all: small tensors are read together, and each name takes its pieces in turn.
    pieces = (piece for batch in _batches(opened, listed) for piece in batch)

    def elements(count: int) -> Iterator[np.ndarray[Any, Any]]:
        while count:
            piece = next(pieces)
            count -= piece.numel()
            yield _plain(piece)

    for name in listed:
        info = opened.info[name]
        # `_batches` leaves the same ones out: another count would take the pieces of the next name.
        yield name, elements(info.shape.numel() if info.dtype not in _NO_NUMBERS else 0)


def _batches(opened: OpenedCheckpoint, names: Iterable[str]) -> Iterator[list[torch.Tensor]]:
    """Yield pieces of tensors, in order: those that are read at once, some 32 MB each time."""
    batch: list[torch.Tensor] = []
    targets: list[BoxTarget] = []
    nbytes = 0
    for name in names:
        info = opened.info[name]
        if info.dtype in _NO_NUMBERS:
            continue
        count = info.shape.numel()
        size = max(PIECE_BYTES // info.dtype.itemsize, 1)
        for start in range(0, count, size):
            # New for each piece: the one before may still be looked at where this is read.
            flat = torch.empty(min(size, count - start), dtype=info.dtype)
            targets += _boxes(name, tuple(info.shape), start, flat)
            batch.append(flat)
            nbytes += flat.nbytes
            # After each piece: a large tensor goes in several batches, small ones share one.
            if nbytes >= PIECE_BYTES:
                opened.read_boxes(targets)
                yield batch
                batch, targets, nbytes = [], [], 0
    if batch:
        opened.read_boxes(targets)
        yield batch


def _boxes(name: str, shape: tuple[int, ...], start: int, flat: torch.Tensor) -> list[BoxTarget]:
    """Return the boxes of a tensor whose elements, from number `start` on, fill `flat`."""
    found: list[BoxTarget] = []
    at = 0
    for offsets, sizes in boxes_of_range(shape, start, start + flat.numel()):
        stop = at + math.prod(sizes)
        found.append((name, offsets, flat[at:stop].view(sizes)))
        at = stop
    return found


def _plain(piece: torch.Tensor) -> np.ndarray[Any, Any]:
    """Return elements in a dtype that numpy has."""
    if piece.dtype == torch.complex32:
        return piece.to(torch.complex64).numpy()
    # numpy has no bfloat16 and no fp8; float32 holds each of their numbers exactly.
    if piece.dtype.is_floating_point and piece.dtype not in (torch.float32, torch.float64):
        return piece.to(torch.float32).numpy()
    return piece.numpy()
