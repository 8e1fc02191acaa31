"""Rounds of thousands of ranks, each with its own connection: `python -m benchmarks.scale.rounds`.

This process is rank 0 and nothing else. The other ranks are real coordinators, each on a thread and
a connection of its own, in a few processes: as many as a machine holds.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from statistics import median

from benchmarks.measure import say
from dist_ckpt.ranks.board import Board
from dist_ckpt.ranks.channels import Channel, Frame, framed, packed
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.hub import Hub
from dist_ckpt.ranks.rendezvous import Address, connect
from dist_ckpt.ranks.rounds import Deadline, Topic
from dist_ckpt.ranks.seals import SEAL_BYTES, Packed

RANKS = 1024
WAITING_RANKS = 4096
WAITING_SECONDS = 60.0

ROUND_TARGET_SECONDS = 1.0
FRAMES_TARGET = 8.0
WAITING_TARGET = 0.02

_PROCESSES = 4
_REPEATS = 5
_PATIENCE_SECONDS = 600.0
_STACK_BYTES = 256 << 10


@dataclass(frozen=True, slots=True)
class Row:
    """What one measurement cost.

    Attributes:
        what: was measured.
        ranks: how many took part.
        wall_seconds: how long it took.
        rank_0_seconds: of processor time, on rank 0.
        others_seconds: of processor time, on all other ranks together.
        frames: to and from rank 0, for each rank; the greeting of a rank, which is one more, is
            not counted.
        nbytes: of these, for each rank.
        is_met: whether it is within its bound; None without one.
    """

    what: str
    ranks: int
    wall_seconds: float
    rank_0_seconds: float
    others_seconds: float
    frames: float
    nbytes: float
    is_met: bool | None = None

    def text(self) -> str:
        """Return the row of the table."""
        verdict = "" if self.is_met is None else "met" if self.is_met else "MISSED"
        return (
            f"| {self.what} | {self.ranks} | {self.wall_seconds:.3f} | {self.rank_0_seconds:.3f} | "
            f"{self.others_seconds:.2f} | {self.frames:.2f} | {self.nbytes:.0f} | {verdict} |"
        )


class Count:
    """Frames and bytes that pass rank 0, in both directions."""

    def __init__(self) -> None:
        self.frames = 0
        self.nbytes = 0

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count while this lasts."""
        send, take = Channel.send, Board.take

        def counted_send(channel: Channel, frame: Packed) -> None:
            self.frames += 1
            self.nbytes += _on_the_wire(frame)
            send(channel, frame)

        def counted_take(board: Board, rank: int, frame: Frame) -> None:
            if rank:
                self.frames += 1
                self.nbytes += _on_the_wire(packed(frame))
            take(board, rank, frame)

        Channel.send = counted_send  # type: ignore[method-assign, assignment]
        Board.take = counted_take  # type: ignore[method-assign, assignment]
        try:
            yield
        finally:
            Channel.send = send  # type: ignore[method-assign]
            Board.take = take  # type: ignore[method-assign]


def _on_the_wire(frame: Packed) -> int:
    return len(framed(frame.body, bytes(SEAL_BYTES)))


class Others:
    """All ranks but rank 0, in a few processes."""

    def __init__(self, hub: Hub) -> None:
        """Connect them."""
        context = multiprocessing.get_context("spawn")
        address = Address(hostname="127.0.0.1", port=hub.port, secret=hub.secret.hex())
        self._processes: list[tuple[BaseProcess, Connection]] = []
        for number in range(_PROCESSES):
            ours, theirs = context.Pipe()
            ranks = range(1 + number, hub.world_size, _PROCESSES)
            process = context.Process(
                target=_be_ranks, args=(theirs, address, ranks, hub.world_size), daemon=True
            )
            process.start()
            self._processes.append((process, ours))
        self.hear()  # that they are there, with all that they import
        self.ask("connect", "")
        self.hear()

    def ask(self, what: str, key: str) -> None:
        """Ask all processes for something."""
        for _, pipe in self._processes:
            pipe.send((what, key))

    def hear(self) -> list[float]:
        """Return what they say when it is done: the processor time that they used so far."""
        found = []
        for _, pipe in self._processes:
            if not pipe.poll(_PATIENCE_SECONDS):
                raise TimeoutError("the other ranks do not come back")
            found.append(float(pipe.recv()))
        return found

    def seconds(self) -> float:
        """Return the processor time that they have used."""
        self.ask("cpu", "")
        return sum(self.hear())

    def end(self) -> None:
        """End them."""
        for process, pipe in self._processes:
            pipe.close()
            process.join()


def _be_ranks(pipe: Connection, address: Address, ranks: Sequence[int], world_size: int) -> None:
    threading.stack_size(_STACK_BYTES)
    members: list[JobCoordinator] = []
    pipe.send(0.0)
    while True:
        try:
            what, key = pipe.recv()
        except EOFError:
            return
        if what == "connect":
            until = time.monotonic() + _PATIENCE_SECONDS
            members = [
                JobCoordinator(connect(address, rank, world_size, until=until)) for rank in ranks
            ]
        elif what == "round":
            each_on_a_thread([_part(member, key) for member in members])
        pipe.send(time.process_time())


def _part(member: JobCoordinator, key: str) -> Callable[[], object]:
    deadline = Deadline.after(_PATIENCE_SECONDS)
    return lambda: member.round(Topic(key, key), b"", lambda _: b"", deadline=deadline)


def each_on_a_thread(works: Sequence[Callable[[], object]]) -> None:
    """Call each of `works` on a thread of its own; an error of one is an error of all."""
    errors: list[BaseException] = []

    def run(work: Callable[[], object]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(work,)) for work in works]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


@contextmanager
def job_of(ranks: int) -> Iterator[tuple[Hub, Others]]:
    """Have a job of so many ranks, all connected."""
    hub = Hub(ranks, loopback=True)
    others = Others(hub)
    try:
        yield hub, others
    finally:
        others.end()


def empty_rounds(hub: Hub, others: Others, count: Count, *, repeats: int = _REPEATS) -> Row:
    """Measure rounds in which nobody has anything to say; medians of those after the first."""
    leader, ranks = JobCoordinator(hub), hub.world_size
    walls, own, foreign, frames, nbytes = [], [], [], [], []
    for number in range(repeats + 1):
        before, counted = others.seconds(), (count.frames, count.nbytes)
        begun, used = time.perf_counter(), time.process_time()
        others.ask("round", f"round {number}")
        _part(leader, f"round {number}")()
        others.hear()
        walls.append(time.perf_counter() - begun)
        own.append(time.process_time() - used)
        foreign.append(others.seconds() - before)
        frames.append((count.frames - counted[0]) / (ranks - 1))
        nbytes.append((count.nbytes - counted[1]) / (ranks - 1))
    wall, each = median(walls[1:]), median(frames[1:])
    met = wall <= ROUND_TARGET_SECONDS and each <= FRAMES_TARGET if ranks == RANKS else None
    return Row(
        "empty round", ranks, wall, median(own[1:]), median(foreign[1:]), each,
        median(nbytes[1:]), met,
    )  # fmt: skip


def waiting(hub: Hub, others: Others, count: Count, seconds: float) -> Row:
    """Measure what it costs rank 0 that all others wait for it."""
    leader, ranks = JobCoordinator(hub), hub.world_size
    others.ask("round", "late")
    while len(hub.board.messages(0, "late")) < ranks - 1:
        time.sleep(0.1)
    counted = (count.frames, count.nbytes)
    begun, used = time.perf_counter(), time.process_time()
    time.sleep(seconds)
    wall, own = time.perf_counter() - begun, time.process_time() - used
    frames, nbytes = count.frames - counted[0], count.nbytes - counted[1]
    _part(leader, "late")()
    others.hear()
    return Row(
        "all others wait for rank 0", ranks, wall, own, 0.0, frames / (ranks - 1),
        nbytes / (ranks - 1), own <= WAITING_TARGET * wall,
    )  # fmt: skip


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print the table, and return its rows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=[4, 64, RANKS, WAITING_RANKS])
    parser.add_argument("--waiting-ranks", type=int, default=WAITING_RANKS)
    parser.add_argument("--seconds", type=float, default=WAITING_SECONDS)
    chosen = parser.parse_args(arguments)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    say(f"open files: {soft}, at most {hard}\n")
    say(
        "| what | ranks | wall s | CPU s, rank 0 | CPU s, others | frames a rank | bytes a rank | |"
    )
    say("|---|---|---|---|---|---|---|---|")
    found: list[Row] = []
    for ranks in sorted({*chosen.ranks, chosen.waiting_ranks}):
        count = Count()
        with count.counting():
            begun, used = time.perf_counter(), time.process_time()
            with job_of(ranks) as (hub, others):
                connected = Row(
                    "connecting, with the start of the processes", ranks,
                    time.perf_counter() - begun, time.process_time() - used, others.seconds(),
                    count.frames / (ranks - 1), count.nbytes / (ranks - 1),
                )  # fmt: skip
                measured = [connected, empty_rounds(hub, others, count)]
                if ranks == chosen.waiting_ranks:
                    measured.append(waiting(hub, others, count, chosen.seconds))
        for row in measured:
            say(row.text())
        found += measured
    return found


if __name__ == "__main__":
    sys.exit(sum(row.is_met is False for row in rows(sys.argv[1:])))
