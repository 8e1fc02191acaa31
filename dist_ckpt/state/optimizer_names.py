"""The state of an optimizer that was stored under other names than the live one has for it.

torch's `optimizer.state_dict()` numbers parameters in the order of the groups, and whoever loads it
goes by that order. Names may have what a wrapper put into them. And several optimizers may have
been saved where there is one now, or the other way round.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.state.decoding import decode, parse_document, references
from dist_ckpt.state.encoding import dumps, encode
from dist_ckpt.state.module_state import partners
from dist_ckpt.state.optimizer_content import MADE, STATE, View, group_name, is_group_name
from dist_ckpt.state.part import Stored
from dist_ckpt.state.rebuilding import Building
from dist_ckpt.state.value_fit import VALUE

BESIDE = "beside."
_PARAMS, _NAMES = "params", "param_names"
_SHOWN = 3


@dataclass(frozen=True)
class Renamed:
    """What is stored, under the names of the live optimizer.

    Attributes:
        stored: with those names.
        back: by such a name the stored one, where it is another.
    """

    stored: Stored
    back: Mapping[str, str] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """All names, of tensors and of objects."""
        return (*self.stored.tensors, *self.stored.objects)

    def then(self, rename: Callable[[Stored], Renamed]) -> Renamed:
        """Return what `rename` makes of this, with the way back to the checkpoint."""
        new = rename(self.stored)
        back = {name: self.back.get(old, old) for name, old in new.back.items()}
        # What it leaves alone keeps the name that it has got here.
        kept = {name: old for name, old in self.back.items() if name in new.names}
        return Renamed(new.stored, {**kept, **back})


def forward(tensors: Mapping[str, Any], back: Mapping[str, str]) -> dict[str, Any]:
    """Return what has stored names under those that `back` leads back from."""
    new = {old: name for name, old in back.items()}
    return {new.get(name, name): tensor for name, tensor in tensors.items()}


def in_live_names(view: View, stored: Stored, part: str) -> Renamed:
    """Return what is stored of one optimizer under the names of the parameters of `view`.

    Raises:
        IntegrityError: a stored group is malformed.
        IncompatibleError: its parameters have numbers, and these fit the live ones not at all or
            not in one way only.
    """
    groups = {n: parse_document(d, n) for n, d in stored.objects.items() if view.is_group(n)}
    if not all(map(_is_group, groups.values())):
        return Renamed(stored)  # whoever reads the group says what is wrong
    listed = [each for group in groups.values() for each in group[_PARAMS]]
    if any(type(each) is int for each in listed):
        owners = _by_numbers(view, stored, groups, part)
    else:
        found = partners(list(view.parameters), listed, is_foreign=stored.is_foreign)
        owners = {other: name for name, other in found.items()}
        if all(other == name for other, name in owners.items()):
            return Renamed(stored)
    return _renamed(stored, view.prefix, groups, owners)


def neighbours(stored: Stored) -> set[str]:
    """Return the places of several optimizers in their list or dict; none where there is one."""
    names = (*stored.tensors, *stored.objects)
    return {name.split(".", 2)[1] for name in names if name.startswith(BESIDE)}


def without_neighbours(stored: Stored) -> Renamed:
    """Return what is stored of several optimizers as that of one, where no two names meet."""
    back: dict[str, str] = {}
    for name in (*stored.tensors, *stored.objects):
        new = name
        if name.startswith(BESIDE):
            new = name.split(".", 2)[-1]
        # Two optimizers have it: as one, the second would silently take the place of the first.
        if new in back:
            return Renamed(stored)
        back[new] = name
    inside = _inside(stored)
    back = {new: old for new, old in back.items() if new != old and old not in inside}
    return Renamed(_with_names(stored, back, {}), back)


def taken_apart(stored: Stored) -> Renamed:
    """Return the one value that `optimizer.state_dict()` was stored as, by its entries.

    As it is where a tensor lies anywhere but directly in the state of a parameter.
    """
    # Nothing is read yet: where a tensor lies in the value is told by the identity of these.
    blank = {name: torch.empty(0) for name in stored.tensors}
    value = decode(stored.objects[VALUE], tensors=blank, path=VALUE)
    name_of = {id(tensor): name for name, tensor in blank.items()}
    back: dict[str, str] = {}
    objects: dict[str, object] = {}
    for owner, entry in value["state"].items():
        for key, each in entry.items() if isinstance(entry, dict) else ():
            name = f"{STATE}{owner}.{key}"
            if id(each) in name_of:
                back[name] = name_of[id(each)]
            else:
                objects[name] = each
    for i, group in enumerate(value["param_groups"]):
        objects[group_name(i, list(map(str, group[_PARAMS])))] = group
    inside: dict[str, torch.Tensor] = {}
    documents = {name: encode(each, path=name, tensors=inside) for name, each in objects.items()}
    if inside or len(back) != len(name_of):
        return Renamed(stored)
    tensors = {name: stored.tensors[old] for name, old in back.items()}
    back |= dict.fromkeys(documents, VALUE)
    return Renamed(replace(stored, tensors=tensors, objects=documents), back)


def one_group_each(stored: Stored) -> Renamed:
    """Return what is stored with a group for each parameter, where each is stepped by its own."""
    back: dict[str, str] = {}
    documents: dict[str, bytes] = {}
    for name, data in stored.objects.items():
        group = parse_document(data, name) if is_group_name(name) else None
        if group is None or not _is_group(group) or len(group[_PARAMS]) < 2:
            continue
        for parameter in group[_PARAMS]:
            if type(parameter) is int:
                return Renamed(stored)  # which is whose its numbers do not say
            new = group_name(0, [parameter])
            documents[new] = dumps({**group, _PARAMS: [parameter]}).encode()
            back[new] = name
    return Renamed(_with_names(stored, back, documents), back)


def shared_out(stored: Stored, views: Sequence[View], part: str) -> Renamed:
    """Return what is stored of one optimizer as that of several, each with its parameters.

    Args:
        stored: without the prefixes of several.
        views: the live ones.
        part: what they are called, for messages.

    Raises:
        IncompatibleError: its parameters have numbers, which do not tell whose they are.
    """
    groups = {n: parse_document(d, n) for n, d in stored.objects.items() if is_group_name(n)}
    if not all(map(_is_group, groups.values())):
        return Renamed(stored)
    listed = [each for group in groups.values() for each in group[_PARAMS]]
    if any(type(each) is int for each in listed) and len(views) > 1:
        raise _refused(part, f"of one optimizer, and there are {len(views)} now")
    holder = {name: view.prefix for view in views for name in view.parameters}
    if len(views) == 1:
        # All goes to the only one there is, which looks at numbers and at other names itself.
        holder = dict.fromkeys(map(str, listed), views[0].prefix)
    else:
        found = partners(list(holder), listed, is_foreign=stored.is_foreign)
        holder = {other: holder[name] for name, other in found.items()}
    back: dict[str, str] = {}
    inside = _inside(stored)
    owner_of = _owner(set(map(str, listed)))
    for name in (*stored.tensors, *stored.objects):
        owner = owner_of(name)
        if owner is not None and owner in holder and name not in inside:
            back[holder[owner] + name] = name
    documents: dict[str, bytes] = {}
    for i, (name, group) in enumerate(groups.items()):
        for prefix in dict.fromkeys(holder.values()):
            # Options are those of the group: each that steps a piece of it gets all of them.
            mine = [each for each in group[_PARAMS] if holder.get(str(each)) == prefix]
            if mine:
                new = prefix + group_name(i, [str(each) for each in mine])
                documents[new] = dumps({**group, _PARAMS: mine}).encode()
                back[new] = name
    return Renamed(_with_names(stored, back, documents), back)


def _by_numbers(
    view: View, stored: Stored, groups: Mapping[str, dict[str, Any]], part: str
) -> dict[str, str]:
    """Return the live parameter of each number, as text, that `groups` have."""
    numbers = [each for group in groups.values() for each in group[_PARAMS]]
    # Before they are put in order: Python has none of numbers and texts.
    if not all(type(each) is int for each in numbers) or len(set(numbers)) != len(numbers):
        raise _refused(part, "with a number that is there twice, or beside names")
    # torch numbers through the groups, so numbers say in which order these were; names do not.
    ordered = sorted(groups.values(), key=lambda group: min(group[_PARAMS], default=math.inf))
    numbers = [each for group in ordered for each in group[_PARAMS]]
    sizes = [len(group[_PARAMS]) for group in ordered]
    live = [size for size in view.sizes if size]
    if [size for size in sizes if size] != live:
        raise _refused(part, f"in groups of {sizes}, and the live ones have {view.sizes}")
    # Names hold in whatever order the program lists its parameters, numbers in one only.
    named = _by_noted_names(view, ordered, numbers)
    owners = named or dict(zip(map(str, numbers), view.parameters, strict=True))
    wrong = list(_contradictions(view, stored, owners, _made(groups.values())))
    if wrong:
        rest = f" and {len(wrong) - _SHOWN} more" if len(wrong) > _SHOWN else ""
        raise _refused(
            part, f"in another order than the live ones have: {', '.join(wrong[:_SHOWN])}{rest}"
        )
    return owners


def _by_noted_names(
    view: View, groups: Sequence[Mapping[str, Any]], numbers: Sequence[int]
) -> dict[str, str]:
    """Return the parameters by the names that torch notes beside numbers; empty without them."""
    names = [name for group in groups for name in group.get(_NAMES) or ()]
    if len(names) != len(numbers) or not all(isinstance(name, str) for name in names):
        return {}
    # Noted by the program that saved, so with what its wrappers put into names.
    pairs = partners(list(view.parameters), names, is_foreign=True)
    found = {other: name for name, other in pairs.items()}
    # All or none: of some by name and the rest by number nobody could tell which are meant.
    if found.keys() != set(names):
        return {}
    return {str(number): found[name] for number, name in zip(numbers, names, strict=True)}


def _contradictions(
    view: View, stored: Stored, owners: Mapping[str, str], made: Mapping[str, Mapping[str, Any]]
) -> Iterator[str]:
    """Yield the parameters whose stored state cannot be theirs, by its shapes.

    One is enough that fits: optimizers keep statistics of blocks, rows and columns as well. Of what
    is several tensors behind one face (`made`) the whole counts.
    """
    shapes: dict[str, list[tuple[int, ...]]] = {}
    owner_of, inside = _owner(owners.keys()), _inside(stored) | _behind(made).keys()
    named = {name: spec.shape for name, spec in stored.tensors.items() if name not in inside}
    named |= {name: tuple(noted["shape"]) for name, noted in made.items()}
    for name, shape in named.items():
        owner = owner_of(name.removeprefix(view.prefix)) if name.startswith(view.prefix) else None
        # A single element, such as a counter of steps, stands beside a parameter of any shape.
        if owner is not None and math.prod(shape) > 1:
            shapes.setdefault(owner, []).append(shape)
    elements = sum(each.numel() for each in view.parameters.values())
    for owner, kept in shapes.items():
        wanted = tuple(view.parameters[owners[owner]].shape)
        # One that flattens all of them keeps its state under the first.
        if not any(_fits(shape, wanted) or shape == (elements,) for shape in kept):
            live = f"{owners[owner]} is {list(wanted)}"
            yield f"number {owner} has state of shape {list(kept[0])}, {live}"


def _fits(shape: tuple[int, ...], wanted: tuple[int, ...]) -> bool:
    # Adafactor keeps its means of rows and columns with one element in the dimension summed over.
    return len(shape) == len(wanted) and all(
        size in (1, extent) for size, extent in zip(shape, wanted, strict=True)
    )


def _renamed(
    stored: Stored,
    prefix: str,
    groups: Mapping[str, dict[str, Any]],
    owners: Mapping[str, str],
) -> Renamed:
    """Return `stored` with the owners that `owners` leads to."""
    back: dict[str, str] = {}
    owner_of, inside = _owner(owners.keys()), _inside(stored)
    for name in (*stored.tensors, *stored.objects):
        if not name.startswith(prefix) or name in inside:
            continue
        owner = owner_of(name.removeprefix(prefix))
        if owner is not None:
            key = name.removeprefix(f"{prefix}{STATE}{owner}.")
            new = f"{prefix}{STATE}{owners[owner]}.{key}"
            if new != name:
                back[new] = name
    documents: dict[str, bytes] = {}
    for i, (name, group) in enumerate(groups.items()):
        listed = [owners.get(str(each), str(each)) for each in group[_PARAMS]]
        # An empty group has nothing but its place to be known by, and that is in its name.
        new = prefix + group_name(i, listed) if listed else name
        documents[new] = dumps({**group, _PARAMS: listed}).encode()
        back[new] = name
    return Renamed(_with_names(stored, back, documents), back)


def _with_names(stored: Stored, back: Mapping[str, str], documents: Mapping[str, bytes]) -> Stored:
    """Return `stored` under new names, with other documents for some of these."""
    gone = set(back.values())
    tensors = {name: spec for name, spec in stored.tensors.items() if name not in gone}
    objects = {name: data for name, data in stored.objects.items() if name not in gone}
    for new, old in back.items():
        if old in stored.tensors:
            tensors[new] = stored.tensors[old]
        else:
            objects[new] = documents.get(new, stored.objects[old])
    new_of = {old: new for new, old in back.items()}
    for name, data in objects.items():
        # Parsed only where the word occurs: hardly any checkpoint has such a note.
        if MADE.encode() in data:
            objects[name] = _made_renamed(data, name, new_of)
    return replace(stored, tensors=tensors, objects=objects)


def _made(groups: Iterable[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Return what parsed groups note of the tensors that are several behind one face."""
    found: dict[str, Mapping[str, Any]] = {}
    for group in groups:
        made = group.get(MADE)
        found |= made if isinstance(made, dict) else {}
    return found


def _behind(made: Mapping[str, Mapping[str, Any]]) -> dict[str, tuple[str, str]]:
    """Return the names of the tensors behind the faces, each with the face and what is added.

    Raises:
        IntegrityError: a note is malformed.
    """
    return {
        whole + suffix: (whole, suffix)
        for whole, noted in made.items()
        for suffix in Building(noted, whole).suffixes()
    }


def _made_renamed(data: bytes, name: str, new_of: Mapping[str, str]) -> bytes:
    """Return an encoded group whose notes of faces go by the new names."""
    group = parse_document(data, name)
    made = _made([group]) if isinstance(group, dict) else {}
    if not made:
        return data
    renamed: dict[str, Mapping[str, Any]] = {}
    for inner, (whole, suffix) in _behind(made).items():
        renamed[new_of.get(inner, inner).removesuffix(suffix)] = made[whole]
    return dumps({**group, MADE: renamed}).encode()


def _owner(owners: Iterable[str]) -> Callable[[str], str | None]:
    """Return what finds the parameter that a name without prefix is of, among `owners`."""
    known = set(owners)

    def find(name: str) -> str | None:
        if not name.startswith(STATE):
            return None
        rest = name.removeprefix(STATE)
        # Parameters have dots in their names and keys may have some: of the owners the longest.
        cut = rest.rfind(".")
        while cut > 0:
            if rest[:cut] in known:
                return rest[:cut]
            cut = rest.rfind(".", 0, cut)
        return None

    return find


def _inside(stored: Stored) -> set[str]:
    """Return the tensors that are in some value: these go by the name that the value has."""
    return {name for data in stored.objects.values() for name in references(data)}


def _is_group(value: object) -> bool:
    listed = value.get(_PARAMS) if isinstance(value, dict) else None
    return isinstance(listed, list) and all(type(each) in (int, str) for each in listed)


def _refused(part: str, what: str) -> IncompatibleError:
    return IncompatibleError(
        f"{part} is there as what state_dict() of an optimizer returned, which numbers its "
        f"parameters, {what}: nobody can tell which are meant. Build the optimizer on the "
        "parameters, in the groups and in the order in which it was saved, or "
        f"{how_to_skip(part)}",
        kind=ErrorKind.STATE_MISMATCH,
    )


def how_to_skip(part: str) -> str:
    """Return what to do about a state of an optimizer that is there in another form."""
    return (
        f"skip=[{part!r}] loads all the rest, and open_checkpoint(...) reads this as it is "
        f"(read_values({part!r}), and tensors by their names)"
    )
