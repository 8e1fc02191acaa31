"""Files that hold an adapter and not the model under it, as PEFT writes them.

PEFT takes the name of the adapter out of the names it stores: `l.lora_A.default.weight` of the live
model is `l.lora_A.weight` in the file, and `l.modules_to_save.default.weight` is `l.weight`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.state.module_state import partners

_COPIES = "modules_to_save"
_BASE = "base_model.model."
_DORA = "lora_magnitude_vector"
_DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class AdapterFit:
    """What of a model is the stored adapter.

    Attributes:
        found: the stored name of each live one that has one.
        own: the live names that are of that adapter, with a partner or without.
    """

    found: dict[str, str]
    own: frozenset[str]


def fit_adapter(wanted: Collection[str], stored: Collection[str], part: str) -> AdapterFit:
    """Find the stored adapter among the `wanted` names of a model.

    Args:
        wanted: the live names.
        stored: those of the file.
        part: what the model is called, for messages.

    Raises:
        IncompatibleError: the model has several adapters that it may be, or none.
    """
    same = partners(wanted, stored, is_foreign=True)
    if len(same) == len(stored):  # as they are: nothing was taken out
        return AdapterFit(same, frozenset(same))
    # Without what PeftModel puts before all names: the live model may be the one inside of it.
    by_short = {name.removeprefix(_BASE): name for name in stored}
    fits: dict[str, AdapterFit] = {}
    for name in wanted:
        for adapter, short in _without_adapter(name.removeprefix(_BASE)):
            fit = fits.setdefault(adapter, AdapterFit({}, frozenset()))
            if short in by_short:
                fit.found[name] = by_short[short]
    most = max((len(fit.found) for fit in fits.values()), default=0)
    best = [adapter for adapter, fit in fits.items() if most and len(fit.found) == most]
    # What PEFT calls an adapter that was given no name.
    if len(best) > 1 and _DEFAULT in best:
        best = [_DEFAULT]
    if len(best) > 1:
        raise IncompatibleError(
            f"{part} has the adapters {', '.join(sorted(best))}, and the file does not say which "
            "one it is of: give rename= a function that puts the name of the adapter into the "
            "stored names",
            kind=ErrorKind.STATE_MISMATCH,
        )
    if not best and not same:
        raise IncompatibleError(
            f"{part}: the file has an adapter and nothing else, and no name of it is in this "
            "model: load it into the model that get_peft_model() returned for the same "
            "configuration, or give rename= what its names are here",
            kind=ErrorKind.STATE_MISMATCH,
        )
    if not best:
        return AdapterFit(same, frozenset(same))
    found = dict(fits[best[0]].found)
    left = set(stored) - set(found.values())
    found |= {name: other for name, other in same.items() if name not in found and other in left}
    own = {name for name in wanted if best[0] in name.split(".")}
    return AdapterFit(found, frozenset(own.union(found)))


def _without_adapter(name: str) -> Iterator[tuple[str, str]]:
    """Yield each component that may be an adapter, and the name that a file has without it."""
    components = name.split(".")
    for at in range(1, len(components)):
        before, after = components[:at], components[at + 1 :]
        if before[-1] == _COPIES:
            before.pop()
        # A parameter once and a layer now: PEFT still stores it by its old name, without `weight`.
        elif before[-1] == _DORA:
            yield components[at], ".".join(before)
        yield components[at], ".".join([*before, *after])
