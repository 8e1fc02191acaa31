"""Bytes from rank to rank, over a process group that a load has for itself."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from dist_ckpt.errors import CoordinationError, ErrorKind, describe
from dist_ckpt.loading.sharing import Extent
from dist_ckpt.ranks.coordinator import Deadline

_MIN_SECONDS = 1.0


@contextmanager
def private_group(
    deadline: Deadline, members: Sequence[int] | None = None
) -> Iterator[dist.ProcessGroup]:
    """Make a group of the ranks of a job that nothing else uses; it is gone again at the end.

    A collective call, on the thread that also makes the training's collectives. When the body is
    left, no rank may still wait for another.

    Args:
        deadline: when to give up.
        members: the ranks of the job in the default group; None for all.

    Raises:
        CoordinationError: some rank did not come in time.
    """
    # Gloo gives up by itself at this point, so that no wait outlives the deadline.
    seconds = max(deadline.remaining_seconds, _MIN_SECONDS)
    try:
        # The other ranks of the default group, if there are any, do not know of this.
        group = dist.new_group(
            None if members is None else list(members),
            backend="gloo",
            timeout=timedelta(seconds=seconds),
            use_local_synchronization=members is not None,
        )
    except Exception as error:  # c10d raises whatever its backends do
        raise CoordinationError(
            f"the ranks could not connect to exchange what they read: {describe(error)}; can each "
            "host reach the others by the interface of GLOO_SOCKET_IFNAME?",
            kind=ErrorKind.PEER_ABSENT,
        ) from error
    try:
        yield group
    finally:
        dist.destroy_process_group(group)


def swap(
    group: dist.ProcessGroup, rank: int, extents: Sequence[Extent], memory: Sequence[memoryview]
) -> int:
    """Send what this rank has read of `extents`, receive the rest; return the bytes received.

    Args:
        group: from `private_group`.
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
        peers = [each for each in extent.ranks if each != rank]
        try:
            if extent.reader != rank:
                peers = [extent.reader]
                work = dist.irecv(tensor, group=group, tag=extent.tag, group_src=peers[0])
                works.append((peers[0], work))
                received += extent.nbytes
            else:
                works += [
                    (to, dist.isend(tensor, group=group, tag=extent.tag, group_dst=to))
                    for to in peers
                ]
        except RuntimeError as error:
            failed.setdefault(peers[0], describe(error))
    # All of them are waited for, also after a failure: who is well gets and gives what it should,
    # so that only the one that is gone is named, and nobody's memory is still written to.
    for peer, work in works:
        try:
            if work is not None:
                work.wait()
        except RuntimeError as error:
            failed.setdefault(peer, describe(error))
    if failed:
        names = ", ".join(map(str, sorted(failed)))
        raise CoordinationError(
            f"the connection to rank {names} was lost while bytes were exchanged: it probably died",
            kind=ErrorKind.PEER_ABSENT,
            ranks=failed,
        )
    return received
