"""Names that share memory: what is stored for them must agree, or one of them wins.

A live model may tie what a checkpoint has twice: one tensor under two names, a view of a part of
another tensor, a tensor in two parts of the state. Read side by side into the one memory, two
values become a mixture of both that nobody stored. So they are read beside it first and compared,
and nothing live is touched before it is known that they agree.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TypeAlias

import msgspec
import numpy as np
import torch
from numpy.typing import NDArray

from dist_ckpt.errors import IncompatibleError
from dist_ckpt.format.index import Box, Index, check_cover, intersect, split_rows
from dist_ckpt.loading.fetching import ReadOptions, read_alone
from dist_ckpt.loading.filling import Wanted, boxes_of
from dist_ckpt.options import LoadOptions, TieRule
from dist_ckpt.planning.describe import LocalBox, NamedTensors, local_boxes
from dist_ckpt.repository.source import Source
from dist_ckpt.staging.arena import reach, view_box
from dist_ckpt.state.layout import dtype_of, is_apart, materialise


class Ties:
    """What of a load goes to one memory, and how that is settled.

    Give what `window` returns to a read and then call `settle`, for every window; then read
    `wanted`, and call `finish`. Without ties there is no window, and `wanted` is all there is.

    Args:
        index: of the checkpoint, as far as it is about `wanted` (`Source.index_of`).
        wanted: boxes and their memory, in the order of the state.
        where: how messages name the checkpoint.
        rule: "refuse": values that differ are an error; "last": the last name in the order of
            `wanted` has its way.
        window_bytes: host memory for values that are to be compared. Only tensors that overlap
            without being one and the same are compared whole, however large they are.

    Attributes:
        wanted: what is to be read to its place.
        windows: how many comparisons there are.
        nbytes_kept: bytes of boxes that are not in `wanted`, as a comparison has them already.

    Raises:
        IncompatibleError: the elements of one tensor are themselves one memory, or one that may
            not be written to.
    """

    def __init__(
        self,
        index: Index,
        wanted: Sequence[Wanted],
        *,
        where: str,
        rule: TieRule,
        window_bytes: int,
    ) -> None:
        _check_writable(wanted)
        self._where = where
        self._rule = rule
        groups = _clusters(wanted)
        tied = {number for cluster in groups for number in cluster}
        self.wanted = [each for number, each in enumerate(wanted) if number not in tied]
        cases: list[_Case] = []
        for cluster in groups:
            alone, found = _sort_out(index, [wanted[number] for number in cluster], rule)
            self.wanted += alone
            cases += found
        pieces = [piece for case in cases for piece in case.cut(window_bytes)]
        self._windows = _packed(pieces, window_bytes)
        self.windows = len(self._windows)
        # What all fits into one window is there once it is compared, and is not read again. Where
        # the last one wins, the order of writing decides, so it is never left to a read.
        self._keeps = self.windows == 1 or rule == "last"
        self.nbytes_kept = sum(case.nbytes for case in cases) if self._keeps else 0
        if not self._keeps:
            self.wanted += [each for case in cases for each in case.to_read]

    def window(self, number: int) -> list[Wanted]:
        """Return what is to be read for a comparison."""
        return [each for case in self._windows[number] for each in case.beside()]

    def settle(self, number: int) -> None:
        """Compare what was read for a window.

        Raises:
            IncompatibleError: two names of one memory have different values; names both.
        """
        for case in self._windows[number]:
            if self._rule == "refuse":
                case.check(self._where)
            if not self._keeps:
                # The next window needs the memory. What agrees is read once more, to its place.
                case.scratch.clear()

    def finish(self) -> None:
        """Bring what was kept of the comparisons to its place."""
        for window in self._windows if self._keeps else ():
            for case in window:
                case.copy()


@dataclass(slots=True)
class _Case:
    """Targets that have memory in common.

    Attributes:
        members: in the order of the state; what is stored for them is not the same bytes.
        same: whether all are one and the same view of one memory.
        scratch: memory of its own for each, while they are compared.
    """

    members: list[Wanted]
    same: bool
    scratch: list[torch.Tensor] = field(default_factory=list)

    @property
    def to_read(self) -> list[Wanted]:
        """What is enough to be read if all agree."""
        return self.members[-1:] if self.same else self.members

    @property
    def nbytes(self) -> int:
        """Bytes of what is enough."""
        return sum(map(_nbytes, self.to_read))

    @property
    def nbytes_beside(self) -> int:
        """Bytes of all members."""
        return sum(map(_nbytes, self.members))

    def cut(self, most_bytes: int) -> list[_Case]:
        """Cut by rows into cases of about so many bytes; views that differ stay together."""
        if not self.same:
            return [self]
        count = -(-self.nbytes_beside // max(most_bytes, 1))
        cuts = [split_rows(each.local.held.box, count) for each in self.members]
        by_rows = zip(*cuts, strict=True)
        return [
            _Case(
                [
                    _narrowed(each, box.offsets, box.sizes)
                    for each, box in zip(self.members, boxes, strict=True)
                ],
                same=True,
            )
            for boxes in by_rows
        ]

    def beside(self) -> list[Wanted]:
        """Return the members with memory of their own."""
        self.scratch = [
            torch.empty(each.local.held.sizes, dtype=each.dtype) for each in self.members
        ]
        return [
            Wanted(each.tensor, LocalBox(each.local.held, memory), each.dtype)
            for each, memory in zip(self.members, self.scratch, strict=True)
        ]

    def check(self, where: str) -> None:
        """Compare what was read, as the live memory would have it.

        Raises:
            IncompatibleError: two members differ; names both.
        """
        values = [
            _in_memory(memory, each.local.memory)
            for each, memory in zip(self.members, self.scratch, strict=True)
        ]
        if self.same:
            first = _flat_bytes(values[0])
            for each, value in zip(self.members, values, strict=True):
                # Bit by bit: a NaN is equal to itself here, and -0.0 is not 0.0.
                if not np.array_equal(_flat_bytes(value), first):
                    raise _differ(where, self.members[0], each)
            return
        written = _WrittenMemory(self.members)
        # All are written before one is compared: whoever is written over by another value differs.
        for number, value in enumerate(values):
            written.put(number, value)
        for number, value in enumerate(values):
            if not written.has(number, value):
                raise _differ(where, self.members[number], self._rival(number, values))

    def copy(self) -> None:
        """Copy the values to the live memory, one after another."""
        with torch.no_grad():
            # In the order of the state, in which the last one has its way.
            for each, value in zip(self.to_read, self.scratch[-len(self.to_read) :], strict=True):
                each.local.memory.copy_(value)

    def _rival(self, number: int, values: Sequence[torch.Tensor]) -> Wanted:
        """Return a member that writes something else over member `number`."""
        for other, value in enumerate(values):
            written = _WrittenMemory(self.members)
            written.put(number, values[number])
            written.put(other, value)
            if not written.has(number, values[number]):
                return self.members[other]
        raise AssertionError("what all of them wrote over it, one of them did")


def _sort_out(
    index: Index, members: Sequence[Wanted], rule: TieRule
) -> tuple[list[Wanted], list[_Case]]:
    """Return those of a cluster that can be read to their places, and the others as cases."""
    views: dict[object, list[Wanted]] = {}
    for each in members:
        views.setdefault(_lie(each.local.memory), []).append(each)
    # A tie that was stored as one: the very same bytes need no comparison and only one reading.
    distinct = {key: _distinct(index, same) for key, same in views.items()}
    alone: list[Wanted] = []
    cases: list[_Case] = []
    # Some elements are in several views and some are not: no order of reading does for all.
    if _overlap([same[0] for same in views.values()]):
        kept = {id(each) for same in distinct.values() for each in same}
        return alone, [_Case([each for each in members if id(each) in kept], same=False)]
    for same in distinct.values():
        if len(same) == 1 or rule == "last":
            # Of one and the same view nothing would be left of those before the last.
            alone.append(same[-1])
        else:
            cases.append(_Case(same, same=True))
    return alone, cases


def _distinct(index: Index, same: Sequence[Wanted]) -> list[Wanted]:
    """Leave out what is stored as the very bytes of a later one."""
    if len(same) == 1:
        return list(same)
    found: dict[object, Wanted] = {}
    for each in same:
        rows, held = index.chunks_of(each.tensor), each.local.held
        columns = (rows.file, rows.offset, rows.starts, rows.sizes)
        key = (*(column.tobytes() for column in columns), each.dtype, held.offsets, held.sizes)
        found.pop(key, None)  # the place of the last one counts
        found[key] = each
    return list(found.values())


def _packed(pieces: Iterable[_Case], most_bytes: int) -> list[list[_Case]]:
    """Put the cases into windows, each as full as may be."""
    windows: list[list[_Case]] = []
    used = 0
    for piece in pieces:
        if not windows or used + piece.nbytes_beside > most_bytes:
            windows.append([])
            used = 0
        windows[-1].append(piece)
        used += piece.nbytes_beside
    return windows


def _narrowed(each: Wanted, offsets: tuple[int, ...], sizes: tuple[int, ...]) -> Wanted:
    held = msgspec.structs.replace(each.local.held, offsets=offsets, sizes=sizes)
    memory = view_box(each.local.memory, held.box, origin=each.local.held.offsets)
    return Wanted(each.tensor, LocalBox(held, memory), each.dtype)


def _nbytes(each: Wanted) -> int:
    return each.local.memory.numel() * each.dtype.itemsize


def _differ(where: str, first: Wanted, second: Wanted) -> IncompatibleError:
    return IncompatibleError(
        f"{where} has different values for {_called(first)} and {_called(second)}, which share "
        "memory in this state; nothing was changed. Untie them, load only one of the two, or let "
        "the last one have its way with ties='last'"
    )


# What shares memory in the state: read beside it first, to see if it agrees.


def prepare(
    source: Source,
    targets: NamedTensors,
    numbers: Mapping[tuple[str, str], int],
    *,
    options: LoadOptions,
) -> tuple[NamedTensors, Ties]:
    """Give memory to what is on the meta device, and find out what shares memory.

    Args:
        source: the checkpoint.
        targets: what is to be filled, by part and name.
        numbers: which stored tensor each of them is.
        options: how to load.

    Returns:
        The targets, all with memory; and the boxes of them that this rank wants.

    Raises:
        IncompatibleError: the elements of one target are themselves one memory, or one that may
            not be written to.
    """
    made: dict[object, torch.Tensor] = {}
    real = {
        # With one `made` for all parts: what is one tensor on the meta device stays one.
        part: materialise(tensors, device=options.device, made=made)
        for part, tensors in targets.items()
    }
    tensors = source.tensors
    wanted = []
    for local in local_boxes(real):
        number = numbers[local.held.part, local.held.name]
        common = _clipped(local, tensors[number].shape)
        if common is not None:
            wanted.append(Wanted(number, common, dtype_of(tensors[number].dtype)))
    # Read now, while nothing has changed yet: it is what may be damaged.
    index = source.index_of(boxes_of(wanted))
    # Half of what may be used is for the values, the other half for the reads.
    half_bytes = options.in_flight_bytes // 2
    where, rule = source.where, options.ties
    return real, Ties(index, wanted, where=where, rule=rule, window_bytes=half_bytes)


def _clipped(local: LocalBox, stored: tuple[int, ...]) -> LocalBox | None:
    """Return what of a box is stored, where the stored tensor has the shape `stored`.

    That is all of it but where a tensor is resized; None where it is nothing.
    """
    held = local.held
    if held.shape == stored:
        return local
    common = intersect(held.box, Box((0,) * len(stored), stored))
    if common is None:
        return None
    memory = view_box(local.memory, common, origin=held.offsets)
    clipped = msgspec.structs.replace(
        held, shape=stored, offsets=common.offsets, sizes=common.sizes
    )
    return LocalBox(clipped, memory)


def compare_ties(source: Source, ties: Ties, options: ReadOptions, *, label: str) -> int:
    """Read and compare the windows of `ties`; return the bytes read.

    Each rank reads them for itself: how many there are differs from rank to rank, and no rank is to
    wait for another one's.

    Args:
        source: the checkpoint.
        ties: those of this rank.
        options: how to read.
        label: what messages call the load.

    Raises:
        IncompatibleError: names of one memory have different values; nothing live was changed.
        IntegrityError: their bytes are damaged or missing.
    """
    half_bytes = options.in_flight_bytes // 2
    # The other half is for the values, see `prepare`.
    alone = replace(options, in_flight_bytes=half_bytes)
    nbytes = 0
    for number in range(ties.windows):
        nbytes += read_alone(source, ties.window(number), alone, label=label)
        ties.settle(number)
    return nbytes


# Targets that have memory in common: found by where their elements lie, byte by byte at need.


_Bytes: TypeAlias = NDArray[np.uint8]


def _clusters(wanted: Sequence[Wanted]) -> list[list[int]]:
    """Return the numbers of targets that reach into one another's memory, each group in order.

    Raises:
        IncompatibleError: the elements of one target are themselves one memory.
    """
    extents: dict[torch.device, list[tuple[int, int, int]]] = {}
    for number, each in enumerate(wanted):
        memory = each.local.memory
        nbytes = memory.nbytes
        if not nbytes:
            continue
        if not memory.is_contiguous():  # most are, and every load asks this of every tensor
            _check_apart(each)
            nbytes = reach(memory) * memory.itemsize
        start = memory.data_ptr()
        # Of each device by itself: addresses of two have nothing to do with each other.
        extents.setdefault(memory.device, []).append((start, start + nbytes, number))
    groups: list[list[int]] = []
    for found in extents.values():
        end = -1
        for start, stop, number in sorted(found):
            if start >= end:
                groups.append([])
            groups[-1].append(number)
            end = max(end, stop)
    # By the order of the state and not of addresses, so that a message is the same every time.
    return sorted(sorted(group) for group in groups if len(group) > 1)


def _overlap(views: Sequence[Wanted]) -> bool:
    """Tell whether any two of these views, or of their elements, have a byte in common."""
    # The columns of one matrix reach into one another, and have nothing in common.
    if len(views) == 1 or _tile(views):
        return False
    return _WrittenMemory(views).fill() != sum(each.local.memory.nbytes for each in views)


def _tile(views: Sequence[Wanted]) -> bool:
    """Tell, without a look at each element, whether these are the tiles of one target.

    Stock DCP asks for each stored chunk of a target by itself.
    """
    first = views[0]
    strides, dtype = first.local.memory.stride(), first.local.memory.dtype
    like = first.tensor, strides, dtype, _origin(first)
    if any(
        (v.tensor, v.local.memory.stride(), v.local.memory.dtype, _origin(v)) != like for v in views
    ):
        return False
    # With one tensor, origin and stride the boxes alone say what is where.
    starts = np.array([each.local.held.offsets for each in views], np.int64)
    sizes = np.array([each.local.held.sizes for each in views], np.int64)
    low = starts.min(axis=0)
    shape: list[int] = ((starts + sizes).max(axis=0) - low).tolist()
    return is_apart(shape, strides) and check_cover(shape, starts - low, sizes) is None


def _origin(each: Wanted) -> int:
    """Return where the first element of the whole tensor would be, by this box of it."""
    memory, offsets = each.local.memory, each.local.held.offsets
    steps = zip(offsets, memory.stride(), strict=True)
    return memory.data_ptr() - sum(at * step for at, step in steps) * memory.itemsize


def _check_apart(each: Wanted) -> None:
    """Check that the elements of one target are not one memory, as those of an expanded one."""
    memory = each.local.memory
    if is_apart(memory.shape, memory.stride()):
        return
    # What reaches into a wider step may still miss it: that is looked at element by element.
    if _WrittenMemory([each]).fill() != memory.nbytes:
        raise IncompatibleError(
            f"{_called(each)}: several elements of the tensor to be filled are one memory (it "
            "was expanded), and can have one value only: give it memory of its own (.clone()); "
            "nothing was changed"
        )


def _check_writable(wanted: Sequence[Wanted]) -> None:
    """Check that no target lies in a file that was mapped for reading.

    The first write there would end the process by a signal, without a word.
    """
    try:
        # Of one process, on Linux; elsewhere nobody can tell.
        lines = Path("/proc/self/maps").read_bytes().splitlines()
    except OSError:
        return
    fields = [line.split(maxsplit=2) for line in lines]
    spans = [span.split(b"-") for span, rights, _ in fields if rights[1:2] != b"w"]
    starts, stops = np.array([[int(end, 16) for end in span] for span in spans], np.uint64).T
    memories = [each.local.memory for each in wanted]
    places = np.array([m.data_ptr() if m.is_cpu and m.nbytes else 0 for m in memories], np.uint64)
    # They are in order, and lie apart.
    before = np.maximum(np.searchsorted(starts, places, side="right"), 1) - 1
    inside = (starts[before] <= places) & (places < stops[before])
    for number in np.flatnonzero(inside)[:1].tolist():
        raise IncompatibleError(
            f"{_called(wanted[number])}: the tensor to be filled lies in a file that was mapped "
            "for reading: map it with numpy.memmap(mode='c'), give it memory of its own (.clone()) "
            "or leave it out (skip=); nothing was changed"
        )


class _WrittenMemory:
    """The memory of several targets as bytes on this host, to see what they would make of it."""

    def __init__(self, members: Sequence[Wanted]) -> None:
        memories = [each.local.memory for each in members]
        starts = [memory.data_ptr() for memory in memories]
        first = min(starts)
        stops = [_stop(memory) for memory in memories]
        # No longer than the members are together: they reach into one another.
        self._bytes: _Bytes = np.zeros(max(stops) - first, np.uint8)
        self._views = [
            _view(self._bytes, memory, start - first)
            for memory, start in zip(memories, starts, strict=True)
        ]

    def put(self, number: int, value: torch.Tensor) -> None:
        """Write `value` to member `number`, over whatever others wrote there."""
        view = self._views[number]
        view[...] = _flat_bytes(value).reshape(view.shape)

    def has(self, number: int, value: torch.Tensor) -> bool:
        """Tell whether member `number` is `value`, bit for bit."""
        view = self._views[number]
        return np.array_equal(view, _flat_bytes(value).reshape(view.shape))

    def fill(self) -> int:
        """Write to every view; return to how many bytes."""
        for view in self._views:
            view[...] = 1
        return int(np.count_nonzero(self._bytes))


def _view(data: _Bytes, memory: torch.Tensor, offset: int) -> _Bytes:
    """Return the bytes of each element of `memory`, which begins at `offset` of `data`."""
    item = memory.itemsize
    strides = (*(step * item for step in memory.stride()), 1)
    return np.ndarray((*memory.shape, item), np.uint8, data, offset, strides)


def _lie(memory: torch.Tensor) -> object:
    """Return what two views have in common only if they are the same elements in one order."""
    # The stride of a single row means nothing.
    steps = zip(memory.stride(), memory.shape, strict=True)
    strides = tuple(stride if size > 1 else 0 for stride, size in steps)
    return (
        memory.data_ptr(),
        memory.shape,
        strides,
        memory.dtype,
        memory.is_conj(),
        memory.is_neg(),
    )


def _in_memory(value: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return what is in the memory of `target` when it has taken `value`, on this host."""
    value = value.to(target.dtype)
    if target.is_conj():
        value = value.conj_physical()
    return -value if target.is_neg() else value


def _stop(memory: torch.Tensor) -> int:
    return memory.data_ptr() + reach(memory) * memory.itemsize


def _flat_bytes(value: torch.Tensor) -> _Bytes:
    """Return the bytes of the elements of a tensor on this host, in their order."""
    return value.contiguous().reshape(-1).view(torch.uint8).numpy()


def _called(each: Wanted) -> str:
    """Return `part/name` as the state has it."""
    return f"{each.local.held.part}/{each.local.held.name}"
