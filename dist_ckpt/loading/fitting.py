"""What of a checkpoint goes where in a state, and everything that does not fit.

`fit` asks each part where its tensors go. Before that, `gather` finds what there is to load under
the names of the state, and reads the small values; what a part may ask in turn is below: the
layout of a tensor that is not there yet, the value of a small one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import cache
from typing import Any

import msgspec
import torch
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, empty

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError, near
from dist_ckpt.foreign.dcp_runs import NAMING, DcpRun, in_parts
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.format.index import Held
from dist_ckpt.loading.called_alike import alike, called_alike, entries_of
from dist_ckpt.loading.fetching import ReadOptions, read_alone
from dist_ckpt.loading.filling import Wanted
from dist_ckpt.options import LoadOptions, matches, rename_key
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.repository.source import Source
from dist_ckpt.state.decoding import Layout, references
from dist_ckpt.state.encoding import fillable
from dist_ckpt.state.layout import dtype_name, dtype_of, empty_beside, is_wrapped, stored_shape
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.part import LayOut, Part, Stored, Targets, TensorSpec, nowhere
from dist_ckpt.state.resizing import ResizeRule, can_resize, matches_resize, told_resize
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.tensors import TensorsPart
from dist_ckpt.state.train_state import goes_by_name
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.state.values import ValuePart, is_taken_whole


@decodable
class Mismatches(msgspec.Struct, frozen=True):
    """How one rank's state and a checkpoint disagree; names are `part/name`.

    Attributes:
        missing: wanted by the state, not stored.
        unexpected: stored, unknown to the state of this rank.
        shapes: stored in another shape than wanted; the entry tells both.
        dtypes: stored in another dtype than wanted, which may not be cast; likewise.
        casts: stored in another dtype than wanted, to be cast; likewise.
        unlike: written by something else than what the state has; the entry tells both.
        unmatched: patterns of `only`, `skip` and `resize`, keys of `rename`, that match nothing.
        filled: parts of which something is to be loaded; generators of random numbers left out.
        empty: parts to be loaded, of which nothing has a partner.
        resized: of another shape, and loaded in part; the entry tells both.
    """

    missing: list[str] = []
    unexpected: list[str] = []
    shapes: list[str] = []
    dtypes: list[str] = []
    casts: list[str] = []
    unmatched: list[str] = []
    unlike: list[str] = []
    filled: list[str] = []
    empty: list[str] = []
    resized: list[str] = []


def compare(
    part: str,
    targets: Mapping[str, torch.Tensor],
    stored: Mapping[str, TensorSpec],
    *,
    cast: bool = False,
    resized: Mapping[str, ResizeRule] | None = None,
) -> Mismatches:
    """Compare the target tensors of one part with the stored ones of the same names.

    Args:
        part: what the part is called.
        targets: the tensors to fill.
        stored: what there is for them.
        cast: whether another dtype may be cast where that is allowed at all.
        resized: the rule by which a target may be of another shape.
    """
    mismatches = Mismatches([], [], [], [], [], resized=[])
    for name, target in targets.items():
        spec = stored.get(name)
        if spec is None:
            mismatches.missing.append(f"{part}/{name}")
            continue
        shape, dtype = stored_shape(target), dtype_name(target.dtype)
        if (shape, dtype) == (spec.shape, spec.dtype):
            continue
        both = f"{part}/{name}: stored {spec.dtype}{list(spec.shape)}, wanted {dtype}{list(shape)}"
        rule = (resized or {}).get(name)
        if shape != spec.shape:
            problem = _why_not_resized(rule, spec.shape, target)
            if problem is not None:
                mismatches.shapes.append(both + problem)
                continue
            mismatches.resized.append(f"{both}: {told_resize(spec.shape, shape)}")
        if dtype != spec.dtype:
            possible = can_cast(dtype_of(spec.dtype), target.dtype)
            if cast and possible:
                mismatches.casts.append(both)
            else:
                mismatches.dtypes.append(both if possible else f"{both} (never cast)")
    return mismatches


def _why_not_resized(
    rule: ResizeRule | None, stored: tuple[int, ...], target: torch.Tensor
) -> str | None:
    """Return what keeps a tensor of another shape from being loaded in part; None for nothing."""
    if rule is None:
        return ""
    shape = stored_shape(target)
    if not can_resize(rule, stored, shape):
        return f" (which is more than resize={rule!r} allows)"
    if target.is_meta and not can_resize("crop", stored, shape):
        return " (on the meta device, where there is no rest to be kept: give it memory first)"
    return None


def can_cast(stored: torch.dtype, wanted: torch.dtype) -> bool:
    """Tell whether `cast=True` may turn one dtype into the other.

    Floating dtypes may turn into each other, and complex ones likewise: weights live with another
    rounding. An integer may only turn into one that holds each of its values. Never floating to
    integer or back, nor anything from or to bool: there a number would become another thing.
    """
    if stored.is_complex or wanted.is_complex:
        return stored.is_complex and wanted.is_complex
    if stored.is_floating_point or wanted.is_floating_point:
        return stored.is_floating_point and wanted.is_floating_point
    if torch.bool in (stored, wanted):
        return False
    small, large = torch.iinfo(stored), torch.iinfo(wanted)
    return large.min <= small.min and small.max <= large.max


def unmatched(options: LoadOptions, known: Collection[str], idle: Iterable[str]) -> list[str]:
    """Return the patterns that match none of the `known` names, and the `idle` keys of rename."""
    patterns = (*options.only, *options.skip)
    lost = [each for each in patterns if not any(matches(each, name) for name in known)]
    lost += [
        each for each in options.resize if not any(matches_resize(each, name) for name in known)
    ]
    return lost + sorted(idle)


def check_matched(mismatches_by_rank: Sequence[Mismatches], known: Collection[str]) -> None:
    """Check that every pattern matches something on some rank.

    Args:
        mismatches_by_rank: what each rank found.
        known: the names that rank 0 knows, to offer those like the pattern.

    Raises:
        UsageError: a pattern matches nothing: a slip of the pen must not load nothing silently.
    """
    # On no rank: the stages of a pipeline know each their own names.
    lost = in_all(each.unmatched for each in mismatches_by_rank)
    if lost:
        pattern = lost[0]
        # A pattern is mostly the beginning of names, so it is compared with beginnings.
        wanted = pattern.strip("*").strip("./") or pattern
        hint = near(wanted, _beginnings(known))
        if pattern.startswith("*") and not hint:
            hint = near(wanted, {each for name in known for each in re.split("[./]", name)})
        # The commonest slip: the name of a tensor without the part that it is in.
        if "/" not in pattern and any(fnmatchcase(name, f"*/{pattern}") for name in known):
            hint = f" (names begin with their part: did you mean '*/{pattern}'?)"
        raise UsageError(
            f"{pattern!r} in only, skip, rename or resize matches no name of the checkpoint or the "
            f"state{hint}; nothing was changed"
        )


def _beginnings(names: Collection[str]) -> set[str]:
    """Return `names` and all that they begin with up to a `.` or `/`."""
    cuts = ((name, at) for name in names for at, char in enumerate(name) if char in "./")
    return {*names, *(name[:at] for name, at in cuts)}


def in_all(lists: Iterable[list[str]]) -> list[str]:
    """Return the names that are in all of `lists`."""
    first, *rest = (set(names) for names in lists)
    return sorted(first.intersection(*rest))


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
    known = {*held.names, *parts}
    chosen = [name for name in parts if options.selects_part(name)]
    empty = [] if chosen else [*parts]
    for name in chosen:
        part, stored = parts[name], held.parts.get(name)
        # Always, so it is not all that is meant, unless nothing else was asked for.
        fits = isinstance(part, RngPart) and len(chosen) > 1
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
        plain = not (found.tensors or found.missing or stored.tensors)  # values alone count, too
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
                # Kept by the stored name, as only the tensors' turn shows which of these are there.
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
            # Noted though it is not renamed: nothing else may be given its name.
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
    # After the values, which say of the tensors inside them where these go.
    for number in range(len(source.tensors)):
        found.take_tensor(number)
    for part in homes:
        # Of a stored part nothing may be selected; that is not the same as a part that is missing.
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
    return lambda names: _peek(source, [numbers[part, name] for name in names])


def _laid_out(parts: Mapping[str, Part], world_size: int) -> LayOut:
    # Made when it is asked for, which is hardly ever.
    live = cache(lambda: _LiveLayouts(parts, world_size=world_size))
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


# How a DTensor is laid out that a part held when it was saved and does not hold yet.


class _LiveLayouts:
    """What the live tensors of a state tell about how others are laid out.

    What a program fills as it goes (a moving average, a cache) is empty when a fresh one loads. A
    plain tensor in that place would be the whole of it on every rank, and torch mixes it with none
    that is sharded. So an encoding says which of its tensors were DTensors, and how they lay; where
    they are to lie now is asked of the live ones: of the parameter that is called so, or of the
    mesh.

    Args:
        parts: the state.
        world_size: how many ranks there are.
    """

    def __init__(self, parts: Mapping[str, Part], *, world_size: int) -> None:
        self._parts = parts
        self._world_size = world_size
        self._live: dict[str, DTensor] | None = None

    def empty(self, name: str, spec: TensorSpec, layout: Layout) -> torch.Tensor:
        """Return an unfilled tensor for what was a DTensor and has no live counterpart.

        Args:
            name: as stored.
            spec: as stored.
            layout: how it lay.

        Raises:
            IncompatibleError: how it is to lie is not known.
        """
        live = self._dtensors()
        if not live and (self._world_size == 1 or self._has_model()):
            return empty_beside(torch.empty(0), spec)  # nothing is sharded in this program
        like = _called(name, spec, live)
        like = _alone(spec, live) if like is None else like
        if like is not None:
            return empty_beside(like, spec)
        placed = _placed(layout, live, spec)
        if placed is None:
            raise IncompatibleError(
                f"{name!r} was a DTensor when it was saved, and this state has nothing there now: "
                "how it is to lie on these ranks is not known. Fill it before the load as a run "
                "does when it begins (one update of a moving average), or give the module whose "
                "parameters it is of in the same state"
            )
        return placed

    def _dtensors(self) -> dict[str, DTensor]:
        if self._live is None:
            self._live = {
                name: tensor
                for part in self._parts.values()
                for name, tensor in _tensors(part)
                if isinstance(tensor, DTensor) and not is_wrapped(tensor)
            }
        return self._live

    def _has_model(self) -> bool:
        return any(isinstance(part, ModelPart) for part in self._parts.values())


def _tensors(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(part, ModelPart):
        named = part.parameter_names()
        yield from ((named[id(p)], p) for p in part.module.parameters() if id(p) in named)
        yield from part.module.named_buffers()
    elif isinstance(part, TensorsPart):
        yield from part.tensors.items()
    elif type(part) is ValuePart and not part.per_rank:
        for name, tensor in fillable(part.value, path=part.name, prefix="").items():
            yield name.lstrip("."), tensor


def _called(name: str, spec: TensorSpec, live: Mapping[str, DTensor]) -> DTensor | None:
    """Return the live tensor whose name `name` ends with; of several the longest."""
    found = [
        other
        for other, tensor in live.items()
        if name.endswith(f".{other}") and tuple(tensor.shape) == spec.shape
    ]
    return live[max(found, key=len)] if found else None


def _alone(spec: TensorSpec, live: Mapping[str, DTensor]) -> DTensor | None:
    """Return a live tensor of that shape, if all of them are laid out alike."""
    found = [tensor for tensor in live.values() if tuple(tensor.shape) == spec.shape]
    places = {(tensor.device_mesh, tensor.placements) for tensor in found}
    # Of two layouts nobody knows which one is meant.
    return found[0] if len(places) == 1 else None


def _placed(layout: Layout, live: Mapping[str, DTensor], spec: TensorSpec) -> torch.Tensor | None:
    """Return a tensor that lies as it lay, if there is one mesh of that form."""
    dims = [dim for _, dim in layout if dim is not None]
    meshes = {
        tensor.device_mesh
        for tensor in live.values()
        if (tensor.device_mesh.mesh_dim_names or (None,) * tensor.device_mesh.ndim)
        == tuple(name for name, _ in layout)
    }
    # Of two meshes of one form nobody knows which one is meant.
    if not layout or len(meshes) != 1 or not all(0 <= dim < len(spec.shape) for dim in dims):
        return None
    placements: list[Placement] = [Replicate() if d is None else Shard(d) for _, d in layout]
    (mesh,) = meshes
    return empty(spec.shape, dtype=dtype_of(spec.dtype), device_mesh=mesh, placements=placements)


# Small tensors, read before anything is decided, because the decision depends on them.


def _peek(source: Source, numbers: Sequence[int]) -> list[torch.Tensor]:
    """Return stored tensors, whole, on the CPU; each rank reads for itself.

    Raises:
        IntegrityError: their bytes are damaged or missing.
    """
    wanted = [_wanted(source, number) for number in numbers]
    # Verified whatever the load was asked for: what to load is decided by these values.
    read_alone(source, wanted, ReadOptions(), label="look at small tensors")
    return [each.local.memory for each in wanted]


def _wanted(source: Source, number: int) -> Wanted:
    entry = source.tensors[number]
    memory = torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
    start = (0,) * len(entry.shape)
    held = Held(entry.part, entry.name, entry.dtype, entry.shape, start, entry.shape)
    return Wanted(number, LocalBox(held, memory), memory.dtype)
