"""Commands that look: ls, show, tensors, latest, best."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_ckpt.cli import places
from dist_ckpt.cli.output import age, clear, finite, say, say_json, show_number, size, table
from dist_ckpt.cli.places import Json, Metric, Options, Place, Url
from dist_ckpt.cli.watching import Every, Watch, repeat
from dist_ckpt.errors import NotFound, UsageError, near

if TYPE_CHECKING:
    from dist_ckpt.repository.listed import Listed
    from dist_ckpt.run import Run

Points = list[tuple[int, float]]
"""Steps, ascending, each with a value."""

_SORTS = ("step", "age", "size")
# A number between dots or at an end: that of `h.0.weight`, and neither of `conv1` nor `l2`.
_LAYER = re.compile(r"(?<![^.])[0-9]+(?![^.])")


def add_looking(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_ls, _show, _tensors, _latest, _best):
        app.command(command.__name__[1:])(command)


def _ls(
    url: Url,
    *,
    sort: Annotated[str, typer.Option(metavar="step|age|size", help="order of the rows")] = "step",
    watch: Watch = False,
    every: Every = 10.0,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """List the checkpoints of a run, or the runs below a place.

    Example: dist-ckpt ls s3://bucket/runs/17
    """
    if sort not in _SORTS:
        raise UsageError(f"--sort is one of {', '.join(_SORTS)}, not {sort!r}")
    run = places.open_whole(url, storage_option)
    repeat(partial(_list, run, sort, json=json, lines=watch), watch=watch, every=every)


def _list(run: Run, sort: str, *, json: bool, lines: bool) -> None:
    """Print what is there, in a terminal that is looked at again in the place of the last look."""
    job = run.status()
    try:
        rows = run.listed()
    except NotFound:
        # No run: but perhaps the folder of all of them.
        below = run.runs_below()
        if not below and job is None:
            raise
        if below and json:
            say_json({"url": run.url, "runs": below}, lines=lines)
            return
        for each in below:
            say(each)
        if below:
            return
        rows = []  # of a job that has not saved yet
    keys: dict[str, Any] = {
        "step": lambda each: each.step,
        # One without a time comes last: nobody knows how old it is.
        "age": lambda each: -each.created.timestamp() if each.created else 0,
        "size": lambda each: each.nbytes or 0,
    }
    rows.sort(key=keys[sort])
    if json:
        listed = [_as_json(each) for each in rows]
        found = {"url": run.url, "checkpoints": listed, "job": job and job.as_json()}
        say_json(found, lines=lines)
        return
    # When all is read: the screen is not empty while a slow storage answers.
    if lines:
        clear()
    _print_rows(rows)
    if job is not None:
        say(f"job: {job.in_words()}")


def _show(
    place: Place, *, metric: Metric = None, storage_option: Options = None, json: Json = False
) -> None:
    """Show what the manifest of a checkpoint says.

    Example: dist-ckpt show runs/17@latest
    """
    run, step = places.open_step(place, storage_option, metric)
    found, job = run.manifest(step), run.status()
    slowest = max(
        found.timings.items(),
        key=lambda item: item[1].stage_seconds + item[1].write_seconds,
        default=None,
    )
    facts: dict[str, Any] = {
        "url": run.url,
        "step": found.step,
        "epoch": found.epoch,
        "created": found.created,
        "save_id": found.save_id,
        "format": found.format,
        "nbytes": found.nbytes,
        "world_size": found.world_size,
        "parts": list(found.parts),
        "metrics": dict(found.metrics),
        "metadata": dict(found.metadata),
        "parent_step": found.parent_step,
        "versions": dict(found.versions),
        "origin": dict(found.origin),
        "timings": {
            rank: {"stage_seconds": each.stage_seconds, "write_seconds": each.write_seconds}
            for rank, each in found.timings.items()
        },
        "slowest_rank": None if slowest is None else int(slowest[0]),
        "job": job and job.as_json(),
    }
    if json:
        say_json(facts)
        return
    shown = {**facts, "nbytes": size(found.nbytes), "job": job and job.in_words()}
    # Of a thousand ranks a person looks for the slowest.
    del shown["timings"]
    if slowest is not None:
        rank, each = slowest
        shown["slowest_rank"] = (
            f"{rank}, {each.stage_seconds:.3f} s to stage and {each.write_seconds:.3f} s to write"
        )
    rows = [[key.replace("_", " "), in_words(value)] for key, value in shown.items()]
    table([("", "left"), ("", "left")], [row for row in rows if row[1]])


def _tensors(
    place: Place,
    *,
    part: Annotated[str | None, typer.Option(help="of this part alone")] = None,
    flat: Annotated[bool, typer.Option("--flat", help="every name by itself")] = False,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """List the tensors of a checkpoint; names that differ in one number are one row.

    Example: dist-ckpt tensors runs/17 --part model
    """
    run, step = places.open_step(place, storage_option, metric)
    index = run.open(step).index
    wanted = [
        (number, each) for number, each in enumerate(index.tensors) if part in (None, each.part)
    ]
    if part is not None and not wanted:
        known = sorted({each.part for each in index.tensors})
        raise UsageError(
            f"no tensor of part {part!r}{near(part, known)}: there are those of {', '.join(known)}"
        )
    rows = [
        {
            "part": each.part,
            "name": each.name,
            "dtype": each.dtype,
            "shape": list(each.shape),
            "chunks": len(index.chunks_of(number).file),
        }
        for number, each in wanted
    ]
    if json:
        say_json({"url": run.url, "step": step, "tensors": rows})
        return
    folded = rows if flat else _folded(rows)
    table(
        [
            ("part", "left"),
            ("name", "left"),
            ("dtype", "left"),
            ("shape", "left"),
            ("cut", "right"),
        ],
        [
            [
                str(each["part"]),
                str(each["name"]),
                str(each["dtype"]),
                str(each["shape"]),
                str(each["chunks"]),
            ]
            for each in folded
        ],
    )


def _latest(url: Url, *, storage_option: Options = None, json: Json = False) -> None:
    """Print the newest checkpoint, as a place that other commands take.

    Example: dist-ckpt verify "$(dist-ckpt latest runs/17)"
    """
    run = places.open_whole(url, storage_option)
    _say_place(url, places.find_named(run, "latest", None), json=json)


def _best(
    url: Url, *, metric: Metric = None, storage_option: Options = None, json: Json = False
) -> None:
    """Print the best checkpoint, as a place that other commands take.

    Example: dist-ckpt best runs/17 --metric val/loss
    """
    run = places.open_whole(url, storage_option)
    _say_place(url, places.find_named(run, "best", metric), json=json)


def _say_place(url: str, step: int, *, json: bool) -> None:
    say_json({"url": url, "step": step}) if json else say(f"{url}@{step}")


def _print_rows(rows: list[Listed]) -> None:
    names = metric_names(rows)
    # Of what the run keeps a best by, that is known already.
    marked = {mark for each in rows for mark in each.marks}
    least = _least(rows, [name for name in names if f"best {name}" not in marked])
    table(
        [
            ("step", "right"),
            ("age", "right"),
            ("size", "right"),
            ("ranks", "right"),
            *((name, "right") for name in names),
            ("state", "left"),
            ("marks", "left"),
        ],
        [
            [
                f"{each.step}",
                age(each.created),
                size(each.nbytes),
                "?" if each.manifest is None else f"{each.manifest.world_size}",
                *(
                    show_number(each.metrics[name]) if name in each.metrics else ""
                    for name in names
                ),
                each.state,
                ", ".join((*each.marks, *least.get(each.step, ()))),
            ]
            for each in rows
        ],
    )


def _as_json(each: Listed) -> dict[str, Any]:
    return {
        "step": each.step,
        "state": each.state,
        "marks": list(each.marks),
        "problem": each.problem,
        "created": None if each.created is None else each.created.isoformat(),
        "nbytes": each.nbytes,
        "world_size": None if each.manifest is None else each.manifest.world_size,
        "epoch": None if each.record is None else each.record.epoch,
        "metrics": dict(each.metrics),
    }


def metric_names(rows: Sequence[Listed]) -> list[str]:
    """Return the names of all metrics, sorted."""
    return sorted({name for each in rows for name in each.metrics})


def metric_series(run: Run, metrics: Sequence[str] = ()) -> dict[str, Points]:
    """Return by metric its values, each with its step, in order.

    Args:
        run: whose.
        metrics: which; all of them without any.

    Raises:
        UsageError: no checkpoint has one of them.
    """
    records = run.records()
    if not records:
        run.newest()  # which says why there is none
    known = sorted({name for each in records for name in each.metrics})
    ranking: Any = import_module("dist_ckpt.repository.ranking")
    for name in metrics:
        if name not in known:
            raise UsageError(ranking.without_metric(name, records, where=run.url))
    return {
        name: [(each.step, each.metrics[name]) for each in records if name in each.metrics]
        for name in metrics or known
    }


def _least(rows: list[Listed], names: list[str]) -> dict[int, list[str]]:
    """Return, by step, the metrics that are smallest there: what is best the person knows."""
    found: dict[int, list[str]] = {}
    for name in names:
        # NaN has no order: `min` would return it wherever it comes first.
        having = [each for each in rows if not math.isnan(each.metrics.get(name, math.nan))]
        # Of a single value that says nothing.
        if len(having) > 1:
            least = min(having, key=lambda each: each.metrics[name])
            found.setdefault(least.step, []).append(f"least {name}")
    return found


def in_words(value: Any) -> str:
    """Return what JSON holds as a person reads it; "" for nothing."""
    # 0 and False are shown: they say something.
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={finite(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put names that differ only in the number of a layer into one row: `h.{0..11}.weight`."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in rows:
        # The first number alone: of `h.0.experts.3` the layer is folded, and the expert stays.
        pattern = _LAYER.sub("#", each["name"], count=1)
        # A layer that is unlike the others in anything has a row of its own.
        key = (each["part"], pattern, each["dtype"], tuple(each["shape"]), each["chunks"])
        groups.setdefault(key, []).append(each)
    folded = []
    for (_, pattern, *_), members in groups.items():
        numbers = [int(found[0]) for each in members if (found := _LAYER.search(each["name"]))]
        name = members[0]["name"]
        if len(members) > 1:
            numbers.sort()
            # A gap shows: a layer that is missing may be what is looked for.
            dense = numbers == list(range(numbers[0], numbers[-1] + 1))
            text = f"{numbers[0]}..{numbers[-1]}" if dense else ",".join(map(str, numbers))
            name = pattern.replace("#", f"{{{text}}}", 1)
        folded.append({**members[0], "name": name})
    return folded
