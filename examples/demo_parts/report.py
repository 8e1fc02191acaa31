"""The picture of the demo: the loss curves over one another, and when what happened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

INK, MUTED, GRID = "#1f2933", "#66727f", "#e4e7eb"
PALE, SPAN, RED = "#9fc5e8", "#d3dde8", "#d1343f"
COMMIT = "#1a7f5a"
_BAR = 0.42  # height of a lane, whose rows are 1 apart
_LABEL = 0.03  # width of a label of two digits, as a share of all seconds
# Curves that lie on one another stay visible: the later, the thinner.
CONTINUED = (("#f7c873", 8.0), ("#b79ad9", 5.5), ("#2a9d8f", 3.0), ("#7a1f4f", 1.1))


@dataclass(frozen=True)
class Curve:
    """Losses by step."""

    label: str
    steps: Sequence[int]
    losses: Sequence[float]


@dataclass(frozen=True)
class Save:
    """One save of a run; times in seconds since the start of its lane."""

    step: int
    start: float
    stop: float
    committed: bool


@dataclass(frozen=True)
class Lane:
    """What one run did; times in seconds since its workers first started.

    Attributes:
        label: the run.
        training: (start, stop) of each stretch of training.
        saves: in order.
        killed: when a worker was killed.
        resumed: step that the last stretch resumed from.
    """

    label: str
    training: Sequence[tuple[float, float]]
    saves: Sequence[Save]
    killed: float | None
    resumed: int


@dataclass(frozen=True)
class Story:
    """All that the picture shows.

    Attributes:
        reference: the undisturbed run.
        killed: the run that lost a worker, in the history that stands.
        lost: first and last step that were taken twice.
        kill_step: the step that was being saved at the kill.
        continued: the runs that went on from its last checkpoint.
        lanes: one per run.
    """

    reference: Curve
    killed: Curve
    lost: tuple[int, int]
    kill_step: int
    continued: Sequence[Curve]
    lanes: Sequence[Lane]


def draw(story: Story, file: Path) -> None:
    """Draw `story` as a PNG."""
    figure = Figure(figsize=(12, 9.6), dpi=130, facecolor="white")
    curves, lanes = figure.subplots(2, 1, height_ratios=(1.3, 1))
    figure.subplots_adjust(left=0.155, right=0.97, top=0.885, bottom=0.075, hspace=0.36)
    figure.text(
        0.03, 0.955, "Killed during a save, and nothing lost", size=17, weight="bold", color=INK
    )
    first, last = story.lost
    figure.text(
        0.03,
        0.925,
        f"A worker got SIGKILL while step {story.kill_step} was being saved. torchrun restarted "
        f"it; training resumed from step {first - 1} and repeated steps {first} to {last} to the "
        "same bits.",
        size=10.5,
        color=MUTED,
    )
    _draw_curves(curves, story)
    _draw_lanes(lanes, story.lanes)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_curves(axes: Axes, story: Story) -> None:
    first, last = story.lost
    reference, killed = story.reference, story.killed
    axes.axvspan(first - 1, last, color=RED, alpha=0.09, lw=0)
    axes.plot(reference.steps, reference.losses, color=PALE, lw=6, label=reference.label, zorder=2)
    axes.plot(killed.steps, killed.losses, color=INK, lw=1.3, label=killed.label, zorder=4)
    for curve, (color, width) in zip(story.continued, CONTINUED, strict=False):
        # Each goes on from the last point of the run it continues.
        steps, losses = [killed.steps[-1], *curve.steps], [killed.losses[-1], *curve.losses]
        axes.plot(steps, losses, color=color, lw=width, label=curve.label, zorder=3)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    top = high - 0.04 * (high - low)
    axes.plot(
        [story.kill_step], [killed.losses[story.kill_step - 1]], "X", color=RED, ms=11, zorder=6
    )
    axes.annotate(
        "",
        (first - 1, top - 0.19 * (high - low)),
        (last, top - 0.19 * (high - low)),
        arrowprops={"arrowstyle": "-|>", "color": RED, "lw": 1.6},
    )
    axes.text(
        (first - 1 + last) / 2,
        top,
        "killed, back\nto the last\ncheckpoint",
        color=RED,
        size=9.5,
        ha="center",
        va="top",
    )
    axes.axvline(killed.steps[-1], color=MUTED, lw=1, ls=(0, (4, 3)), zorder=1)
    axes.text(
        killed.steps[-1] + 0.8,
        top,
        "continued at\nother world sizes",
        color=MUTED,
        size=9.5,
        va="top",
    )
    axes.set_xlim(0, max(curve.steps[-1] for curve in (killed, *story.continued)) + 1)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    # Between the kill and where the others go on: the one place that nothing else is in.
    axes.legend(
        loc="upper left",
        bbox_to_anchor=(last + 0.5, top),
        bbox_transform=axes.transData,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
    )
    _dress(axes, grid="both")


def _draw_lanes(axes: Axes, lanes: Sequence[Lane]) -> None:
    seconds = max(stop for lane in lanes for _, stop in lane.training)
    for row, lane in enumerate(lanes):
        for start, stop in lane.training:
            axes.barh(row, stop - start, left=start, height=_BAR, color=SPAN, lw=0, zorder=2)
        for save in lane.saves:
            color = COMMIT if save.committed else RED
            axes.plot([save.start, save.stop], [row, row], color=color, lw=3.5, zorder=3)
            if save.committed:
                axes.plot([save.stop], [row], "D", color=color, ms=5.5, zorder=4)
        for near in close_together(lane.saves, seconds * _LABEL):
            place = {"ha": "center", "va": "bottom", "size": 8.5}
            place["color"] = COMMIT if near[-1].committed else RED
            middle = (near[0].stop + near[-1].stop) / 2
            label = ", ".join(str(save.step) for save in near)
            axes.text(middle, row - _BAR / 2 - 0.05, label, place)
        if lane.resumed:
            start, stop = lane.training[-1]
            marks = [save.stop for save in lane.saves if save.stop >= start]
            # Inside the bar where there is room before its first mark, else behind all of it.
            inside = min([stop, *marks]) - start > 2.5 * seconds * _LABEL
            place = {"ha": "left", "va": "center", "size": 8.5, "color": MUTED}
            text = f" from {lane.resumed}" if inside else f"   from {lane.resumed}"
            axes.text(start if inside else max([stop, *marks]), row, text, place)
        if lane.killed is not None:
            _draw_restart(axes, row, lane.killed, lane.training[-1][0])
    axes.set_yticks(range(len(lanes)), [lane.label for lane in lanes])
    axes.set_ylim(len(lanes) - 0.35, -0.75)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds since the workers of the run first started")
    axes.legend(
        handles=[
            Patch(color=SPAN, label="training"),
            Line2D(
                [], [], color=COMMIT, marker="D", ms=5, lw=0, label="checkpoint of a step committed"
            ),
            Line2D(
                [],
                [],
                color=RED,
                marker="X",
                ms=9,
                lw=0,
                label="SIGKILL, the save in flight is lost",
            ),
        ],
        loc="lower left",
        bbox_to_anchor=(0, 1.0),
        ncols=3,
        frameon=False,
        fontsize=9.5,
        labelcolor=INK,
        borderaxespad=0.2,
        handletextpad=0.5,
    )
    _dress(axes, grid="x")


def close_together(saves: Sequence[Save], seconds: float) -> list[list[Save]]:
    """Group saves that ended less than `seconds` after the one before: they share a label."""
    groups: list[list[Save]] = []
    for save in saves:
        alike = groups and groups[-1][-1].committed == save.committed
        if alike and save.stop - groups[-1][-1].stop < seconds:
            groups[-1].append(save)
        else:
            groups.append([save])
    return groups


def _draw_restart(axes: Axes, row: int, killed: float, again: float) -> None:
    axes.plot([killed], [row], "X", color=RED, ms=11, zorder=5)
    axes.plot([killed, again], [row, row], color=RED, lw=1.4, ls=(0, (2, 2)), zorder=1)
    place = {"ha": "center", "va": "bottom", "size": 9, "color": RED}
    axes.text((killed + again) / 2, row - 0.06, "torchrun starts the workers again", place)


def _dress(axes: Axes, *, grid: Literal["both", "x"]) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, labelsize=9.5)
    axes.xaxis.label.set_color(MUTED)
    axes.yaxis.label.set_color(MUTED)
    axes.grid(axis=grid, color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
