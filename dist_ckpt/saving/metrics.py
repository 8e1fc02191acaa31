"""Metrics as callers give them: numbers, tensors on any device, different on each rank."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from typing import SupportsFloat, TypeAlias

import torch

from dist_ckpt import events
from dist_ckpt.errors import UsageError, describe
from dist_ckpt.saving.messages import Report

Metrics: TypeAlias = Mapping[str, SupportsFloat]
"""Numbers by name: floats, integers, numpy scalars, tensors of one element on any device."""

_log = logging.getLogger("dist_ckpt")


def as_given(metrics: Metrics | None) -> Metrics:
    """Return what was given as `metrics`, none for None.

    Raises:
        UsageError: they are not by name.
    """
    if metrics is None:
        return {}
    given: object = metrics
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise UsageError(f"metrics are a dict of numbers by name, not a {kind}")
    return metrics


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Return `metrics` as floats; of a tensor its one element, wherever it is.

    Raises:
        UsageError: a name that is no text, or a value that is not one number.
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if not isinstance(name, str):
            raise UsageError(f"metric {name!r} must be named by text, not {type(name).__name__}")
        try:
            # A loss is given as it is: torch warns of numbers taken from what has a gradient.
            numbers[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except Exception as error:  # a foreign __float__ may do anything
            raise UsageError(
                f"metric {name!r} is {type(value).__name__}, not a number ({describe(error)})"
            ) from error
    return numbers


def tell_differing(url: str, step: int, reports: Sequence[Report], told: set[str]) -> None:
    """Rank 0: say which metrics other ranks gave another value for; that of rank 0 is stored.

    Args:
        url: where the run is.
        step: what is saved.
        reports: of each rank.
        told: names that were told of before, and now: what differs does so at every save.
    """
    first = reports[0].metrics
    for rank, report in enumerate(reports):
        for name, value in report.metrics.items():
            same = name in first and _same(value, first[name])
            if same or name in told:
                continue
            told.add(name)
            stored = first.get(name)
            events.emit(events.MetricsDiffer(url, step, 0, name, stored, rank, value))
            _log.warning(
                "metric %r differs between ranks at step %d (rank 0: %s, rank %d: %s): that of "
                "rank 0 counts; average it over the ranks, or give it on rank 0 only",
                name,
                step,
                "not given" if stored is None else stored,
                rank,
                value,
            )


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))
