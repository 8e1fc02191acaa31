"""What one optimizer keeps, under which names, and how it is written down.

Names: `state.<parameter>.<key>` for what the optimizer keeps per parameter, tensors as tensors
and the rest as objects; `param_groups.<first parameter>` for the options of a group and the
names of its parameters, or `param_groups[i]` where a group is empty; `shared_state` for what an
optimizer keeps under keys that are no parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import torch
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import dumps, encode
from dist_ckpt.state.layout import (
    address,
    check_storable,
    dtype_name,
    dtype_of,
    empty_beside,
    in_order,
    is_wrapped,
    memory_order,
    stored_shape,
)
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.part import TensorSpec
from dist_ckpt.state.rebuilding import Building, difference, how_made, rebuilt
from dist_ckpt.state.spread import pieces

# Which stored parameter group is which live one: pure decisions over names.


PREFIX = "param_groups"
MARK = "@"
"""What the keys of a stored group begin with that are no options but notes about its state."""

MADE = f"{MARK}made"
"""The note of how what is several tensors behind one face is built of these."""

# How a live group lists its parameters; everything else in it is an option.
_STRUCTURE = frozenset({"params", "param_names"})


def group_name(index: int, parameters: Sequence[str]) -> str:
    """Return what the group at `index` is called in a checkpoint.

    By its first parameter, so that ranks that hold different groups never share a name.
    """
    return f"{PREFIX}.{parameters[0]}" if parameters else f"{PREFIX}[{index}]"


def is_group_name(name: str) -> bool:
    """Tell whether `group_name` may have made `name`."""
    return name.startswith((f"{PREFIX}.", f"{PREFIX}["))


def options_of(group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a group, live or stored: no parameters, no notes."""
    return {
        key: value
        for key, value in group.items()
        if key not in _STRUCTURE and not str(key).startswith(MARK)
    }


def options_digest(data: bytes) -> str:
    """Return a digest of the options in an encoded group: of what its members have in common."""
    return bytes_digest(dumps(options_of(parse_document(data, PREFIX))).encode())


@dataclass(frozen=True)
class GroupMatch:
    """The stored name of each live group that has one, and the names that have no partner.

    Attributes:
        stored_of: by live group name, from which its options come: each of its parameters was
            saved with just these.
        missing: live groups, or `group[parameter]` where a group of that name has others.
        unexpected: stored ones, likewise; `group[parameter]` also where another rank may have
            that parameter.
    """

    stored_of: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)


def _never(first: str, second: str) -> bool:
    return False


def match_groups(
    live: Mapping[str, Sequence[str]],
    stored: Mapping[str, Sequence[str]],
    *,
    alike: Callable[[str, str], bool] = _never,
) -> GroupMatch:
    """Match live groups to stored ones, each given as name to canonical parameter names.

    A group of one stage of a pipeline is a piece of what another layout has as one group. So a
    live group may be a piece of a stored one, or be made of pieces of several that are `alike`. A
    stored group is never shared by two live ones: whoever split it wants other options.

    Args:
        live: the groups of this rank.
        stored: those of all ranks that saved.
        alike: tells whether two stored groups have equal options.
    """
    match = GroupMatch(_same_members(live, stored))
    taken = set(match.stored_of.values())
    owner = {parameter: name for name, params in stored.items() for parameter in params}
    for name, params in live.items():
        if name in match.stored_of or not params or not owner.keys() >= set(params):
            continue
        first, *others = dict.fromkeys(owner[parameter] for parameter in params)
        if taken.isdisjoint((first, *others)) and all(alike(first, each) for each in others):
            match.stored_of[name] = first
            taken.update((first, *others))
            rest = {p: each for each in (first, *others) for p in stored[each]}
            match.unexpected.extend(f"{rest[p]}[{p}]" for p in rest if p not in set(params))
    for name, source in match.stored_of.items():
        # What other ranks had of the same group says nothing more.
        mine = set(live[name])
        taken.update(
            each
            for each, params in stored.items()
            if params and mine.issuperset(params) and alike(source, each)
        )
    _tell_unmatched(match, live, {n: params for n, params in stored.items() if n not in taken})
    return match


def _same_members(
    live: Mapping[str, Sequence[str]], stored: Mapping[str, Sequence[str]]
) -> dict[str, str]:
    """Return by live name the stored groups of just the same parameters."""
    # An optimizer has each parameter in one group only, so a set of them is an identity.
    by_parameters = {frozenset(params): name for name, params in stored.items() if params}
    same: dict[str, str] = {}
    for name, params in live.items():
        found = by_parameters.get(frozenset(params))
        # Empty groups have nothing but their place to be known by. And of two that list the same
        # in another order, that of the rank counts which has this order.
        if name in stored and set(stored[name]) == set(params):
            found = name
        if found is not None:
            same[name] = found
    return same


def _tell_unmatched(
    match: GroupMatch, live: Mapping[str, Sequence[str]], loose: dict[str, Sequence[str]]
) -> None:
    for name, params in live.items():
        if name in match.stored_of:
            continue
        # A group of the same name but with other parameters: say which, not just that.
        if name in loose:
            other = loose.pop(name)
            match.missing.extend(f"{name}[{p}]" for p in params if p not in set(other))
            match.unexpected.extend(f"{name}[{p}]" for p in other if p not in set(params))
        else:
            match.missing.append(name)
    match.unexpected.extend(loose)


# The parameters and groups of an optimizer, by name.


STATE = "state."


@dataclass(frozen=True)
class View:
    """One optimizer as it is now.

    Attributes:
        prefix: what all its names begin with; empty for the only one of its part.
        parameters: by name, in the order of the groups.
        groups: the live groups by name.
        members: by group, the names of its parameters.
    """

    prefix: str
    parameters: dict[str, torch.Tensor]
    groups: dict[str, dict[str, Any]]
    members: dict[str, list[str]]

    @classmethod
    def of(
        cls, groups: Iterable[dict[str, Any]], names: Mapping[int, str], *, prefix: str = ""
    ) -> View:
        """Name what is in `groups`; `names` has the parameters of models by `id`."""
        parameters: dict[str, torch.Tensor] = {}
        by_name: dict[str, dict[str, Any]] = {}
        members: dict[str, list[str]] = {}
        for i, group in enumerate(groups):
            listed = []
            for j, parameter in enumerate(group["params"]):
                name = names.get(id(parameter), f"group{i}.param{j}")
                while name in parameters:  # a module may be called group0, too
                    name += "_"
                parameters[name] = parameter
                listed.append(name)
            called = prefix + group_name(i, listed)
            by_name[called] = group
            members[called] = listed
        return cls(prefix, parameters, by_name, members)

    @property
    def sizes(self) -> list[int]:
        """How many parameters each group has."""
        return [len(listed) for listed in self.members.values()]

    def name(self, parameter: str, key: str) -> str:
        """Return what `key` of the state of a parameter is called."""
        return f"{self.prefix}{STATE}{parameter}.{key}"

    def owner(self, name: str) -> tuple[str, str] | None:
        """Split what `name` made, where a parameter of that name exists."""
        start = self.prefix + STATE
        if name.startswith(start):
            rest = name.removeprefix(start)
            cut = rest.rfind(".")
            while cut > 0:  # a parameter's name has dots, and so may a key
                if rest[:cut] in self.parameters:
                    return rest[:cut], rest[cut + 1 :]
                cut = rest.rfind(".", 0, cut)
        return None

    def is_group(self, name: str) -> bool:
        """Tell whether `name` is that of a group of this optimizer, live or stored."""
        return name.startswith(self.prefix) and is_group_name(name.removeprefix(self.prefix))


def parameter_names(
    models: Sequence[ModelPart], parameters: Iterable[torch.Tensor]
) -> dict[int, str]:
    """Return the names of those of `parameters` that belong to a model, by `id`."""
    # By identity: a parameter does not know its name.
    mine = {id(parameter) for parameter in parameters}
    by_model = [(model.name, model.parameter_names()) for model in models]
    spanned = [(name, names) for name, names in by_model if mine & names.keys()]
    out: dict[int, str] = {}
    for model_name, names in spanned:
        # One model needs no prefix, so a second one in the state does not rename anything.
        prefix = f"{model_name}." if len(spanned) > 1 else ""
        for key, name in names.items():
            out.setdefault(key, prefix + name)
    return out


# What a checkpoint says of an optimizer's tensors beside their values.
#
# An index knows dtype and shape. What an optimizer keeps may depend on more: on the order in which
# its elements lie in memory, and on whether it is a plain tensor although its parameter is sharded.
# A note is a key of a stored group that begins with `@`; only the class is always there.


_CLASS = f"{MARK}class"
_DTYPES = f"{MARK}dtypes"
_ORDER = f"{MARK}order"
_PLAIN = f"{MARK}plain"
_LIKE = f"{MARK}like"
_SAME = f"{MARK}same"


@dataclass(frozen=True, slots=True)
class Notes:
    """The notes of all groups together; empty for a checkpoint from before there were any.

    Attributes:
        classes: what the optimizer was, as `package.Class`.
        dtypes: by parameter, its dtype then.
        order: by tensor, see `dist_ckpt.state.layout.memory_order`.
        plain: tensors that were plain beside a DTensor.
        like: by tensor that is no state of one parameter, the parameter it is laid out as.
        made: by what is several tensors behind one face, how one is built of these.
        same: by tensor, the name under which that very tensor was met first.
    """

    classes: set[str] = field(default_factory=set)
    dtypes: dict[str, str] = field(default_factory=dict)
    order: dict[str, list[int]] = field(default_factory=dict)
    plain: set[str] = field(default_factory=set)
    like: dict[str, str] = field(default_factory=dict)
    made: dict[str, Any] = field(default_factory=dict)
    same: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, groups: Iterable[Mapping[str, Any]]) -> Notes:
        """Gather the notes of stored groups; what is of another form than ours is no note."""
        notes = cls()
        for group in groups:
            if isinstance(group.get(_CLASS), str):
                notes.classes.add(group[_CLASS])
            dtypes, params = group.get(_DTYPES), group["params"]
            if isinstance(dtypes, str):
                notes.dtypes.update(dict.fromkeys(params, dtypes))
            elif isinstance(dtypes, list) and len(dtypes) == len(params):
                notes.dtypes.update(zip(params, map(str, dtypes), strict=True))
            notes.order.update(_dict(group.get(_ORDER)))
            notes.like.update(_dict(group.get(_LIKE)))
            notes.made.update(_dict(group.get(MADE)))
            same = _dict(group.get(_SAME))
            notes.same.update({key: first for key, first in same.items() if type(first) is str})
            plain = group.get(_PLAIN)
            notes.plain.update(map(str, plain) if isinstance(plain, list) else ())
        return notes

    @classmethod
    def of_entry(cls, noted: Mapping[str, Any]) -> Notes:
        """Return the notes of an entry that is in no group, which tell of all its tensors."""
        return cls.read([{_CLASS: "", **noted, "params": []}])

    def empty(self, name: str, spec: TensorSpec, *, like: torch.Tensor) -> torch.Tensor:
        """Return an unfilled tensor for what is stored as `name`, laid out as it was.

        Args:
            name: the stored tensor.
            spec: its dtype and shape; the dtype is that of the result.
            like: what it stands beside in arithmetic.
        """
        if name in self.plain:
            # Next to its parameter, though torch would refuse to mix the two in one operation:
            # an optimizer that keeps it so does not mix them.
            made = torch.empty(spec.shape, dtype=dtype_of(spec.dtype), device=like.device)
        else:
            made = empty_beside(like, spec)
        return self.ordered(name, made)

    def ordered(self, name: str, made: torch.Tensor) -> torch.Tensor:
        """Return `made`, or memory in the order in which `name` lay."""
        order = self.order.get(name)
        if order is not None and sorted(map(int, order)) != list(range(made.ndim)):
            return made  # it lies about another tensor; the values are right in any order
        return in_order(made, order) if self.classes else made


def class_notes(cls: str, parameters: Iterable[torch.Tensor]) -> dict[str, Any]:
    """Return the notes that every group has."""
    dtypes = [parameter.dtype for parameter in parameters]
    if len(set(dtypes)) == 1:
        return {_CLASS: cls, _DTYPES: dtype_name(dtypes[0])}
    return {_CLASS: cls, _DTYPES: [dtype_name(dtype) for dtype in dtypes]}


def tensor_notes(
    tensors: Mapping[str, torch.Tensor], beside: torch.Tensor | None, among: Mapping[str, Any]
) -> dict[str, Any]:
    """Return what must be noted of `tensors`: nothing in nearly all cases.

    Args:
        tensors: by stored name.
        beside: the parameter whose state they are; None where they belong to no single one.
        among: the parameters that those may be laid out as, by name.
    """
    notes: dict[str, Any] = {}
    for name, tensor in tensors.items():
        order = memory_order(tensor)
        if order is not None:
            notes.setdefault(_ORDER, {})[name] = order
        if isinstance(beside, DTensor) and tensor.ndim and not isinstance(tensor, DTensor):
            notes.setdefault(_PLAIN, []).append(name)
        if beside is None and isinstance(tensor, DTensor):
            for parameter, other in among.items():
                if _same_layout(tensor, other):
                    notes.setdefault(_LIKE, {})[name] = parameter
                    break
    return notes


def merge_notes(into: dict[str, Any], notes: Mapping[str, Any]) -> None:
    """Add `notes` of further tensors to those of a group."""
    for key, value in notes.items():
        if isinstance(value, dict):
            into.setdefault(key, {}).update(value)
        else:
            into.setdefault(key, []).extend(value)


def _same_layout(tensor: DTensor, other: object) -> bool:
    return (
        isinstance(other, DTensor)
        and other.shape == tensor.shape
        and other.device_mesh == tensor.device_mesh
        and other.placements == tensor.placements
    )


def _dict(value: object) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}


SHARED = "shared_state"
# Keys of no parameter's own making: an entry that is no dict, and entries under other keys.
WHOLE, OTHERS = "@whole", "@others"
_TEXT = {str}


@dataclass(slots=True)
class Content:
    """Values of one optimizer, as they are in memory or as they were decoded.

    Attributes:
        state: by parameter, what is kept for it.
        options: by live group, everything but its parameters.
        shared: what is kept under keys that are no parameters.
    """

    state: dict[str, Any] = field(default_factory=dict)
    options: dict[str, dict[str, Any]] = field(default_factory=dict)
    shared: dict[Any, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Capture:
    """What was written down so far of a part: see `dist_ckpt.state.part.Captured`.

    Attributes:
        part: its name, for messages.
        stepped: names of the tensors that are state of a parameter.
        groups: names of the groups.
    """

    part: str
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    stepped: set[str] = field(default_factory=set)
    groups: set[str] = field(default_factory=set)

    def add_value(self, name: str, value: object) -> dict[str, torch.Tensor]:
        """Encode a value, and return the tensors in it by name."""
        before = len(self.tensors)
        self.objects[name] = encode(
            value, path=f"{self.part}.{name}", tensors=self.tensors, prefix=name
        )
        # A dict keeps the order of insertion: what is new is at the end.
        added = len(self.tensors) - before
        return dict(islice(reversed(self.tensors.items()), added)) if added else {}


def write_down(view: View, content: Content, written: Capture, *, cls: str) -> None:
    """Name and encode `content`.

    Args:
        view: the optimizer.
        content: what it keeps.
        written: receives tensors and objects.
        cls: what the optimizer is, as `package.Class`.
    """
    plain: dict[str, dict[str, object]] = {}
    notes = _write_state(view, content, written, plain)
    for owner, values in plain.items():
        for name, value in values.items():
            inner = written.add_value(name, value)
            if inner:
                merge_notes(
                    notes.setdefault(owner, {}), tensor_notes(inner, view.parameters[owner], {})
                )
    general: dict[str, Any] = {}
    if content.shared:
        shared = written.add_value(view.prefix + SHARED, content.shared)
        general = tensor_notes(shared, None, view.parameters)
    written.stepped.update(written.tensors)
    met: dict[int, str] = {}
    for name in view.groups:
        parameters = {owner: view.parameters[owner] for owner in view.members[name]}
        noted = class_notes(cls, parameters.values())
        # In the order of the parameters: every rank has to write the same.
        for owner in parameters if notes else ():
            merge_notes(noted, notes.get(owner, {}))
        # Of what belongs to no group the first one speaks.
        merge_notes(noted, general)
        general = {}
        merge_notes(noted, _met_before(name, content.options[name], met))
        options = {**content.options[name], "params": view.members[name], **noted}
        written.add_value(name, options)
        written.groups.add(name)


def _met_before(
    group: str, options: Mapping[str, Any], met: dict[int, str]
) -> dict[str, dict[str, str]]:
    """Return the note of tensors that are an option of an earlier group, too.

    Args:
        group: what it is called.
        options: of that group.
        met: the name of each tensor that was met, by `id`, which is added to.
    """
    found: dict[str, str] = {}
    for key, value in options.items():
        # Named as the encoder does it: by key and place.
        inside = enumerate(value) if isinstance(value, list | tuple) else ()
        places = {f"{group}.{key}.{i}": each for i, each in inside} or {f"{group}.{key}": value}
        for name, each in places.items():
            if isinstance(each, torch.Tensor) and met.setdefault(id(each), name) != name:
                found[name] = met[id(each)]
    return {_SAME: found} if found else {}


def _write_state(
    view: View, content: Content, written: Capture, plain: dict[str, dict[str, object]]
) -> dict[str, dict[str, Any]]:
    """Name the tensors of all parameters; put what is no tensor into `plain`, by parameter.

    Returns:
        What must be noted, by parameter.
    """
    start = view.prefix + STATE
    notes: dict[str, dict[str, Any]] = {}
    met: dict[int, str] = {}
    # In the order of the groups: that of `state` depends on which gradient came first.
    for owner, parameter in view.parameters.items():
        entry = content.state.get(owner)
        entries = optimizer_entries(entry, where=f"{written.part}.{start}{owner}.")
        for key, whole in wholes(entry).items():
            noted = {MADE: {f"{start}{owner}.{key}": how_made(whole)}}
            merge_notes(notes.setdefault(owner, {}), noted)
        mine: dict[str, torch.Tensor] = {}
        again: dict[str, str] = {}
        sharded = isinstance(parameter, DTensor)
        for key, value in entries.items():
            name = f"{start}{owner}.{key}"
            # Objects come later, so that tensors inside give way to these names.
            if not isinstance(value, torch.Tensor):
                plain.setdefault(owner, {})[name] = value
                continue
            check_storable(value, written.part, name)
            written.tensors[name] = value
            # Asked here, since nearly none is: this is done for each tensor of each save.
            if not value.is_contiguous() or (sharded and not isinstance(value, DTensor)):
                mine[name] = value
            if met.setdefault(id(value), name) != name:
                again[name] = met[id(value)]
        if mine:
            merge_notes(notes.setdefault(owner, {}), tensor_notes(mine, parameter, {}))
        if again:
            merge_notes(notes.setdefault(owner, {}), {_SAME: again})
    return notes


def optimizer_entries(entry: Any, *, where: str = "") -> dict[str, Any]:
    """Return what an optimizer keeps for one parameter, by the keys under which it is stored.

    Args:
        entry: what it keeps.
        where: what that is called, for messages.

    Raises:
        UsageError: a tensor is sharded in a way that its class does not let anybody follow.
    """
    if entry is None:
        return {}
    if not isinstance(entry, dict):
        return {WHOLE: [entry]}
    if set(map(type, entry)) <= _TEXT:
        return _unwrapped(entry, where)
    # Keys that are no text would come back as text from a name.
    named = {key: value for key, value in entry.items() if type(key) is str}
    return {
        **_unwrapped(named, where),
        OTHERS: {k: v for k, v in entry.items() if type(k) is not str},
    }


def wholes(entry: Any) -> dict[str, torch.Tensor]:
    """Return what of an entry is stored as the several tensors that it is made of."""
    if not isinstance(entry, dict):
        return {}
    return {key: v for key, v in entry.items() if type(key) is str and is_wrapped(v)}


def _unwrapped(entry: dict[str, Any], where: str) -> dict[str, Any]:
    if not any(map(is_wrapped, entry.values())):
        return entry
    found: dict[str, Any] = {}
    for key, value in entry.items():
        inner = pieces(value, f"{where}{key}")
        found |= {key + suffix: each for suffix, each in inner.items()}
    return found


def joined(entries: Mapping[str, Any]) -> Any:
    """Return what `optimizer_entries` took apart."""
    if WHOLE in entries:
        return entries[WHOLE][0]
    others = entries.get(OTHERS, {})
    return {key: value for key, value in entries.items() if key != OTHERS} | others


def check_own(state: Mapping[Any, Any], view: View, part: str) -> dict[Any, Any]:
    """Return what `state` has under keys that are no parameters.

    Raises:
        UsageError: one is a tensor that is in none of the groups.
    """
    known = {id(parameter) for parameter in view.parameters.values()}
    shared: dict[Any, Any] = {}
    for key, value in state.items():
        if not isinstance(key, torch.Tensor):
            shared[key] = value
        elif id(key) not in known:
            raise UsageError(
                f"{part} keeps state for a tensor of shape {tuple(key.shape)} that is in "
                "none of its groups: build the optimizer after the module is wrapped or moved"
            )
    return check_shared(shared, view, part)


def check_shared(shared: dict[Any, Any], view: View, part: str) -> dict[Any, Any]:
    """Return `shared`, unless it goes by numbers that mean nothing to the next process.

    Raises:
        UsageError: a key is the `id` of a parameter.
    """
    known = {id(parameter): name for name, parameter in view.parameters.items()}
    for key in shared:
        if type(key) is int and key in known:
            raise UsageError(
                f"{part} keeps state for {known[key]} by id(parameter), a number that another "
                "process does not know: keep it by the parameter itself, state[parameter]"
            )
    return shared


# What an optimizer keeps that is several tensors behind one face: filled, or built anew.


class Faces:
    """The wrapped tensors that are stored of one optimizer.

    Args:
        view: the live optimizer.
        made: what is noted of each, by stored name.
        part: what it is called, for messages.

    Raises:
        IntegrityError: a note is malformed.
    """

    def __init__(self, view: View, made: Mapping[str, Any], part: str) -> None:
        self._view = view
        self._part = part
        self._faces: dict[str, tuple[Building, list[str]]] = {}
        self._of: dict[str, tuple[str, str]] = {}
        for name, noted in made.items():
            if view.owner(name) is None:
                continue
            building = Building(noted, f"{part}.{name}")
            suffixes = building.suffixes()
            self._faces[name] = building, suffixes
            self._of.update({name + suffix: (name, suffix) for suffix in suffixes})

    def has(self, name: str) -> bool:
        """Tell whether the stored tensor `name` is one of those behind a face."""
        return name in self._of

    def target(
        self, name: str, owner: str, spec: TensorSpec, *, kept: object, in_place: bool
    ) -> torch.Tensor:
        """Return what to fill with a stored inner tensor.

        Args:
            name: the stored one.
            owner: the parameter.
            spec: what is stored.
            kept: the live one, if there is one.
            in_place: whether that may be filled.
        """
        if isinstance(kept, torch.Tensor):
            same = (stored_shape(kept), dtype_name(kept.dtype)) == (spec.shape, spec.dtype)
            # One of another shape or dtype is none that could be cast: it is refused as it is.
            return kept if in_place or not same else empty_beside(kept, spec)
        face, suffix = self._of[name]
        return self._faces[face][0].target(suffix, spec, self._view.parameters[owner])

    def check(self, live: Mapping[str, Any], targets: Mapping[str, torch.Tensor]) -> None:
        """See that each can be put together, while nothing has changed.

        Raises:
            IncompatibleError: one cannot be built, or the live one is of another kind.
        """
        for name, (building, suffixes) in self._faces.items():
            if not all(name + suffix in targets for suffix in suffixes):
                continue
            owner, key = self._owner(name)
            kept = wholes(live.get(owner)).get(key)
            if kept is None:
                building.build({suffix: targets[name + suffix] for suffix in suffixes})
                continue
            problem = difference(how_made(kept), building.noted)
            if problem is not None:
                raise IncompatibleError(
                    f"{self._part}.{name}: stored and kept by this optimizer are {problem}: build "
                    "the optimizer with the options that it was saved with",
                    kind=ErrorKind.STATE_MISMATCH,
                )

    def put_together(self, entries: dict[str, dict[str, Any]], kept: Mapping[str, Any]) -> None:
        """Put wholes in the place of the inner tensors in `entries`, given by parameter.

        Args:
            entries: what was loaded.
            kept: what the optimizer keeps; a whole that was filled where it lies stays itself.
        """
        for name, (building, suffixes) in self._faces.items():
            owner, key = self._owner(name)
            mine = entries.get(owner, {})
            if all(key + suffix in mine for suffix in suffixes):
                inner = {suffix: mine.pop(key + suffix) for suffix in suffixes}
                mine[key] = whole_of(inner, wholes(kept.get(owner)).get(key), building)

    def _owner(self, name: str) -> tuple[str, str]:
        owner = self._view.owner(name)
        assert owner is not None  # `__init__` left out those without one
        return owner


def whole_of(
    inner: Mapping[str, torch.Tensor], kept: torch.Tensor | None, building: Building
) -> torch.Tensor:
    """Return the whole that `inner` are: the live one if they are its memory."""
    if kept is None or not is_wrapped(kept):
        return building.build(inner)
    live = pieces(kept, building.where)
    if live.keys() != inner.keys():
        return building.build(inner)
    if all(address(live[suffix]) == address(tensor) for suffix, tensor in inner.items()):
        return kept
    return rebuilt(kept, inner)
