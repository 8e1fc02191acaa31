"""Which run and which step a command means: `URL`, `URL@STEP`, `URL@latest`, `URL@best`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.errors import ErrorKind, NotFound, UsageError

if TYPE_CHECKING:
    from dist_ckpt.repository.ranking import Criterion
    from dist_ckpt.run import Run

_AT = re.compile(r"(?P<url>.*)@(?P<which>\d+|latest|newest|best)", re.DOTALL)

Url = Annotated[
    str, typer.Argument(metavar="URL", envvar="DIST_CKPT_URL", help="the run: a path or a URL")
]
Place = Annotated[
    str,
    typer.Argument(
        metavar="URL[@STEP]",
        envvar="DIST_CKPT_URL",
        help="a checkpoint: of a step, @latest (without any) or @best",
    ),
]
Options = Annotated[
    list[str] | None,
    typer.Option("--storage-option", metavar="K=V", help="an option of the storage; repeatable"),
]
Metric = Annotated[
    str | None,
    typer.Option(
        "--metric",
        metavar="NAME[:max]",
        help="what @best is chosen by; by default what the run keeps the best by",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="print JSON")]


def open_run(url: str, options: Sequence[str] | None) -> Run:
    """Return the run at `url`."""
    # Imported by this very use: most of the time that a command takes to start.
    return dist_ckpt.Run(url, storage_options=storage_options(options))


def storage_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Return what `--storage-option` said: numbers, true and false as such, the rest as text."""
    found: dict[str, Any] = {}
    for each in given or ():
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise UsageError(f"--storage-option takes KEY=VALUE, not {each!r}")
        kinds: dict[str, Any] = {"true": True, "false": False}
        found[key] = kinds.get(value.lower(), int(value) if value.isdecimal() else value)
    return found


def split(place: str) -> tuple[str, str]:
    """Return the url of a place, and which checkpoint of it: "latest" where it does not say."""
    found = _AT.fullmatch(place)
    return (found["url"], found["which"]) if found else (place, "latest")


def criterion(metric: str | None) -> Criterion:
    """Return what `--metric` says.

    Raises:
        UsageError: it was not given.
    """
    if not metric:
        raise UsageError("say by which metric the best is chosen: --metric val/loss, or f1:max")
    # Imported by this very use, as the run is.
    parsed: Criterion = import_module("dist_ckpt.repository.ranking").Criterion.parse(metric)
    return parsed


def open_step(place: str, options: Sequence[str] | None, metric: str | None) -> tuple[Run, int]:
    """Return the run and the step that `place` means.

    Raises:
        NotFound: there is none.
    """
    url, which = split(place)
    run = open_run(url, options)
    if which.isdecimal():
        return run, int(which)
    return run, find_named(run, which, metric)


def find_named(run: Run, which: str, metric: str | None) -> int:
    """Return the latest or the best step of a run.

    Without a metric the best by the first one that the run itself keeps it by.
    """
    if which == "best":
        known = [] if metric else run.criteria()
        wanted = known[0] if known else criterion(metric)
        step = run.best(wanted.metric, wanted.mode)
        if step is None:
            raise NotFound(
                f"no checkpoint in {run.url} has the metric {wanted.metric!r}",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        return step
    step = run.latest()
    if step is None:
        run.listed()  # which says what is there instead, if that is nothing
        raise NotFound(f"no committed checkpoint in {run.url}", kind=ErrorKind.NO_CHECKPOINT)
    return step
