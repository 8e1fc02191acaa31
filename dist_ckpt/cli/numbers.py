"""Commands about numbers: stats of tensors, and plot of metrics."""

from __future__ import annotations

import io
import math
import os
import shutil
from dataclasses import asdict
from importlib import import_module
from typing import Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.cli import places
from dist_ckpt.cli.looking import Points, metric_series
from dist_ckpt.cli.output import say, say_json, show_number, table
from dist_ckpt.cli.places import Json, Metric, Options, Place, Url
from dist_ckpt.cli.progress import showing_reads
from dist_ckpt.errors import StorageError, UsageError, describe

_NARROW, _WIDE = 60, 100
_ROWS = 12
_PICTURES = (".png", ".pdf", ".svg")
# A character of braille is two dots wide and four high: these are the bits of each.
_BLANK = 0x2800
_DOTS = ((0x01, 0x08), (0x02, 0x10), (0x04, 0x20), (0x40, 0x80))


def add_numbers(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_stats, _plot):
        app.command(command.__name__[1:])(command)


def _stats(
    place: Place,
    names: Annotated[
        list[str] | None,
        typer.Argument(metavar="[NAME]...", help="names or patterns of tensors; all without any"),
    ] = None,
    *,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Show the range and the mean of tensors, and how many elements are no number or infinite.

    Piece by piece, in bounded memory. What is said of the elements is said of the finite ones.

    Example: dist-ckpt stats runs/17@best 'model/*.weight' --metric val/loss
    """
    run, step = places.open_step(place, storage_option, metric)
    # The one thing here that needs torch.
    numbers: Any = import_module("dist_ckpt.doors.numbers")
    # Opened for the names alone: the bar has to know its total before the first byte is read.
    with dist_ckpt.open_checkpoint(run.store, step=step) as opened:
        wanted = numbers.matching(opened, names or ())
        nbytes = sum(opened.info[name].nbytes for name in wanted)
    with (
        showing_reads(run, step, nbytes=nbytes) as seen,
        dist_ckpt.open_checkpoint(seen.store, step=step) as opened,
    ):
        found = list(numbers.tensor_stats(opened, wanted))
    if json:
        say_json({"url": run.url, "step": step, "tensors": [asdict(each) for each in found]})
        return
    titles = ("name", "dtype", "shape", "least", "most", "mean", "NaN", "Inf")
    table(
        [(title, "left" if number < 3 else "right") for number, title in enumerate(titles)],
        [
            [
                each.name,
                each.dtype,
                str(list(each.shape)),
                *map(show_number, (each.least, each.most, each.mean)),
                *(f"{count or ''}" for count in (each.nans, each.infs)),
            ]
            for each in found
        ],
    )


def _plot(
    url: Url,
    metrics: Annotated[
        list[str] | None,
        typer.Argument(metavar="[METRIC]...", help="names of metrics; all without any"),
    ] = None,
    *,
    out: Annotated[
        str | None,
        typer.Option("--out", "-o", metavar="FILE", help="a picture: .png, .pdf or .svg"),
    ] = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Draw how metrics of a run went, in the terminal or as a picture.

    Example: dist-ckpt plot runs/17 val/loss -o loss.png
    """
    if out is not None and not out.endswith(_PICTURES):
        raise UsageError(f"--out ends in one of {', '.join(_PICTURES)}, not {out!r}")
    if out is not None:
        places.check_picture(out)
    run = places.open_whole(url, storage_option)
    series = metric_series(run, metrics or ())
    # A program gets an empty object, not a sentence.
    if not series and not json:
        say(f"no checkpoint in {run.url} has a metric")
        return
    if out is not None:
        _draw_picture(series, out, title=run.url)
    if json:
        say_json({"url": run.url, "metrics": series, "out": out})
    elif out is not None:
        say(out)
    else:
        width = min(max(shutil.get_terminal_size((_WIDE, 24)).columns, _NARROW), _WIDE)
        for name, points in series.items():
            for line in draw(name, points, width=width):
                say(line)


def draw(name: str, points: Points, *, width: int) -> list[str]:
    """Return the course of a metric as lines of text.

    Args:
        name: what it is called.
        points: steps, ascending, each with its value; what is not finite is left out, and told.
        width: how many characters a line may take.
    """
    known = [(step, value) for step, value in points if math.isfinite(value)]
    besides = f", {len(points) - len(known)} not finite" if len(known) < len(points) else ""
    title = f"{name} ({len(known)} values{besides})"
    if not known:
        return [title]
    least, most = (choose(value for _, value in known) for choose in (min, max))
    labels = [show_number(most), *[""] * (_ROWS - 2), show_number(least)]
    margin = max(map(len, labels))
    rows = _dots(known, (least, most), columns=width - margin - 2)
    first, last = f"{known[0][0]}", f"{known[-1][0]}"
    axis = first + last.rjust(width - margin - 2 - len(first)) if len(known) > 1 else first
    return [
        title,
        *(f"{label:>{margin}} ┤{row}" for label, row in zip(labels, rows, strict=True)),
        f"{'':>{margin}}  {axis}",
    ]


def _dots(points: Points, span: tuple[float, float], *, columns: int) -> list[str]:
    """Return rows of braille with a dot for each point, and a line from one to the next."""
    (first, last), (least, most) = (points[0][0], points[-1][0]), span
    wide, high = 2 * columns - 1, 4 * _ROWS - 1

    def at(step: int, value: float) -> tuple[int, int]:
        # A run of one checkpoint has no span of steps.
        x = round((step - first) / ((last - first) or 1) * wide)
        # Halved first: the distance of two large values may be none that a float has.
        y = (most / 2 - value / 2) / ((most / 2 - least / 2) or 1)
        return x, round(y * high)

    cells = [[_BLANK] * columns for _ in range(_ROWS)]
    before = at(*points[0])
    for point in points:
        here = at(*point)
        # So many dots that the line has no gap, however steep it is.
        count = max(abs(here[0] - before[0]), abs(here[1] - before[1]), 1)
        for number in range(count + 1):
            x, y = (round(a + (b - a) * number / count) for a, b in zip(before, here, strict=True))
            cells[y // 4][x // 2] |= _DOTS[y % 4][x % 2]
        before = here
    return ["".join(map(chr, row)).rstrip(chr(_BLANK)) for row in cells]


def _draw_picture(series: dict[str, Points], out: str, *, title: str) -> None:
    try:
        # Not pyplot, which would look for a display.
        figures: Any = import_module("matplotlib.figure")
    except ImportError as error:
        raise UsageError(
            "a picture is drawn where matplotlib is installed: pip install 'dist_ckpt[demo]'; "
            "without --out the plot is in the terminal"
        ) from error
    figure = figures.Figure(figsize=(8, 3 * max(len(series), 1)), layout="constrained")
    figure.suptitle(title)
    for number, (name, points) in enumerate(series.items(), 1):
        axes = figure.add_subplot(len(series), 1, number)
        axes.plot(*zip(*points, strict=True), marker=".")
        axes.set(xlabel="step", ylabel=name)
    # In memory first: what cannot be drawn leaves no half of a file.
    picture = io.BytesIO()
    figure.savefig(picture, format=os.path.splitext(out)[1][1:])
    try:
        with open(out, "wb") as file:
            file.write(picture.getvalue())
    except OSError as error:
        raise StorageError(f"cannot write {out}: {describe(error)}") from error
