"""Names under which a state may look for what is stored otherwise.

Parts that other programs call by another common name, where only one fits; and the entries of a
dict that was saved as one value.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from dist_ckpt.foreign.dcp_runs import DcpRun
from dist_ckpt.foreign.names import MODELS
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.options import LoadOptions
from dist_ckpt.repository.source import Source
from dist_ckpt.state.decoding import parse_document
from dist_ckpt.state.encoding import TAG, dumps, is_wrapped_node
from dist_ckpt.state.module_state import wrapper_prefix

ALIKE = (
    MODELS,
    (
        *("optimizer", "optim", "opt", "optimizers", "optimizer_state_dict", "optimizer_state"),
        *("optim_state_dict", "optimizer_states", "optimizer_0", "last_optimizer_state"),
    ),
    (
        *("scheduler", "lr_scheduler", "lr_schedulers", "scheduler_state_dict", "schedulers"),
        *("lr_scheduler_state_dict", "lr_sched", "sched", "opt_param_scheduler"),
    ),
    ("scaler", "grad_scaler", "scaler_state_dict", "amp_scaler"),
    ("ema", "model_ema", "ema_model", "ema_state_dict", "state_dict_ema", "ema_model_state_dict"),
    ("step", "global_step", "iteration"),
    ("epoch", "current_epoch"),
)
"""Names of one thing, the one that it has here first."""


def alike(part: str) -> tuple[str, ...]:
    """Return the names that programs give what is called `part` here; nothing of other parts."""
    return next((names for names in ALIKE if part in names), ())


def called_alike(
    source: Source, options: LoadOptions, live: Collection[str]
) -> tuple[LoadOptions, list[str]]:
    """Return options that also rename parts of `source` to those of the state that they must be.

    Only what another program wrote, or the Writer of stock state dicts: the parts of a state have
    the names that the state gave them. What the program renames itself is left to it.

    Args:
        source: the checkpoint.
        options: what the program asked for.
        live: the parts of the state.

    Returns:
        The options, and a line for the report on each part that was found so.
    """
    rename = options.rename
    # Which names a function is going to give cannot be asked, so nothing is guessed beside one.
    if not isinstance(source, ForeignSource | DcpRun) or not isinstance(rename, Mapping | None):
        return options, []
    said = {name.partition("/")[0] for pair in (rename or {}).items() for name in pair}
    found: dict[str, str] = {}
    for part in live:
        # Never instead of a name that is there (docs/design/007).
        if part in source.parts or part in said or not options.selects_part(part):
            continue
        group = alike(part)
        others = [name for name in source.parts if name in group and name not in (*live, *said)]
        # Of two nobody knows which one is meant.
        if len(others) == 1 and others[0] not in found:
            found[others[0]] = part
    if not found:
        return options, []
    notes = [f"{part} is called {name!r} in the checkpoint" for name, part in found.items()]
    return replace(options, rename={**(rename or {}), **found}), notes


# A dict that was saved as one value, seen as the named entries that it has.


@dataclass(frozen=True, slots=True)
class Entries:
    """The entries of a dict, by their keys joined with dots, without the prefix of a wrapper.

    Attributes:
        tensors: one or more for a tensor, by the name under which that is stored.
        objects: everything else, encoded.
    """

    tensors: dict[str, list[str]] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)


def entries_of(data: bytes, *, path: str) -> Entries | None:
    """Return the entries of the encoded dict `data`; None if it is no dict of strings.

    Raises:
        IntegrityError: `data` is no encoding.
    """
    pairs = _pairs(parse_document(data, path))
    if pairs is None:
        return None
    found = Entries()
    walked = list(_walk(pairs, ()))
    # Of the wrapper in which it was saved (`module.` of DDP), which no name here begins with.
    prefix = wrapper_prefix([name for name, _ in walked])
    for full, node in walked:
        name = full.removeprefix(prefix)
        if _is_tensor(node):
            found.tensors.setdefault(node["v"], []).append(name)
        else:
            found.objects[name] = dumps(node).encode()
    return found


def _walk(pairs: list[tuple[str, Any]], steps: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
    for key, node in pairs:
        if is_wrapped_node(node):
            # A live one is filled by the tensors that it is made of, and needs nothing else.
            for suffix, inner in node["v"][1].items():
                yield ".".join((*steps, key)) + suffix, inner
            continue
        below = None if _is_tensor(node) else _pairs(node)
        # An empty dict is an entry by itself, or nothing would be left of it.
        if below:
            yield from _walk(below, (*steps, key))
        else:
            yield ".".join((*steps, key)), node


def _pairs(node: Any) -> list[tuple[str, Any]] | None:
    """Return the items of an encoded dict whose keys are strings."""
    if not isinstance(node, dict):
        return None
    if TAG not in node:
        return list(node.items())
    pairs = node.get("v")
    if node[TAG] not in ("dict", "ordered_dict") or not isinstance(pairs, list):
        return None
    if not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        return None
    return [(key, value) for key, value in pairs] if _are_strings(pairs) else None


def _are_strings(pairs: list[Any]) -> bool:
    return all(isinstance(pair[0], str) for pair in pairs)


def _is_tensor(node: Any) -> bool:
    return isinstance(node, dict) and node.get(TAG) == "tensor" and isinstance(node.get("v"), str)
