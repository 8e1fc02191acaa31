"""Reads what all ranks want of a checkpoint: each byte once, verified, into the live tensors."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Self, TypeVar

import msgspec
import numpy as np
import torch.distributed as dist

from dist_ckpt.decodable import decodable
from dist_ckpt.format.index import Box
from dist_ckpt.loading.exchange import Exchange, Lost, Peers, check_nobody_lost
from dist_ckpt.loading.fetching import MAX_GAP_BYTES, BounceMemory, Counts, Fetcher
from dist_ckpt.loading.filling import ReadTargets, Wanted
from dist_ckpt.loading.ranges import SECTOR_BYTES, Files, Ranges, cut
from dist_ckpt.loading.schedule import CanRead, Survey, cost, group, survey
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Decide, Topic, on_every_rank
from dist_ckpt.repository.on_hosts import HostsStore
from dist_ckpt.repository.source import Source

Rule = Literal["auto", "always", "never"]

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
    exchange: Rule = "auto"
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


@decodable
class _Request(msgspec.Struct, frozen=True, array_like=True):
    """What a rank needs, and whether it has something to do before any tensor is filled."""

    needs: Survey
    asks: bool


@decodable
class _Answer(msgspec.Struct, frozen=True, array_like=True):
    """Whether to exchange, why, whether any rank asks first, and the group of each rank."""

    exchanged: bool
    why: str
    asks: bool
    group_of: bytes = b""


@dataclass(frozen=True, slots=True)
class _Plan:
    """What this rank is going to do."""

    files: Files
    sizes: Sequence[int]
    filling: ReadTargets
    fetcher: Fetcher


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
    with JointRead(
        source, options, coordinator, topic, deadline=lambda: deadline, memory=memory
    ) as reading:
        reading.agree(lambda: wanted)
        reading.begin()
        return reading.read()


def boxes_of(wanted: Iterable[Wanted]) -> list[tuple[int, Box]]:
    """Return the wanted boxes as `Source.index_of` takes them."""
    return [(each.tensor, each.local.held.box) for each in wanted]


class JointRead:
    """One load of bytes on one rank: at most three rounds, whatever there is to read.

    `agree`, `begin`, `read`, each called by all ranks; the connections between them end with the
    context.
    """

    def __init__(
        self,
        source: Source,
        options: ReadOptions,
        coordinator: Coordinator,
        topic: Topic,
        *,
        deadline: Callable[[], Deadline],
        memory: BounceMemory | None = None,
    ) -> None:
        """See `read_targets`; `deadline` returns that of what begins now."""
        self._memory = memory or BounceMemory()
        self._source = source
        self._options = options
        self._coordinator = coordinator
        self._topic = topic
        self._deadline = deadline
        self._counts = Counts()
        self._peers: Peers | None = None
        self._plan: _Plan
        self._answer: _Answer
        store, alone = source.store, coordinator.world_size == 1
        # Of several ranks, where each reads only what the folder of its host has.
        self._on_hosts = store if isinstance(store, HostsStore) and not alone else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._hang_up()

    def agree(self, prepare: Callable[[], Sequence[Wanted]], *, asks: bool = False) -> None:
        """Find out what all ranks want, and who reads it; nothing is filled. A round.

        Args:
            prepare: returns what this rank wants.
            asks: whether this rank has something to do in `begin`.

        Raises:
            CheckpointError: the same on every rank.
        """
        with self._counts.clock("plan"):
            self._plan, data = self._together(
                "plan",
                lambda: self._planned(prepare()),
                message=lambda plan: msgspec.msgpack.encode(_Request(self._survey(plan), asks)),
                decide=self._decide,
            )
        self._answer = msgspec.msgpack.decode(data, type=_Answer)

    def begin(self, first: Callable[[], None] = lambda: None) -> None:
        """Do what comes before any tensor is filled, and connect; a round where there is any.

        Args:
            first: what this rank has to do.

        Raises:
            CheckpointError: the same on every rank.
        """
        if not self._answer.exchanged and not self._answer.asks:
            return

        def work() -> None:
            if self._answer.exchanged:
                # Before anything may fail on one rank alone: for the others wait for it here.
                self._peers = Peers(self._deadline(), self._options.members)
            first()

        self._together("first", work)

    def read(self) -> ReadResult:
        """Fill the tensors; a round.

        Raises:
            CheckpointError: the same on every rank; tensors may be half filled.
        """
        answer = self._answer
        if answer.exchanged:
            self._together(
                "read", self._exchange, message=msgspec.msgpack.encode, decide=check_nobody_lost
            )
        else:
            with self._counts.clock("read"):
                self._counts.read, _ = self._together("read", self._plan.fetcher.fetch_all)
        return ReadResult(
            self._counts.read,
            self._plan.filling.nbytes_wanted,
            self._counts.received,
            answer.exchanged,
            answer.why,
            self._counts.seconds,
        )

    def _survey(self, plan: _Plan) -> Survey:
        if self._coordinator.world_size == 1:
            return Survey("", plan.filling.needs.nbytes, b"")  # nobody to compare it with
        return survey(plan.filling.needs, plan.files, plan.sizes)

    def _decide(self, messages: Sequence[bytes]) -> bytes:
        """Rank 0: find out what several ranks need, and what it is worth to read that once."""
        requests = [msgspec.msgpack.decode(message, type=_Request) for message in messages]
        surveys = [each.needs for each in requests]
        apart = once = surveys[0].nbytes
        if len(surveys) > 1:
            apart, once = cost(surveys)
        exchanged, why = decide_exchange(self._options.exchange, apart_bytes=apart, once_bytes=once)
        if self._on_hosts is not None:
            # Whatever was asked for: there is no other way to what only some can read.
            exchanged, why = True, "each host has some of the files"
        # Said in steps, which are next to nothing where the groups are regular.
        steps = np.diff(group(surveys), prepend=0).astype("<i4").tobytes() if exchanged else b""
        asks = any(each.asks for each in requests)
        return msgspec.msgpack.encode(_Answer(exchanged, why, asks, zlib.compress(steps)))

    def _planned(self, wanted: Sequence[Wanted]) -> _Plan:
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
        return _Plan(files, [file.nbytes for file in index.files], filling, fetcher)

    def _needs(self, plan: _Plan) -> Ranges:
        """Return what this rank needs, cut into what one rank may read for several at a time."""
        # Of what a window holds, each rank should have a share to read.
        share_bytes = self._options.in_flight_bytes // max(2, self._coordinator.world_size)
        extent_bytes = min(_EXTENT_BYTES, max(share_bytes, plan.files.largest_unit))
        return cut(plan.filling.needs, most_bytes=extent_bytes, begin=plan.files.begin)

    def _exchange(self) -> Lost:
        assert self._peers is not None
        plan, rank = self._plan, self._coordinator.rank
        exchange = Exchange(
            rank,
            plan.fetcher,
            plan.filling,
            self._counts,
            self._memory,
            self._options.in_flight_bytes,
            self._who_can_read(),
        )
        steps = np.frombuffer(zlib.decompress(self._answer.group_of), "<i4")
        return exchange.run(self._peers, self._needs(plan), np.cumsum(steps).tolist())

    def _who_can_read(self) -> CanRead | None:
        if self._on_hosts is None:
            return None
        files = self._plan.files
        readers = [self._on_hosts.readers(file.name) for file in self._source.index_of([]).files]
        return lambda address: readers[files.place(address)[0]]

    def _hang_up(self) -> None:
        if self._peers is not None:
            self._peers.close()
            self._peers = None

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
            deadline=self._deadline(),
            message=message,
            decide=decide,
        )


def decide_exchange(exchange: Rule, *, apart_bytes: int, once_bytes: int) -> tuple[bool, str]:
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
