"""The storage contract: keys and bytes, nothing else.

A `Store` is one place (a directory, a bucket prefix) that holds objects under keys.
Keys are relative, `/`-separated, and checked by `check_key`. A store knows nothing of
checkpoints, steps or tensors. What a backend cannot do is declared in `Capabilities`,
never assumed. Below stands what is done with any store in the same way: to read an object whole, to
fill several buffers as one (`Scatter`), and to store what is made meanwhile (`Stream`).
"""

from __future__ import annotations

import re
import secrets
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Literal, Protocol, runtime_checkable

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
    describe,
)

Buffer = bytes | bytearray | memoryview
PutMode = Literal["create", "replace"]

Watch = Callable[[int], None]
"""Sees the bytes of a put go: called with the size of each piece, right before it leaves.

It may be called from any thread, and from several at once. To end the put it raises any
`CheckpointError` but a `StorageError`, which would be taken for one of the backend.
"""

PIECE_BYTES = 8 << 20
"""How large a piece is that a put writes or sends at once, where nothing calls for another size."""

TEMPORARY_PREFIX = ".tmp-"
"""How the name of an unfinished object begins; no listing shows it and no key may use it."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a backend guarantees, as data.

    Attributes:
        atomic_create: `put(mode="create")` has exactly one winner among any number of
            racing writers, on any number of hosts.
        strong_list: a listing that starts after a `put` returned contains its key.
        durable: what `put` returned from survives the loss of power of this host.
        direct_io: reads and writes go past the page cache where memory is page-aligned.
        max_part_bytes: the most bytes that one request carries; None where there are no parts.
        max_object_bytes: the most bytes that one object holds; None where only the disk is a limit.
        flat: there are no folders: a listing of all keys takes one request for each thousand of
            them, as one of a single prefix does.
    """

    atomic_create: bool
    strong_list: bool
    durable: bool
    direct_io: bool = False
    max_part_bytes: int | None = None
    max_object_bytes: int | None = None
    flat: bool = False


@dataclass(frozen=True, slots=True)
class Entry:
    """One object in a listing.

    Attributes:
        key: its name.
        nbytes: its size.
        modified: when it was put, in seconds since 1970 by the clock there; None if not known.
    """

    key: str
    nbytes: int
    modified: float | None = field(default=None, compare=False)


@runtime_checkable
class Store(Protocol):
    """A place with keys and bytes: seven methods and two attributes.

    Every method raises `StorageError` when the backend fails and `UsageError` for a bad key.
    Stores may be used from several threads at once.
    """

    @property
    def url(self) -> str:
        """Where this is, as a person would write it; never holds a secret."""
        ...

    @property
    def capabilities(self) -> Capabilities:
        """What this backend guarantees."""
        ...

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store the concatenation of `buffers` under `key`, whole or not at all.

        The object is durable when this returns, and no reader ever sees a part of it. The
        buffers are not joined in memory and may not change until this returns.

        Args:
            key: where to.
            buffers: the bytes.
            mode: whether an object that exists is an error, or makes way.
            watch: told the size in bytes of every piece right before it is written or sent, in no
                order: pieces of at most 16 MiB, or of the size of the parts of an upload. What is
                sent again after a failure may be told again, so the sum may exceed the object.
                When it raises, the put ends within the pieces under way, with that very error:
                nothing is stored or replaced, and nothing is left behind.

        Raises:
            AlreadyExists: `mode="create"` and the key exists; its bytes are untouched.
            StorageError: nothing new is visible under `key`, nor left behind where it could be
                removed. With `mode="replace"` a reader finds the old bytes or the new, whole.
            UsageError: also where this backend cannot hold an object and a folder of one name,
                and `key` would need it; what was there is untouched.
        """
        ...

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Fill `buffers`, one after another, with the bytes of `key` from `offset` on.

        Returns:
            How many bytes there were: short of what fits only where the object ends, 0 from there
            on. No byte behind them is touched.

        Raises:
            NotFound: no such key; a folder is no key.
            UsageError: `offset` is negative, or a buffer is read-only or not contiguous.
        """
        ...

    def size(self, key: str) -> int:
        """Return the size in bytes of the object under `key`.

        Raises:
            NotFound: no such key.
        """
        ...

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield every object whose key starts with the folder `prefix` ("" or "a/b/"), sorted.

        The order is that of the code points of the keys. Objects put or deleted meanwhile may be
        in it or not. A folder that does not exist holds nothing.
        """
        ...

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the sorted names one level below `prefix`.

        A folder's name ends in `/`; a folder that holds no object is not listed.
        """
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects under `keys`; one that does not exist is no error.

        Neighbours in `keys` may go at the same time: what must go first is a call of its own.
        The removal is durable when this returns, so what is deleted by a later call cannot be
        lost before it. `keys` may come from a listing of this store that is still going on.
        """
        ...

    def close(self) -> None:
        """Release what the store holds open. A closed store is not used again."""
        ...


MayGo = Callable[[str], bool]
"""Says of an unfinished object, by its key, whether it may go; of a folder, whose key ends in `/`,
whether anything in it may. An unfinished file is asked about by its temporary name."""


def everything(_: str) -> bool:
    """Let everything go that a killed writer left."""
    return True


@runtime_checkable
class Sweeper(Protocol):
    """What a store also offers whose killed writers leave something behind."""

    def sweep(self, prefix: str = "", *, may_go: MayGo = everything) -> int:
        """Remove what killed writers left below the folder `prefix`; return how many things.

        What a living writer, on this host or another, still needs is left alone as far as the
        backend can tell, no listed object is touched, and no link is followed.

        Args:
            prefix: where to look.
            may_go: a store knows how its own unfinished objects look, not what others keep beside
                them or what this job is writing: only what this takes is removed. Folders that it
                does not take are not looked into.
        """
        ...


@runtime_checkable
class ExactDeleter(Protocol):
    """What a store also offers that can look and delete in one step, or nearly so."""

    def delete_exactly(self, key: str, data: bytes) -> bool:
        """Remove the object under `key` only if it holds `data`; see the function of this name."""
        ...


def delete_exactly(store: Store, key: str, data: bytes) -> bool:
    """Remove the object under `key` only if it holds exactly `data`.

    Where the backend can compare and delete as one, nothing that was put in between goes; elsewhere
    the object is read right before it is deleted.

    Returns:
        Whether it held that, and is gone now. False changes nothing.

    Raises:
        StorageError: the backend failed, and the object may be there still.
    """
    if isinstance(store, ExactDeleter):
        return store.delete_exactly(key, data)
    # Two steps, and so a window between them, which commit-v1, section 4, step 5, bears: the look
    # is the last thing before the deletion.
    if not holds(store, key, data):
        return False
    store.delete([key])
    return True


def has(store: Store, key: str) -> bool:
    """Tell whether `store` has something under `key`.

    Raises:
        StorageError: the backend failed; an outage never looks like a missing object.
    """
    # Not by a listing: tens of thousands of objects may lie beside it.
    try:
        store.size(key)
    except NotFound:
        return False
    return True


def holds(store: Store, key: str, data: bytes) -> bool:
    """Whether there is an object under `key`, and its bytes are `data`."""
    try:
        # One byte more is asked for, so a longer object that begins with `data` is no match.
        return read_all(store, key, likely_bytes=len(data)) == data
    except (NotFound, IntegrityError):
        return False


# By the regex engine, and nearly always by one look: a load asks for a key at each of its reads.
_PART = rf"(?!\.{{1,2}}(?:/|\Z)|{re.escape(TEMPORARY_PREFIX)})[^/\\\x00-\x1f\x7f\ud800-\udfff]+"
_KEY = re.compile(rf"{_PART}(?:/{_PART})*")
_UNPRINTABLE = re.compile(r"[\\\x00-\x1f\x7f]")
# Exactly this form is what commit-v1, section 6, lets a sweep remove: what only looks like it may
# be somebody's.
_TEMPORARY = re.compile(re.escape(TEMPORARY_PREFIX) + r"[0-9a-f]{16}")


def check_key(key: str) -> str:
    """Return `key` if it is a valid one: relative, `/`-separated, inside the store.

    Raises:
        UsageError: empty, absolute, not encodable as UTF-8, holding an empty, `.` or `..`
            component, one that starts with `.tmp-`, a backslash, or a control character.
    """
    if _KEY.fullmatch(key):
        return key
    if not key or any(part in ("", ".", "..") for part in key.split("/")):
        raise UsageError(f"bad key {key!r}: must be relative with no empty, '.' or '..' component")
    if _UNPRINTABLE.search(key):
        raise UsageError(f"bad key {key!r}: must hold no backslash and no control character")
    if any(part.startswith(TEMPORARY_PREFIX) for part in key.split("/")):
        raise UsageError(f"bad key {key!r}: {TEMPORARY_PREFIX!r} is kept for unfinished objects")
    # All that is left: a half of a surrogate pair.
    raise UsageError(f"bad key {key!r}: must be encodable as UTF-8")


def is_key(text: str) -> bool:
    """Whether `text`, a name found in the place, is a valid key: others are left alone."""
    try:
        check_key(text)
    except UsageError:
        return False
    return True


def temporary_name() -> str:
    """Return a new name for an unfinished object."""
    # 64 random bits, since writers on other hosts draw names for the same folder and ask nobody.
    return TEMPORARY_PREFIX + secrets.token_hex(8)


def is_temporary(name: str) -> bool:
    """Whether `name` is exactly one that `temporary_name` returns."""
    return _TEMPORARY.fullmatch(name) is not None


def check_prefix(prefix: str) -> str:
    """Return `prefix` if it is "" or a valid key followed by `/`."""
    if prefix:
        if not prefix.endswith("/"):
            raise UsageError(f"bad prefix {prefix!r}: must be empty or end in '/'")
        check_key(prefix[:-1])
    return prefix


def check_keys(keys: Iterable[str]) -> Iterator[str]:
    """Yield each of `keys` once checked; a lone str, which is a sequence of letters, is refused."""
    if isinstance(keys, str):
        raise UsageError(f"keys must be an iterable of keys, not the one key {keys!r}")
    return map(check_key, keys)


def check_mode(mode: PutMode) -> PutMode:
    """Return `mode` if it is one that `put` knows."""
    if mode not in ("create", "replace"):
        raise UsageError(f"bad mode {mode!r}: must be 'create' or 'replace'")
    return mode


def flat_views(buffers: Sequence[Buffer]) -> list[memoryview]:
    """Return a view of the bytes of each buffer, in order, without the empty ones; no copies.

    Raises:
        UsageError: one of `buffers` is no contiguous buffer, or `buffers` is itself a buffer.
    """
    # A lone buffer is a sequence too, of its bytes: the error would else be about some integer.
    one = isinstance(buffers, bytes | bytearray | memoryview | str)
    if one or not isinstance(buffers, Sequence):
        raise UsageError(f"buffers must be a sequence of buffers, not {type(buffers).__name__}")
    views = [_flat(buffer) for buffer in buffers]
    return [view for view in views if view.nbytes]


def watched(views: Iterable[memoryview], watch: Watch | None) -> Iterator[memoryview]:
    """Yield the bytes of `views` in pieces, in order and without copies, each told to `watch`."""
    for view in views:
        for start in range(0, view.nbytes, PIECE_BYTES):
            piece = view[start : start + PIECE_BYTES]
            if watch is not None:
                watch(piece.nbytes)
            yield piece


def fill_views(offset: int, buffers: Sequence[memoryview]) -> list[memoryview]:
    """Return views of the bytes that `read_into(key, offset, *buffers)` has to fill.

    Raises:
        UsageError: `offset` is negative, or a buffer is read-only or not contiguous.
    """
    if offset < 0:
        raise UsageError(f"bad offset {offset}: must not be negative")
    views = [_flat(buffer) for buffer in buffers]
    if any(view.readonly for view in views):
        raise UsageError("the buffer to read into is read-only")
    return [view for view in views if view.nbytes]


def _flat(buffer: Buffer) -> memoryview:
    try:
        view = memoryview(buffer)
    except TypeError as error:
        raise UsageError(f"{type(buffer).__name__} is no buffer of bytes") from error
    if not view.c_contiguous:
        raise UsageError("a buffer must be contiguous")
    if not view.nbytes:
        # A view with a zero in its shape cannot be cast, and there is nothing in it to look at.
        return memoryview(bytearray())
    return view.cast("B")


# However large an object is said to be: what says so may be wrong.
_READ_AT_ONCE_BYTES = 64 << 20


def read_all(
    store: Store,
    key: str,
    *,
    likely_bytes: int = 1 << 18,
    limit_bytes: int = 1 << 32,
    begins: bytes = b"",
) -> bytes:
    """Return the whole object under `key`, of one version of it.

    Args:
        store: where it is.
        key: its name.
        likely_bytes: how large it is, at a guess: if it is not larger, one read is all it takes.
        limit_bytes: how large it can be at most.
        begins: what it begins with.

    Raises:
        NotFound: no such key.
        IntegrityError: the object is larger than `limit_bytes`, or begins with something else
            than `begins`: it is not what it should be.
    """
    # A question for its size first would cost an object store as much as the object.
    # One byte more than is likely: only a read that comes back short has seen the end.
    head = memoryview(bytearray(min(likely_bytes, _READ_AT_ONCE_BYTES) + 1))
    count = store.read_into(key, 0, head)
    nbytes = count if count < head.nbytes else store.size(key)
    if nbytes > limit_bytes:
        raise IntegrityError(
            f"{key} in {store.url} holds {nbytes} bytes, more than the {limit_bytes} it could be",
            kind=ErrorKind.MALFORMED,
        )
    if count < head.nbytes:
        # Read whole by one call, and so of one version.
        return bytes(head[:count])
    # A file of any size may be one hole: memory is taken only for what looks right so far.
    if bytes(head[: len(begins)]) != begins:
        raise IntegrityError(
            f"{key} in {store.url} does not begin as it should", kind=ErrorKind.MALFORMED
        )
    # From its begin on once more: what was read may be of a version that was replaced since.
    data = bytearray(nbytes)
    count = store.read_into(key, 0, memoryview(data))
    return bytes(data[:count])


# Several buffers that are filled as if they were one.


class Scatter:
    """Flat views of bytes, thought of as one after another.

    Args:
        views: where the bytes go; empty ones count for nothing.

    Attributes:
        nbytes: how many bytes the views have together.
    """

    def __init__(self, views: Sequence[memoryview]) -> None:
        self._views = [view for view in views if view.nbytes]
        self._stops = list(accumulate(view.nbytes for view in self._views))
        self.nbytes = self._stops[-1] if self._stops else 0

    def write(self, start: int, data: bytes | memoryview) -> None:
        """Copy `data` to the bytes from `start` on; it does not reach beyond the end."""
        views = self.cut(start, start + len(data))
        if len(views) == 1:  # nearly always: what arrives at once is small
            views[0][:] = data
            return
        source, done = memoryview(data), 0
        for view in views:
            view[:] = source[done : done + view.nbytes]
            done += view.nbytes

    def cut(self, start: int, stop: int) -> list[memoryview]:
        """Return views of the bytes from `start` up to, not including, `stop`."""
        found = []
        # To the right: a view that ends where the bytes begin holds none of them.
        number = bisect_right(self._stops, start)
        while start < stop and number < len(self._views):
            view, end = self._views[number], self._stops[number]
            first = start - (end - view.nbytes)
            last = min(stop, end) - (end - view.nbytes)
            found.append(view if last - first == view.nbytes else view[first:last])
            start, number = end, number + 1
        return found


# Objects that are made while they are stored, so that memory never holds all of one.


@dataclass(frozen=True, slots=True)
class Stream:
    """The bytes of one object, made piece by piece.

    Iterating begins anew each time, since a put may have to. It yields flat views of bytes, of
    which there are `nbytes` in all; none is empty, and none changes afterwards.

    Attributes:
        nbytes: of the whole.
        pieces: begins to make them, from the first one on.
        compared: asks for what is written to be read again. A store that can do so while it writes,
            before the object can be seen, compares the two and tells, from any thread, at which
            byte and how many it found equal; what is not told was not compared.
    """

    nbytes: int
    pieces: Callable[[], Iterator[memoryview]]
    compared: Callable[[int, int], None] | None = None

    @classmethod
    def of(cls, views: Sequence[memoryview]) -> Stream:
        """Return the stream of what is there already."""
        return cls(sum(view.nbytes for view in views), lambda: iter(views))

    def __iter__(self) -> Iterator[memoryview]:
        return self.pieces()


@runtime_checkable
class Streamer(Protocol):
    """What a store also offers that can begin to store an object before all of it is there."""

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Store what `stream` makes under `key`, whole or not at all, as `Store.put` does.

        Raises:
            IntegrityError: what was written reads otherwise, see `Stream.compared`.
        """
        ...


def put_stream(store: Store, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
    """Store what `stream` makes under `key`, whole or not at all.

    A store that is no `Streamer` gets all of it at once, and so memory has to hold it.

    Raises:
        CheckpointError: those of `Store.put`, and whatever the stream raises; nothing is stored.
    """
    if isinstance(store, Streamer):
        store.put_stream(key, stream, mode=mode)
    else:
        store.put(key, list(stream), mode=mode)


def read_file(store: Store, key: str, start: int, buffers: Sequence[memoryview]) -> int:
    """Fill `buffers` with the bytes of `key` from `start` on; return how many there were.

    Raises:
        CheckpointError: as the store said it.
        StorageError: the store raised what it should have mapped; the cause is that.
    """
    try:
        return store.read_into(key, start, *buffers)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of a store of the program's own: for one handler all the same
        raise StorageError(f"cannot read {key} in {store.url}: {describe(error)}") from error
