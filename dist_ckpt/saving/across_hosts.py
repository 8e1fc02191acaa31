"""A save to a folder on each host: what is done before it, and how all of them commit it.

Each rank writes its files into the folder of its host. When all are durable, each host gets what
describes the files of all ranks, and their values, so that any host can say what a checkpoint
consists of. Only when every host has all of that is the manifest put: first by rank 0, which is
the commit, then by the leaders of the other hosts. So a manifest on any host proves that each host
had its share; and a save is reported as committed only when every host has the manifest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CheckpointError, ErrorKind, IncompatibleError
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import NODE_LOCAL, Manifest
from dist_ckpt.format.names import segment_name
from dist_ckpt.planning.files import extra_name
from dist_ckpt.ranks.hosts import Hosts
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.node_local import claim_folders, meet
from dist_ckpt.ranks.rounds import Deadline, Topic, on_every_rank, pack, unpack
from dist_ckpt.repository.commit import check_owner
from dist_ckpt.saving.attempt import Attempt, Commit, StagedShare
from dist_ckpt.storage.base import read_all


def begin_folders(job: Job, step: int, topic: Topic, deadline: Deadline) -> Hosts:
    """Have each host look whether `step` may be saved in its folder; a call of all ranks.

    Returns:
        The hosts of the job.

    Raises:
        CheckpointError: it may not be; see `Job.begin`. The same on every rank.
    """
    hosts = meet(job, topic, deadline)
    rank = job.training.rank

    def look() -> None:
        if job.leads:
            job.check_first(step)

    # Before the claims: whoever is refused has taken the run from nobody.
    on_every_rank(job.training, topic.phase("first"), look, deadline=deadline)
    claim_folders(job, topic, deadline)

    def begin() -> None:
        # Rank 0 begins for the job, with the plan.
        if job.leads and rank:
            job.begin(step)

    on_every_rank(job.training, topic.phase("begin"), begin, deadline=deadline)
    return hosts


def run_across_hosts(job: Job, attempt: Attempt, share: StagedShare, commit: Commit) -> None:
    """Write, report, and commit on all hosts; see `Attempt.run`."""
    across = _HostsCommit(job, attempt, share, commit)
    attempt.run(share, across.decide, across.finish)


@decodable
class _Written(msgspec.Struct, frozen=True):
    """What a rank wrote.

    Attributes:
        small: bytes by name, of what every host is to have: what describes the files of the rank,
            Python values, and tensors of which only the values of this rank count.
        alike: by name the digest of the others, which are equal wherever they are written.
    """

    small: dict[str, bytes]
    alike: dict[str, str]


@decodable
class _Described(msgspec.Struct, frozen=True):
    """What the leader of a host is told of a save.

    Attributes:
        root: encoded.
        manifest: encoded.
        files: by name what the ranks of other hosts say of their files, and their values.
    """

    root: bytes
    manifest: bytes
    files: dict[str, bytes]


class _HostsCommit:
    """Commits one attempt in the folders of all hosts.

    Args:
        job: whose hosts.
        attempt: of this rank.
        share: what this rank gives to it.
        commit: what rank 0 knows.
    """

    def __init__(self, job: Job, attempt: Attempt, share: StagedShare, commit: Commit) -> None:
        assert job.hosts is not None  # `begin_folders` has found them
        self._job = job
        self._hosts = job.hosts
        self._attempt = attempt
        self._share = share
        self._commit = commit
        self._coordinator = job.coordinators.writer
        self._root = b""
        self._manifest = b""

    def decide(self, messages: Sequence[bytes]) -> bytes:
        """Rank 0: check the reports, and describe the checkpoint; nothing is committed yet.

        Raises:
            CheckpointError: see `Commit.describe`.
        """
        self._root, draft = self._commit.describe(messages)
        draft = _said_of(draft, self._hosts)
        manifest = self._commit.transaction.manifest(self._root, draft)
        self._manifest = manifest_format.encode(manifest)
        return b""

    def finish(self) -> None:
        """Commit on all hosts; a call of all ranks, after `decide`.

        Raises:
            CheckpointError: the same on every rank. After the second round the checkpoint may be
                there, and a restore then completes it.
        """
        described = self._gather()
        deadline = self._attempt.deadline
        on_every_rank(
            self._coordinator,
            self._before_commit("prepared"),
            lambda: self._prepare(described),
            deadline=deadline,
            decide=self._commit_first,
        )
        try:
            on_every_rank(
                self._coordinator,
                self._attempt.topic.phase("settled"),
                lambda: self._settle(described),
                deadline=deadline,
            )
        except CheckpointError as error:
            error.add_note(
                f"step {self._attempt.transaction.step} is committed on "
                f"{self._hosts.names[0]}, and a restore with its disk completes it on the others"
            )
            raise

    def _before_commit(self, phase: str) -> Topic:
        """Return the topic of a round whose failure says that nothing was committed."""
        topic = self._attempt.topic.phase(phase)
        self._attempt.topics.append(topic)
        return topic

    def _gather(self) -> _Described | None:
        """Return what this rank, if it leads a host, has to put there for all others."""

        def decide(messages: Sequence[bytes]) -> list[bytes]:
            written = [unpack(each, _Written) for each in messages]
            # The index describes them once, so they have to be the same bytes (commit-v1, section
            # 11).
            _check_twins(self._hosts, written)
            small = [each.small for each in written]
            return [self._told(rank, small) for rank in range(len(messages))]

        _, answer = on_every_rank(
            self._coordinator,
            self._before_commit("gather"),
            self._written,
            deadline=self._attempt.deadline,
            message=pack,
            decide=decide,
        )
        return msgspec.msgpack.decode(answer, type=_Described) if answer else None

    def _written(self) -> _Written:
        """Return what the other hosts have to know of what this rank wrote."""
        staged, transaction, rank = (
            self._share.staged,
            self._attempt.transaction,
            self._attempt.rank,
        )
        assert not isinstance(staged, BaseException)  # it would have ended the round before
        apart = {plan.name for plan in staged.plans if plan.apart}
        files = {file.name: file for file in self._attempt.files.written}
        alone = [name for name in files if name in apart or name == extra_name(rank)]
        # Over the digests of their blocks: no byte is read again.
        alike = {
            name: bytes_digest(file.blocks) for name, file in files.items() if name not in alone
        }
        # That of rank 0 is inside of the root; a twin describes what it alone has.
        if rank and (alone or (alike and self._share.twin_of is None)):
            alone.append(segment_name(rank))
        read = partial(read_all, transaction.store)
        return _Written({name: read(transaction.key(name)) for name in alone}, alike)

    def _told(self, rank: int, small: Sequence[Mapping[str, bytes]]) -> bytes:
        if not self._hosts.leads(rank):
            return b""
        host = self._hosts.of_rank[rank]
        files = {
            name: data
            for other, named in enumerate(small)
            if self._hosts.of_rank[other] != host
            for name, data in named.items()
        }
        return msgspec.msgpack.encode(_Described(self._root, self._manifest, files))

    def _prepare(self, described: _Described | None) -> None:
        """Put all but the manifest into the folder of this host."""
        # A rank that gave the save up is heard here for the last time.
        self._attempt.stop.check()
        if described is not None:
            transaction = self._attempt.transaction
            for name, data in described.files.items():
                transaction.put_file(name, [data])
            transaction.prepare(described.root)
            # Each folder has a history of its own: who lost one may commit to none.
            check_owner(transaction.store, transaction.claim)

    def _commit_first(self, _: Sequence[bytes]) -> bytes:
        """Rank 0: put the manifest, now that nothing else is missing anywhere."""
        self._commit.transaction.complete(
            self._manifest, confirm=self._commit.confirm, replaces=self._replaced()
        )
        self._job.committed(self._commit.transaction.step)
        return b""

    def _settle(self, described: _Described | None) -> None:
        """Put the manifest into the folder of another host, once it is committed."""
        if described is not None and self._attempt.rank:
            transaction = self._attempt.transaction
            # The very bytes of rank 0: by these a reader knows that it is one checkpoint.
            transaction.complete(described.manifest, replaces=self._replaced())
            self._job.committed(transaction.step)

    def _replaced(self) -> bytes | None:
        return self._job.passed_over.manifest(self._attempt.transaction.step)


def _check_twins(hosts: Hosts, written: Sequence[_Written]) -> None:
    """Check that what several hosts wrote under one name has the same bytes on all of them.

    Raises:
        IncompatibleError: replicas of a tensor differ; names a file and two ranks.
    """
    first: dict[str, tuple[int, str]] = {}
    for rank, each in enumerate(written):
        for name, digest in each.alike.items():
            other, expected = first.setdefault(name, (rank, digest))
            if digest != expected:
                here, there = (hosts.names[hosts.of_rank[each]] for each in (other, rank))
                raise IncompatibleError(
                    f"{name} differs between rank {other} on {here} and rank {rank} on {there}, "
                    "which hold the same tensors: their copies have drifted apart; "
                    "check_replicas=True names the tensors where all ranks share one place",
                    kind=ErrorKind.REPLICAS_DIFFER,
                    ranks={rank: f"its {name} is not that of rank {other}"},
                )


def _said_of(draft: Manifest, hosts: Hosts) -> Manifest:
    # For people and for messages: nobody decides by it (commit-v1, section 11).
    said: list[dict[str, Any]] = [
        {"host": name, "ranks": hosts.ranks(number)} for number, name in enumerate(hosts.names)
    ]
    return msgspec.structs.replace(draft, origin={**draft.origin, NODE_LOCAL: said})
