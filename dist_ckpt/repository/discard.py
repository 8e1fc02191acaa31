"""Going back: checkpoints that a job gave up, hidden at once and deleted later (commit-v1, 6).

A discard is an object of its own, created by the owner of the run: it hides every checkpoint that
is newer than a step and was committed under an older claim. Taking the object away shows them
again, as long as they were not collected.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, NotFound, UsageError
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.names import DISCARDS, discard_key, manifest_key, parse_claim
from dist_ckpt.repository.commit import check_owner, read_manifest
from dist_ckpt.repository.history import delete_attempt, is_pinned
from dist_ckpt.storage.base import Store, delete_exactly, read_all

_LIMIT_BYTES = 1 << 16


@decodable
class Discard(msgspec.Struct, frozen=True):
    """What one job gave up.

    Attributes:
        after: the step gone back to; -1 for the beginning. What is newer is hidden.
        claim: of the job: what it commits itself, and whoever comes later, is not hidden.
        created: when, for people.
    """

    after: int
    claim: int
    created: str


def put(store: Store, *, claim: int, after: int) -> None:
    """Hide what is newer than `after` and was committed before `claim`; nothing is deleted."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    encoded = msgspec.json.encode(Discard(after, claim, now))
    # A put whose outcome is unknown may be repeated.
    store.put(discard_key(claim), [encoded], mode="replace")


def spread(store: Store, discards: Iterable[tuple[int, int]]) -> None:
    """Put what other folders of a run know as given up into one that was away then.

    Args:
        store: the folder.
        discards: of each the step gone back to, and the claim of the job.
    """
    known = {each.claim: each.after for each in read(store)}
    # Of two under one claim the lower hides what the other does, and more.
    for after, claim in sorted(discards):
        if claim not in known or after < known[claim]:
            put(store, claim=claim, after=after)
            known[claim] = after


def read(store: Store) -> list[Discard]:
    """Return the discards of the run.

    Raises:
        IntegrityError: one cannot be read: which checkpoints count is then not known.
    """
    numbers = (parse_claim(name) for name in store.list_children(f"{DISCARDS}/"))
    return [_read(store, number) for number in numbers if number is not None]


def hidden(store: Store, steps: Iterable[int], discards: Sequence[Discard]) -> dict[int, bytes]:
    """Return those of `steps` that are hidden, each with its manifest.

    A manifest is read of those alone that a discard may be about. One that is damaged is not
    hidden: a restore passes it over, and people may want to look at it.
    """
    oldest = min((each.after for each in discards), default=None)
    found: dict[int, bytes] = {}
    for step in steps:
        if oldest is None or step <= oldest:
            continue
        try:
            data = read_manifest(store, step)
            manifest = manifest_format.decode(data, step=step)
        except (NotFound, IntegrityError, IncompatibleError):
            continue
        if any(step > each.after and manifest.claim < each.claim for each in discards):
            found[step] = data
    return found


def collect(store: Store, given_up: Mapping[int, bytes], *, claim: int) -> list[int]:
    """Delete what is hidden, then the discards; return what was deleted.

    Called after a commit of the owner of the run, and never before: until then what was given up
    can be had back. A pinned checkpoint stays, hidden.

    Args:
        store: where the run is.
        given_up: the hidden steps, each with its manifest.
        claim: of the caller.

    Raises:
        FencedError: a newer claim owns the run.
        StorageError: a deletion failed; the discards stay, and the next tidying tries again.
    """
    discards = read(store)
    if not discards:
        return []
    check_owner(store, claim)
    gone: list[int] = []
    kept = False
    for step, data in given_up.items():
        save_id = manifest_format.decode(data, step=step).save_id
        if is_pinned(store, step, save_id):
            kept = True
            continue
        # Again for each: a newer job may have been started meanwhile.
        check_owner(store, claim)
        # Itself alone: this very job may have saved the step anew since the listing, and files of
        # the new one may lie beside its own already.
        if delete_exactly(store, manifest_key(step), data):
            gone.append(step)
        # Also where the step was saved anew: these are the files of what was given up.
        delete_attempt(store, step, save_id)
    if not kept:
        # Last: while one of them is there, it must not be listed again.
        store.delete([discard_key(each.claim) for each in discards])
    return gone


def _read(store: Store, claim: int) -> Discard:
    key = discard_key(claim)
    data = read_all(store, key, limit_bytes=_LIMIT_BYTES)
    try:
        found = msgspec.json.decode(data, type=Discard)
    except msgspec.MsgspecError:
        found = None
    # One that was copied under another number would hide what its job never gave up.
    if found is None or found.claim != claim or found.after < -1:
        raise IntegrityError(
            f"{key} in {store.url} is damaged, so it is not known which checkpoints were given up: "
            "delete it, and all that are there count again",
            kind=ErrorKind.MALFORMED,
        )
    return found


# Training on from an older step, or from none: what is newer must not be left in the run.


_SHOWN = 5
# What counts the restarts of one command: of torchrun, and of a job that Slurm put back in line.
_RESTARTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")


def check_first_start(url: str, newer: Sequence[int]) -> None:
    """Check that this program was not restarted by itself, with the same arguments as before.

    Raises:
        UsageError: it was, and what it is to give up is most likely what it saved itself.
    """
    for name in _RESTARTS:
        count = os.environ.get(name, "")
        if count.isascii() and count.isdecimal() and int(count) > 0:
            raise UsageError(
                f"discard_newer=True in a restart ({name}={count}) would give up step "
                f"{', '.join(map(str, newer[-_SHOWN:]))} in {url}, which the starts before it may "
                "have saved: go back in a start of its own, and then go on with restore() or "
                "--auto-resume"
            )


def left_behind(url: str, origin: int | None, newer: Sequence[int]) -> UsageError:
    """Return the error of a training that would leave newer checkpoints in the run.

    Args:
        url: the run.
        origin: the step it goes on from; -1 for the beginning, None when nobody called `restore`.
        newer: the committed steps above that, ascending.
    """
    listed = ", ".join(map(str, newer[-_SHOWN:]))
    if len(newer) > _SHOWN:
        listed = f"{len(newer) - _SHOWN} others and {listed}"
    there = f"{url} has checkpoints ({listed})"
    if origin is None:
        return UsageError(
            f"{there}, and this training goes on from none of them, because restore() was not "
            "called, or failed: a training from the beginning would replace them. Call restore() "
            "before the first step; to begin anew and give them up, restore('none', "
            "discard_newer=True); to keep both, begin another run",
            kind=ErrorKind.NOT_RESTORED,
        )
    start = "the beginning" if origin < 0 else f"step {origin}"
    return UsageError(
        f"{url} has checkpoints newer than {start} ({listed}), and a restart would go on from step "
        f"{newer[-1]}: to train on from {start} and give them up, restore with discard_newer=True; "
        "to keep both, save into another run; only to look, dist_ckpt.load(state, url, step=...) "
        "takes nothing over, and rollback() restores the best model alone",
        kind=ErrorKind.STEP_BEHIND,
    )


def gone_back_past(url: str, step: int) -> UsageError:
    """Return the error of a training that would go on from what was given up in the run `url`."""
    return UsageError(
        f"step {step} in {url} was given up by a training that went back: it is hidden, a restart "
        "would not go on from it, and it is deleted after the next commit. To go on from it after "
        f"all, delete the object in {DISCARDS}/ whose `after` is below {step} (the log named it "
        "then), and it is listed again; to keep both, copy it and begin another run from the copy "
        f"by restore(url=...); only to look, dist_ckpt.load(state, url, step={step}) reads it",
        kind=ErrorKind.STEP_BEHIND,
    )
