"""What of a checkpoint goes where in a state, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.foreign.dcp_runs import NAMING, DcpRun, in_parts
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.loading.called_alike import alike, called_alike
from dist_ckpt.loading.matching import Mismatches, compare, unmatched
from dist_ckpt.loading.peeking import peek
from dist_ckpt.options import LoadOptions, rename_key
from dist_ckpt.repository.source import Source
from dist_ckpt.state.entries import entries_of
from dist_ckpt.state.laying_out import LiveLayouts
from dist_ckpt.state.objects import references
from dist_ckpt.state.part import LayOut, Part, Stored, Targets, TensorSpec, nowhere
from dist_ckpt.state.resizing import ResizeRule
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.train_state import goes_by_name
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import ValuePart, is_taken_whole

# What a checkpoint holds, under the names of the state, of all that is to be loaded.


@dataclass(frozen=True, slots=True)
class StoredParts:
    """What there is to load.

    Attributes:
        parts: what is stored for each part and selected.
        numbers: the number in the index of each selected tensor, by part and name.
        names: every stored part and `part/name`, selected or not.
        idle: keys of the `rename` mapping that are the beginning of nothing stored.
    """

    parts: Mapping[str, Stored]
    numbers: Mapping[tuple[str, str], int]
    names: frozenset[str]
    idle: frozenset[str]


@dataclass(slots=True)
class _Part:
    """The selected content of one part, being gathered."""

    tensors: dict[str, TensorSpec] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


class _Gathering:
    def __init__(
        self, source: Source, options: LoadOptions, rank: int, by_name: Collection[str]
    ) -> None:
        self.source = source
        self.by_name = by_name
        self.options = options
        self.rank = rank  # whose values to take
        self.parts: dict[str, _Part] = {}
        self.numbers: dict[tuple[str, str], int] = {}
        self.origins: dict[str, str] = {}  # the name in the state, the stored name
        # The tensors inside Python values, by stored part and name: the part that the value went
        # to, None where it is not selected.
        self.owned: dict[tuple[str, str], str | None] = {}
        # The names that tensors have as entries of a dict which was saved as one value, by stored
        # part and name.
        self.entries: dict[tuple[str, str], list[str]] = {}

    def take_objects(self, part: str, *, has_tensors: bool) -> None:
        """Gather the Python values of one stored part."""
        objects = self.source.read_objects(part, rank=self.rank)
        # To a part that has names of its own, a dict that was saved is what its entries are.
        if objects.keys() == {VALUE} and self._goes_by_name(part):
            taken = entries_of(objects[VALUE], path=part)
            if taken is not None:
                objects = taken.objects
                self.entries.update({(part, old): new for old, new in taken.tensors.items()})
        for name, data in objects.items():
            home, new = self._place(part, name)
            selected = self.options.selects(f"{home}/{new}")
            if selected:
                self.parts.setdefault(home, _Part()).objects[new] = data
            # The values name these tensors, so they go where the value goes and keep their name.
            for inner in references(data, path=f"{part}.{name}") if has_tensors else ():
                self.owned[part, inner] = home if selected else None

    def take_tensor(self, number: int) -> None:
        """Gather one stored tensor."""
        entry = self.source.tensors[number]
        key = (entry.part, entry.name)
        if key in self.owned:
            owner = self.owned[key]
            self._note(f"{owner or entry.part}/{entry.name}", f"{entry.part}/{entry.name}")
            if owner is not None:
                self._keep(number, owner, entry.name)
        if key not in self.owned or key in self.entries:
            for name in self.entries.get(key, [entry.name]):
                home, new = self._place(entry.part, name)
                if self.options.selects(f"{home}/{new}"):
                    self._keep(number, home, new)

    def _keep(self, number: int, home: str, name: str) -> None:
        entry = self.source.tensors[number]
        spec = TensorSpec(entry.dtype, entry.shape)
        self.parts.setdefault(home, _Part()).tensors[name] = spec
        self.numbers[home, name] = number

    def _goes_by_name(self, part: str) -> bool:
        rename = self.options.rename
        if rename is None:
            return part in self.by_name
        # Who names the value itself, or renames by a function, goes by the stored names.
        return (
            isinstance(rename, Mapping)
            and not any(key.startswith(f"{part}/{VALUE}") for key in rename)
            and self.options.renamed(f"{part}/").partition("/")[0] in self.by_name
        )

    def _place(self, part: str, name: str) -> tuple[str, str]:
        old = f"{part}/{name}"
        new = self.options.renamed(old)
        home, slash, rest = new.partition("/")
        if not (home and slash and rest):
            if new == old:
                raise IntegrityError(
                    f"{self.source.where} holds {old!r}, which is no name", kind=ErrorKind.MALFORMED
                )
            raise UsageError(f"rename made {new!r} of {old!r}: a name is a part, '/', and a name")
        self._note(new, old)
        return home, rest

    def _note(self, new: str, old: str) -> None:
        other = self.origins.setdefault(new, old)
        if other != old:
            raise UsageError(f"rename makes {new!r} of both {other!r} and {old!r}")


def gather(
    source: Source,
    options: LoadOptions,
    *,
    live: Collection[str],
    rank: int,
    world_size: int,
    by_name: Collection[str] = (),
    lay_out: LayOut = nowhere,
) -> StoredParts:
    """Find what of `source` is to be loaded, and read the Python values of it.

    Args:
        source: the checkpoint.
        options: what to load, and under which names.
        live: the parts of the state. Values of other parts are not read.
        rank: this rank.
        world_size: ranks now.
        by_name: those of `live` whose tensors have names of their own, as a module's have.
        lay_out: see `Stored.lay_out`.

    Raises:
        UsageError: `rename` makes no name, or one of two.
        IntegrityError: a value is damaged.
    """
    # At another world size nobody has a predecessor: rank 0's values stand for all.
    whose = rank if world_size == source.saved_world_size else 0
    found = _Gathering(source, options, whose, by_name)
    homes: set[str] = set()
    unread: set[str] = set()
    for part, mine in _numbers_by_part(source).items():
        names = (source.tensors[number].name for number in mine)
        possible = _homes(part, names, options)
        homes |= possible
        if any(home in live and options.selects_part(home) for home in possible):
            found.take_objects(part, has_tensors=bool(mine))
        else:
            unread.add(part)
    for number in range(len(source.tensors)):
        found.take_tensor(number)
    for part in homes:
        found.parts.setdefault(part, _Part())
    kept = {
        "rank": rank,
        "world_size": world_size,
        "saved_world_size": source.saved_world_size,
        "cast": options.cast,
        "is_adapter": isinstance(source, ForeignSource) and source.is_adapter,
        "is_foreign": isinstance(source, ForeignSource | DcpRun),
        "lay_out": lay_out,
    }
    return StoredParts(
        parts={part: _stored(part, found, kept) for part in found.parts},
        numbers=found.numbers,
        names=frozenset((*found.origins, *homes)),
        idle=_idle(options, found.origins.values(), unread),
    )


def _stored(part: str, found: _Gathering, kept: Mapping[str, Any]) -> Stored:
    """Return what was gathered for a part; `kept` is what is the same for all of them."""
    mine, options = found.parts[part], found.options
    return Stored(
        mine.tensors,
        mine.objects,
        by_rank=_of_every_rank(found.source, part),
        selects=_within(part, options),
        resize=_resize_within(part, options),
        peek=_peek_within(part, found.source, found.numbers),
        **kept,
    )


def _numbers_by_part(source: Source) -> dict[str, list[int]]:
    numbers: dict[str, list[int]] = {part: [] for part in source.parts}
    for number, entry in enumerate(source.tensors):
        numbers.setdefault(entry.part, []).append(number)
    return numbers


def _of_every_rank(source: Source, part: str) -> Callable[[], list[dict[str, bytes]]]:
    ranks = range(source.saved_world_size)
    # One reading for the check before anything changes, and for the values after it.
    return cache(lambda: [source.read_objects(part, rank=rank) for rank in ranks])


def _homes(part: str, names: Iterable[str], options: LoadOptions) -> set[str]:
    """Return the parts of the state that anything of the stored `part` may belong to."""
    if options.rename is None:
        return {part}
    homes = {options.renamed(f"{part}/{name}").partition("/")[0] for name in names}
    if isinstance(options.rename, Mapping):
        # The names of Python values are not known before they are read; a function cannot be
        # asked about names that may not exist.
        return homes | {options.renamed(f"{part}/").partition("/")[0]}
    return homes | {part}


def _within(part: str, options: LoadOptions) -> Callable[[str], bool]:
    return lambda name: options.selects(f"{part}/{name}")


def _peek_within(
    part: str, source: Source, numbers: Mapping[tuple[str, str], int]
) -> Callable[[Sequence[str]], list[torch.Tensor]]:
    return lambda names: peek(source, [numbers[part, name] for name in names])


def _laid_out(parts: Mapping[str, Part], world_size: int) -> LayOut:
    # Made when it is asked for, which is hardly ever.
    live = cache(lambda: LiveLayouts(parts, world_size=world_size))
    return lambda name, spec, layout: live().empty(name, spec, layout)


def _resize_within(part: str, options: LoadOptions) -> Callable[[str], ResizeRule | None]:
    return lambda name: options.resizes(f"{part}/{name}")


def _idle(options: LoadOptions, stored: Iterable[str], unread: Collection[str]) -> frozenset[str]:
    if not isinstance(options.rename, Mapping):
        return frozenset()
    used = {rename_key(options.rename, name) for name in stored}
    # Of what was not read nobody knows which names there are.
    keys = {key for key in options.rename if key.partition("/")[0] not in unread}
    return frozenset(keys - used)


@dataclass(frozen=True, slots=True)
class Matched:
    """What of a checkpoint goes where: nothing live has been changed yet.

    Attributes:
        source: the checkpoint.
        holdings: what is to be loaded of it.
        targets: by part, where its tensors go.
        mismatches: what does not fit.
        known: the names of both sides.
        notes: what else to know.
        first: the parts to restore before any tensor is filled.
    """

    source: Source
    holdings: StoredParts
    targets: Mapping[str, Mapping[str, torch.Tensor]]
    mismatches: Mismatches
    known: frozenset[str]
    notes: Sequence[str]
    first: Sequence[str]


def fit(
    source: Source,
    options: LoadOptions,
    parts: Mapping[str, Part],
    *,
    rank: int,
    world_size: int,
) -> Matched:
    """Find where each stored byte would go on this rank, and everything that does not fit."""
    source, options, notes = _named_here(source, options, parts)
    held = gather(
        source,
        options,
        live=parts,
        rank=rank,
        world_size=world_size,
        by_name=[name for name, part in parts.items() if goes_by_name(part)],
        lay_out=_laid_out(parts, world_size),
    )
    missing: list[str] = []
    unexpected: list[str] = []
    unlike: list[str] = []
    compared: list[Mismatches] = []
    targets: dict[str, Mapping[str, torch.Tensor]] = {}
    filled: list[str] = []
    empty: list[str] = []
    known = {*held.names, *parts}
    for name, part in parts.items():
        if not options.selects_part(name):
            continue
        stored = held.parts.get(name)
        fits = isinstance(part, RngPart)  # always, so it is never all that is meant
        if stored is None:
            missing.append(name)
            empty += [] if fits else [name]
            continue
        found = part.targets(stored)
        notes += filter(None, [found.note])
        wanted = [f"{name}/{entry}" for entry in found.missing]
        known.update(wanted, (f"{name}/{entry}" for entry in found.tensors))
        unexpected += [f"{name}/{entry}" for entry in found.unexpected]
        unlike += found.unlike
        compared.append(_compare(name, found, stored, options))
        missing += [*filter(options.selects, wanted), *compared[-1].missing]
        targets[name] = {key: t for key, t in found.tensors.items() if key in stored.tensors}
        plain = not (found.tensors or found.missing or stored.tensors)
        (filled if targets[name] or plain else empty).extend([] if fits else [name])
    unexpected += [name for name in held.parts if name not in parts and options.selects_part(name)]
    mismatches = Mismatches(
        missing,
        unexpected,
        *_tensors_apart(compared),
        unmatched(options, known, held.idle),
        unlike,
        filled=filled,
        empty=empty,
        resized=[entry for each in compared for entry in each.resized],
    )
    first = [name for name in targets if _goes_first(parts[name], held.parts[name])]
    return Matched(source, held, targets, mismatches, frozenset(known), notes, first)


def taken_whole(live: Mapping[str, Part], options: LoadOptions) -> frozenset[str]:
    """Return what the parts may be called that take what was saved as the one value that it was.

    Only such a part knows what its state is made of: names sorted out of it would be of no use.

    Args:
        live: the parts of the state.
        options: what the program asked for.
    """
    found = {name for name, part in live.items() if is_taken_whole(part)}
    others = {name for part in found for name in alike(part) if name not in live}
    renamed: set[str] = set()
    if isinstance(options.rename, Mapping):
        renamed = {old for old, new in options.rename.items() if new in found}
    return frozenset(found | others | renamed)


def _named_here(
    source: Source, options: LoadOptions, live: Mapping[str, Part]
) -> tuple[Source, LoadOptions, list[str]]:
    """Return the checkpoint with its names sorted into parts, and the parts called as in `live`."""
    notes: list[str] = []
    if source.manifest is None or NAMING in source.manifest.versions:
        # Of another program, or of the Writer for one: a state may call its parts otherwise.
        source = in_parts(source, whole=taken_whole(live, options))
        options, notes = called_alike(source, options, live)
    return source, options, notes


def _compare(name: str, found: Targets, stored: Stored, options: LoadOptions) -> Mismatches:
    return compare(name, found.tensors, stored.tensors, cast=options.cast, resized=found.resized)


def _tensors_apart(compared: Sequence[Mismatches]) -> tuple[list[str], list[str], list[str]]:
    """Return what was found of shapes, of dtypes, and of casts."""
    return (
        [entry for each in compared for entry in each.shapes],
        [entry for each in compared for entry in each.dtypes],
        [entry for each in compared for entry in each.casts],
    )


def _goes_first(part: Part, stored: Stored) -> bool:
    return isinstance(part, ValuePart) and part.goes_first(stored)
