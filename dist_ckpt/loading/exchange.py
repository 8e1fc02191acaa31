"""Bytes from rank to rank, over a process group that a load has for itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import msgspec
import numpy as np
import torch
import torch.distributed as dist

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CoordinationError, ErrorKind, describe
from dist_ckpt.loading.fetching import BounceBuffers, BounceMemory, Counts, Fetcher
from dist_ckpt.loading.filling import ReadTargets
from dist_ckpt.loading.ranges import Ranges
from dist_ckpt.loading.schedule import PAGE_BYTES, CanRead, Extent, place_extents, share
from dist_ckpt.ranks.channels import SILENCE_SECONDS
from dist_ckpt.ranks.rounds import Deadline

_MIN_SECONDS = 1.0


class Peers:
    """The ranks of a job, connected for one load: a process group that nothing else uses.

    To make one is a collective call, on the thread that also makes the training's collectives.
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
                if not (extent.passes_on and extent.reader == self.rank):
                    self.filling.fill(extent.start, view)


def _needs_by_group(peers: Peers, mine: Ranges, group_of: list[int]) -> list[Ranges]:
    if not any(group_of):
        return [mine]  # all need the same
    by_rank = peers.needs(mine)
    return [by_rank[group_of.index(number)] for number in range(max(group_of) + 1)]
