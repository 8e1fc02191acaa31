"""One job on one run: its ranks, its place, its claim."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Self, TypeAlias, TypedDict

import torch.distributed as dist
from torch.distributed import ProcessGroup
from torch.distributed.tensor import DTensor

from dist_ckpt.errors import UsageError, without_secrets
from dist_ckpt.format.names import checked_seconds, new_save_id
from dist_ckpt.ranks.hosts import Hosts
from dist_ckpt.ranks.rendezvous import join_job
from dist_ckpt.ranks.rounds import Coordinator, Coordinators, Deadline, SoloCoordinator, Topic
from dist_ckpt.ranks.same_place import check_same_place, check_sights, sight_of, token_of
from dist_ckpt.repository import Repository
from dist_ckpt.repository.commit import check_owner, read_manifest
from dist_ckpt.repository.discard import gone_back_past, left_behind
from dist_ckpt.repository.status import check_alone
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place, resolve

# Which ranks form the job that saves and loads together.


Ranks: TypeAlias = Literal["all", "alone"]


class JobKeywords(TypedDict, total=False):
    """The keywords of `JobRanks`, for the signatures of the calls that take them."""

    ranks: Ranks
    process_group: ProcessGroup | None
    node_local: bool


JOB_KEYWORDS = frozenset(JobKeywords.__annotations__)


@dataclass(frozen=True, slots=True)
class JobRanks:
    """Which ranks form a job.

    Attributes:
        ranks: "all": those of the process group, and each of them makes the call. "alone": this
            process makes it alone, whatever the others do, and holds all of the state.
        process_group: the group whose ranks form the job; None for the default one. Ranks in
            messages and files are numbered within it.
        node_local: whether each host has a folder of its own there, on a disk that no other host
            sees: the path may be one and the same, or another on each. See
            docs/guides/storage.md.

    Raises:
        UsageError: an argument is malformed, or this process is not in the group.
    """

    ranks: Ranks = "all"
    process_group: ProcessGroup | None = None
    node_local: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> Self:
        """Take what is about the job from the keywords of a call."""
        return cls(**{name: keywords[name] for name in JOB_KEYWORDS & keywords.keys()})

    def __post_init__(self) -> None:
        if self.ranks not in ("all", "alone"):
            raise UsageError(
                f"ranks is 'all' or 'alone', not {self.ranks!r}: give some of the ranks as "
                "process_group="
            )
        if not isinstance(self.node_local, bool):
            raise UsageError(f"node_local is True or False, not {self.node_local!r}")
        if self.node_local and self.ranks == "alone":
            raise UsageError("ranks='alone' has one folder: leave node_local out")
        group: object = self.process_group
        if group is None:
            return
        if self.ranks == "alone":
            raise UsageError("ranks='alone' is this process without a process_group: give one")
        # What `new_group` returns to the ranks that are outside of it is no group.
        outside = group == dist.GroupMember.NON_GROUP_MEMBER
        if not outside and not isinstance(group, ProcessGroup):
            hint = " (of a device mesh: its get_group(...))" if hasattr(group, "get_group") else ""
            raise UsageError(f"process_group is a torch process group{hint}, not {group!r}")
        if outside or dist.get_rank(self.process_group) < 0:
            raise UsageError(
                "this process is not in the process group that it was given: only the ranks of "
                "the group make the call"
            )

    def check_joined(self) -> None:
        """Check that this process does not take itself for a job, being one of several.

        Raises:
            UsageError: it was started as one of several ranks, and there is no process group.
        """
        started = os.environ.get("WORLD_SIZE", "")
        several = started.isdecimal() and int(started) > 1 and "RANK" in os.environ
        if self.ranks == "alone" or not several or _initialized():
            return
        raise UsageError(
            f"this process was started as rank {os.environ['RANK']} of {started} (RANK and "
            "WORLD_SIZE are set, as torchrun does), but there is no process group, so each of them "
            "would save for itself and take the run from the others: call "
            "torch.distributed.init_process_group first, or give ranks='alone' if this process "
            "alone saves there"
        )

    def group(self) -> ProcessGroup | None:
        """Return the process group of the job, None where this process is all of it."""
        if self.ranks == "alone" or not _initialized():
            return None
        group = self.process_group or dist.group.WORLD
        return None if group is None or dist.get_world_size(group) == 1 else group

    def world_size(self) -> int:
        """Return how many ranks the job has."""
        group = self.group()
        return 1 if group is None else dist.get_world_size(group)

    def hold(self, error: Exception) -> Exception:
        """Return what this rank alone may have refused: the others hear of it in the next round.

        They make the same call, and would wait there for this one.

        Raises:
            Exception: `error` itself, where this process is the whole job.
        """
        if self.world_size() == 1:
            raise error
        return error

    def members(self) -> tuple[int, ...] | None:
        """Return the ranks in the default process group; None where the job is all of that."""
        if not _initialized():
            return None
        group = self.group()
        here = [dist.get_rank()] if group is None else dist.get_process_group_ranks(group)
        return None if len(here) == dist.get_world_size() else tuple(here)

    def lacks(self, tensor: object) -> bool:
        """Tell whether a part of `tensor` lies on ranks outside of the job alone."""
        if not isinstance(tensor, DTensor):
            return False
        members = self.members()
        if members is None:
            return False
        mesh = tensor.device_mesh.mesh
        held = sum((mesh == rank for rank in members), start=mesh.new_zeros(mesh.shape)) > 0
        # Along a dimension of replicas one of them is enough; along any other all are needed.
        for dim, placement in enumerate(tensor.placements):
            if placement.is_replicate():
                held = held.any(dim, keepdim=True)
        return not bool(held.all())


def _initialized() -> bool:
    return dist.is_available() and dist.is_initialized()


# Which checkpoints a job found damaged and went past: the one place that knows.


class PassedOver:
    """The damaged checkpoints of one job, from the restore that passed them over on.

    Each stays in it until its step is saved anew, or restored because it is whole after all:
    another restore in between, of an older step or of the best one, changes nothing about damage.
    They count for no policy and are nobody's best; only they may be saved again; nothing but such
    a save deletes them. Safe to use from several threads.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Replaced and never changed, so that whoever looks at it needs no lock.
        self._manifests: Mapping[int, bytes | None] = {}

    @property
    def steps(self) -> frozenset[int]:
        """The steps that were passed over."""
        return frozenset(self._manifests)

    def manifest(self, step: int) -> bytes | None:
        """Return the manifest with which `step` was found damaged; None where that is not known.

        Rank 0 knows it. It tells this very checkpoint from one that took its place since.
        """
        return self._manifests.get(step)

    def add(self, manifests: Mapping[int, bytes | None]) -> None:
        """Take note of steps, each with its manifest as it was found."""
        with self._lock:
            self._manifests = {**self._manifests, **manifests}

    def discard(self, step: int) -> None:
        """Forget `step`: what is there now is whole."""
        with self._lock:
            self._manifests = {old: m for old, m in self._manifests.items() if old != step}


# What the others are told of a call whose own deadline is malformed is told at once.
_REFUSAL_SECONDS = 60.0
_LEAVE_SECONDS = 30.0
# Long enough for the others to read what rank 0 has decided already.
_HURRIED_LEAVE_SECONDS = 3.0


class Job:
    """What saving and loading share.

    Attributes:
        url: where the run is, as messages name it.
        repository: the run.
        ranks: which ranks form the job.
        timeout_seconds: the deadline of every save and restore.
        restored_step: the step this job went on from, None for a fresh start.
        passed_over: what its restores found damaged.
        restore_asked: whether a restore was asked for, be it in vain.
        has_committed: whether it has committed a step since it began; known to rank 0.
        hosts: which ranks have a folder of their own, once that was found out; None where all
            ranks share one place.
        owns_folders: whether the run in each of these folders was taken over.
        calls: which of several calls with rounds of their own is being made; empty for none.
    """

    def __init__(
        self,
        place: Place,
        *,
        timeout_seconds: float,
        ranks: JobRanks | None = None,
        commits: bool = True,
        joins: bool = False,
        exclusive: bool = False,
    ) -> None:
        """Resolve the place; other ranks are contacted at the first save or load only.

        Args:
            place: where the run is.
            timeout_seconds: the deadline of every save and restore.
            ranks: which ranks form the job; None for all.
            commits: whether the job may take the run over; else it only looks.
            joins: whether it adds to a run whatever is there, and need not go on from anything.
            exclusive: whether it takes the run over only where no other job is at work on it.

        Raises:
            UsageError: the place is malformed, the timeout is not a positive number of seconds, or
                this is one of several processes that would each take the run over.
        """
        checked = checked_seconds(timeout_seconds, "timeout_seconds")
        store = place if isinstance(place, Store) else resolve(place)
        self.ranks = ranks or JobRanks()
        self._commits = commits
        self._check_joined()
        self.url = without_secrets(store.url)
        self.repository = Repository(store)
        self.timeout_seconds = checked
        self.restored_step: int | None = None
        self.restore_asked = False
        self.has_committed = False
        self.hosts: Hosts | None = None
        self.owns_folders = False
        self.calls = ""
        self._joins = joins
        self._exclusive = exclusive
        # Where training began: the step restored, -1 for the beginning; None until it is said.
        self._origin: int | None = None
        self.passed_over = PassedOver()
        # Rank 0, from the first save on: the newest committed step not passed over, -1 for
        # none. Nobody else may commit while this job owns the run, so it need not be looked for.
        self._newest: int | None = None
        self._claim: int | None = None
        self._same_place = False
        self._numbers = itertools.count(1)
        self._left = False
        self._hurried = False
        self._pid: int | None = None

    @cached_property
    def coordinators(self) -> Coordinators:
        """The way to the other ranks, set up at first use: all ranks get here in one call."""
        self._check_joined()  # once more: the process group may be gone since
        group = self.ranks.group()
        if group is None:
            found = Coordinators(SoloCoordinator(), SoloCoordinator())
        else:
            found = join_job(group, timeout_seconds=self.timeout_seconds)
        self._pid = os.getpid()
        return found

    @property
    def training(self) -> Coordinator:
        """The coordinator of the thread that calls `save` and `restore`; see `check_process`."""
        self.check_process()
        return self.coordinators.training

    def check_process(self) -> None:
        """Check that this is the process that uses the job.

        Raises:
            UsageError: another does, and this one was forked of it.
        """
        if self.is_parents:
            # Two writers under one claim would each take the other's files for garbage.
            raise UsageError(
                f"this Checkpointer of {self.url} belongs to process {self._pid}, of which this "
                "one was forked: use it there, or make one here for a run of its own"
            )

    @property
    def is_parents(self) -> bool:
        """Whether this is the copy that a fork has made of a job that is at work in the parent."""
        return self._pid is not None and self._pid != os.getpid()

    def _check_joined(self) -> None:
        if self._commits:
            self.ranks.check_joined()

    def claim(self, *, at_least: int = 1) -> int:
        """Rank 0: return this job's claim on the run, taken at the first call.

        So does each rank that leads a host with a folder of its own; all of them need one number,
        so one below `at_least` is left behind for another.
        """
        if self._claim is None or self._claim < at_least:
            if self.hosts is None:
                self.check_alone()
            self._claim = self.repository.claim(at_least=at_least)
        return self._claim

    def check_owns(self) -> None:
        """Check that nobody took this folder from the job, if it has a claim there.

        Raises:
            FencedError: another job did.
        """
        if self._claim is not None:
            check_owner(self.repository.store, self._claim)

    def claim_anew(self) -> None:
        """Rank 0: take a newer claim in the place of the one that the job has, if it has one.

        A discard hides what older claims committed (commit-v1, section 8): to give up what it
        saved itself a job needs another one.

        Raises:
            FencedError: the run is no longer that of this job.
        """
        if self._claim is not None:
            self.check_owns()
            self._claim = self.repository.claim(at_least=self._claim + 1)

    def check_alone(self) -> None:
        """Check, before the claim, that no other job is at work in this folder, if that is wanted.

        Raises:
            UsageError: one is.
        """
        if self._exclusive and self._claim is None:
            check_alone(self.repository.store, most_seconds=self.timeout_seconds / 2)

    @property
    def common_url(self) -> str:
        """What all ranks have to name alike; nothing where each host may have a path of its own."""
        return "" if self.ranks.node_local else self.url

    @property
    def leads(self) -> bool:
        """Whether this rank does what is done once for its folder; of a shared one that is 0."""
        rank = self.training.rank
        return rank == 0 if self.hosts is None else self.hosts.leads(rank)

    @property
    def claimed(self) -> int | None:
        """Rank 0: the claim of this job, None as long as it has none."""
        return self._claim

    def check_same_place(self, topic: Topic) -> None:
        """Check once, after the claim was taken, that all ranks mean one place; a call of them all.

        Where each host has a folder of its own, which was looked at when the claims were taken, no
        rank goes on before all are here: a leader has to know of an attempt before files of it
        are in its folder.

        Raises:
            UsageError: each host has a folder of its own there, for example.
        """
        if self.ranks.node_local:
            known = topic.phase("known")
            self.training.round(known, b"", lambda _: b"", deadline=self.deadline())
            return
        if not self._same_place and self.training.world_size > 1:
            check_same_place(
                self.training,
                self.repository.store,
                self._claim,
                topic=topic.phase("place"),
                deadline=self.deadline(),
            )
        self._same_place = True

    def place_token(self) -> bytes:
        """Rank 0: return what shows that another rank means this place, after the claim was taken.

        It is empty where that need not be found out; `check_same_place` asks by rounds of its own.
        """
        shared = not self.ranks.node_local
        if not shared or self._same_place or self._claim is None or self.training.world_size == 1:
            return b""
        return token_of(self.repository.store, self._claim)

    def sees(self, token: bytes) -> tuple[bool, bytes]:
        """Return whether this rank sees what rank 0 does, and what it tells rank 0 of that."""
        leads = self.training.rank == 0
        return sight_of(self.repository.store, token, self.deadline(), leads=leads)

    def check_seen(self, token: bytes, messages: Sequence[bytes]) -> None:
        """Rank 0: check what all ranks tell of what they see.

        Raises:
            UsageError: each host has a folder of its own there, for example.
        """
        check_sights(self.repository.store.url, token, messages)

    def all_see_it(self) -> None:
        """Note that all ranks mean one place."""
        self._same_place = True

    def begin(self, step: int) -> str:
        """Rank 0: open an attempt to save `step` and return its save_id.

        Storage is asked at the first save only, and where the answer would be an error: the fence
        at the commit guards the rest.

        Raises:
            AlreadyExists: the step is committed.
            FencedError: a newer claim owns the run.
            UsageError: the step is older than the newest one, the store cannot commit, or the run
                has checkpoints that this job does not go on from.
        """
        self.check_first(step)
        claim = self.claim()
        if self._newest is None:
            # What was given up counts as not committed, and may be saved again.
            self.passed_over.add(self.repository.hidden())
            if not self._joins:
                try:
                    self._check_goes_on()  # nobody else can commit from the claim on
                except UsageError:
                    self.check_owns()  # unless that was taken over, and what is there is not ours
                    raise
        if self._newest is None or step <= self._newest:
            self._newest = self.repository.check_begin(step, claim, refused=self.passed_over.steps)
        return new_save_id(claim)

    def committed(self, step: int) -> None:
        """Rank 0: note that `step` was committed."""
        self.has_committed = True
        self._newest = step
        self.passed_over.discard(step)

    def go_on(
        self, step: int | None, passed_over: Mapping[int, bytes | None] | None = None
    ) -> None:
        """Note where training goes on from; every save after it is checked against that.

        Args:
            step: the checkpoint of this run that was restored, None for the beginning.
            passed_over: the steps found damaged on the way to it, each with its manifest as far as
                this rank knows it. They may be saved again; no other committed step ever is, but
                those that were given up.
        """
        self.restored_step = step
        self._origin = -1 if step is None else step
        self.passed_over.add(passed_over or {})
        if step is not None:
            self.passed_over.discard(step)
        self._newest = None

    def give_up(self, steps: Collection[int], *, after: int) -> None:
        """Rank 0: hide what is newer than `after`, which are `steps`; they may be saved again."""
        store = self.repository.store
        self.repository.discard(claim=self.claim(), after=after)
        # Those of them that cannot be hidden, since their manifests cannot be read, too.
        self.passed_over.add({step: read_manifest(store, step) for step in steps})
        self._newest = None

    def check_first(self, step: int) -> None:
        """Rank 0: check that the first save of this job may be made, writing nothing."""
        if self._claim is not None:
            return
        # Before the claim: whoever is refused has taken the run from nobody.
        if self._joins:
            self.passed_over.add(self.repository.hidden())  # counts as not committed
            self.repository.check_begin(step, None, refused=self.passed_over.steps)
            return
        if self.restored_step is not None and self.restored_step in self.repository.hidden():
            raise gone_back_past(self.url, self.restored_step)  # which was restored to look
        there = self.repository.newer(-1, besides=self.passed_over.steps)
        forgotten = self._origin is None and not self.restore_asked
        if self._origin is not None or (
            forgotten and (step in there or step > max(there, default=-1))
        ):
            self._check_goes_on()
        self.repository.check_begin(step, None, refused=self.passed_over.steps)
        self._check_goes_on()

    def _check_goes_on(self) -> None:
        """Rank 0: check that nothing is in the run that this job would leave behind.

        Raises:
            UsageError: there are checkpoints, newer than what was restored.
        """
        newer = self.repository.newer(
            -1 if self._origin is None else self._origin, besides=self.passed_over.steps
        )
        if newer:
            raise left_behind(self.url, self._origin, newer)

    def topic(self, verb: str, label: str) -> Topic:
        """Return the topic of the next round; ranks that make the same calls get the same one."""
        asked = {"node_local": str(self.ranks.node_local), "the call": self.calls or verb}
        return Topic(f"{verb}/{next(self._numbers)}", label, asked=asked)

    def deadline(self) -> Deadline:
        """Return the deadline of what begins now."""
        return Deadline.after(self.timeout_seconds)

    def hurry(self) -> None:
        """Note that this rank ends by an exception: others may never come to leave because of it.

        They may be in a collective that this rank will not join, and that ends when it has gone.
        """
        self._hurried = True

    def leave(self) -> None:
        """Say good-bye to the other ranks, so that rank 0 does not end before they were told."""
        if "coordinators" in self.__dict__ and not self.is_parents and not self._left:
            # They are kept: joining once more, on this rank alone, would shift all later jobs.
            self._left = True
            patience = _HURRIED_LEAVE_SECONDS if self._hurried else _LEAVE_SECONDS
            seconds = min(self.timeout_seconds, patience)
            self.coordinators.training.leave(Deadline.after(seconds))


def job_of_call(
    place: Place, ranks: JobRanks, *, timeout_seconds: float, **kind: bool
) -> tuple[Job, Exception | None]:
    """Return the job of a call, and what keeps this rank from making it, if anything does.

    A driver that one host lacks, say, is missed by its ranks alone, and the others wait for them in
    the first round of the call: there this rank has to say why it does not go on.

    Args:
        place: see `Job`, and so for the others.
        ranks: which ranks form the job.
        timeout_seconds: the deadline.
        **kind: `commits`, `joins`, `exclusive`.

    Raises:
        UsageError: it cannot be made, and this process is all of it.
    """
    try:
        return Job(place, ranks=ranks, timeout_seconds=timeout_seconds, **kind), None
    except Exception as error:
        held = ranks.hold(error)
    # Nothing is read there or written: the call ends in its first round.
    nowhere = Job("memory://nowhere", ranks=ranks, timeout_seconds=_REFUSAL_SECONDS, **kind)
    nowhere.url = without_secrets(
        os.fspath(place) if isinstance(place, os.PathLike) else str(place)
    )
    return nowhere, held
