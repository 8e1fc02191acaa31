"""What was measured of large jobs, as a page with a verdict for each bound, and as one plot."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import matplotlib

matplotlib.use("Agg")  # no display is needed

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.scale import load_rounds, loads, requests, steady
from benchmarks.scale.index import CHUNK_TARGET, MANIFEST_TARGET, ROOT_TARGET, Sizes
from benchmarks.scale.planning import MIB_TARGET, SECONDS_TARGET
from benchmarks.scale.planning import Row as Plan
from benchmarks.scale.rounds import (
    FRAMES_TARGET,
    RANKS,
    ROUND_TARGET_SECONDS,
    WAITING_TARGET,
)
from benchmarks.scale.rounds import Row as Round

PAGE = Path("docs/performance.md")
PICTURE = "performance-scale.png"

LARGEST = 16_384
BYTES_TARGET = 2048.0

T = TypeVar("T")
_Row = TypeVar("_Row", Plan, load_rounds.Row)


@dataclass(frozen=True, slots=True)
class Measured:
    """All rows of one run."""

    rounds: Sequence[Round]
    plans: Sequence[Plan]
    indexes: Sequence[Sizes]
    steady: Sequence[steady.Row] = ()
    loads: Sequence[loads.Row] = ()
    load_rounds: Sequence[load_rounds.Row] = ()
    requests: Sequence[requests.Row] = ()


@dataclass(frozen=True, slots=True)
class Curve:
    """What one figure is at some numbers of ranks, ascending."""

    name: str
    points: Sequence[tuple[int, float]]

    @property
    def exponent(self) -> float | None:
        """With which power of the ranks it grows between the last two points."""
        if len(self.points) < 2:
            return None
        (few, small), (many, large) = self.points[-2:]
        if min(small, large) <= 0:
            return None
        return math.log(large / small) / math.log(many / few)

    @property
    def label(self) -> str:
        """The name, and the exponent."""
        return self.name if self.exponent is None else f"{self.name}: {self.exponent:.2f}"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether a bound is kept.

    Attributes:
        figure: what is bounded.
        bound: by what.
        found: the largest that was measured, and where.
        share: of the bound that this is, at most 1 if it is kept; None where nothing was measured.
    """

    figure: str
    bound: str
    found: str
    share: float | None

    @property
    def is_missed(self) -> bool:
        """Whether it was measured and is not kept."""
        return self.share is not None and self.share > 1

    @property
    def text(self) -> str:
        """The row of the table."""
        how = "not measured" if self.share is None else "met"
        if self.is_missed:
            how = f"MISSED, {self.share:.1f} times the bound"
        return f"| {self.figure} | {self.bound} | {self.found} | {how} |"


def verdicts(measured: Measured) -> list[Verdict]:
    """Return the verdict of each bound; those of large jobs hold for the largest measured."""
    plans = [row for row in measured.plans if row.ranks == LARGEST]
    indexes = [row for row in measured.indexes if row.ranks == LARGEST]
    empty = [r for r in measured.rounds if r.what == "empty round" and r.ranks == RANKS]
    waits = [r for r in measured.rounds if r.what.startswith("all others wait")]
    saves = [row for row in measured.steady if row.ranks == LARGEST]
    # What a first save says besides, it says at each save.
    often = max((row.nbytes for row in saves), default=0.0)
    return [
        _worst(
            "empty round, 1,024 ranks", empty, lambda r: r.wall_seconds, ROUND_TARGET_SECONDS, "s",
        ),
        _worst("frames a rank in it", empty, lambda r: r.frames, FRAMES_TARGET, ""),
        _worst(
            "all others wait, of a core of rank 0", waits,
            lambda r: 100 * r.rank_0_seconds / r.wall_seconds, 100 * WAITING_TARGET, "%",
        ),
        _worst("first plan, CPU", plans, lambda r: r.seconds, SECONDS_TARGET, "s", _job),
        _worst("first plan, memory", plans, lambda r: r.mib, MIB_TARGET, "MiB", _job),
        _worst(
            "first save, through rank 0 for each rank", plans,
            lambda r: r.received + r.sent + often, BYTES_TARGET, "B", _job,
        ),
        *_steady(saves),
        _worst("index, for each chunk", indexes, lambda r: r.chunk_bytes, CHUNK_TARGET, "B"),
        _worst("root", indexes, lambda r: r.root_bytes / 1024, ROOT_TARGET / 1024, "KiB"),
        _worst(
            "manifest", indexes, lambda r: r.manifest_bytes / 1024, MANIFEST_TARGET / 1024, "KiB",
        ),
        *_load_rounds(measured.load_rounds),
        *_loads(measured.loads),
        *_requests(measured.requests),
    ]  # fmt: skip


def _steady(rows: Sequence[steady.Row]) -> list[Verdict]:
    save = "steady save"
    return [
        _worst(f"{save}, CPU of rank 0", rows, lambda r: r.seconds, steady.SECONDS_TARGET, "s"),
        _worst(f"{save}, memory of rank 0", rows, lambda r: r.mib, steady.MIB_TARGET, "MiB"),
        _worst(
            f"{save}, CPU of a rank", rows, lambda r: 1000 * r.rank_seconds,
            1000 * steady.RANK_TARGET, "ms",
        ),
        _worst(
            f"{save}, through rank 0 for each rank", rows, lambda r: r.nbytes,
            steady.BYTES_TARGET, "B",
        ),
    ]  # fmt: skip


def _loads(rows: Sequence[loads.Row]) -> list[Verdict]:
    def name(row: loads.Row) -> str:
        return f"({row.ranks:,} to {row.readers:,} ranks)"

    plan = "open and plan of a load"
    return [
        _worst(f"{plan}, CPU", rows, lambda r: r.seconds, loads.SECONDS_TARGET, "s", name),
        _worst(f"{plan}, memory", rows, lambda r: r.mib, loads.MIB_TARGET, "MiB", name),
        _worst(
            "load, bytes read for each wanted", rows, lambda r: r.read, loads.READ_TARGET, "", name
        ),
    ]


def _load_rounds(rows: Sequence[load_rounds.Row]) -> list[Verdict]:
    def name(row: load_rounds.Row) -> str:
        return f"({row.what}, {row.ranks} ranks)"

    return [
        _worst(
            "load, through rank 0 for each rank", rows, lambda r: r.nbytes,
            load_rounds.BYTES_TARGET, "B", name,
        ),
        _worst("load, rounds", rows, lambda r: r.rounds, load_rounds.ROUNDS_TARGET, "", name),
    ]  # fmt: skip


def _requests(rows: Sequence[requests.Row]) -> list[Verdict]:
    found = []
    for what, bound in requests.BOUNDS.items():
        mine = [row for row in rows if row.what == what]
        size = f"{requests.CHECKPOINTS:,} checkpoints of {3 * requests.RANKS:,} files"
        figure = f"requests, run of {size}: {what}"
        found.append(_worst(figure, mine, lambda row: row.requests, bound, ""))
    return found


def _worst(
    figure: str,
    rows: Sequence[T],
    value: Callable[[T], float],
    bound: float,
    unit: str,
    name: Callable[[T], str] = lambda _: "",
) -> Verdict:
    told = f"{bound:,.6g} {unit}".strip()
    if not rows:
        return Verdict(figure, told, "", None)
    worst = max(rows, key=value)
    amount = value(worst)
    shown = f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"
    found = f"{shown} {unit} {name(worst)}"
    return Verdict(figure, told, " ".join(found.split()), value(worst) / bound)


def _job(row: Plan) -> str:
    return f"({row.job})"


def panels(measured: Measured) -> dict[str, list[Curve]]:
    """Return the curves, by what they are of."""
    empty = [row for row in measured.rounds if row.what == "empty round"]
    return {
        "first plan, CPU s": _by(measured.plans, _of_job, lambda row: row.seconds),
        "first plan, MiB": _by(measured.plans, _of_job, lambda row: max(row.mib, 1.0)),
        "first save, B a rank": _by(measured.plans, _of_job, lambda row: row.received + row.sent),
        "empty round, s": [
            Curve("wall", [(row.ranks, row.wall_seconds) for row in empty]),
            Curve("CPU, rank 0", [(row.ranks, row.rank_0_seconds) for row in empty]),
        ],
        "empty round, B a rank": [Curve("both ways", [(row.ranks, row.nbytes) for row in empty])],
        "load, B a rank": _by(measured.load_rounds, lambda r: r.what, lambda r: r.nbytes),
        "other CPU s": [
            Curve("steady save, rank 0", [(row.ranks, row.seconds) for row in measured.steady]),
            Curve("plan of a load, to half as many", _halves(measured.loads)),
        ],
        "index, KiB": [
            Curve("root", [(row.ranks, row.root_bytes / 1024) for row in measured.indexes]),
            Curve("manifest", [(row.ranks, row.manifest_bytes / 1024) for row in measured.indexes]),
        ],
    }


def _halves(rows: Iterable[loads.Row]) -> list[tuple[int, float]]:
    return [(row.ranks, row.seconds) for row in rows if row.readers * 2 == row.ranks]


def _of_job(row: Plan) -> str:
    return row.job


def _by(
    rows: Iterable[_Row], name: Callable[[_Row], str], value: Callable[[_Row], float]
) -> list[Curve]:
    points: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        points.setdefault(name(row), []).append((row.ranks, value(row)))
    return [Curve(each, found) for each, found in points.items()]


def write(measured: Measured, page: Path = PAGE) -> None:
    """Write the page, and the plot beside it."""
    page.write_text(_page(measured))
    _draw(panels(measured), page.with_name(PICTURE))


_HEAD = """# Performance at scale

`make bench-scale` writes this page: the real rounds, planner, index, saves of a known structure,
plans of loads, and repository, on synthetic jobs of up to 16,384 ranks, on one machine of two
cores. Times were taken beside whatever else that machine did; CPU seconds and counts say more than
the clock. Each bound, and how it is kept:
"""

_BETWEEN = f"""
What is not measured here is said to be so, and is no promise. What a rank does itself in a steady
save, and plans of loads, are those of 7B, FSDP2; of loads four ranks are looked at, each reading
for itself. What a load says through rank 0 is of real processes, as many as one machine holds.
Requests are counted by pages of 1,000 names and deletions of 1,000 keys. Retention is that of a
process which has read the manifests before (the first after a restart reads each, several at
once), a deletion apart. A restore by one rank alone also lists the files of the checkpoint, 50
requests; several ranks each look at the sizes of some files.

![Every figure over the number of ranks]({PICTURE})

Both axes are logarithmic, and the number behind a name is its exponent: with which power of the
ranks the figure grows between the two largest jobs. What is the same for any number of ranks has 0,
what each rank adds to has 1.

## Curves
"""


def _page(measured: Measured) -> str:
    bounds = [each.text for each in verdicts(measured)]
    curves = [
        f"| {figure} | {curve.name} | {_points(curve)} | {_exponent(curve)} |"
        for figure, found in panels(measured).items()
        for curve in found
        if curve.points
    ]
    parts = [
        _HEAD,
        _table(["figure", "bound", "measured", "verdict"], bounds),
        _BETWEEN,
        _table(["figure", "of", "ranks: value", "exponent"], curves),
    ]
    return "\n".join(parts) + "\n"


def _table(head: Sequence[str], rows: Sequence[str]) -> str:
    return "\n".join([f"| {' | '.join(head)} |", f"|{'---|' * len(head)}", *rows])


def _points(curve: Curve) -> str:
    return ", ".join(f"{ranks:,}: {value:,.3g}" for ranks, value in curve.points)


def _exponent(curve: Curve) -> str:
    return "" if curve.exponent is None else f"{curve.exponent:.2f}"


def _draw(found: dict[str, list[Curve]], path: Path) -> None:
    figure = Figure(figsize=(17, 7.5), layout="constrained")
    drawn = {title: curves for title, curves in found.items() if any(c.points for c in curves)}
    for number, (title, curves) in enumerate(drawn.items(), 1):
        _draw_panel(figure.add_subplot(2, 4, number), title, curves)
    figure.savefig(path, dpi=80)


def _draw_panel(axes: Axes, title: str, curves: Sequence[Curve]) -> None:
    for curve in curves:
        ranks, values = [at for at, _ in curve.points], [value for _, value in curve.points]
        axes.plot(ranks, values, marker="o", markersize=4, label=curve.label)
    axes.set(title=title, xscale="log", yscale="log", xlabel="ranks")
    axes.grid(visible=True, which="major", alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
