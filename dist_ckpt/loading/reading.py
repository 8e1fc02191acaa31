"""Reads what all ranks want of a checkpoint: each byte once, verified, into the live tensors.

What several ranks want one of them reads and sends to the others, over a process group that a load
has for itself.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Self, TypeVar

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CoordinationError, ErrorKind, describe
from dist_ckpt.loading.fetching import (
    BounceBuffers,
    BounceMemory,
    Counts,
    Fetcher,
    ReadOptions,
    ReadPlan,
    Rule,
    cut,
    plan_reading,
)
from dist_ckpt.loading.filling import Ranges, ReadTargets, Wanted
from dist_ckpt.loading.schedule import (
    PAGE_BYTES,
    CanRead,
    Extent,
    Survey,
    cost,
    group,
    place_extents,
    share,
    survey,
)
from dist_ckpt.ranks.channels import SILENCE_SECONDS
from dist_ckpt.ranks.rounds import Coordinator, Deadline, Decide, Topic, on_every_rank
from dist_ckpt.repository.on_hosts import HostsStore
from dist_ckpt.repository.source import Source

ResultT = TypeVar("ResultT")

# What one rank reads for several at a time: small enough to even out what ranks read.
_EXTENT_BYTES = 4 << 20
# With "auto", what may be read in vain for each byte that is wanted by somebody.
_WORTH = 0.05


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
        """Prepare; nothing is read.

        Args:
            source: the checkpoint, the same on all ranks.
            options: the same on all ranks.
            coordinator: the way to the other ranks.
            topic: names the rounds of this.
            deadline: returns that of what begins now.
            memory: for bytes under way, if some is being made ready already; it may be released.
        """
        self._memory = memory or BounceMemory()
        self._source = source
        self._options = options
        self._coordinator = coordinator
        self._topic = topic
        self._deadline = deadline
        self._counts = Counts()
        self._peers: Peers | None = None
        self._plan: ReadPlan
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
                lambda: plan_reading(self._source, prepare(), self._options, memory=self._memory),
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
                self._peers = self._coordinator.beside(
                    self._topic.phase("first"),
                    lambda: Peers(self._deadline(), self._options.members),
                    Peers.close,
                )
            first()

        self._together("first", work)

    def read(self) -> ReadResult:
        """Fill the tensors; a round.

        Raises:
            CheckpointError: the same on every rank; tensors may be half filled.
        """
        answer = self._answer
        if answer.exchanged:
            # A lost peer is no error of this rank: rank 0 hears the peer's own error, or sees that
            # it died (docs/design/012).
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

    def _survey(self, plan: ReadPlan) -> Survey:
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

    def _needs(self, plan: ReadPlan) -> Ranges:
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
    # With "always" too: there is nothing to send.
    if not saved:
        return False, "no byte is needed by more than one rank"
    if exchange != "auto":
        return exchange == "always", f"exchange={exchange!r}; {told}"
    if not dist.is_gloo_available():
        return False, f"this torch was built without gloo; {told}"
    return saved > _WORTH * once_bytes, f"{told}; above {_WORTH:.0%} they are exchanged"


# Bytes from rank to rank.


_MIN_SECONDS = 1.0


class Peers:
    """The ranks of a job, connected for one load: a process group that nothing else uses.

    To make one is a collective call, while the thread that makes the training's collectives waits.
    When one of them closes it, whoever still waits for that rank stops waiting, with an error.
    """

    def __init__(
        self,
        deadline: Deadline,
        members: Sequence[int] | None = None,
        *,
        silence_seconds: float = SILENCE_SECONDS,
    ) -> None:
        """Connect.

        Args:
            deadline: when to give up.
            members: the ranks of the job in the default group; None for all.
            silence_seconds: how long a host may not be reached until it counts as gone.

        Raises:
            CoordinationError: some rank did not come in time.
        """
        # Gloo gives up by itself, and before rank 0 does: rank 0 is there to name who is late.
        self._until = deadline.for_coordinator().for_coordinator()
        # All ranks come at once, from a round: who is waited for as long as that was cut off. What
        # the group waits for later has the whole time, see `wait`.
        seconds = min(self._remaining_seconds, silence_seconds)
        try:
            # The other ranks of the default group, if there are any, do not know of this.
            self._group = dist.new_group(
                None if members is None else list(members),
                backend="gloo",
                timeout=timedelta(seconds=seconds),
                use_local_synchronization=members is not None,
            )
        except Exception as error:  # c10d raises whatever its backends do
            raise CoordinationError(
                f"the ranks could not connect to exchange what they read: {describe(error)}; can "
                "each host reach the others by the interface of GLOO_SOCKET_IFNAME?",
                kind=ErrorKind.PEER_ABSENT,
            ) from error

    def close(self) -> None:
        """Hang up; once is enough."""
        # It is gone, with its connections, when nothing refers to it any more: so nobody else may
        # hold it, not even a traceback.
        if self._group is not None:
            dist.destroy_process_group(self._group)
            self._group = None

    def send(self, data: torch.Tensor, to: int, tag: int) -> dist.Work | None:
        """Begin to send `data` to a rank."""
        return dist.isend(data, group=self._group, tag=tag, group_dst=to)

    def receive(self, data: torch.Tensor, sender: int, tag: int) -> dist.Work | None:
        """Begin to receive `data` from a rank."""
        return dist.irecv(data, group=self._group, tag=tag, group_src=sender)

    def wait(self, work: dist.Work) -> None:
        """Wait until what was begun is done, or the deadline has come.

        Raises:
            RuntimeError: the peer is gone, or it is too late.
        """
        work.wait(timedelta(seconds=self._remaining_seconds))

    @property
    def _remaining_seconds(self) -> float:
        return max(self._until.remaining_seconds, _MIN_SECONDS)

    def needs(self, mine: Ranges) -> list[Ranges]:
        """Tell all ranks what this one needs, and return what each of them does.

        Raises:
            CoordinationError: a peer is gone, or did not answer in time.
        """
        told = torch.from_numpy(np.stack([mine.start, mine.stop]))
        counts = self._gather(torch.tensor([len(mine)]))
        most = max(map(int, counts))
        # `all_gather` takes as much from each rank.
        padded = torch.zeros(2, most, dtype=torch.int64)
        padded[:, : len(mine)] = told
        found = self._gather(padded)
        cut = [each[:, : int(count)].numpy() for each, count in zip(found, counts, strict=True)]
        return [Ranges(start, stop) for start, stop in cut]

    def _gather(self, mine: torch.Tensor) -> list[torch.Tensor]:
        found = [torch.empty_like(mine) for _ in range(dist.get_world_size(self._group))]
        failed = _failure(lambda: dist.all_gather(found, mine, group=self._group))
        if failed:
            raise CoordinationError(
                f"a connection was lost while ranks said what they need: {failed}",
                kind=ErrorKind.PEER_ABSENT,
            )
        return found


def _failure(work: Callable[[], object]) -> str:
    """Do `work`; return why it failed, "" if it did not.

    The error itself is given up: its traceback holds on to the group.
    """
    try:
        work()
    except RuntimeError as error:
        return describe(error)
    return ""


def swap(peers: Peers, rank: int, extents: Sequence[Extent], memory: Sequence[memoryview]) -> int:
    """Send what this rank has read of `extents`, receive the rest; return the bytes received.

    Args:
        peers: the way to the other ranks.
        rank: this rank.
        extents: those of a window that this rank needs, the same order on all of its ranks.
        memory: for each of `extents`, its bytes or the memory for them.

    Raises:
        CoordinationError: a peer is gone or did not answer in time; `ranks` names it.
    """
    works: list[tuple[int, dist.Work | None]] = []
    failed: dict[int, str] = {}
    received = 0
    for extent, data in zip(extents, memory, strict=True):
        tensor = torch.frombuffer(data, dtype=torch.uint8)
        others = [each for each in extent.ranks if each != rank]
        try:
            if extent.reader != rank:
                others = [extent.reader]
                works.append((others[0], peers.receive(tensor, others[0], extent.tag)))
                received += extent.nbytes
            else:
                works += [(to, peers.send(tensor, to, extent.tag)) for to in others]
        except RuntimeError as error:
            failed.setdefault(others[0], describe(error))
    # All of them are waited for, also after a failure: who is well gets and gives what it should,
    # so that only the one that is gone is named, and nobody's memory is still written to.
    for peer, work in works:
        why = "" if work is None else _failure(partial(peers.wait, work))
        if why:
            failed.setdefault(peer, why)
    # They keep the group alive, and with it the connections: see `Peers.close`.
    works.clear()
    if failed:
        names = ", ".join(map(str, sorted(failed)))
        raise CoordinationError(
            f"the connection to rank {names} was lost while bytes were exchanged: it probably died",
            kind=ErrorKind.PEER_ABSENT,
            ranks=failed,
        )
    return received


@decodable
class Lost(msgspec.Struct, frozen=True, array_like=True):
    """What a rank has to say of peers that it lost in an exchange; nothing where all are there.

    Attributes:
        says: what happened.
        ranks: the peers, each with the cause.
    """

    says: str = ""
    ranks: dict[int, str] = {}


def check_nobody_lost(messages: Sequence[bytes]) -> bytes:
    """Rank 0: check that no connection broke though all ranks are still there.

    Raises:
        CoordinationError: some did.
    """
    found = [msgspec.msgpack.decode(message, type=Lost) for message in messages]
    told = [each.says for each in found if each.says]
    if told:
        ranks = {rank: why for each in found for rank, why in each.ranks.items()}
        raise CoordinationError(told[0], kind=ErrorKind.PEER_ABSENT, ranks=ranks)
    return b""


@dataclass(frozen=True, slots=True)
class Exchange:
    """What one rank does in an exchange: no round, however many windows there are.

    Attributes:
        rank: this one.
        fetcher: reads what falls to this rank.
        filling: takes the bytes.
        counts: of what is done here.
        memory: of reads; it is given back before the windows take what they may.
        in_flight_bytes: the most that a window may hold.
        can_read: who can read what; None where every rank can read everything.
    """

    rank: int
    fetcher: Fetcher
    filling: ReadTargets
    counts: Counts
    memory: BounceMemory
    in_flight_bytes: int
    can_read: CanRead | None = None

    def run(self, peers: Peers, mine: Ranges, group_of: list[int]) -> Lost:
        """Read what falls to this rank, and get the rest from the others; hang up if that fails.

        Nobody is to wait for a rank that goes no further.

        Args:
            peers: the way to the other ranks.
            mine: what this rank needs, cut as for `share`.
            group_of: for each rank, the number of its group.

        Returns:
            Which peers were lost on the way. That is no error of this rank: whether they died, gave
            up because of an error, or are late, rank 0 hears or sees itself.

        Raises:
            CheckpointError: this rank failed.
        """
        lost = Lost()
        try:
            self._exchange(peers, mine, group_of)
        except CoordinationError as error:
            lost = Lost(error.message, dict(error.ranks))
        except BaseException:
            # First of all: it throws those who wait for this rank out of their waits.
            peers.close()
            raise
        if lost.says:
            peers.close()
        return lost

    def _exchange(self, peers: Peers, mine: Ranges, group_of: list[int]) -> None:
        with self.counts.clock("exchange"):
            needs = _needs_by_group(peers, mine, group_of)
            sharing = share(
                needs, group_of, window_bytes=self.in_flight_bytes, can_read=self.can_read
            )
        windows = [
            [each for each in window if self.rank in each.ranks] for window in sharing.windows
        ]
        with self.counts.clock("read"):
            # Not over gaps: what others need of them comes with the windows, once.
            self.counts.read += self.fetcher.fetch(sharing.alone[self.rank], max_gap_bytes=0)
        self.memory.release()
        size = max((place_extents(extents)[-1] for extents in windows), default=0)
        buffers = BounceBuffers(1, size, devices=self.filling.devices)
        for extents in windows:
            buffer = buffers.take()
            with buffers.using(buffer):
                self._window(peers, extents, buffer.memory)
        # After the last buffer is free again: what went to a device is there by then.
        self.filling.check_filled()

    def _window(self, peers: Peers, extents: Sequence[Extent], memory: memoryview) -> None:
        # Behind the last place comes the end of the window.
        placed = list(zip(place_extents(extents), extents, strict=False))
        views = [memory[start : start + extent.nbytes] for start, extent in placed]
        own = [
            (extent.start, extent.nbytes, memory[start - start % PAGE_BYTES :])
            for start, extent in placed
            if extent.reader == self.rank
        ]
        with self.counts.clock("read"):
            self.counts.read += self.fetcher.fetch_into(own)
        with self.counts.clock("exchange"):
            self.counts.received += swap(peers, self.rank, extents, views)
            for extent, view in zip(extents, views, strict=True):
                # What it reads for others only has no place here.
                if not (extent.passes_on and extent.reader == self.rank):
                    self.filling.fill(extent.start, view)


def _needs_by_group(peers: Peers, mine: Ranges, group_of: list[int]) -> list[Ranges]:
    if not any(group_of):
        return [mine]  # all need the same
    by_rank = peers.needs(mine)
    return [by_rank[group_of.index(number)] for number in range(max(group_of) + 1)]
