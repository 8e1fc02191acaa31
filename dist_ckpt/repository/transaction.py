"""One attempt to save a step: put files under its save_id, then commit by one create-only put."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import msgspec

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    ErrorKind,
    NotFound,
    StorageError,
    UsageError,
    describe,
)
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import Manifest, ManifestFile
from dist_ckpt.format.names import file_key, index_key, manifest_key, parse_save_id, step_dir
from dist_ckpt.repository.claim import check_owner
from dist_ckpt.storage.base import Buffer, Store, Watch, delete_exactly, read_all


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
                raise AlreadyExists(
                    f"step {self.step} is already committed in {self.store.url}: "
                    "save under another step",
                    kind=ErrorKind.IN_DOUBT if stored is None else ErrorKind.STEP_EXISTS,
                ) from error
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

    def _stored_manifest(self, key: str) -> bytes | None:
        try:
            return read_all(self.store, key)
        except (NotFound, StorageError):
            return None


# Answers after which nothing of a put takes effect any more.
_REFUSALS = (ErrorKind.STORAGE_FULL, ErrorKind.PERMISSION, ErrorKind.USAGE)
