"""The sign of life of a job: one small object for each claim (commit-v1, section 10).

Nothing of the protocol depends on it. It is for people, and for a job that is to start only where
no other one is at work (`exclusive=True`).
"""

from __future__ import annotations

import time
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any, Literal

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound, StorageError, UsageError
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.names import parse_claim, parse_status, status_key
from dist_ckpt.repository.commit import (
    highest_claim,
    is_of_this_process,
    read_manifest,
)
from dist_ckpt.storage.base import Store, read_all

Phase = Literal["restoring", "training", "saving", "ended", "failed"]
"""What a job does. One that does not say that it ended or failed is alive, or was killed."""

OVER: tuple[Phase, ...] = ("ended", "failed")

_LIMIT_BYTES = 1 << 16
# How many intervals without a change make a job that is not alive, and how long that may take.
_SILENT = 3
_MOST_SECONDS = 120.0
_LONGEST_NAP_SECONDS = 1.0
_MOST_STARTS = 100


@decodable
class JobStatus(msgspec.Struct, frozen=True, kw_only=True):
    """What a job says of itself, about as often as it was told to.

    Attributes:
        claim: the number of its claim.
        host: of rank 0.
        pid: of rank 0, on that host.
        world_size: how many ranks it has.
        phase: what it does.
        step: the step that was told last, None before the first.
        commit: the newest step that it restored or committed, None for none.
        lag_steps: how many steps would be lost if it ended now, None where that is unknown.
        failed_saves: how many of its saves failed since the last one that was committed.
        starts_in_vain: how many jobs before this one, one after the other, were started on this run
            and ended otherwise than well without having committed anything.
        heartbeat: when this was written, by the clock of that host, in ISO 8601.
        beat: how often it was written before; whoever sees it grow sees a job that is alive.
        every_seconds: how often it is written.
    """

    claim: int
    host: str
    pid: int
    world_size: int
    phase: Phase
    step: int | None = None
    commit: int | None = None
    lag_steps: int | None = None
    failed_saves: int = 0
    starts_in_vain: int = 0
    heartbeat: str = ""
    beat: int = 0
    every_seconds: float = 0.0

    @property
    def is_over(self) -> bool:
        """Whether the job said that it ended."""
        return self.phase in OVER

    @property
    def age_seconds(self) -> float | None:
        """How long ago it was written, if the clocks of both hosts agree; None for a bad time."""
        try:
            written = datetime.fromisoformat(self.heartbeat)
        except ValueError:
            return None
        # Without a zone it is not known when that was.
        return None if written.tzinfo is None else (datetime.now(UTC) - written).total_seconds()

    def as_json(self) -> dict[str, Any]:
        """Return it as plain JSON values."""
        found: dict[str, Any] = msgspec.to_builtins(self)
        return found

    def in_words(self) -> str:
        """Return it as one line for people."""
        parts = [f"claim {self.claim}, process {self.pid} on {self.host}", self.phase]
        parts += [f"step {self.step}"] * (self.step is not None)
        parts += [f"newest checkpoint {self.commit}"] * (self.commit is not None)
        parts += [f"{self.lag_steps} steps not saved"] * bool(self.lag_steps)
        parts += [f"{self.failed_saves} failed saves in a row"] * bool(self.failed_saves)
        parts += [f"{self.starts_in_vain} starts before it in vain"] * bool(self.starts_in_vain)
        age = self.age_seconds
        if age is not None and not self.is_over:
            parts.append(f"last heard of {age:.0f} s ago, every {self.every_seconds:g} s")
        return ", ".join(parts)


def put_status(store: Store, status: JobStatus) -> None:
    """Say `status`, in the place of what was said under this claim before.

    Raises:
        StorageError: it could not be stored.
    """
    store.put(status_key(status.claim), [msgspec.json.encode(status)], mode="replace")


def read_status(store: Store, claim: int) -> JobStatus | None:
    """Return what the job of `claim` said last, None where that is nothing that can be read.

    What this user may not read counts as nothing.

    Raises:
        StorageError: the backend failed.
    """
    try:
        data = read_all(store, status_key(claim), limit_bytes=_LIMIT_BYTES)
        found = msgspec.json.decode(data, type=JobStatus)
    except (NotFound, IntegrityError, msgspec.DecodeError):
        return None
    except StorageError as error:
        _check_forbidden(error)
        return None
    # One that was copied under another number is none of that job.
    return found if found.claim == claim else None


def newest(store: Store) -> JobStatus | None:
    """Return what the job that owns the run said last, None for nothing."""
    try:
        claim = highest_claim(store)
    except StorageError as error:
        _check_forbidden(error)
        return None
    return read_status(store, claim) if claim else None


def _check_forbidden(error: StorageError) -> None:
    """Pass over what this user has no right to read: whoever looks at a run does without it."""
    if error.kind is not ErrorKind.PERMISSION:
        raise error


def old_keys(store: Store, claim: int) -> list[str]:
    """Return the keys of what jobs before `claim` said: nobody asks for it any more."""
    found = (parse_status(name) for name in store.list_children("claims/"))
    return [status_key(each) for each in found if each is not None and each < claim]


def starts_in_vain(store: Store, claim: int, newest_step: int | None) -> int:
    """Return how many jobs right before that of `claim` ended badly and committed nothing.

    Told by the claims themselves: a job that was killed at once has said nothing. One that ended
    well had nothing to do, and breaks the row. What the process of `claim` itself began before
    (smaller batches, tried after larger ones did not fit; a notebook) is no start.

    Args:
        store: where the run is.
        claim: of the job that asks.
        newest_step: the newest committed step, None for none.
    """
    last = 0
    if newest_step is not None:
        with suppress(NotFound):  # deleted since
            manifest = manifest_format.decode(read_manifest(store, newest_step), step=newest_step)
            # Whoever committed this was not in vain, and the row begins behind it.
            last = manifest.claim
    taken = {parse_claim(name) for name in store.list_children("claims/")}
    before = sorted(each for each in taken if each is not None and last < each < claim)
    count = 0
    # The last ones alone, as each takes two requests.
    for each in reversed(before[-_MOST_STARTS:]):
        if is_of_this_process(store, each):
            continue
        said = read_status(store, each)
        if said is not None and said.phase == "ended":
            break
        count += 1
    return count


def check_alone(store: Store, *, most_seconds: float) -> None:
    """Check that no other job is at work on the run.

    A job is alive when what it says changes while it is looked at: no clock is compared with that
    of another host. So this takes up to three of the intervals of a job that was killed, and no
    time where the last job said that it ended, or never said anything.

    Args:
        store: where the run is.
        most_seconds: how long to look.

    Raises:
        UsageError: one is (`ErrorKind.IN_USE`).
    """
    claim = highest_claim(store)
    first = read_status(store, claim) if claim else None
    if first is None or first.is_over:
        return
    # Whatever is said there: nobody waits for ever because of a number in a file.
    patience = min(_SILENT * max(first.every_seconds, 0.0), most_seconds, _MOST_SECONDS)
    until = time.monotonic() + patience
    nap = min(max(patience / 20, 0.01), _LONGEST_NAP_SECONDS)
    while time.monotonic() < until:
        time.sleep(nap)
        now = read_status(store, claim)
        if now is not None and now.is_over:
            break
        if now is not None and now.beat != first.beat:
            raise _in_use(store, now)
    # A job that was started while this one looked has taken the run over.
    owner = highest_claim(store)
    if owner != claim:
        raise _in_use(
            store, read_status(store, owner) or msgspec.structs.replace(first, claim=owner)
        )


def _in_use(store: Store, status: JobStatus) -> UsageError:
    return UsageError(
        f"exclusive=True, and another job is at work on {store.url}: claim {status.claim}, process "
        f"{status.pid} on {status.host}, {status.phase} at step {status.step}. Wait until it has "
        "ended, or end it; without exclusive=True this job would take the run from it",
        kind=ErrorKind.IN_USE,
    )
