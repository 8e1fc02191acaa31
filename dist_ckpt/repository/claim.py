"""Claims: numbered, create-only objects; the highest number owns the run (commit-v1, section 3)."""

from __future__ import annotations

import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    ErrorKind,
    FencedError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.events import tell_once
from dist_ckpt.format.names import CLAIM_LIMIT, claim_key, parse_claim
from dist_ckpt.storage.base import Store, read_all

_STRAYS = "strays"
# No claim: whoever had it could never be followed by anybody.
_LAST = CLAIM_LIMIT - 1
_LIMIT_BYTES = 1 << 16
_MOST_BLOCKED = 8

process_names: dict[int, str] = {}
"""What this process calls itself in claims, by its number."""


def highest(store: Store) -> int:
    """Return the number of the claim that owns the run, 0 when there is none."""
    return _owner(store, _numbers(store))


def take(store: Store, *, at_least: int = 1, before: Callable[[], int] = int) -> int:
    """Create the next claim and return its number; any number of processes may race.

    Args:
        store: where the run is.
        at_least: the lowest number that will do.
        before: asked where there is no claim: the highest under which anything there was written.

    Raises:
        UsageError: no number is left, or the place is malformed.
    """
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
        # By which other ranks know it again, whatever their hosts and processes are called.
        "nonce": secrets.token_hex(8),
        "process": _this_process(),
    }
    number = at_least - 1
    blocked = 0
    while True:
        names = _numbers(store)
        # A copy has no claims. What it has is to be older than what is committed from now on.
        number = max(number, _owner(store, names) or before()) + 1
        while number in names:
            number += 1  # the name of something that is no claim
        if number >= _LAST:
            raise UsageError(
                f"{store.url} has used up its claims ({claim_key(number - 1)} is there): go on in "
                "another run, which may be begun from the newest checkpoint of this one"
            )
        # Noted in the claim itself: what is above it and was there before it cannot be newer.
        strays = [each for each in names if each > number]
        said = record | {"claim": number} | ({_STRAYS: strays} if strays else {})
        try:
            store.put(claim_key(number), [json.dumps(said).encode()])
        except AlreadyExists:
            continue  # another process was faster
        except UsageError:
            # A folder may bear the name. Anything else that is wrong stays so for every number.
            blocked += 1
            if blocked > _MOST_BLOCKED:
                raise
            continue
        return number


def check_owner(store: Store, number: int) -> None:
    """Raise unless claim `number` still owns the run.

    Raises:
        FencedError: a newer claim exists.
    """
    newer = [each for each in _numbers(store) if each > number]
    if newer:
        # Asked only where a run has strays: what they hold now does not matter any more.
        known = _strays(store, number)
        newer = [each for each in newer if each not in known]
    if newer:
        # For people: what is called higher still may be a stray.
        newest = next((each for each in reversed(newer) if _taker(store, each)), newer[-1])
        raise FencedError(
            f"claim {number} on {store.url} was superseded by claim {newest}: "
            f"{_taker(store, newest) or 'another job'} took this run over, so this one may not "
            "commit to it and must stop"
        )


def is_of_this_process(store: Store, number: int) -> bool:
    """Whether this very process made a claim; hosts and numbers of processes come again."""
    try:
        return _record(store, number).get("process") == _this_process()
    except CheckpointError:
        return False


def _this_process() -> str:
    return process_names.setdefault(os.getpid(), secrets.token_hex(8))  # a forked one is another


def _numbers(store: Store) -> list[int]:
    """Return the numbers of all objects that are called like claims, ascending."""
    found = (parse_claim(name) for name in store.list_children("claims/"))
    return sorted(number for number in found if number is not None and number < _LAST)


def _owner(store: Store, numbers: Sequence[int]) -> int:
    """Return the highest of `numbers` that is a claim, 0 for none, and tell of those above it."""
    for number in reversed(numbers):
        if _is_claim(store, number):
            return number
        tell_once(
            store.url,
            f"{claim_key(number)} in {store.url} is no claim that dist_ckpt made, so it owns "
            "nothing; it is left where it is",
        )
    return 0


def _is_claim(store: Store, number: int) -> bool:
    """Whether the object of that number is a claim; one that cannot be read counts as one."""
    try:
        return _record(store, number).get("claim") == number
    except NotFound:
        return True  # deleted since, or seen by the listing alone
    except StorageError as error:
        # Of another user, perhaps: to take it for none would let two jobs own the run.
        if error.kind is not ErrorKind.PERMISSION:
            raise
        return True


def _strays(store: Store, number: int) -> Sequence[object]:
    """Return what lay above claim `number` when it was made."""
    try:
        strays = _record(store, number).get(_STRAYS)
    except NotFound:
        return []
    except StorageError as error:
        if error.kind is not ErrorKind.PERMISSION:
            raise
        return []
    return strays if isinstance(strays, list) else []


def _record(store: Store, number: int) -> Mapping[str, object]:
    """Return what a claim says, nothing where it cannot be made out.

    Raises:
        NotFound: there is none.
        StorageError: the backend failed.
    """
    try:
        record = json.loads(read_all(store, claim_key(number), limit_bytes=_LIMIT_BYTES))
    except (IntegrityError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _taker(store: Store, number: int) -> str:
    """Say who holds a claim, "" where that cannot be read: it is for people only."""
    try:
        record = _record(store, number)
        host, pid, created = (str(record[name])[:80] for name in ("host", "pid", "created"))
    except (CheckpointError, KeyError):
        return ""
    if (host, pid) == (socket.gethostname(), str(os.getpid())):
        return f"another Checkpointer or save of this very process, at {created},"
    return f"another job (process {pid} on {host}, at {created})"
