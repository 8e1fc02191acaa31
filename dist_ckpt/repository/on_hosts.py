"""A run whose checkpoints lie in folders of several hosts, each of which has a share of the files.

Each folder is a run of its own, in which only the files of other hosts are missing. Whether a
checkpoint is whole is known of all folders together.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

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
    step_dir,
)
from dist_ckpt.repository.checkpoint import read_manifest
from dist_ckpt.repository.host_files import BadCopies
from dist_ckpt.repository.source import listed
from dist_ckpt.storage.base import Store

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
        reasons = {step: error.message for step, error in self._problems.items()} | self.refused
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
        self.refused.pop(taken.step, None)
        return self.refused

    def _candidates(self) -> Iterator[Candidate]:
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
