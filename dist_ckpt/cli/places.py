"""Which run and which step a command means: `URL`, `URL@STEP`, `URL@latest`, `URL@best`."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.errors import UsageError

if TYPE_CHECKING:
    from dist_ckpt.repository.ranking import Criterion
    from dist_ckpt.run import Run

# The last @ counts, and only before a step: one in a folder or a user name is part of the URL.
_AT = re.compile(r"(?P<url>.*)@(?P<which>[0-9]+|latest|newest|best)/*", re.DOTALL)

_ENVIRONMENT = "DIST_CKPT_URL"

Url = Annotated[
    str, typer.Argument(metavar="URL", envvar=_ENVIRONMENT, help="the run: a path or a URL")
]
Place = Annotated[
    str,
    typer.Argument(
        metavar="URL[@STEP]",
        envvar=_ENVIRONMENT,
        help="a checkpoint: of a step, @latest (without any) or @best",
    ),
]
# Of a command that must be given more than a place; see `or_environment`.
FirstUrl = Annotated[
    str,
    typer.Argument(
        metavar="URL", help=f"the run: a path or a URL; without it that of {_ENVIRONMENT}"
    ),
]
FirstPlace = Annotated[
    str,
    typer.Argument(
        metavar="URL[@STEP]",
        help="a checkpoint: of a step, @latest (without any) or @best; without it that of "
        f"{_ENVIRONMENT}",
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


def open_whole(url: str, options: Sequence[str] | None) -> Run:
    """Return the run of a command that is about all of it.

    Raises:
        UsageError: it says which checkpoint, and nothing is called so.
    """
    run, which = split(url)
    whole = open_run(url, options)
    # A folder may be called so, and an `@` with a number be part of its name.
    if run != url and not whole.store.list_children():
        raise UsageError(f"{url}: this is about a whole run: give {run}, not @{which}")
    return whole


def storage_options(given: Sequence[str] | None) -> dict[str, Any]:
    """Return what `--storage-option` said: numbers, true and false as such, the rest as text."""
    found: dict[str, Any] = {}
    for each in given or ():
        key, equals, value = each.partition("=")
        if not equals or not key:
            raise UsageError(f"--storage-option takes KEY=VALUE, not {each!r}")
        kinds: dict[str, Any] = {"true": True, "false": False}
        found[key] = kinds.get(value.lower(), int(value) if is_number(value) else value)
    return found


def or_environment(first: str, second: str | None, what: str) -> tuple[str, str]:
    """Return the place of a command, and what it must be given besides.

    Args:
        first: the first argument: the place, or what comes after it where that is all there is.
        second: the second one.
        what: what comes after the place, for the message.

    Raises:
        UsageError: one argument was given, and the environment names no place.
    """
    if second is not None:
        return first, second
    place = os.environ.get(_ENVIRONMENT)
    if not place:
        raise UsageError(
            f"only {first!r} was given: give the place and {what}, or {what} alone where "
            f"{_ENVIRONMENT} names the place"
        )
    return place, first


def is_number(text: str) -> bool:
    """Whether a text is a number: digits of other scripts than 0 to 9 are letters."""
    return text.isascii() and text.isdecimal()


def share_options(options: Sequence[str] | None, *named: str) -> list[Sequence[str] | None]:
    """Return for each of the places of a command the options that go to it: a path takes none.

    Raises:
        UsageError: they go to none, or are malformed.
    """
    if not options:
        return [None] * len(named)
    # Imported by this very use, as the run is.
    resolving: Any = import_module("dist_ckpt.storage.resolve")
    given = storage_options(options)
    resolving.check_options_taken(given, *named)
    taken = [resolving.options_for(each, given) is not None for each in named]
    return [options if each else None for each in taken]


def split(place: str) -> tuple[str, str]:
    """Return the url of a place, and which checkpoint of it: "latest" where it does not say."""
    found = _AT.fullmatch(place)
    if found is None:
        return place, "latest"
    return found["url"], "latest" if found["which"] == "newest" else found["which"]


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


def open_every(place: str, options: Sequence[str] | None, metric: str | None) -> Run:
    """Return the run that `--all` means.

    Raises:
        UsageError: it says which checkpoint, too.
    """
    if metric is not None or split(place)[0] != place:
        raise UsageError(f"--all is every checkpoint of a run: give {split(place)[0]} alone")
    return open_run(place, options)


def open_target(url: str, options: Sequence[str] | None) -> Run:
    """Return the run that is copied into, or that something new goes into.

    Raises:
        UsageError: it says which checkpoint: a folder of that name could never be named; or no run
            may be there.
    """
    run, which = split(url)
    if run != url:
        raise UsageError(f"{url}: a checkpoint keeps its step: give the run, {run}, not @{which}")
    target = open_run(url, options)
    # Imported by this very use, as the run is.
    destination: Any = import_module("dist_ckpt.repository.destination")
    destination.check_new_run(target.store, storage_options(options))
    return target


def check_picture(path: str) -> None:
    """Check that a file may be written under `path`: not among the files of a run.

    Raises:
        UsageError: it may not.
    """
    destination: Any = import_module("dist_ckpt.repository.destination")
    folder = dist_ckpt.Run(os.path.dirname(os.path.abspath(path))).store
    destination.check_new_files(folder, named=True)


def check_metric(metric: str | None, *named: str) -> None:
    """Check that a metric was given where one of the places is @best, which it is for.

    Raises:
        UsageError: it would be passed over.
    """
    # One of several is enough: of the two places of diff either may be @best.
    if metric is not None and all(split(each)[1] != "best" for each in named):
        raise UsageError(f"--metric says which one @best is, and it is not in {' '.join(named)}")


def opened_at(
    place: str, options: Sequence[str] | None, metric: str | None
) -> tuple[str, int | None]:
    """Return what is to be opened and which step of it, None where it is no run of ours.

    Raises:
        NotFound: there is no best one.
        CheckpointError: none that is there can be read.
    """
    url, which = split(place)
    # Without a look: whoever opens it says what is there instead.
    if which.isdecimal():
        return url, int(which)
    run = open_run(url, options)
    if which == "best":
        return url, find_named(run, which, metric)
    try:
        return url, run.latest()
    except UsageError:
        return url, None  # a file of others, perhaps: whoever opens it says what it is


def open_step(place: str, options: Sequence[str] | None, metric: str | None) -> tuple[Run, int]:
    """Return the run and the step that `place` means.

    Raises:
        NotFound: there is none.
        UsageError: a metric was given, and it is not the best that is meant.
    """
    check_metric(metric, place)
    return find_step(place, options, metric)


def find_step(place: str, options: Sequence[str] | None, metric: str | None) -> tuple[Run, int]:
    """Return the run and the step that one of several places means; see `open_step`."""
    url, which = split(place)
    run = open_run(url, options)
    if which.isdecimal():
        return run, int(which)
    return run, find_named(run, which, metric)


def find_named(run: Run, which: str, metric: str | None) -> int:
    """Return the latest or the best step of a run.

    Without a metric the best by the first one that the run itself keeps it by.

    Raises:
        NotFound: there is none.
        CheckpointError: none that is there can be read.
    """
    if which != "best":
        return run.newest().step
    # What the run keeps its best by is the best that is meant.
    known = [] if metric else run.criteria()
    wanted = known[0] if known else criterion(metric)
    records = run.records()
    if not records:
        run.newest()  # which says why there is none
    ranking: Any = import_module("dist_ckpt.repository.ranking")
    best: int = ranking.best_among(records, wanted, where=run.url).step
    return best
