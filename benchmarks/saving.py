"""Saves against limits and peers: `make bench-saving`, or `python -m benchmarks.saving`."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

from benchmarks import jobs
from benchmarks.alone import EARLY_SAVES, run_alone
from benchmarks.libraries import available
from benchmarks.local import write_raw
from benchmarks.measure import say, verdict
from benchmarks.peers import BACKGROUND, NAMES, OURS, STOCK, Peer, empty, make, settle
from benchmarks.sections import run_sections
from benchmarks.under_dcp import under_dcp
from benchmarks.workload import Loop, State
from dist_ckpt.storage.disk import aligned_buffer

STALL_TARGET = 1.15
FIRST_TARGET = 1.5
SHARE_TARGET = 0.27
DURABLE_TARGET = 1.25
MEMORY_TARGET = 1.05
MEMORY_EXTRA_BYTES = 128 << 20
GROWTH_BYTES = 32 << 20
SLOWED_TARGET = 1.0
SLOWED_AIM = 0.5
EXCHANGE_TARGET = 1.5

_MIB = 1 << 20
_SECTOR_BYTES = 4096
_LATE_SAVES = 20
_LIMITS = "limits"
_TRAINING_REPEATS = 3


@dataclass(slots=True)
class _Times:
    """Seconds of each run of one way to save."""

    stall: list[float] = field(default_factory=list)
    durable: list[float] = field(default_factory=list)


def main(arguments: list[str]) -> int:
    """Measure what `arguments` choose; return 0 when all targets are met."""
    sections: dict[str, Callable[[Path, argparse.Namespace], bool]] = {
        "stall": _stall,
        "alone": _alone,
        "training": _training,
        "ranks": _ranks,
        "dcp": under_dcp,
    }
    met = run_sections(arguments, sections, description=__doc__, libraries=NAMES)
    return 0 if all(met) else 1


def _stall(place: Path, chosen: argparse.Namespace) -> bool:
    """Warm saves of one process, in turn: how long the step waits, and until all is durable."""
    state = State(chosen.scale)
    copy, raw = _memcpy(state), _raw_write(place / "raw", state.nbytes)
    names = available(NAMES)[0]
    folders = {name: place / str(number) for number, name in enumerate(names)}
    for folder in (place / "raw", *folders.values()):
        folder.mkdir()
    peers = {name: make(name, folders[name], state) for name in names}
    times = {name: _Times() for name in (_LIMITS, *names)}
    for number in range(chosen.repeats + 1):
        # To and fro: a machine that gets slower meanwhile does so for all. The limits are next to
        # this package, before it and after it in turn.
        for name in [_LIMITS, *names] if number % 2 else [*names[::-1], _LIMITS]:
            if name == _LIMITS:
                stall, durable = copy(), raw()
            else:
                stall, durable = _save(peers[name], number, folders[name])
            if number:  # the first is to warm up
                times[name].stall.append(stall)
                times[name].durable.append(durable)
    for peer in peers.values():
        peer.close()
    ratios = _print_times(state, times, chosen.repeats)
    met = verdict("stall of a warm save against a memcpy", ratios[0], target=STALL_TARGET)
    return met & verdict("until durable against the raw limit", ratios[1], target=DURABLE_TARGET)


def _save(peer: Peer, number: int, folder: Path) -> tuple[float, float]:
    begun = time.perf_counter()
    wait = peer.start(number)
    stall = time.perf_counter() - begun
    wait()
    settle(folder)
    durable = time.perf_counter() - begun
    empty(folder)
    return stall, durable


def _memcpy(state: State) -> Callable[[], float]:
    """Return what copies every tensor of `state` into one buffer that was touched before."""
    tensors = state.tensors()
    buffer = torch.frombuffer(aligned_buffer(state.nbytes), dtype=torch.float32).zero_()
    copies: list[torch.Tensor] = []
    start = 0
    for each in tensors:
        copies.append(buffer[start : start + each.numel()].view(each.shape))
        start += each.numel()

    def run() -> float:
        begun = time.perf_counter()
        for target, source in zip(copies, tensors, strict=True):
            target.copy_(source)
        return time.perf_counter() - begun

    return run


def _raw_write(folder: Path, nbytes: int) -> Callable[[], float]:
    """Return what writes as many bytes as fast as the disk takes them."""
    data = aligned_buffer(-(-nbytes // _SECTOR_BYTES) * _SECTOR_BYTES)
    torch.frombuffer(data, dtype=torch.uint8).random_()

    def run() -> float:
        begun = time.perf_counter()
        write_raw(str(folder / "raw"), data)
        seconds = time.perf_counter() - begun
        (folder / "raw").unlink()
        return seconds

    return run


def _print_times(state: State, times: dict[str, _Times], repeats: int) -> tuple[float, float]:
    """Print the table of warm saves; return the two ratios of this package to their limits."""
    limits = times.pop(_LIMITS)
    copy, raw = median(limits.stall), median(limits.durable)
    title = f"Warm saves, 1 process, {state.nbytes / 1e9:.2f} GB in {len(state.tensors())} tensors"
    lines = [
        f"\n{title}, medians of {repeats}",
        f"  {'':28} stall s  x memcpy   durable s  x limit",
        f"  {'memcpy':28} {copy:7.3f}",
        f"  {'raw write':28} {'':7}  {'':8}   {raw:9.3f}",
    ]
    for name, each in times.items():
        stall, durable = median(each.stall), median(each.durable)
        lines.append(
            f"  {name:28} {stall:7.3f}  {stall / copy:8.2f}   {durable:9.3f}  {durable / raw:7.2f}"
        )
    say("\n".join(lines))
    ours = times[OURS]
    return median(ours.stall) / copy, median(ours.durable) / raw


def _alone(place: Path, chosen: argparse.Namespace) -> bool:
    """Each way in a process of its own: the first save, and memory."""
    say(
        "\nAlone in a process: first and warm stall, and memory above the state\n"
        f"  {'':28} first s   warm s  first/warm   after {EARLY_SAVES} MiB  x state  "
        f"after {_LATE_SAVES} MiB"
    )
    found = {}
    for name in available(BACKGROUND)[0]:
        folder = Path(tempfile.mkdtemp(dir=place))
        # Only of this package it is claimed that twenty saves take no more than three.
        saves = _LATE_SAVES if name == OURS else EARLY_SAVES + 1
        each = found[name] = run_alone(name, folder, scale=chosen.scale, saves=saves)
        late = f"{each.late_bytes / _MIB:9.0f}" if name == OURS else ""
        say(
            f"  {name:28} {each.first_seconds:7.3f}  {each.warm_seconds:7.3f}"
            f"  {each.first_seconds / each.warm_seconds:10.2f}   {each.early_bytes / _MIB:11.0f}"
            f"  {each.early_bytes / each.state_bytes:7.2f}  {late}"
        )
    ours = found[OURS]
    allowed = MEMORY_TARGET * ours.state_bytes + MEMORY_EXTRA_BYTES
    first = ours.first_seconds / ours.warm_seconds
    met = verdict("first save against a warm one", first, target=FIRST_TARGET)
    met &= verdict(
        f"memory above the state against {MEMORY_TARGET} x the state + 128 MiB",
        ours.late_bytes / allowed,
        target=1.0,
    )
    growth = (ours.late_bytes - ours.early_bytes) / GROWTH_BYTES
    return met & verdict("growth until the 20th save against 32 MiB", growth, target=1.0)


def _training(place: Path, chosen: argparse.Namespace) -> bool:
    """What a background save takes from training steps, by the end of a fixed number of them."""
    state, loop = State(chosen.scale), Loop(chosen.scale)
    names = available(BACKGROUND)[0]
    folders = {name: place / str(number) for number, name in enumerate(names)}
    for folder in folders.values():
        folder.mkdir()
    peers = {name: make(name, folders[name], state) for name in names}
    loop.steps(5)
    # As many as the slowest of them is expected to be busy for, and some more.
    steps = max(5, round(6 * chosen.scale / median(loop.steps(5))))
    free: list[float] = []
    lost: dict[str, list[float]] = {name: [] for name in names}
    repeats = min(chosen.repeats, _TRAINING_REPEATS)
    for number in range(repeats + 1):
        alone = sum(loop.steps(steps))
        for name in names if number % 2 else names[::-1]:
            wait = peers[name].start(number)
            seconds = sum(loop.steps(steps))
            wait()
            empty(folders[name])
            if number:
                lost[name].append(seconds - alone)
        if number:
            free.append(alone)
    for peer in peers.values():
        peer.close()
    say(
        f"\nTraining beside a save, {steps} steps that take {median(free):.2f} s by themselves, "
        f"medians of {repeats}\n  {'':28} seconds lost  x stock"
    )
    stock = max(median(lost[STOCK]), 1e-3)
    for name in names:
        seconds = median(lost[name])
        say(f"  {name:28} {seconds:12.3f}  {seconds / stock:7.2f}")
    ratio = max(median(lost[OURS]), 0.0) / stock
    met = verdict("time lost against stock async_save", ratio, target=SLOWED_TARGET)
    verdict("the aim", ratio, target=SLOWED_AIM)
    return met


def _ranks(place: Path, chosen: argparse.Namespace) -> bool:
    """Four ranks: each one's share of a replicated state, and what they say to one another."""
    say(f"\n{jobs.RANKS} ranks that hold one state (DDP): the largest share of a rank")
    found = jobs.shares(place / "shares", chosen.scale / 20)
    for name, share in found.items():
        say(f"  {name:28} staged {share.staged:6.1%}  written {share.written:6.1%}")
    worst = max(found[OURS].staged, found[OURS].written)
    met = verdict("largest share of the state", worst, target=SHARE_TARGET)
    few, many = (jobs.exchange(place / f"exchange-{n}", n) for n in (150, 15_000))
    say(f"Exchange between {jobs.RANKS} ranks in a steady save")
    for tensors, each in ((150, few), (15_000, many)):
        say(f"  {tensors:6} tensors: {each.nbytes:6} bytes, {each.seconds * 1e3:7.2f} ms")
    met &= verdict("bytes, 15,000 tensors against 150", many.nbytes / few.nbytes, target=1.1)
    return met & verdict(
        "time, 15,000 tensors against 150", many.seconds / few.seconds, target=EXCHANGE_TARGET
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
