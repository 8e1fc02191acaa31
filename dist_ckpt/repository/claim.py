"""Claims: numbered, create-only objects; the highest number owns the run (commit-v1, section 3)."""

from __future__ import annotations

import json
import os
import socket
from datetime import UTC, datetime

from dist_ckpt.errors import AlreadyExists, CheckpointError, FencedError
from dist_ckpt.format.names import claim_key, parse_claim
from dist_ckpt.storage.base import Store, read_all


def highest(store: Store) -> int:
    """Return the number of the claim that owns the run, 0 when there is none."""
    numbers = (parse_claim(name) for name in store.list_children("claims/"))
    return max((number for number in numbers if number is not None), default=0)


def take(store: Store) -> int:
    """Create the next claim and return its number; any number of processes may race."""
    record = {
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "host": socket.gethostname(),
        "pid": os.getpid(),
    }
    number = 0
    while True:
        number = max(number, highest(store)) + 1
        try:
            store.put(claim_key(number), [json.dumps(record | {"claim": number}).encode()])
        except AlreadyExists:
            continue  # another process was faster
        return number


def check_owner(store: Store, number: int) -> None:
    """Raise unless claim `number` still owns the run.

    Raises:
        FencedError: a newer claim exists.
    """
    newest = highest(store)
    if newest > number:
        raise FencedError(
            f"claim {number} on {store.url} was superseded by claim {newest}: "
            f"{_taker(store, newest)} took this run over, so this one may not commit to it and "
            "must stop"
        )


def _taker(store: Store, number: int) -> str:
    """Say who holds a claim, as far as that can be read: it is for people only."""
    try:
        record = json.loads(read_all(store, claim_key(number), limit_bytes=1 << 16))
        host, pid, created = (str(record[name])[:80] for name in ("host", "pid", "created"))
    except (CheckpointError, ValueError, TypeError, KeyError, RecursionError):
        return "another job"
    if (host, pid) == (socket.gethostname(), str(os.getpid())):
        return f"another Checkpointer or save of this very process, at {created},"
    return f"another job (process {pid} on {host}, at {created})"
