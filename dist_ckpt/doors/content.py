"""What goes out: named tensors of one part, read by boxes, renamed and cast if asked."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError, NotFound, UsageError, near
from dist_ckpt.loading.called_alike import alike
from dist_ckpt.loading.opened import BoxTarget, OpenedCheckpoint
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.storage.base import is_key
from dist_ckpt.storage.disk import aligned_buffer

# A multiple of each item size, so that a view of any dtype can begin there.
_CACHE_LINE_BYTES = 64
# Half a megabyte of float64: what is put aside for it is little beside a window of 16 MiB.
_PIECE_ELEMENTS = 1 << 16

_CASTS = {
    name: dtype
    for dtype, names in (
        (torch.float16, ("float16", "fp16", "half")),
        (torch.bfloat16, ("bfloat16", "bf16")),
        (torch.float32, ("float32", "fp32", "float")),
        (torch.float64, ("float64", "fp64", "double")),
    )
    for name in names
}


@dataclass(frozen=True, slots=True)
class Item:
    """One tensor as it goes out.

    Attributes:
        name: what it is called there.
        dtype: what its elements are there.
        shape: in elements.
    """

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return math.prod(self.shape) * self.dtype.itemsize


class Outgoing(Protocol):
    """Tensors by name, of which boxes can be read."""

    @property
    def items(self) -> Mapping[str, Item]:
        """What there is, in its order."""
        ...

    @property
    def ties(self) -> Sequence[tuple[str, ...]]:
        """Groups of names that are one tensor."""
        ...

    def fill(self, boxes: Sequence[BoxTarget]) -> None:
        """Fill memory of the dtypes of the items with boxes of them.

        Raises:
            CheckpointError: bytes are damaged or missing, or cannot be had in that dtype.
        """
        ...


def dtype_to_cast(dtype: str | torch.dtype | None) -> torch.dtype | None:
    """Return the floating dtype that `dtype` names.

    Raises:
        UsageError: there is none of that name, or weights make no sense in it.
    """
    if dtype is None:
        return None
    # A `torch.dtype` may be given as it is: its text has `torch.` before the name.
    found = _CASTS.get(str(dtype).removeprefix("torch."))
    if found is None:
        raise UsageError(
            f"dtype={dtype!r}: weights are cast to one of {', '.join(sorted(_CASTS))}; numbers of "
            "fewer bits need scales, which no cast makes"
        )
    return found


class StoredContent:
    """The tensors of one part of an opened checkpoint.

    Args:
        opened: the checkpoint; it stays the caller's.
        part: which part, by its name or one that other programs give it.
        dtype: what floating tensors become; None leaves them.
        rename: patterns to names, see `Renaming`.

    Attributes:
        part: what the part is called in the checkpoint.
        items: the tensors.
        ties: the groups of names that are stored once.
        is_value: whether it is a dict of tensors that was saved as a plain value.

    Raises:
        NotFound: there is no such part, or no tensor in it.
        UsageError: a pattern matches nothing, names fall together, or there is nothing to cast.
    """

    def __init__(
        self,
        opened: OpenedCheckpoint,
        part: str,
        *,
        dtype: torch.dtype | None = None,
        rename: Mapping[str, str] | None = None,
    ) -> None:
        self._opened = opened
        self.part = find_part(opened, part)
        infos = {info.name: info for info in opened.info.values() if info.part == self.part}
        if not infos:
            # An export of nothing would look like one that went well.
            raise NotFound(f"part {self.part!r} of {opened.where} has no tensors")
        # A dict of tensors is one value, in which these have its name before their own.
        self.is_value = list(opened.read_encoded(self.part)) == [VALUE] and all(
            name.startswith(f"{VALUE}.") for name in infos
        )
        before = f"{VALUE}." if self.is_value else ""
        bare = {name.removeprefix(before): name for name in infos}
        renaming = Renaming(rename or {})
        # Where two names become one, this is shorter than `bare`, by which `check` finds them.
        made = {renaming(name): name for name in bare}
        renaming.check(bare, made)
        self._names = {new: bare[old] for new, old in made.items()}
        self.items: Mapping[str, Item] = {
            new: Item(new, cast_dtype(infos[old].dtype, dtype), tuple(infos[old].shape))
            for new, old in self._names.items()
        }
        # Without effect it would be taken for done: the caller expects weights of that dtype.
        if dtype is not None and not any(info.dtype.is_floating_point for info in infos.values()):
            raise UsageError(f"{opened.where} has no floating tensor in {part!r} to cast")
        new_of = {old: new for new, old in self._names.items()}
        self.ties: Sequence[tuple[str, ...]] = [
            tuple(new_of[name] for name in group) for group in opened.ties(self.part)
        ]

    def fill(self, boxes: Sequence[BoxTarget]) -> None:
        """Fill memory with boxes of the tensors, cast. See `Outgoing.fill`."""
        full = [f"{self.part}/{self._names[name]}" for name, _, _ in boxes]
        # What has the dtype already is read to its place, with no copy between.
        targets = _beside([self._opened.info[name].dtype for name in full], boxes)
        asked = [
            (name, offsets, read)
            for name, (_, offsets, _), read in zip(full, boxes, targets, strict=True)
        ]
        if asked:
            self._opened.read_boxes(asked)
        for (name, _, memory), read in zip(boxes, targets, strict=True):
            # A number may fit float32 and not float16: an export must not make weights infinite.
            if read is not memory and not _cast(read, memory):
                wider = "" if memory.dtype is torch.bfloat16 else "cast to bfloat16, or "
                raise IncompatibleError(
                    f"{name} of {self._opened.where} has values beyond {memory.dtype}, which would "
                    f"become infinite: {wider}do not cast",
                    kind=ErrorKind.STATE_MISMATCH,
                )


def _beside(stored: Sequence[torch.dtype], boxes: Sequence[BoxTarget]) -> list[torch.Tensor]:
    """Return the memory of each box, or for one that is stored in another dtype some of that."""
    pairs = list(zip(stored, [memory for _, _, memory in boxes], strict=True))
    others = own_memory([(memory.shape, own) for own, memory in pairs if own != memory.dtype])
    aside = iter(others)
    return [memory if own == memory.dtype else next(aside) for own, memory in pairs]


def own_memory(
    tensors: Sequence[tuple[Sequence[int], torch.dtype]],
) -> list[torch.Tensor]:
    """Return zeroed tensors of these shapes and dtypes, which share a mapping of their own.

    A window is filled on a thread of its own, and what `malloc` gave a thread stays with the arena
    of that thread: with one window after the other, that adds up to hundreds of megabytes. A
    mapping is gone with the last of its tensors.
    """
    starts, nbytes = [], 0
    for shape, dtype in tensors:
        starts.append(nbytes)
        nbytes += rounded_up(math.prod(shape) * dtype.itemsize)
    # `torch.frombuffer` refuses a buffer of no bytes.
    if not nbytes:
        return [torch.zeros(tuple(shape), dtype=dtype) for shape, dtype in tensors]
    memory = torch.frombuffer(aligned_buffer(nbytes), dtype=torch.uint8)
    found = []
    for start, (shape, dtype) in zip(starts, tensors, strict=True):
        stop = start + math.prod(shape) * dtype.itemsize
        found.append(memory[start:stop].view(dtype).view(tuple(shape)))
    return found


def split_alike(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield views of contiguous tensors of one shape, piece by piece.

    What a calculation puts aside for so few elements is no matter for `own_memory`.
    """
    flat = [tensor.view(-1) for tensor in tensors]
    for start in range(0, flat[0].numel(), _PIECE_ELEMENTS):
        yield tuple(tensor[start : start + _PIECE_ELEMENTS] for tensor in flat)


def rounded_up(nbytes: int) -> int:
    """Return how much room a tensor of `nbytes` takes where others lie beside it."""
    return -(-nbytes // _CACHE_LINE_BYTES) * _CACHE_LINE_BYTES


def cast_dtype(stored: torch.dtype, wanted: torch.dtype | None) -> torch.dtype:
    """Return what elements of `stored` become where floating ones shall be `wanted`."""
    # What has so few bits is quantized, and means nothing without the scales beside it.
    floating = stored.is_floating_point and stored.itemsize > 1
    return wanted if wanted is not None and floating else stored


def _narrows(stored: torch.dtype, wanted: torch.dtype) -> bool:
    # By range, not by size: from float16 to bfloat16 digits are lost, and nothing overflows.
    return torch.finfo(wanted).max < torch.finfo(stored).max


def _cast(read: torch.Tensor, memory: torch.Tensor) -> bool:
    """Put `read` into `memory`, piece by piece; return whether nothing became infinite by that."""
    narrows = _narrows(read.dtype, memory.dtype)
    for before, after in split_alike(read, memory):
        after.copy_(before)
        # Where the range does not shrink, the elements need no second look.
        if narrows and _overflows(before, after):
            return False
    return True


def _overflows(read: torch.Tensor, memory: torch.Tensor) -> bool:
    if not bool(torch.isinf(memory).any()):
        return False
    # What was infinite before may stay so: only what became it is lost.
    return not torch.equal(torch.isinf(read), torch.isinf(memory))


def find_part(opened: OpenedCheckpoint, part: str) -> str:
    """Return what `part` is called in the checkpoint, which another program may have written.

    Raises:
        NotFound: there is no such part; offers those that there are.
    """
    if part in opened.parts:
        return part
    others = [name for name in opened.parts if name in alike(part)]
    # Only where another program chose the names; of two that could be meant none is taken.
    if opened.manifest is None and len(others) == 1:
        return others[0]
    raise NotFound(
        f"{opened.where} has no part {part!r}{near(part, opened.parts)}; there are "
        f"{', '.join(opened.parts)}"
    )


class Renaming:
    """New names by patterns, the first that matches counts.

    A `*` in a pattern takes any text, which goes to the place of the `*` in the name: `net.*` to
    `model.*`. A pattern without one is a whole name, or the beginning of names up to a dot.

    Raises:
        UsageError: a pattern or name that can be none.
    """

    def __init__(self, rename: Mapping[str, str]) -> None:
        if not isinstance(rename, Mapping):
            raise UsageError(f"rename maps patterns to names, as a dict, and is no {rename!r}")
        self._rules: list[tuple[str, re.Pattern[str], str]] = []
        self._used: set[str] = set()
        for pattern, name in rename.items():
            if not (isinstance(pattern, str) and pattern and isinstance(name, str)):
                raise UsageError(f"rename maps patterns to names, not {pattern!r} to {name!r}")
            if name.count("*") > pattern.count("*"):
                raise UsageError(f"rename {pattern!r} to {name!r}: the name has more * than that")
            # Of a beginning, what is behind it goes along.
            # Escaped: a dot in a name is no "any character", as it would be in an expression.
            body = "(.*)".join(map(re.escape, pattern.split("*")))
            tail = "" if "*" in pattern else r"((?:\..*)?)"
            self._rules.append((pattern, re.compile(body + tail, re.DOTALL), name))

    def __call__(self, name: str) -> str:
        """Return the new name of `name`.

        Raises:
            UsageError: it can be none: empty, or one that leads out of where it is put.
        """
        for pattern, rule, new in self._rules:
            found = rule.fullmatch(name)
            # `fullmatch` alone: `net` is no pattern for `network.weight`.
            if found is None:
                continue
            self._used.add(pattern)
            texts = list(found.groups(default=""))
            if "*" not in pattern:
                # To nothing: then the dot behind the beginning goes, too.
                renamed = new + texts[0] if new else texts[0].removeprefix(".")
            else:
                first, *rest = new.split("*")
                # A name may have fewer `*` than its pattern: what the others took is left out.
                renamed = first + "".join(t + r for t, r in zip(texts, rest, strict=False))
            if not is_key(renamed):
                raise UsageError(f"rename {pattern!r} makes {renamed!r} of {name!r}: no name")
            return renamed
        return name

    def check(self, names: Iterable[str], made: Mapping[str, str]) -> None:
        """Check that each pattern was of use, and that no two names became one.

        Args:
            names: all that there were.
            made: by new name, the last that it was made of.

        Raises:
            UsageError: otherwise.
        """
        listed = list(names)
        # A mistyped pattern would leave all names as they are, and the export would look done.
        unused = [pattern for pattern, _, _ in self._rules if pattern not in self._used]
        if unused:
            rule = next(rule for pattern, rule, _ in self._rules if pattern == unused[0])
            taken = next(filter(rule.fullmatch, listed), None)
            if taken is not None:
                raise UsageError(
                    f"rename {unused[0]!r} is of no use: {taken!r} goes by a pattern before it, as "
                    "all that it matches; put it first"
                )
            raise UsageError(
                f"rename {unused[0]!r} matches no name{near(unused[0], listed)}; there is, for "
                f"example, {listed[0]!r}"
            )
        if len(made) < len(listed):
            twice = next(name for name in listed if name not in made.values())
            raise UsageError(f"by rename, {twice!r} gets the name of another tensor")
