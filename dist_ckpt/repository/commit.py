"""Committing to a run: a claim says who may, and a transaction does it by one create-only put.

Claims are numbered, create-only objects; the highest number owns the run (commit-v1, section 3). A
transaction is one attempt to save a step: files are put under its save_id, then the manifest.
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime

import msgspec

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    ErrorKind,
    FencedError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
    describe,
)
from dist_ckpt.events import tell_once
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import LIMIT_BYTES, Manifest, ManifestFile
from dist_ckpt.format.names import (
    CLAIM_LIMIT,
    claim_key,
    file_key,
    index_key,
    manifest_key,
    parse_claim,
    parse_save_id,
    step_dir,
)
from dist_ckpt.storage.base import Buffer, Store, Watch, delete_exactly, read_all

_STRAYS = "strays"
# No claim: whoever had it could never be followed by anybody.
_LAST = CLAIM_LIMIT - 1
# More than any claim says: what is larger was put there by somebody else.
_CLAIM_BYTES = 1 << 16
_MOST_BLOCKED = 8

process_names: dict[int, str] = {}
"""What this process calls itself in claims, by its number."""


def highest_claim(store: Store) -> int:
    """Return the number of the claim that owns the run, 0 when there is none."""
    return _owner(store, _numbers(store))


def take_claim(store: Store, *, at_least: int = 1, before: Callable[[], int] = int) -> int:
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
    # The last number is no claim, whatever bears it: commit-v1, section 3.
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
        record = json.loads(read_all(store, claim_key(number), limit_bytes=_CLAIM_BYTES))
    except (IntegrityError, ValueError, RecursionError):
        return {}
    return record if isinstance(record, dict) else {}


def _taker(store: Store, number: int) -> str:
    """Say who holds a claim, "" where that cannot be read: it is for people only."""
    try:
        record = _record(store, number)
        # Cut, as anybody may have written it, and it goes into a message.
        host, pid, created = (str(record[name])[:80] for name in ("host", "pid", "created"))
    except (CheckpointError, KeyError):
        return ""
    if (host, pid) == (socket.gethostname(), str(os.getpid())):
        return f"another Checkpointer or save of this very process, at {created},"
    return f"another job (process {pid} on {host}, at {created})"


# One attempt to save a step, and the manifest that makes it a checkpoint.


class Transaction:
    """An attempt in progress: nothing of it is listed until `commit` returned.

    Any rank may hold one for the same save_id and put its own files; rank 0 commits.
    """

    def __init__(self, store: Store, step: int, save_id: str) -> None:
        claim = parse_save_id(save_id)
        if claim is None:
            raise UsageError(f"bad save_id {save_id!r}: not drawn by new_save_id")
        self.store = store
        self.step = step
        self.save_id = save_id
        self.claim = claim
        # Keys, also of puts that failed: not every store leaves nothing behind then.
        self._tried: list[str] = []
        self._in_doubt = False

    @property
    def may_exist(self) -> bool:
        """Whether the checkpoint was committed here, or nobody can tell that it was not."""
        return self._in_doubt

    def key(self, name: str) -> str:
        """Return the key of the file `name` of this attempt."""
        return file_key(self.step, self.save_id, name)

    def put_file(self, name: str, buffers: Sequence[Buffer], *, watch: Watch | None = None) -> str:
        """Store one file of this attempt, durably; return its key.

        Args:
            name: of the file.
            buffers: its bytes.
            watch: see `Store.put`.

        Raises:
            StorageError: it could not be stored whole.
        """
        key = self.key(name)
        self._put(key, buffers, watch)
        return key

    def discard(self) -> None:
        """Remove all that was put through this object, of an attempt that failed for good.

        Nothing is removed when the checkpoint may exist.

        Raises:
            StorageError: a deletion failed; what remains is garbage for `Repository.collect`.
        """
        if not self._in_doubt:
            self.store.delete(self._tried)

    def commit(
        self,
        root: bytes,
        draft: Manifest,
        *,
        confirm: Callable[[], None] = lambda: None,
        replaces: bytes | None = None,
    ) -> Manifest:
        """Make the checkpoint exist.

        Args:
            root: describes all files put by all ranks, encoded.
            draft: the manifest, all of it but what it says of the root.
            confirm: asked last, right before the manifest is put; raises to call the commit off.
            replaces: the manifest of this step that this very job found damaged and passed over,
                as it was then; it goes first, if it still is the one that is there.

        Raises:
            FencedError: a newer claim owns the run; nothing was committed.
            AlreadyExists: the step was committed by another attempt.
            StorageError: the commit did not take effect, or, with the kind `IN_DOUBT`, nobody can
                tell yet whether it did.
        """
        manifest = self.manifest(root, draft)
        self.prepare(root)
        self.complete(manifest_format.encode(manifest), confirm=confirm, replaces=replaces)
        return manifest

    def manifest(self, root: bytes, draft: Manifest) -> Manifest:
        """Return the manifest that names `root`, given all else of it."""
        # Relative, so that a step directory that is copied or renamed stays whole by itself.
        relative = index_key(self.step, self.save_id).removeprefix(f"{step_dir(self.step)}/")
        stored = ManifestFile(relative, len(root), bytes_digest(root))
        return msgspec.structs.replace(draft, index=stored)

    def prepare(self, root: bytes) -> None:
        """Put the last thing but the manifest; see `commit`."""
        self._put(index_key(self.step, self.save_id), [root], None)

    def complete(
        self,
        data: bytes,
        *,
        confirm: Callable[[], None] = lambda: None,
        replaces: bytes | None = None,
    ) -> None:
        """Put the encoded manifest, after all that it names; see `commit`."""
        # Looked at last: what happens between this line and the put is the protocol's only window.
        check_owner(self.store, self.claim)
        confirm()
        if replaces is not None:
            # Only now: until everything of the new one is durable, the damaged one is all there is.
            # And only itself: were this job suspended since the look at the claims, the one that
            # took the run over may have saved the step anew.
            delete_exactly(self.store, manifest_key(self.step), replaces)
        self._put_manifest(data)

    def _put(self, key: str, buffers: Sequence[Buffer], watch: Watch | None) -> None:
        self._tried.append(key)
        try:
            self.store.put(key, buffers, mode="create", watch=watch)
        except (CheckpointError, MemoryError):
            raise
        except Exception as error:  # of a store that maps nothing: for one handler all the same
            full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
            raise StorageError(
                f"cannot put {key} in {self.store.url}: {describe(error)}",
                kind=ErrorKind.STORAGE_FULL if full else None,
            ) from error

    def _put_manifest(self, data: bytes) -> None:
        key = manifest_key(self.step)
        # From here on until a clear answer: what is asked of a server may be done long after its
        # answer was lost, and a checkpoint without its files must never come into being.
        self._in_doubt = True
        try:
            self.store.put(key, [data], mode="create")
        except BaseException as error:
            # The answer of a put that took effect may have been lost, and its retry then meets our
            # own manifest. What is stored decides, not what the backend said.
            stored = self._stored_manifest(key)
            if stored == data:
                return
            if isinstance(error, AlreadyExists):
                self._in_doubt = stored is None
                if not self._in_doubt:
                    # Whoever saved it may have taken the run over: then this job has to stop.
                    check_owner(self.store, self.claim)
                raise self._exists(readable=stored is not None) from error
            if isinstance(error, CheckpointError) and error.kind in _REFUSALS:
                self._in_doubt = False
                raise
            if not isinstance(error, Exception):
                raise  # an interrupt is one whatever it interrupts
            raise StorageError(
                f"{describe(error)}; whether step {self.step} is committed in {self.store.url} is "
                "not known: look for it before it is saved again",
                kind=ErrorKind.IN_DOUBT,
            ) from error

    def _exists(self, *, readable: bool) -> AlreadyExists:
        if readable:
            return AlreadyExists(
                f"step {self.step} is already committed in {self.store.url}: "
                "save under another step",
                kind=ErrorKind.STEP_EXISTS,
            )
        return AlreadyExists(
            f"{manifest_key(self.step)} is in {self.store.url} already and cannot be read: if a "
            "link, a pipe or a socket bears that name, remove it; else save under another step",
            kind=ErrorKind.IN_DOUBT,
        )

    def _stored_manifest(self, key: str) -> bytes | None:
        try:
            return read_all(self.store, key, limit_bytes=LIMIT_BYTES, begins=b"{")
        except IntegrityError:
            return b""  # no manifest at all, so none of ours
        except (NotFound, StorageError):
            return None


# Answers after which nothing of a put takes effect any more.
_REFUSALS = (ErrorKind.STORAGE_FULL, ErrorKind.PERMISSION, ErrorKind.USAGE)


_LOOKS = 3


def read_manifest(store: Store, step: int) -> bytes:
    """Return the manifest of `step` as it is stored, not decoded.

    Raises:
        NotFound: no such step is committed.
        IntegrityError: it cannot be a manifest, of which not much was read then; or the store
            lists one, and does not find it.
    """
    key = manifest_key(step)
    for _ in range(_LOOKS):
        # One byte is looked at before all of them: what a file claims to hold may be one hole.
        with suppress(NotFound):
            return read_all(store, key, limit_bytes=LIMIT_BYTES, begins=b"{")
        # A store that lost an object may list it still, and a host may remember that a name is not
        # there. By that a checkpoint would be none: another taken for it, and its files for
        # garbage. So both have to say it; what was deleted or committed in between is seen anew.
        folder, _, name = key.rpartition("/")
        if name not in store.list_children(f"{folder}/"):
            raise NotFound(
                f"no checkpoint of step {step} in {store.url}", kind=ErrorKind.NO_CHECKPOINT
            )
    raise IntegrityError(
        f"{key} is listed in {store.url}, and not found when it is read: the storage contradicts "
        "itself. Look at it again later; bring back a copy if it is lost",
        kind=ErrorKind.MISSING_FILE,
    )
