"""What of a checkpoint goes where in a state, and everything that does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from dist_ckpt.loading.matching import Misfits, compare, unmatched
from dist_ckpt.loading.stored import Holdings, gather
from dist_ckpt.options import LoadOptions
from dist_ckpt.repository.source import Source
from dist_ckpt.state.part import Part, Stored
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.train_state import goes_by_name
from dist_ckpt.state.values import ValuePart


@dataclass(frozen=True, slots=True)
class Matched:
    """What of a checkpoint goes where: nothing live has been changed yet.

    Attributes:
        source: the checkpoint.
        holdings: what is to be loaded of it.
        targets: by part, where its tensors go.
        misfits: what does not fit.
        known: the names of both sides.
        notes: what else to know.
        first: the parts to restore before any tensor is filled.
    """

    source: Source
    holdings: Holdings
    targets: Mapping[str, Mapping[str, torch.Tensor]]
    misfits: Misfits
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
    held = gather(
        source,
        options,
        live=parts,
        rank=rank,
        world_size=world_size,
        by_name=[name for name, part in parts.items() if goes_by_name(part)],
    )
    missing: list[str] = []
    unexpected: list[str] = []
    unlike: list[str] = []
    compared: list[Misfits] = []
    targets: dict[str, Mapping[str, torch.Tensor]] = {}
    notes: list[str] = []
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
        notes += [] if found.note is None else [found.note]
        wanted = [f"{name}/{entry}" for entry in found.missing]
        known.update(wanted, (f"{name}/{entry}" for entry in found.tensors))
        missing += [entry for entry in wanted if options.selects(entry)]
        unexpected += [f"{name}/{entry}" for entry in found.unexpected]
        unlike += found.unlike
        compared.append(compare(name, found.tensors, stored.tensors, cast=options.cast))
        missing += compared[-1].missing
        targets[name] = {key: t for key, t in found.tensors.items() if key in stored.tensors}
        plain = not (found.tensors or found.missing or stored.tensors)
        (filled if targets[name] or plain else empty).extend([] if fits else [name])
    unexpected += [name for name in held.parts if name not in parts and options.selects_part(name)]
    misfits = Misfits(
        missing,
        unexpected,
        *_tensors_apart(compared),
        unmatched(options, known, held.idle),
        unlike,
        filled=filled,
        empty=empty,
    )
    first = [name for name in targets if _goes_first(parts[name], held.parts[name])]
    return Matched(source, held, targets, misfits, frozenset(known), notes, first)


def _tensors_apart(compared: Sequence[Misfits]) -> tuple[list[str], list[str], list[str]]:
    """Return what was found of shapes, of dtypes, and of casts."""
    return (
        [entry for each in compared for entry in each.shapes],
        [entry for each in compared for entry in each.dtypes],
        [entry for each in compared for entry in each.casts],
    )


def _goes_first(part: Part, stored: Stored) -> bool:
    return isinstance(part, ValuePart) and part.goes_first(stored)
