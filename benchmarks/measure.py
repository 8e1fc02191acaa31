"""Cases that are run in turn, and the table of their medians."""

from __future__ import annotations

import multiprocessing
import re
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TypeVar

ResultT = TypeVar("ResultT")

_MIB = 1 << 20
_GIB = 1 << 30


def _nothing() -> None:
    pass


@dataclass(frozen=True, slots=True)
class Case:
    """One thing to measure: `run` is timed, `before` and `after` are not."""

    name: str
    run: Callable[[], object]
    before: Callable[[], object] = _nothing
    after: Callable[[], object] = _nothing


@dataclass(slots=True)
class Samples:
    """What the runs of one case took: seconds, and bytes of memory above what there was before."""

    seconds: list[float] = field(default_factory=list)
    extra_bytes: list[int] = field(default_factory=list)


def interleave(cases: Sequence[Case], *, repeats: int) -> dict[str, Samples]:
    """Run each of `cases` once to warm up, then `repeats` times in turn, to and fro.

    A disk or a machine that gets slower or faster meanwhile does so for all of them.
    """
    samples = {case.name: Samples() for case in cases}
    for number in range(repeats + 1):
        for case in cases if number % 2 else reversed(cases):
            case.before()
            resident = _reset_peak()
            begun = time.perf_counter()
            case.run()
            seconds = time.perf_counter() - begun
            extra_bytes = max(_status_bytes("VmHWM") - resident, 0)
            case.after()
            if number:
                samples[case.name].seconds.append(seconds)
                samples[case.name].extra_bytes.append(extra_bytes)
    return samples


def table(
    title: str, samples: Mapping[str, Samples], *, nbytes: int, limits: Sequence[str]
) -> dict[str, float]:
    """Print the medians of `samples`, and their ratio to the fastest of `limits`; return those."""
    best = min(median(samples[name].seconds) for name in limits)
    ratios = {name: median(each.seconds) / best for name, each in samples.items()}
    width = max(map(len, samples))
    lines = [f"{title}, {nbytes / _GIB:.2f} GiB, medians of {len(samples[limits[0]].seconds)}"]
    lines.append(f"  {'':{width}}  seconds   (min to max)    GiB/s  ratio  extra MiB")
    for name, each in samples.items():
        middle = median(each.seconds)
        lines.append(
            f"  {name:{width}}  {middle:7.3f}  ({min(each.seconds):.3f} to {max(each.seconds):.3f})"
            f"  {nbytes / _GIB / middle:5.2f}  {ratios[name]:5.2f}"
            f"  {max(each.extra_bytes) / _MIB:9.0f}"
        )
    say("\n".join(lines))
    return ratios


def verdict(what: str, ratio: float, *, target: float) -> bool:
    """Print whether `ratio` keeps to `target`; return it."""
    met = ratio <= target
    say(f"  {what}: {ratio:.2f}, target {target:.2f}: {'met' if met else 'MISSED'}\n")
    return met


def say(text: str) -> None:
    """Print `text` at once, for those who wait."""
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep the tables whole: stock DCP warns that there is one process, which is meant here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def in_own_process(measure: Callable[..., ResultT], *arguments: object) -> ResultT:
    """Return what `measure` returns in a new process, whose peak of memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as alone:
        return alone.apply(measure, arguments)


def peak_mib() -> float:
    """Return the most memory that this process ever had, in MiB."""
    # Not that of `getrusage`, which is at least what the parent had when it started this process.
    return _status_bytes("VmHWM") / _MIB


def _reset_peak() -> int:
    """Begin to look for the peak of the memory anew; return what is used now, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _status_bytes("VmRSS")


def _status_bytes(name: str) -> int:
    found = re.search(rf"{name}:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(found[1]) * 1024 if found else 0
