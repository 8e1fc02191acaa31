"""A folder for each host: the claims by which one job owns all of them, under one number."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import UsageError
from dist_ckpt.ranks.hosts import Hosts, find_hosts
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline, Topic, on_every_rank
from dist_ckpt.ranks.same_place import sight_of, token_of
from dist_ckpt.ranks.waiting import ranks_as_text

# Each turn takes a number that is higher than all that any folder has; only another job that
# claims at the same time makes one more necessary.
_MOST_TURNS = 8


@decodable
class _Sight(msgspec.Struct, frozen=True):
    """Whether a rank finds what its host, and what another host, has put into its own folder."""

    own: bool
    other: bool


def meet(job: Job, topic: Topic, deadline: Deadline) -> Hosts:
    """Find out which ranks share a folder, once for a job; a call of all ranks.

    Raises:
        CoordinationError: a rank did not come.
    """
    if job.hosts is None:
        url = job.repository.store.url
        job.hosts = find_hosts(job.training, url, topic=topic.opening("hosts"), deadline=deadline)
    return job.hosts


def claim_folders(
    job: Job,
    topic: Topic,
    deadline: Deadline,
    *,
    failed: Exception | None = None,
    anew: bool = False,
) -> None:
    """Take a claim in the folder of each host, all of one number; a call of all ranks.

    It is done once for a job, and by one that goes back once more. Attempts bear the number of
    their claim, so that each host tells for itself, as in any run, which of them can no longer be
    committed.

    Args:
        job: whose ranks lead their hosts.
        topic: names the rounds.
        deadline: when to give up.
        failed: what keeps this rank from going on; all ranks hear of it, and no claim is taken.
        anew: whether newer claims are taken where the job has some; see `Job.claim_anew`.

    Raises:
        UsageError: hosts share a folder, or ranks of one host do not.
        FencedError: the folders are no longer those of this job.
        CheckpointError: a claim could not be taken; the same on every rank.
    """
    hosts = meet(job, topic, deadline)
    if job.owns_folders and not anew:
        return
    _hear(job, failed, topic, deadline)
    job.owns_folders = False  # until all have one number again
    # The same on all ranks that lead a host, and of no matter on the others.
    number = job.claimed + 1 if anew and job.claimed is not None else 1
    for turn in range(_MOST_TURNS):
        agreed = _take(job, number, topic.phase(f"claim-{turn}"), deadline)
        if not turn:
            # Before a higher number is tried: in one folder each host would pass the other.
            _check_apart(job, hosts, topic, deadline)
        if agreed[0] == agreed[1]:
            job.owns_folders = True
            return
        number = agreed[1]
    raise UsageError(
        f"the claims in the folders of {', '.join(hosts.names)} at {job.url} are overtaken again "
        "and again: are other jobs being started there, or is it one folder for several hosts?"
    )


def _hear(job: Job, failed: Exception | None, topic: Topic, deadline: Deadline) -> None:
    def fail() -> None:
        if failed is not None:
            raise failed
        if job.leads:
            # In all folders before a claim is taken in any: who is refused takes nobody's run.
            job.check_alone()
            job.check_owns()

    on_every_rank(job.training, topic.phase("may-claim"), fail, deadline=deadline)


def _take(job: Job, at_least: int, topic: Topic, deadline: Deadline) -> tuple[int, int]:
    """Have each leader take a claim; return the lowest and the highest number."""

    def decide(messages: Sequence[bytes]) -> bytes:
        numbers = [msgspec.msgpack.decode(each, type=int) for each in messages]
        # Claims count from 1: a 0 is of a rank that leads no host.
        taken = [number for number in numbers if number]
        return msgspec.msgpack.encode((min(taken), max(taken)))

    _, answer = on_every_rank(
        job.training,
        topic,
        lambda: job.claim(at_least=at_least) if job.leads else 0,
        deadline=deadline,
        message=msgspec.msgpack.encode,
        decide=decide,
    )
    return msgspec.msgpack.decode(answer, type=tuple[int, int])


def _check_apart(job: Job, hosts: Hosts, topic: Topic, deadline: Deadline) -> None:
    """Check that each rank finds the claim of its own host, and that of no other."""
    store, rank = job.repository.store, job.training.rank

    def token() -> bytes:
        if not job.leads:
            return b""
        assert job.claimed is not None
        return token_of(store, job.claimed)

    _, answer = on_every_rank(
        job.training,
        topic.phase("tokens"),
        token,
        deadline=deadline,
        message=bytes,
        decide=lambda messages: msgspec.msgpack.encode([messages[n] for n in hosts.leaders]),
    )
    tokens = msgspec.msgpack.decode(answer, type=list[bytes])
    mine = hosts.of_rank[rank]
    # Of the others one is enough: were any two one folder, their numbers would never agree.
    # That of the host before, in a circle: the first host looks for the last.
    other = tokens[mine - 1] if len(tokens) > 1 else None

    def look() -> _Sight:
        # Without patience, as that of another host should never appear.
        shared = other is not None and sight_of(store, other, Deadline.after(0.0), leads=False)[0]
        return _Sight(sight_of(store, tokens[mine], deadline, leads=job.leads)[0], shared)

    def decide(messages: Sequence[bytes]) -> bytes:
        sights = [msgspec.msgpack.decode(each, type=_Sight) for each in messages]
        _check_sights(job.url, hosts, sights)
        return b""

    on_every_rank(
        job.training,
        topic.phase("sights"),
        look,
        deadline=deadline,
        message=msgspec.msgpack.encode,
        decide=decide,
    )


def _check_sights(url: str, hosts: Hosts, sights: Sequence[_Sight]) -> None:
    shared = [rank for rank, sight in enumerate(sights) if sight.other]
    if shared:
        host = hosts.of_rank[shared[0]]
        raise UsageError(
            f"{hosts.names[host]} and {hosts.names[host - 1]} share one place at {url}: leave "
            "node_local out, or give each host a folder on a disk of its own",
            ranks=dict.fromkeys(shared, "it sees the folder of another host"),
        )
    blind = [rank for rank, sight in enumerate(sights) if not sight.own]
    if blind:
        host = hosts.of_rank[blind[0]]
        leader = hosts.leaders[host]
        raise UsageError(
            f"rank {ranks_as_text(blind)} on {hosts.names[host]} cannot find at {url} what rank "
            f"{leader} of the same host has just written there: give all ranks of a host one "
            "folder, and containers that have folders of their own names of their own",
            ranks=dict.fromkeys(blind, f"it does not see the folder of rank {leader}"),
        )
