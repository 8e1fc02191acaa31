"""Parts that other programs call otherwise: by the names that are common, where only one fits."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace

from dist_ckpt.foreign.dcp_runs import DcpRun
from dist_ckpt.foreign.names import MODELS
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.options import LoadOptions
from dist_ckpt.repository.source import Source

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
    if not isinstance(source, ForeignSource | DcpRun) or not isinstance(rename, Mapping | None):
        return options, []
    said = {name.partition("/")[0] for pair in (rename or {}).items() for name in pair}
    found: dict[str, str] = {}
    for part in live:
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
