"""Commands that only look: ls, show, tensors, verify, diff, compare, latest, best."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.cli import places
from dist_ckpt.cli.output import age, number, plain, say, say_json, size, table
from dist_ckpt.cli.places import Json, Metric, Options, Place, Url
from dist_ckpt.errors import IntegrityError, NotFound, UsageError

if TYPE_CHECKING:
    from dist_ckpt.run import Listed, Run

_SORTS = ("step", "age", "size")
_LAYER = re.compile(r"(?<![^.])\d+(?![^.])")


def register(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (ls, show, tensors, verify, diff, compare, latest, best):
        app.command()(command)


def ls(
    url: Url,
    sort: Annotated[str, typer.Option(metavar="step|age|size", help="order of the rows")] = "step",
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """List the checkpoints of a run, or the runs below a place.

    Example: dist-ckpt ls s3://bucket/runs/17
    """
    if sort not in _SORTS:
        raise UsageError(f"--sort is one of {', '.join(_SORTS)}, not {sort!r}")
    run = places.open_run(url, storage_option)
    try:
        rows = run.listed()
    except NotFound:
        below = _runs_below(url, storage_option)
        if not below:
            raise
        if json:
            say_json({"url": run.url, "runs": below})
            return
        for each in below:
            say(each)
        return
    keys: dict[str, Any] = {
        "step": lambda each: each.step,
        "age": lambda each: -each.created.timestamp() if each.created else 0,
        "size": lambda each: each.nbytes or 0,
    }
    rows.sort(key=keys[sort])
    if json:
        say_json({"url": run.url, "checkpoints": [_as_json(each) for each in rows]})
        return
    names = _metric_names(rows)
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
                *(number(each.metrics[name]) if name in each.metrics else "" for name in names),
                each.state,
                ", ".join((*each.marks, *_best_marks(rows, each, names))),
            ]
            for each in rows
        ],
    )


def show(
    place: Place, metric: Metric = None, storage_option: Options = None, json: Json = False
) -> None:
    """Show what the manifest of a checkpoint says.

    Example: dist-ckpt show runs/17@latest
    """
    run, step = places.open_step(place, storage_option, metric)
    found = run.manifest(step)
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
    }
    if json:
        say_json(facts)
        return
    shown = {**facts, "nbytes": size(found.nbytes)}
    del shown["timings"]
    if slowest is not None:
        rank, each = slowest
        shown["slowest_rank"] = (
            f"{rank}, {each.stage_seconds:.3f} s to stage and {each.write_seconds:.3f} s to write"
        )
    rows = [[key.replace("_", " "), _in_words(value)] for key, value in shown.items()]
    table([("", "left"), ("", "left")], [row for row in rows if row[1]])


def tensors(
    place: Place,
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
        raise UsageError(f"no tensor of part {part!r}: there are those of {', '.join(known)}")
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


def verify(
    place: Place,
    every: Annotated[bool, typer.Option("--all", help="all checkpoints of the run")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="sizes alone, no data is read")] = False,
    sample: Annotated[
        str | None,
        typer.Option(metavar="P%|I/N", help="a random share of the data, or the I-th of N shares"),
    ] = None,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Compare the bytes of a checkpoint with their digests; exit code 12 tells damage.

    Example: dist-ckpt verify s3://bucket/runs/17 --all --sample 5%
    """
    share = (0, 1) if quick else _share(sample)
    if every:
        run = places.open_run(places.split(place)[0], storage_option)
        steps = [each.step for each in run.listed() if each.state != "unfinished"]
    else:
        run, step = places.open_step(place, storage_option, metric)
        steps = [step]
    reports = [run.verify(step, sample=share) for step in steps]
    if json:
        found = [
            {
                "step": each.step,
                "ok": each.ok,
                "files": each.files,
                "nbytes_read": each.nbytes,
                "problems": list(each.problems),
            }
            for each in reports
        ]
        say_json({"url": run.url, "checkpoints": found})
    else:
        for each in reports:
            read = f"{each.files} files, {size(each.nbytes)} read"
            say(f"step {each.step}: {f'whole ({read})' if each.ok else 'DAMAGED'}")
            for problem in each.problems:
                say(f"  {problem}")
    bad = [each.step for each in reports if not each.ok]
    if bad:
        raise IntegrityError(f"damaged in {run.url}: step {', '.join(map(str, bad))}")


def diff(
    one: Annotated[str, typer.Argument(metavar="URL@STEP", help="a checkpoint")],
    other: Annotated[str, typer.Argument(metavar="URL@STEP|STEP", help="another one")],
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Show in what two checkpoints differ, by their digests: no data is read.

    Example: dist-ckpt diff runs/17@100 200
    """
    run, step = places.open_step(one, storage_option, metric)
    if other.isdecimal():
        there, second = run, int(other)
    else:
        there, second = places.open_step(other, storage_option, metric)
    found = run.diff(step, second, of=there)
    facts = _facts_that_differ(run, step, there, second)
    if json:
        rows = [
            {"part": e.part, "name": e.name, "kind": e.kind, "here": e.here, "there": e.there}
            for e in found
        ]
        say_json({"equal": not rows, "tensors": rows, "facts": facts})
        return
    for name, (mine, theirs) in facts.items():
        say(f"{name}: {_in_words(mine) or 'nothing'} -> {_in_words(theirs) or 'nothing'}")
    if not found:
        say("all tensors are equal")
        return
    table(
        [
            ("part", "left"),
            ("name", "left"),
            ("differ in", "left"),
            ("here", "left"),
            ("there", "left"),
        ],
        [[e.part, e.name, e.kind, e.here, e.there] for e in found],
    )


def compare(url: Url, storage_option: Options = None, json: Json = False) -> None:
    """Show how the metrics of a run went, checkpoint by checkpoint.

    Example: dist-ckpt compare runs/17
    """
    run = places.open_run(url, storage_option)
    rows = [each for each in run.listed() if each.record is not None]
    names = _metric_names(rows)
    if json:
        series = {
            name: [[each.step, each.metrics[name]] for each in rows if name in each.metrics]
            for name in names
        }
        say_json({"url": run.url, "metrics": series})
        return
    cells = []
    for name in names:
        values = [each.metrics[name] for each in rows if name in each.metrics]
        cells.append(
            [name, _spark(values), *(number(f(values)) for f in (min, max)), number(values[-1])]
        )
    table(
        [
            ("metric", "left"),
            ("", "left"),
            ("least", "right"),
            ("most", "right"),
            ("last", "right"),
        ],
        cells,
    )


def latest(url: Url, storage_option: Options = None, json: Json = False) -> None:
    """Print the newest checkpoint, as a place that other commands take.

    Example: dist-ckpt verify "$(dist-ckpt latest runs/17)"
    """
    run = places.open_run(url, storage_option)
    _say_place(url, places.step_of(run, "latest", None), json=json)


def best(
    url: Url, metric: Metric = None, storage_option: Options = None, json: Json = False
) -> None:
    """Print the best checkpoint, as a place that other commands take.

    Example: dist-ckpt best runs/17 --metric val/loss
    """
    run = places.open_run(url, storage_option)
    _say_place(url, places.step_of(run, "best", metric), json=json)


def _say_place(url: str, step: int, *, json: bool) -> None:
    say_json({"url": url, "step": step}) if json else say(f"{url}@{step}")


def _runs_below(url: str, options: list[str] | None) -> list[str]:
    return list(dist_ckpt.runs_below(url, storage_options=places.storage_options(options)))


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


def _metric_names(rows: list[Listed]) -> list[str]:
    return sorted({name for each in rows for name in each.metrics})


def _best_marks(rows: list[Listed], one: Listed, names: list[str]) -> list[str]:
    """Return the metrics that are smallest here: what is best the person knows."""
    found = []
    for name in names:
        values = [each.metrics[name] for each in rows if name in each.metrics]
        if len(values) > 1 and one.metrics.get(name) == min(values):
            found.append(f"least {name}")
    return found


def _in_words(value: Any) -> str:
    if value is None or value in ({}, []):
        return ""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={plain(each)}" for key, each in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return str(value)


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Put names that differ only in the number of a layer into one row: `h.{0..11}.weight`."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for each in rows:
        pattern = _LAYER.sub("#", each["name"], count=1)
        key = (each["part"], pattern, each["dtype"], tuple(each["shape"]), each["chunks"])
        groups.setdefault(key, []).append(each)
    folded = []
    for (_, pattern, *_), members in groups.items():
        numbers = [int(found[0]) for each in members if (found := _LAYER.search(each["name"]))]
        name = members[0]["name"]
        if len(members) > 1:
            numbers.sort()
            dense = numbers == list(range(numbers[0], numbers[-1] + 1))
            text = f"{numbers[0]}..{numbers[-1]}" if dense else ",".join(map(str, numbers))
            name = pattern.replace("#", f"{{{text}}}", 1)
        folded.append({**members[0], "name": name})
    return folded


def _share(sample: str | None) -> tuple[int, int] | None:
    if sample is None:
        return None
    percent = re.fullmatch(r"(\d+(?:\.\d+)?)%", sample)
    if percent and 0 < float(percent[1]) <= 100:
        shares = max(round(100 / float(percent[1])), 1)
        return random.randint(1, shares), shares
    part = re.fullmatch(r"(\d+)/(\d+)", sample)
    if part and 1 <= int(part[1]) <= int(part[2]):
        return int(part[1]), int(part[2])
    raise UsageError(
        f"--sample takes a share such as 5%, or 2/10 for the second tenth, not {sample!r}"
    )


def _facts_that_differ(run: Run, step: int, there: Run, other: int) -> dict[str, list[Any]]:
    mine, theirs = run.manifest(step), there.manifest(other)
    names = ("epoch", "world_size", "parts", "metrics", "metadata", "versions")
    return {
        name: [plain(getattr(mine, name)), plain(getattr(theirs, name))]
        for name in names
        if plain(getattr(mine, name)) != plain(getattr(theirs, name))
    }


def _spark(values: list[float]) -> str:
    """Return the course of some numbers as one line of blocks."""
    marks = "▁▂▃▄▅▆▇█"
    finite = [each for each in values if each - each == 0]
    if not finite:
        return ""
    low, span = min(finite), max(finite) - min(finite) or 1.0
    return "".join(
        marks[min(int((each - low) / span * 8), 7)] if each - each == 0 else "?"
        for each in values[-40:]
    )
