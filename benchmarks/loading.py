"""Loads against limits and peers: `make bench-loading`, or `python -m benchmarks.loading`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from benchmarks import load_jobs, load_planning, load_s3
from benchmarks.libraries import available
from benchmarks.load_alone import run_alone
from benchmarks.loads import NAMES, OURS, SMALL, SMALL_BYTES, Way, make
from benchmarks.local import drop_cache, read_raw, write_raw
from benchmarks.measure import Case, interleave, say, table
from benchmarks.s3 import environment_of
from benchmarks.sections import run_sections
from benchmarks.workload import State
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.options import LoadOptions
from dist_ckpt.storage.disk import aligned_buffer
from tests.services.s3 import s3_service

COLD_TARGET = 1.3
REPLICAS_TARGET = 1.05
RESHARD_TARGET = 1.10
S3_TARGET = 1.15
MEMORY_EXTRA_BYTES = 64 << 20
PLANNING_TARGET_SECONDS = 2.0

_MIB = 1 << 20
_SECTOR_BYTES = 4096
_S3_BYTES = 512 << 20
_LIMIT = "raw limit"


@dataclass(frozen=True, slots=True)
class Figure:
    """One line of the table at the end.

    Attributes:
        what: what is measured, against what.
        value: the ratio, or seconds.
        target: the most that it may be.
    """

    what: str
    value: float
    target: float

    @property
    def met(self) -> bool:
        """Whether the target is kept to."""
        return self.value <= self.target


Section = Callable[[Path, argparse.Namespace], list[Figure]]


def main(arguments: list[str]) -> int:
    """Measure what `arguments` choose; return 0 when all targets are met."""
    sections: dict[str, Section] = {
        "cold": _cold,
        "memory": _memory,
        "ranks": _ranks,
        "s3": _s3,
        "planning": _planning,
    }
    found = run_sections(arguments, sections, description=__doc__, libraries=NAMES)
    figures = [figure for each in found for figure in each]
    _summarise(figures)
    return 0 if all(each.met for each in figures) else 1


def _summarise(figures: list[Figure]) -> None:
    width = max((len(each.what) for each in figures), default=0)
    lines = [f"\n{'':{width}}  measured   at most"]
    for each in figures:
        verdict = "met" if each.met else "MISSED"
        lines.append(f"{each.what:{width}}  {each.value:8.2f}  {each.target:8.2f}  {verdict}")
    say("\n".join(lines))


def _cold(place: Path, chosen: argparse.Namespace) -> list[Figure]:
    """Loads of one process with nothing in the page cache, in turn, each one checked."""
    state = State(chosen.scale)
    ways = _saved(place, state, available(NAMES)[0])
    raw = aligned_buffer(-(-state.nbytes // _SECTOR_BYTES) * _SECTOR_BYTES)
    torch.frombuffer(raw, dtype=torch.uint8).random_()
    write_raw(str(place / "raw"), raw)
    expected = _digests(state)

    def before() -> None:
        for tensor in state.tensors():
            tensor.zero_()
        drop_cache(place)

    def check() -> None:
        if _digests(state) != expected:
            raise AssertionError("what was loaded is not what was saved")

    def read() -> None:
        read_raw(str(place / "raw"), raw)

    cases = [Case(_LIMIT, read, before=before)]
    cases += [Case(name, way.load, before=before, after=check) for name, way in ways.items()]
    samples = interleave(cases, repeats=chosen.repeats)
    say("")
    count = len(state.tensors())
    title = f"Cold load, 1 process, {count} tensors"
    ratios = table(title, samples, nbytes=state.nbytes, limits=[_LIMIT])
    return [Figure("cold load, 1 rank, verified / raw limit", ratios[OURS], COLD_TARGET)]


def _saved(place: Path, state: State, names: list[str]) -> dict[str, Way]:
    """Return the ways to load, each with its checkpoint written."""
    ways = {name: make(name, place / str(number), state) for number, name in enumerate(names)}
    for way in ways.values():
        way.save()
    return ways


def _digests(state: State) -> list[str]:
    return [
        bytes_digest(each.reshape(-1).view(torch.uint8).numpy().data) for each in state.tensors()
    ]


def _memory(place: Path, chosen: argparse.Namespace) -> list[Figure]:
    """Each way in a process of its own: memory above the tensors that are loaded into."""
    names = available(NAMES)[0]
    state = State(chosen.scale)
    _saved(place, state, names)
    nbytes = state.nbytes
    del state
    say(f"\nHost memory above the target, alone in a process, {nbytes / _MIB:.0f} MiB of state")
    figures: list[Figure] = []
    allowed = {OURS: LoadOptions().in_flight_bytes, SMALL: SMALL_BYTES}
    for name in [OURS, SMALL, *names[1:]]:
        folder = place / str(names.index(OURS if name == SMALL else name))
        drop_cache(place)
        extra = run_alone(name, folder, scale=chosen.scale)
        say(f"  {name:28} {extra / _MIB:7.0f} MiB  {extra / nbytes:5.2f} x state")
        if name in allowed:
            most = allowed[name] + MEMORY_EXTRA_BYTES
            title = f"memory above the target / {most / _MIB:.0f} MiB ({name})"
            figures.append(Figure(title, extra / most, 1.0))
    return figures


def _ranks(place: Path, chosen: argparse.Namespace) -> list[Figure]:
    """How many bytes all ranks together read from storage."""
    say(f"\nBytes read by all ranks together / bytes wanted\n  {'':28} {OURS:>9}  torch DCP")
    found = load_jobs.replicas(place / "replicas", chosen.scale / 4)
    title = f"DDP at {load_jobs.RANKS}"
    rows = [(title, found, REPLICAS_TARGET)]
    for number, case in enumerate(load_jobs.RESHARDS):
        found = load_jobs.reshard(place / str(number), case)
        rows.append((case.name, found, RESHARD_TARGET))
    for name, each, _ in rows:
        say(f"  {name:28} {each.ours / each.wanted:9.3f}  {each.stock / each.wanted:9.3f}")
    return [
        Figure(f"bytes read / wanted, {name}", each.ours / each.wanted, target)
        for name, each, target in rows
    ]


def _s3(place: Path, chosen: argparse.Namespace) -> list[Figure]:
    """A load from an S3 server: a given one, or one that is started and stopped here."""
    with s3_service() as service, environment_of(service):
        if service.kind == "moto":
            say(
                "\nNOT MEASURED: a load from S3. No server is given or installed: run "
                "tools/install_services.py, or set DIST_CKPT_TEST_S3_URL"
            )
            return []
        nbytes = round(_S3_BYTES * chosen.scale)
        samples = load_s3.measure(service, nbytes, repeats=chosen.repeats)
    title = f"\nLoad from S3 ({service.kind})"
    ratios = table(title, samples, nbytes=nbytes, limits=load_s3.LIMITS)
    return [Figure("load from S3 / ranged reads", ratios[OURS], S3_TARGET)]


def _planning(place: Path, chosen: argparse.Namespace) -> list[Figure]:
    """From the bytes of an index to the ranges that one rank reads."""
    tensors = max(1, round(load_planning.TENSORS * chosen.scale))
    chunks = max(1, round(load_planning.CHUNKS * chosen.scale))
    data = load_planning.index_bytes(tensors, chunks)
    say(
        f"\nPlanning, {tensors} tensors x {chunks} chunks, an index of {len(data) / _MIB:.1f} MiB, "
        f"medians of {chosen.repeats}"
    )
    figures = []
    for name, plan in load_planning.shares(data).items():
        seconds = median(plan() for _ in range(chosen.repeats))
        say(f"  {name:28} {seconds:7.3f} s")
        figures.append(Figure(f"seconds to plan, {name}", seconds, PLANNING_TARGET_SECONDS))
    return figures


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
