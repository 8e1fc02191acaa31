"""The average of several checkpoints, tensor by tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NotRequired, SupportsIndex, TypeAlias, TypedDict, Unpack

import torch

from dist_ckpt.doors.content import Item, Outgoing, StoredContent, own_memory, split_alike
from dist_ckpt.doors.export import (
    ExportChoice,
    ExportReport,
    Format,
    WhichStep,
    open_at,
    write_content,
)
from dist_ckpt.doors.spool import check_target, is_saved, save_parts
from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.names import as_number, plain_step
from dist_ckpt.loading.opened import BoxTarget, OpenedCheckpoint, place_name
from dist_ckpt.options import check_known
from dist_ckpt.storage.resolve import Place, check_options_taken, options_for

AverageSource: TypeAlias = Place | tuple[Place, WhichStep]
"""A checkpoint to be averaged: a place, or a run and which step of it."""


class AverageKeywords(TypedDict):
    """The further keywords of `dist_ckpt.average`."""

    max_shard: NotRequired[int | str | None]
    like: NotRequired[Place | None]
    storage_options: NotRequired[Mapping[str, Any] | None]


@dataclass(frozen=True, slots=True)
class AverageReport:
    """What was averaged, and where it is.

    Attributes:
        url: the run.
        step: under which step it is committed.
        weights: of each checkpoint, 1 in all.
        tensors: how many names there are.
        was_there: whether it had been committed before, bit for bit the same.
    """

    url: str
    step: int
    weights: tuple[float, ...]
    tensors: int
    was_there: bool = False

    def __str__(self) -> str:
        """Say it for people."""
        done = "was there already" if self.was_there else "committed"
        return (
            f"step {self.step} of {self.url} {done}: {self.tensors} tensors, the average of "
            f"{len(self.weights)} checkpoints"
        )


def average(
    sources: Sequence[AverageSource],
    out: Place,
    *,
    weights: Sequence[float] | None = None,
    part: str = "model",
    format: Format | None = None,  # noqa: A002  the word for it everywhere
    step: SupportsIndex | None = None,
    **options: Unpack[AverageKeywords],
) -> AverageReport | ExportReport:
    """Average one part of several checkpoints, to a run or, with `format=`, to an export.

    Sums are of float64 and rounded once. What is not floating (counters, masks) is that of the last
    checkpoint.

    ```python
    import dist_ckpt
    import torch

    for step in (1, 2):
        dist_ckpt.save({"model": {"w": torch.full((2,), float(step))}}, "runs/17", step=step)
    dist_ckpt.average([("runs/17", 1), ("runs/17", 2)], "runs/averaged", weights=[1, 3])
    with dist_ckpt.open_checkpoint("runs/averaged") as averaged:
        assert averaged["model/w"].read().tolist() == [1.75, 1.75]
    ```

    Args:
        sources: two or more: places as `open_checkpoint` takes them, or pairs of a run and a step.
        out: the run, which the call takes over; or where an export goes, see `export`.
        weights: of each checkpoint; they need not be 1 in all. Equal ones by default.
        part: which part.
        format: of an export; None for a checkpoint of a run.
        step: under which step of the run; by default the highest of those that are averaged.
        **options: for an export to "hf", `max_shard` and `like`; `storage_options` for each of the
            places that takes any, as for `export`.

    Raises:
        NotFound: there is no such checkpoint or part.
        IncompatibleError: the checkpoints differ in names, dtypes or shapes.
        AlreadyExists: the destination exists.
        UsageError: an argument is malformed, or `out` is a folder of runs, or in a run.
    """
    check_known(options, list(AverageKeywords.__annotations__), besides=_ARGUMENTS, verb="average")
    if isinstance(sources, str) or not isinstance(sources, Sequence) or len(sources) < 2:
        raise UsageError("an average is of two checkpoints or more: give a list of them")
    shares = _shares(weights, len(sources))
    given = options.get("storage_options")
    check_options_taken(given, *map(_place_of, sources), out, options.get("like"))
    if (choice := _choice(format, options, step)) is None:
        check_target(out, options_for(out, given))
    with ExitStack() as stack:
        opened = [stack.enter_context(_open(source, options)) for source in sources]
        where = [each.where for each in opened]
        averaged = AveragedContent([StoredContent(each, part) for each in opened], shares, where)
        highest = max(each.step for each in opened)
        if choice is not None:
            work = {"average": where, "weights": list(shares), "part": part}
            return write_content(averaged, out, choice, work=work, step=highest)
        number = highest if step is None else plain_step(step)
        return _commit(averaged, out, part, number, shares, storage_options=given)


def _choice(
    format: Format | None,  # noqa: A002
    options: AverageKeywords,
    step: SupportsIndex | None,
) -> ExportChoice | None:
    """Return how to export, None for a checkpoint of a run.

    Raises:
        UsageError: an option is malformed, is of an export alone, or of a run alone.
    """
    if format is not None:
        if step is not None:
            raise UsageError("step: that is of a run, and with format= none is made; leave it out")
        return ExportChoice.of(format, options)
    of_exports = [name for name in sorted(options) if name != "storage_options"]
    if any(options.get(name) is not None for name in of_exports):
        raise UsageError(f"{', '.join(of_exports)}: that is of an export, give its format=")
    return None


def _commit(
    averaged: AveragedContent,
    out: Place,
    part: str,
    step: int,
    shares: tuple[float, ...],
    *,
    storage_options: Mapping[str, Any] | None,
) -> AverageReport:
    given, contents = options_for(out, storage_options), {part: averaged}
    # Asked first: after a call that was cut off behind its commit, a second save would be refused.
    was_there = is_saved(contents, {}, out, step, stored=StoredContent, storage_options=given)
    if not was_there:
        save_parts(contents, {}, out, step=step, metrics={}, storage_options=given)
    return AverageReport(place_name(out, given), step, shares, len(averaged.items), was_there)


_ARGUMENTS = ("sources", "out", "weights", "part", "format", "step")


def _open(source: AverageSource, options: AverageKeywords) -> OpenedCheckpoint:
    if isinstance(source, tuple):
        if len(source) != 2:
            raise UsageError(f"{source!r}: a source is a place, or a run and a step of it")
        return open_at(source[0], source[1], options)
    return open_at(source, None, options)


# Also of what is malformed: `_open` refuses it, and in words that fit.
def _place_of(source: AverageSource) -> object:
    return source[0] if isinstance(source, tuple) and source else source


def _shares(weights: Sequence[float] | None, count: int) -> tuple[float, ...]:
    if weights is None:
        return (1 / count,) * count
    if not isinstance(weights, Iterable) or len(weights := [*weights]) != count:
        raise UsageError(f"{count} checkpoints have {count} weights, not {weights!r}")
    numbers = [number for each in weights if (number := as_number(each)) is not None]
    # Rounded once: the shares add up to 1 as nearly as floats can.
    total = math.fsum(numbers)
    # NaN fails the comparison, and what adds up to infinity leaves no shares.
    if len(numbers) < count or not all(each >= 0 for each in numbers) or not 0 < total < math.inf:
        raise UsageError(f"weights are numbers that are not negative, and not all 0: {weights!r}")
    return tuple(each / total for each in numbers)


class AveragedContent:
    """The average of several contents, made box by box as it is read.

    Args:
        contents: at least one.
        weights: of each, 1 in all.
        where: what messages call each.

    Attributes:
        items: the tensors, as the first has them.
        ties: names that are one tensor in all of them.

    Raises:
        IncompatibleError: they differ in names, dtypes or shapes, or are quantized.
    """

    def __init__(
        self, contents: Sequence[Outgoing], weights: Sequence[float], where: Sequence[str]
    ) -> None:
        self._contents = contents
        self._weights = weights
        self.items: Mapping[str, Item] = contents[0].items
        for content, name in zip(contents[1:], where[1:], strict=True):
            _check_alike(self.items, content.items, where[0], name)
        for item in self.items.values():
            # fp8 means something only with its scales, and those would be averaged by themselves.
            if item.dtype.is_floating_point and item.dtype.itemsize == 1:
                raise IncompatibleError(
                    f"{item.name} is of {item.dtype}: quantized weights have no average",
                    kind=ErrorKind.STATE_MISMATCH,
                )
        groups = [{frozenset(group) for group in content.ties} for content in contents]
        # Tied in one and apart in another, two names have averages of their own.
        common = set.intersection(*groups)
        self.ties = [group for group in contents[0].ties if frozenset(group) in common]

    def fill(self, boxes: Sequence[BoxTarget]) -> None:
        """Fill memory with averages. See `Outgoing.fill`."""
        averaged = [memory for _, _, memory in boxes if _is_averaged(memory)]
        # Beside the result, whose dtype may be too narrow to add up in.
        totals = own_memory([(memory.shape, _wide(memory.dtype)) for memory in averaged])
        for content, weight in zip(self._contents, self._weights, strict=True):
            # The memory of the result is free until the end: it takes each of them in turn.
            content.fill(boxes)
            # A weight of 0 takes nothing of it, be it infinite.
            if weight:
                for total, memory in zip(totals, averaged, strict=True):
                    for whole, part in split_alike(total, memory):
                        whole.add_(part.to(whole.dtype), alpha=weight)
        for total, memory in zip(totals, averaged, strict=True):
            memory.copy_(total)


def _is_averaged(memory: torch.Tensor) -> bool:
    return memory.dtype.is_floating_point or memory.dtype.is_complex


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.complex128 if dtype.is_complex else torch.float64


def _check_alike(
    first: Mapping[str, Item], other: Mapping[str, Item], where: str, elsewhere: str
) -> None:
    only = sorted(first.keys() ^ other.keys())
    # Names and shapes alone were read so far: a mismatch costs no byte of a tensor.
    if only:
        home = where if only[0] in first else elsewhere
        raise IncompatibleError(
            f"{len(only)} names are in one of {where} and {elsewhere} only, such as {only[0]!r} of "
            f"{home}",
            kind=ErrorKind.STATE_MISMATCH,
        )
    for name, item in first.items():
        if item != other[name]:
            raise IncompatibleError(
                f"{name} is {item.dtype}{list(item.shape)} in {where}, and "
                f"{other[name].dtype}{list(other[name].shape)} in {elsewhere}",
                kind=ErrorKind.STATE_MISMATCH,
            )
