"""A run whose checkpoints lie in folders of several hosts, each of which has a share of the files.

Each folder is a run of its own, in which only the files of other hosts are missing. Whether a
checkpoint is whole is known of all folders together.

What several hosts have under one name is the same, so a copy that is damaged on one of them is no
reason to give the checkpoint up.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, NotFound
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import (
    EPOCH_NOTE,
    EXTRA,
    PIN,
    REMOVED,
    is_attempt_file,
    parse_save_id,
    parse_shard_name,
    segment_name,
    step_dir,
)
from dist_ckpt.format.segments import SegmentNote
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.commit import read_manifest
from dist_ckpt.repository.source import listed, reason
from dist_ckpt.storage.base import Entry, Store
from dist_ckpt.storage.wrapper import StoreWrapper

_SHOWN = 4
_MARKS = (EPOCH_NOTE, PIN, REMOVED)


@decodable
class FolderStep(msgspec.Struct, frozen=True):
    """What one host has of a step.

    Attributes:
        manifest: as it is stored; empty for none.
        problem: why it cannot be read; empty where it can.
        attempts: for each attempt its files, bytes by name.
    """

    manifest: bytes
    problem: str
    attempts: dict[str, dict[str, int]]


@dataclass(frozen=True, slots=True)
class Candidate:
    """A checkpoint that some host has the manifest of."""

    data: bytes
    manifest: Manifest

    @property
    def order(self) -> tuple[int, int, str, str]:
        """The later claim goes before the later step: its job took the run over from the other."""
        manifest = self.manifest
        # What comes third and fourth only settles the rest, in one way whoever is asked first.
        return manifest.claim, manifest.step, manifest.created, manifest.save_id


class HostsSearch:
    """Rank 0: goes through the checkpoints that there are, the one to go on from first.

    Attributes:
        url: how messages name the run.
        refused: what was passed over, each with the reason.
        candidate: what is looked at.
        discards: what any host knows as given up: steps above one, of claims below one.
    """

    candidate: Candidate

    def __init__(
        self,
        steps: Sequence[Mapping[int, FolderStep]],
        refused: Mapping[int, str],
        *,
        url: str,
        step: int | None,
        fall_back: bool,
        bad: BadCopies,
        discards: Collection[tuple[int, int]] = (),
    ) -> None:
        """Take what the leaders said.

        Args:
            steps: of each host.
            refused: steps that were found damaged before.
            url: how messages name the run.
            step: what was asked for; None for the newest.
            fall_back: whether one that is not whole is passed over for the one before.
            bad: copies that count as missing.
            discards: see the class.

        Raises:
            NotFound: no host has `step`.
        """
        self._steps = steps
        self._step = step
        self._fall_back = fall_back
        self._bad = bad
        self.discards = discards
        self.url = url
        self.refused = dict(refused)
        self._failure: IntegrityError | None = None
        self._problems: dict[int, IntegrityError | IncompatibleError] = {}
        self._all = sorted(self._candidates(), key=lambda each: each.order, reverse=True)
        for each in self._all:
            self._problems.pop(each.manifest.step, None)  # another host has a manifest of it
        self._left = [each for each in self._all if each.manifest.step not in refused]
        if step is not None:
            self._begin_with(step)

    @property
    def held(self) -> list[dict[str, int]]:
        """For each host, what it has of the files of the candidate: bytes by name."""
        manifest = self.candidate.manifest
        there = [steps.get(manifest.step) for steps in self._steps]
        save_id = manifest.save_id
        held = [{} if each is None else each.attempts.get(save_id, {}) for each in there]
        return self._bad.without(save_id, held)

    def next(self) -> Candidate | None:
        """Return what to look at next; None where there is nothing at all.

        Raises:
            IntegrityError: nothing that there is can be restored.
            IncompatibleError: it was written by a newer format.
        """
        if self._left:
            self.candidate = self._left.pop(0)
            return self.candidate
        if self._failure is not None:
            raise _and_older(self._failure, "No older step is whole either")
        # What a restore found out itself says more than what the manifests are like.
        reasons = {step: error.message for step, error in self._problems.items()} | self.refused
        # Before any damage: what a newer release wrote stops a restart (commit-v1, section 5).
        self._check_compatible(-1)
        if reasons:
            raise IntegrityError(
                f"no checkpoint in {self.url} can be completed by the hosts that are here, and a "
                "training that began anew there would in time take their place "
                f"({listed(reasons, self.url)}). Nothing was changed: start with the hosts that "
                "have the rest, bring back a copy of it, or begin a run elsewhere",
                kind=ErrorKind.MISSING_FILE,
            )
        return None

    def again(self) -> None:
        """Have the candidate looked at once more, without the copies that are bad."""
        self._left.insert(0, self.candidate)

    def refuse(self, error: IntegrityError) -> None:
        """Take note that the candidate is not whole."""
        step = self.candidate.manifest.step
        if self._fall_back:
            self.refused[step] = error.message
        elif self._failure is None:
            self._failure = error
            # Only to name one that is whole: who asked for a step is never given another.
            self._left = [each for each in self._left if each.manifest.step < step]

    def take(self) -> dict[int, str]:
        """Return what is passed over for the candidate, which is whole.

        Raises:
            IntegrityError: it is not what was asked for, which is not whole.
            IncompatibleError: something newer was written by a newer format.
        """
        taken = self.candidate.manifest
        if self._failure is not None:
            raise _and_older(
                self._failure, f"The newest older step that is whole is step {taken.step}"
            )
        if self._step is None:
            self._check_compatible(taken.step)
            for step, error in self._problems.items():
                if step > taken.step:
                    self.refused.setdefault(step, error.message)
            for other in (each.manifest for each in self._all):
                if other.step > taken.step:
                    self.refused.setdefault(
                        other.step,
                        f"claim {other.claim}, which wrote it, was superseded by claim "
                        f"{taken.claim}, which went on without it and wrote step {taken.step}",
                    )
        # Another attempt at this step may be among them.
        self.refused.pop(taken.step, None)
        return self.refused

    def _candidates(self) -> Iterator[Candidate]:
        # By its bytes, as all hosts have the same manifest of one checkpoint.
        found: dict[tuple[int, bytes], None] = {}
        for host in self._steps:
            for step, there in host.items():
                if there.manifest:
                    found[step, there.manifest] = None
                elif there.problem:
                    self._problems[step] = IntegrityError(there.problem, kind=ErrorKind.MALFORMED)
        for step, data in found:
            try:
                manifest = manifest_format.decode(data, step=step)
            except (IntegrityError, IncompatibleError) as error:
                self._problems[step] = error
                continue
            # Also on a host that was away when it was given up.
            if not any(step > after and manifest.claim < claim for after, claim in self.discards):
                yield Candidate(data, manifest)

    def _begin_with(self, step: int) -> None:
        """Look at `step` first, and beyond it only for what is whole."""
        if step in self._problems:  # on all hosts that have it
            raise self._problems[step]
        first = [each for each in self._left if each.manifest.step == step]
        if not first:
            steps = ", ".join(str(each.manifest.step) for each in self._all[:3]) or "none"
            raise NotFound(
                f"no checkpoint of step {step} in {self.url} on any host that is here: the newest "
                f"are {steps}",
                kind=ErrorKind.NO_CHECKPOINT,
            )
        self._left = first + [each for each in self._left if each.manifest.step < step]

    def _check_compatible(self, step: int) -> None:
        for newer, error in self._problems.items():
            # An older step of another format is in nobody's way.
            if newer > step and isinstance(error, IncompatibleError):
                raise error


def lacks(manifest: Manifest, url: str, missing: Sequence[str]) -> IntegrityError:
    """Return the error of a checkpoint of which files are on no host that is here."""
    ranks = sorted({shard[1] for name in missing if (shard := parse_shard_name(name)) is not None})
    on = dict.fromkeys(manifest.hosts[rank] for rank in ranks if rank in manifest.hosts)
    shown = ", ".join(missing[:_SHOWN]) + f" and {len(missing) - _SHOWN} more" * (
        len(missing) > _SHOWN
    )
    by = f", written by rank {', '.join(map(str, ranks))}" if ranks else ""
    return IntegrityError(
        f"step {manifest.step} in {url}: no host that is here has {shown}{by}"
        f"{' on ' * bool(on)}{', '.join(on)}",
        kind=ErrorKind.MISSING_FILE,
    )


def files_elsewhere(
    manifest: Manifest, names: Iterable[str], there: Collection[str]
) -> dict[str, str]:
    """Return the files that are missing as they belong to other hosts, each with its host.

    The folder is taken for that of the host of whose files the largest part is there: what it lacks
    of these is lost, and what it lacks of others it never had.

    Args:
        manifest: what was committed.
        names: its files.
        there: those that the folder has.
    """
    written_on = manifest.hosts
    hosts: dict[str, list[str]] = {}
    for name in names if written_on else ():
        shard = parse_shard_name(name)
        if shard is not None and shard[1] in written_on and not is_on_all_hosts(name):
            hosts.setdefault(written_on[shard[1]], []).append(name)
    has = {host: sum(name in there for name in own) / len(own) for host, own in hosts.items()}
    here = max(has, key=has.__getitem__, default=None)
    # Nothing of any host is there, so nobody can tell whose folder it is.
    if here is None or not has[here]:
        return {}
    return {
        name: host
        for host, own in hosts.items()
        for name in own
        if host != here and name not in there
    }


def is_on_all_hosts(name: str) -> bool:
    """Whether a file is put on every host: what describes the others, and Python values."""
    shard = parse_shard_name(name)
    return shard[0] == EXTRA if shard is not None else is_attempt_file(name) and name not in _MARKS


def _and_older(error: IntegrityError, older: str) -> IntegrityError:
    return IntegrityError(f"{error.message}. {older}", kind=error.kind)


def list_folder(store: Store, steps: Iterable[int]) -> dict[int, FolderStep]:
    """Return what the folder of a host has of `steps`."""
    found = {}
    for step in steps:
        attempts: dict[str, dict[str, int]] = {}
        manifest, problem = b"", ""
        for entry in store.list_entries(f"{step_dir(step)}/"):
            _, attempt, *rest = entry.key.split("/")
            # Files of attempts: whatever else lies there is somebody's.
            if len(rest) == 1 and parse_save_id(attempt) is not None:
                attempts.setdefault(attempt, {})[rest[0]] = entry.nbytes
        try:
            manifest = read_manifest(store, step)
        except NotFound:
            pass
        except IntegrityError as error:
            problem = error.message
        found[step] = FolderStep(manifest, problem, attempts)
    return found


# The files of one checkpoint in the folders of several hosts: who has which, and what is damaged.


class HostsStore(StoreWrapper):
    """The folder of this host, and what is known of one checkpoint's files on other hosts.

    What is small was sent here, and is read from memory; of the rest there is the size.

    Args:
        inner: the folder.
        small: bytes by key, of what the folder lacks.
        held: for each host, its files of the checkpoint: bytes by name.
        of_rank: for each rank, the number of its host.
        here: the number of this host.
        folder: in which these files are, with a slash.
    """

    def __init__(
        self,
        inner: Store,
        *,
        small: Mapping[str, bytes],
        held: Sequence[Mapping[str, int]],
        of_rank: Sequence[int],
        here: int,
        folder: str,
    ) -> None:
        super().__init__(inner)
        self._small = small
        self._held = held
        self._of_rank = of_rank
        self._here = held[here]
        self._folder = folder
        # What several hosts have under one name is the same, so any of them may say its size.
        self._nbytes = {folder + name: size for named in held for name, size in named.items()}

    def readers(self, name: str) -> list[int]:
        """Return the ranks that can read a file of the checkpoint, ascending."""
        has = [name in named for named in self._held]
        return [rank for rank, host in enumerate(self._of_rank) if has[host]]

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """See `Store.read_into`.

        Raises:
            IncompatibleError: only another host has it, and no exchange was made for it.
        """
        data = self._small.get(key)
        if data is None:
            if key in self._nbytes and key.removeprefix(self._folder) not in self._here:
                raise IncompatibleError(
                    f"{key} is on another host, and names that share memory in the state have "
                    "values of their own in it, which each rank compares alone: give these names "
                    "memory of their own, or load on ranks whose hosts have the file",
                    kind=ErrorKind.STATE_MISMATCH,
                )
            return super().read_into(key, offset, *buffers)
        start = offset
        for buffer in buffers:
            piece = data[start : start + len(buffer)]
            buffer[: len(piece)] = piece
            start += len(piece)
        return start - offset

    def size(self, key: str) -> int:
        """See `Store.size`, of whichever host has it."""
        if key in self._small:
            return len(self._small[key])
        return self._nbytes[key] if key in self._nbytes else super().size(key)

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list_entries`; of the files of the checkpoint, on all hosts."""
        if prefix != self._folder:
            yield from super().list_entries(prefix)
            return
        for key in sorted(self._nbytes):
            yield Entry(key, self._nbytes[key])

    def around(self, operation: Any, key: str, run: Any) -> Any:
        """See `StoreWrapper.around`."""
        return run()


class WatchedCheckpoint(Checkpoint):
    """A checkpoint that remembers what of it could not be read here.

    Attributes:
        damaged: by name, the files that this rank found damaged, each with the reason.
    """

    def __init__(
        self, store: Store, manifest_bytes: bytes, index_bytes: bytes, *, step: int
    ) -> None:
        # First: opening the checkpoint reads what may be damaged already.
        self.damaged: dict[str, str] = {}
        super().__init__(store, manifest_bytes, index_bytes, step=step)

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Checkpoint.read_into`."""
        with self._watching(self.files[file][0]):
            super().read_into(file, start, *buffers)

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """See `Checkpoint.compare`."""
        self.file(file)  # what describes it, which may be damaged, is another file
        with self._watching(self.files[file][0]):
            super().compare(file, start, *buffers)

    def _read_segment(self, note: SegmentNote) -> bytes:
        with self._watching(segment_name(note.rank)):
            return super()._read_segment(note)

    @contextmanager
    def _watching(self, name: str) -> Iterator[None]:
        try:
            yield
        except IntegrityError as error:
            # The first reason is what happened; later ones may only follow from it.
            self.damaged.setdefault(name, reason(self.step, self.store.url, error.message))
            raise


class BadCopies:
    """Rank 0: the copies of files that turned out to be damaged, each on one host of a job."""

    def __init__(self) -> None:
        self._why: dict[tuple[str, int, str], str] = {}

    def add(self, save_id: str, host: int, name: str, why: str) -> bool:
        """Take note of one; tell whether that is news."""
        news = (save_id, host, name) not in self._why
        self._why.setdefault((save_id, host, name), why)
        return news

    def without(self, save_id: str, held: Sequence[Mapping[str, int]]) -> list[dict[str, int]]:
        """Return, for each host, what it has of an attempt that was not found damaged."""
        return [
            {name: size for name, size in named.items() if (save_id, host, name) not in self._why}
            for host, named in enumerate(held)
        ]

    def told(self, save_id: str, hosts: Sequence[str], where: str) -> list[str]:
        """Return what there is to say of an attempt that was loaded all the same."""
        return [
            f"{where}: {name} is damaged on {hosts[host]}, another copy was read: {why}"
            for (found, host, name), why in self._why.items()
            if found == save_id
        ]
