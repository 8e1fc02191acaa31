"""The picture of the demo on two hosts: the loss, and how many workers trained when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from examples.demo_parts.records import Attempt, Entry
from examples.demo_parts.report import COMMIT, GRID, INK, MUTED, PALE, RED, SPAN


@dataclass(frozen=True)
class Stretch:
    """What one start of the training did; times in Unix seconds.

    Attributes:
        hosts: on how many.
        workers: how many.
        resumed: the step it went on from.
        start: when.
        stop: of its last step.
        steps: that it took.
        losses: of these.
    """

    hosts: int
    workers: int
    resumed: int
    start: float
    stop: float
    steps: Sequence[int]
    losses: Sequence[float]

    @classmethod
    def of(cls, attempt: Attempt[str], workers: int) -> Self:
        """Return what an attempt did, with so many workers on each host."""
        return cls(
            attempt.world_size // workers,
            attempt.world_size,
            attempt.resumed,
            attempt.time,
            attempt.entries[-1].time,
            [entry.step for entry in attempt.entries],
            [float.fromhex(entry.value) for entry in attempt.entries],
        )


def draw(
    stretches: Sequence[Stretch], calm: Sequence[Entry[str]], kill_step: int, file: Path
) -> None:
    """Draw the picture as a PNG.

    Args:
        stretches: of the run that lost a host, in order.
        calm: the losses of the same sizes with nothing lost.
        kill_step: the step that was being saved when the host was lost.
        file: where to.
    """
    figure = Figure(figsize=(12, 7), dpi=130, facecolor="white")
    curves, hosts = figure.subplots(2, 1, height_ratios=(2, 1))
    figure.subplots_adjust(left=0.09, right=0.97, top=0.86, bottom=0.09, hspace=0.4)
    title = "One of two hosts lost during a save, and nothing else"
    figure.text(0.03, 0.95, title, size=17, weight="bold", color=INK)
    back = stretches[1].resumed
    figure.text(
        0.03,
        0.91,
        f"The host was lost while step {kill_step} was being saved. torchrun went on with the "
        f"other, from step {back}; the host came back, and training ended at full size.",
        size=10.5,
        color=MUTED,
    )
    _draw_losses(curves, stretches, calm)
    _draw_hosts(hosts, stretches)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file)


def _draw_losses(axes: Axes, stretches: Sequence[Stretch], calm: Sequence[Entry[str]]) -> None:
    label = "same sizes from the same steps on, nothing lost"
    losses = [float.fromhex(entry.value) for entry in calm]
    axes.plot([entry.step for entry in calm], losses, color=PALE, lw=6, label=label)
    for one, color in zip(stretches, (INK, RED, COMMIT), strict=False):
        label = f"{one.workers} workers, from {one.resumed or 'the beginning'}"
        axes.plot(one.steps, one.losses, color=color, lw=1.5, label=label)
    axes.set_xlabel("step")
    axes.set_ylabel("training loss (nats per byte)")
    axes.legend(frameon=False, fontsize=9.5, labelcolor=INK)
    _dress(axes)


def _draw_hosts(axes: Axes, stretches: Sequence[Stretch]) -> None:
    zero = stretches[0].start
    for one in stretches:
        for host in range(one.hosts):
            width = one.stop - one.start
            axes.barh(host, width, left=one.start - zero, height=0.5, color=SPAN)
    lost, back = stretches[0].stop - zero, stretches[2].start - zero
    axes.plot([lost], [1], "X", color=RED, ms=11)
    axes.plot([lost, back], [1, 1], color=RED, lw=1.4, ls=(0, (2, 2)), zorder=0)
    axes.set_yticks([0, 1], ["host 0", "host 1"])
    axes.set_ylim(1.5, -0.5)
    axes.set_xlabel("seconds since the workers first started")
    _dress(axes)


def _dress(axes: Axes) -> None:
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(GRID)
    axes.tick_params(colors=MUTED, length=0, labelsize=9.5)
    axes.grid(axis="x", color=GRID, lw=0.8, zorder=0)
    axes.set_axisbelow(True)
