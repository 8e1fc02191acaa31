"""Reads what all ranks want of a checkpoint: each byte once, verified, into the live tensors."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Literal, TypeVar

import msgspec
import numpy as np
import torch.distributed as dist

from dist_ckpt.format.boxes import Box
from dist_ckpt.loading.exchange import (
    PAGE_BYTES,
    Extent,
    cost,
    place_extents,
    private_group,
    share,
    swap,
)
from dist_ckpt.loading.fetching import (
    MAX_GAP_BYTES,
    BounceBuffers,
    BounceMemory,
    Fetcher,
)
from dist_ckpt.loading.filling import ReadTargets
from dist_ckpt.loading.ranges import SECTOR_BYTES, Files, Ranges, cut
from dist_ckpt.loading.wanted import Wanted
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Decide, Topic, on_every_rank
from dist_ckpt.repository.source import Source

Exchange = Literal["auto", "always", "never"]

ResultT = TypeVar("ResultT")

# What one rank reads for several at a time: small enough to even out what ranks read.
_EXTENT_BYTES = 4 << 20
# Bytes that nobody wants, inside of a chunk, above which they are stepped over.
_MAX_GAP_BYTES = 1 << 20
# With "auto", what may be read in vain for each byte that is wanted by somebody.
_WORTH = 0.05


@dataclass(frozen=True, slots=True)
class ReadOptions:
    """How to read.

    Attributes:
        verify: whether every byte is compared with its digest, where there are digests.
        exchange: whether ranks read what several of them want once, and send it to one another.
            "auto": where that saves more than a twentieth of all that is wanted. What it saves is
            work of the storage, which all ranks of all hosts share; what it costs is network, of
            which each host brings its own.
        in_flight_bytes: the most host memory to use at a time, above that of the targets.
        members: the ranks of the job in the default process group; None for all of it.
    """

    verify: bool = True
    exchange: Exchange = "auto"
    in_flight_bytes: int = 256 << 20
    members: Sequence[int] | None = None


@dataclass(frozen=True, slots=True)
class ReadResult:
    """What one rank read.

    Attributes:
        nbytes_read: bytes that this rank read from storage.
        nbytes_wanted: bytes of the boxes that it wanted.
        nbytes_exchanged: bytes that it received from other ranks.
        exchanged: whether ranks sent one another what several wanted.
        why: what that was decided by.
        seconds: by phase: `plan`, `read`, `exchange`.
    """

    nbytes_read: int
    nbytes_wanted: int
    nbytes_exchanged: int
    exchanged: bool
    why: str
    seconds: Mapping[str, float]


class _Needs(msgspec.Struct, frozen=True, array_like=True):
    """What a rank needs: two columns of int64, little-endian, and what the call was told."""

    start: bytes
    stop: bytes
    exchange: Exchange

    @property
    def ranges(self) -> Ranges:
        return Ranges(np.frombuffer(self.start, "<i8"), np.frombuffer(self.stop, "<i8"))


class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """Whether to exchange, and then the needs of each group and the group of each rank."""

    exchanged: bool
    why: str
    needs: list[_Needs] = []
    group_of: list[int] = []


@dataclass(frozen=True, slots=True)
class _Plan:
    """What this rank is going to do."""

    files: Files
    filling: ReadTargets
    fetcher: Fetcher


@dataclass(slots=True)
class _Counts:
    read: int = 0
    received: int = 0
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def clock(self, phase: str) -> Iterator[None]:
        begun = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - begun


def read_targets(
    source: Source,
    wanted: Sequence[Wanted],
    options: ReadOptions,
    *,
    coordinator: Coordinator,
    topic: Topic,
    deadline: Deadline,
    memory: BounceMemory | None = None,
) -> ReadResult:
    """Fill the memory of `wanted` on every rank; a collective call.

    Args:
        source: the checkpoint, the same on all ranks.
        wanted: what this rank wants; it may be nothing.
        options: the same on all ranks.
        coordinator: the way to the other ranks.
        topic: names the rounds of this.
        deadline: when to give up.
        memory: for bytes under way, if some is being made ready already; it may be released.

    Raises:
        CheckpointError: the same on every rank; tensors may be half filled.
    """
    reading = _Reading(
        source, options, coordinator, topic, deadline=deadline, memory=memory or BounceMemory()
    )
    return reading.run(wanted)


def boxes_of(wanted: Iterable[Wanted]) -> list[tuple[int, Box]]:
    """Return the wanted boxes as `Source.index_of` takes them."""
    return [(each.tensor, each.local.held.box) for each in wanted]


class _Reading:
    """One load of bytes on one rank."""

    def __init__(
        self,
        source: Source,
        options: ReadOptions,
        coordinator: Coordinator,
        topic: Topic,
        *,
        deadline: Deadline,
        memory: BounceMemory,
    ) -> None:
        self._memory = memory
        self._source = source
        self._options = options
        self._coordinator = coordinator
        self._topic = topic
        self._deadline = deadline
        self._counts = _Counts()

    def run(self, wanted: Sequence[Wanted]) -> ReadResult:
        with self._counts.clock("plan"):
            plan, data = self._together(
                "plan",
                lambda: self._plan(wanted),
                message=lambda plan: _encode(self._needs(plan), self._options.exchange),
                decide=_decide,
            )
        answer = msgspec.msgpack.decode(data, type=_Answer)
        if answer.exchanged:
            self._exchange(plan, answer)
        else:
            with self._counts.clock("read"):
                nbytes, _ = self._together("read", plan.fetcher.fetch_all)
            self._counts.read = nbytes
        return ReadResult(
            self._counts.read,
            plan.filling.nbytes_wanted,
            self._counts.received,
            answer.exchanged,
            answer.why,
            self._counts.seconds,
        )

    def _plan(self, wanted: Sequence[Wanted]) -> _Plan:
        verify = self._options.verify and self._source.verified
        index = self._source.index_of(boxes_of(wanted))
        files = Files.of(index, apart_bytes=MAX_GAP_BYTES, verify=verify)
        filling = ReadTargets(
            index, wanted, files, max_gap_bytes=_MAX_GAP_BYTES if verify else SECTOR_BYTES
        )
        fetcher = Fetcher(
            self._source,
            files,
            filling,
            verify=verify,
            in_flight_bytes=self._options.in_flight_bytes,
            memory=self._memory,
        )
        return _Plan(files, filling, fetcher)

    def _needs(self, plan: _Plan) -> Ranges:
        """Return what this rank needs, cut into what one rank may read for several at a time."""
        # Of what a window holds, each rank should have a share to read.
        share_bytes = self._options.in_flight_bytes // max(2, self._coordinator.world_size)
        extent_bytes = min(_EXTENT_BYTES, max(share_bytes, plan.files.largest_unit))
        return cut(plan.filling.needs, most_bytes=extent_bytes, begin=plan.files.begin)

    def _exchange(self, plan: _Plan, answer: _Answer) -> None:
        """Read what falls to this rank, and get the rest from the others, window by window."""
        rank, limit = self._coordinator.rank, self._options.in_flight_bytes
        sharing = share(
            [each.ranges for each in answer.needs],
            answer.group_of,
            window_bytes=limit,
        )
        mine = [[each for each in window if rank in each.ranks] for window in sharing.windows]
        with ExitStack() as stack:
            with self._counts.clock("exchange"):
                group, _ = self._together(
                    "connect",
                    lambda: stack.enter_context(
                        private_group(self._deadline, self._options.members)
                    ),
                )
            with self._counts.clock("read"):
                # Not over gaps: what others need of them comes with the windows, once.
                nbytes, _ = self._together(
                    "alone", lambda: plan.fetcher.fetch(sharing.alone[rank], max_gap_bytes=0)
                )
            self._counts.read += nbytes
            # The windows take as much as is allowed.
            self._memory.release()
            size = max((place_extents(extents)[-1] for extents in mine), default=0)
            buffers = BounceBuffers(1, size, devices=plan.filling.devices)
            for number, extents in enumerate(mine):
                buffer = buffers.take()
                with buffers.using(buffer):
                    self._window(plan, group, number, (extents, buffer.memory))
            # After the last buffer is free again: what went to a device is there by then.
            self._together("filled", plan.filling.check_filled)

    def _window(
        self,
        plan: _Plan,
        group: dist.ProcessGroup,
        number: int,
        window: tuple[Sequence[Extent], memoryview],
    ) -> None:
        extents, memory = window
        rank = self._coordinator.rank
        placed = list(zip(place_extents(extents), extents, strict=False))
        views = [memory[start : start + extent.nbytes] for start, extent in placed]
        own = [
            (extent.start, extent.nbytes, memory[start - start % PAGE_BYTES :])
            for start, extent in placed
            if extent.reader == rank
        ]

        def exchange() -> None:
            self._counts.received += swap(group, rank, extents, views)
            for extent, view in zip(extents, views, strict=True):
                plan.filling.fill(extent.start, view)

        with self._counts.clock("read"):
            # Nobody sends or receives before all have read: a rank that failed would be waited for.
            nbytes, _ = self._together(f"window-{number}", lambda: plan.fetcher.fetch_into(own))
        self._counts.read += nbytes
        with self._counts.clock("exchange"):
            self._together(f"swap-{number}", exchange)

    def _together(
        self,
        phase: str,
        work: Callable[[], ResultT],
        *,
        message: Callable[[ResultT], bytes] = lambda _: b"",
        decide: Decide = lambda _: b"",
    ) -> tuple[ResultT, bytes]:
        """Do `work`; return its result and rank 0's answer when it succeeded on every rank."""
        return on_every_rank(
            self._coordinator,
            self._topic.phase(phase),
            work,
            deadline=self._deadline,
            message=message,
            decide=decide,
        )


def _encode(needs: Ranges, exchange: Exchange) -> bytes:
    start, stop = (column.astype("<i8").tobytes() for column in (needs.start, needs.stop))
    return msgspec.msgpack.encode(_Needs(start, stop, exchange))


def _decide(messages: Sequence[bytes]) -> bytes:
    """Rank 0: compare the needs of all ranks, equal ones once."""
    distinct = list(dict.fromkeys(messages))
    numbers = {message: number for number, message in enumerate(distinct)}
    group_of = [numbers[message] for message in messages]
    needs = [msgspec.msgpack.decode(message, type=_Needs) for message in distinct]
    apart, once = cost([each.ranges for each in needs], group_of)
    exchanged, why = decide_exchange(needs[0].exchange, apart_bytes=apart, once_bytes=once)
    answer = _Answer(exchanged, why, needs, group_of) if exchanged else _Answer(exchanged, why)
    return msgspec.msgpack.encode(answer)


def decide_exchange(exchange: Exchange, *, apart_bytes: int, once_bytes: int) -> tuple[bool, str]:
    """Decide whether ranks exchange what they read, and say why.

    Args:
        exchange: what the caller asked for.
        apart_bytes: read by all ranks together when each reads what it needs.
        once_bytes: read by all ranks together when each byte is read once.
    """
    saved = apart_bytes - once_bytes
    told = f"{saved} of {apart_bytes} bytes are needed by more than one rank"
    if not saved:
        return False, "no byte is needed by more than one rank"
    if exchange != "auto":
        return exchange == "always", f"exchange={exchange!r}; {told}"
    if not dist.is_gloo_available():
        return False, f"this torch was built without gloo; {told}"
    return saved > _WORTH * once_bytes, f"{told}; above {_WORTH:.0%} they are exchanged"
