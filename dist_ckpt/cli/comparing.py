"""Commands that compare: verify, diff, compare."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Mapping
from dataclasses import asdict, replace
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.cli import places
from dist_ckpt.cli.every import work_on
from dist_ckpt.cli.looking import in_words, metric_series
from dist_ckpt.cli.output import finite, say, say_json, show_number, size, table
from dist_ckpt.cli.places import Json, Metric, Options, Place, Url
from dist_ckpt.cli.progress import showing_reads
from dist_ckpt.errors import IncompatibleError, IntegrityError, StorageError, UsageError

if TYPE_CHECKING:
    from dist_ckpt.repository import VerifyReport
    from dist_ckpt.repository.listed import Listed
    from dist_ckpt.run import Run


def add_comparing(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_verify, _diff, _compare):
        app.command(command.__name__[1:])(command)


def _verify(
    place: Place,
    *,
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
    if quick and sample is not None:
        raise UsageError("--quick reads no data, of which --sample is a share: give one of them")
    # No share at all: sizes are looked at, and no data.
    share = (0, 1) if quick else _share(sample)
    unknown: list[Listed] = []
    listed: list[Listed] = []
    # @latest goes this way too: here what cannot be read is told, and not passed over.
    if every or places.split(place)[1] == "latest":
        if every:
            run = places.open_every(place, storage_option, metric)
            listed = run.listed()
        else:
            places.check_metric(metric, place)
            run = places.open_run(places.split(place)[0], storage_option)
            # Of what was saved last nothing may be passed over here: who asks wants to know.
            listed = run.newest_down()
            if not listed:
                run.newest()  # which says why there is none
        # What this version cannot read is no damage, and keeps no other from being verified.
        unknown = [each for each in listed if each.state in ("newer format", "unreadable")]
        steps = [each.step for each in listed if each.state in ("committed", "damaged")]
    else:
        run, step = places.open_step(place, storage_option, metric)
        steps = [step]
    if not steps and not unknown:
        run.newest()  # which says why there is none
    reports, unread = _reports(run, steps, share, listed if every else [])
    unknown += unread
    if json:
        say_json({"url": run.url, "checkpoints": _as_json(reports, unknown)})
    else:
        _say_reports(reports, unknown)
    bad = sorted(each.step for each in reports if not each.ok)
    # After all was shown: a script gets the code, a person every line.
    if bad:
        raise IntegrityError(f"damaged in {run.url}: step {', '.join(map(str, bad))}")
    # Only where nothing is damaged: of both, damage decides the exit code.
    if unknown:
        steps = [each.step for each in unknown]
        raise IncompatibleError(f"not verified in {run.url}: step {', '.join(map(str, steps))}")


def _reports(
    run: Run, steps: list[int], share: tuple[int, int] | None, listed: list[Listed]
) -> tuple[list[VerifyReport], list[Listed]]:
    """Verify `steps`; return what was found, and those of `listed` that could not be read.

    One that is in `listed` keeps no other from being verified; of one alone an error is the answer.
    """
    by_step = {each.step: each for each in listed}
    reports: list[VerifyReport] = []

    def verify(step: int) -> None:
        with showing_reads(run, step, shares=1 if share is None else share[1]) as seen:
            reports.append(seen.verify(step, sample=share))

    left = work_on(steps, verify, every=bool(listed), passed_over={StorageError: "unreadable"})
    unread = [
        replace(by_step[step], state="unreadable", problem=error.message)
        for step, (_, error) in left.items()
    ]
    return reports, unread


def _as_json(reports: list[VerifyReport], unknown: list[Listed]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = [
        {
            "step": each.step,
            "ok": each.ok,
            "files": each.files,
            "nbytes_read": each.nbytes,
            "problems": list(each.problems),
            "elsewhere": dict(each.elsewhere),
        }
        for each in reports
    ]
    for each in unknown:
        # Null and not false: nobody has looked at its bytes.
        row = {"ok": None, "files": 0, "nbytes_read": 0, "problems": [each.problem]}
        rows.append({"step": each.step, **row, "elsewhere": {}})
    return sorted(rows, key=lambda row: int(row["step"]))


def _say_reports(reports: list[VerifyReport], unknown: list[Listed]) -> None:
    for each in reports:
        read = f"{each.files} files, {size(each.nbytes)} read"
        say(f"step {each.step}: {f'whole ({read})' if each.ok else 'DAMAGED'}")
        for problem in each.problems:
            say(f"  {problem}")
        for host, count in each.elsewhere.items():
            say(f"  {count} more files are on {host}, in a folder of its own, and were not read")
    for one in unknown:
        say(f"step {one.step}: NOT VERIFIED, {one.state}")
        say(f"  {one.problem}")


def _diff(
    one: Annotated[str, typer.Argument(metavar="URL@STEP", help="a checkpoint")],
    other: Annotated[str, typer.Argument(metavar="URL@STEP|STEP", help="another one")],
    *,
    values: Annotated[
        bool, typer.Option("--values", help="read what differs, and say how far it is apart")
    ] = False,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Show in what two checkpoints differ, by their digests: no data is read without --values.

    With it, how far tensors are apart, and which Python values differ, each by its path.

    Example: dist-ckpt diff runs/17@100 200 --values
    """
    places.check_metric(metric, one, other)
    # A bare number is a step of the first run, whose options it shares.
    here, *rest = places.share_options(
        storage_option, one, *([] if places.is_number(other) else [other])
    )
    run, step = places.find_step(one, here, metric)
    if not rest:
        there, second = run, int(other)
    else:
        there, second = places.find_step(other, rest[0], metric)
    rows = [asdict(each) for each in run.diff(step, second, of=there)]
    differing = run.diff_values(step, second, of=there)
    parts = [asdict(each) for each in differing]
    if values:
        rows = _with_values(rows, (run, step), (there, second))
        module: Any = import_module("dist_ckpt.doors.values")  # which needs torch
        found = module.value_changes(run.open(step), there.open(second), differing)
        parts = [asdict(each) for each in found]
    facts = _facts_that_differ(run, step, there, second)
    if json:
        # Equal is what a restore would give back; metrics, or versions, may differ all the same.
        say_json({"equal": not rows + parts, "tensors": rows, "values": parts, "facts": facts})
        return
    if facts:
        _say_facts(facts)
    if rows:
        _say_tensors(rows, values=values)
    if parts:
        _say_values(parts, values=values)
    if not rows + parts:
        say("all tensors and values are equal")


def _say_facts(facts: Mapping[str, list[Any]]) -> None:
    """Print what differs besides, side by side: metrics, metadata and versions by their names."""
    cells = []
    for name, both in facts.items():
        if not all(isinstance(each, Mapping) for each in both):
            cells.append([name, *map(in_words, both)])
            continue
        for key in dict.fromkeys(key for each in both for key in each):
            here, there = (in_words(each[key]) if key in each else "" for each in both)
            if here != there:
                cells.append([f"{name} {key}", here, there])
    table([("", "left"), ("here", "left"), ("there", "left")], cells)


def _say_tensors(rows: list[dict[str, Any]], *, values: bool) -> None:
    texts = {"part": "part", "name": "name", "kind": "differ in", "here": "here", "there": "there"}
    numbers = ("differing", "absolute", "relative") if values else ()
    table(
        [*((title, "left") for title in texts.values()), *((each, "right") for each in numbers)],
        [
            [*(row[name] for name in texts), *(show_number(row.get(name)) for name in numbers)]
            for row in rows
        ],
    )


def _say_values(rows: list[dict[str, Any]], *, values: bool) -> None:
    # Only digests were compared, and these tell no names of values.
    if not values:
        parts = ", ".join(dict.fromkeys(row["part"] for row in rows))
        say(f"Python values differ in {parts}: --values names them")
        return
    ranks = any(row["rank"] is not None for row in rows)
    titles = ("part", *["rank"] * ranks, "value", "here", "there")
    cells = [
        [
            row["part"],
            *["" if row["rank"] is None else f"{row['rank']}"] * ranks,
            *(row[name] for name in ("path", "here", "there")),
        ]
        for row in rows
    ]
    table([(title, "left") for title in titles], cells)


def _with_values(
    rows: list[dict[str, Any]], one: tuple[Run, int], other: tuple[Run, int]
) -> list[dict[str, Any]]:
    """Return `rows` with how far the values are apart, without those that are equal after all."""
    module: Any = import_module("dist_ckpt.doors.numbers")  # which needs torch
    # Of rows of other kinds (a name, a dtype, a shape) no elements stand side by side.
    names = [f"{row['part']}/{row['name']}" for row in rows if row["kind"] == "values"]
    (run, step), (there, second) = one, other
    with (
        showing_reads(run, step) as seen,
        # By the store that counts, so that what is read here shows as progress.
        dist_ckpt.open_checkpoint(seen.store, step=step) as here,
        dist_ckpt.open_checkpoint(there.store, step=second) as beyond,
    ):
        found = {each.name: each for each in module.value_differences(here, beyond, names)}
    return [
        {
            **row,
            "differing": None if far is None else far.differing,
            "absolute": None if far is None else far.absolute,
            "relative": None if far is None else far.relative,
        }
        for row in rows
        # Rows that differ in name, dtype or shape have no figures, and stay.
        for far in [found.get(f"{row['part']}/{row['name']}")]
        # Digests tell bits apart, also where the values are equal, as 0.0 and -0.0 are.
        if far is None or far.differing
    ]


def _compare(url: Url, *, storage_option: Options = None, json: Json = False) -> None:
    """Show how the metrics of a run went, checkpoint by checkpoint.

    Example: dist-ckpt compare runs/17
    """
    run = places.open_whole(url, storage_option)
    series = metric_series(run)
    if json:
        say_json({"url": run.url, "metrics": series})
        return
    if not series:
        say(f"no checkpoint in {run.url} has a metric")
        return
    cells = []
    for name, points in series.items():
        values = [value for _, value in points]
        # NaN has no order, and would make that of all others depend on where it stands.
        known = [value for value in values if not math.isnan(value)] or values
        cells.append(
            [name, _spark(values), *map(show_number, (min(known), max(known), values[-1]))]
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


def _share(sample: str | None) -> tuple[int, int] | None:
    if sample is None:
        return None
    percent = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)%", sample)
    if percent and 0 < float(percent[1]) <= 100:
        # Shares are equal parts: 30% is read as one of three.
        shares = max(round(100 / float(percent[1])), 1)
        # Drawn anew by each call: verified often enough, every block has its turn.
        return random.randint(1, shares), shares
    part = re.fullmatch(r"([0-9]+)/([0-9]+)", sample)
    if part and 1 <= int(part[1]) <= int(part[2]):
        return int(part[1]), int(part[2])
    raise UsageError(
        f"--sample takes a share such as 5%, or 2/10 for the second tenth, not {sample!r}"
    )


def _facts_that_differ(run: Run, step: int, there: Run, other: int) -> dict[str, list[Any]]:
    mine, theirs = run.manifest(step), there.manifest(other)
    names = ("epoch", "world_size", "parts", "metrics", "metadata", "versions")
    # By `finite`, as NaN is unequal to itself and would differ from its own copy.
    return {
        name: [finite(getattr(mine, name)), finite(getattr(theirs, name))]
        for name in names
        if finite(getattr(mine, name)) != finite(getattr(theirs, name))
    }


def _spark(values: list[float]) -> str:
    """Return the course of some numbers as one line of blocks."""
    marks = "▁▂▃▄▅▆▇█"
    known = [each for each in values if math.isfinite(each)]
    if not known:
        return ""
    # Where all are equal there is no span to divide by.
    low, span = min(known), max(known) - min(known) or 1.0
    return "".join(
        marks[min(int((each - low) / span * 8), 7)] if math.isfinite(each) else "?"
        for each in values[-40:]
    )
