"""Objects in the memory of this process: for tests, notebooks and trying things out."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NoReturn

from dist_ckpt.errors import AlreadyExists, NotFound, UsageError, without_secrets
from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    PutMode,
    Scatter,
    Stream,
    Watch,
    check_key,
    check_keys,
    check_mode,
    check_prefix,
    fill_views,
    flat_views,
    watched,
)


@dataclass(slots=True)
class _Space:
    lock: threading.Lock = field(default_factory=threading.Lock)
    objects: dict[str, bytes] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)


# Shared by the whole process on purpose: equal names are one place, as equal paths are.
_spaces: dict[str, _Space] = {}
_spaces_lock = threading.Lock()


class MemoryStore:
    """The named space `name` of this process; it lasts as long as the process does.

    Args:
        name: stores of one name share their objects; other processes see none of them.
    """

    def __init__(self, name: str) -> None:
        if not name:
            raise UsageError("a memory store needs a name, as in memory://my-run")
        self._name = check_key(name)
        with _spaces_lock:
            self._space = _spaces.setdefault(name, _Space())

    def __repr__(self) -> str:
        name = without_secrets(self.url).removeprefix("memory://")
        return f"MemoryStore({name!r})"

    def __reduce__(self) -> NoReturn:
        raise UsageError(
            f"{self.url} is in the memory of this process, and another one would not find it there "
            "again: give a path or a URL where several processes save or load"
        )

    @property
    def url(self) -> str:
        """`memory://` and the name."""
        return f"memory://{self._name}"

    @property
    def capabilities(self) -> Capabilities:
        """Atomic and consistent within the one process that sees it; lost with that process."""
        return Capabilities(atomic_create=True, strong_list=True, durable=False)

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Store a copy of `buffers`, joined: the copy is the object. See `Store.put`."""
        check_key(key)
        check_mode(mode)
        # Before the lock is taken: `watch` may take long, or raise, and then nothing was stored.
        data = b"".join(watched(flat_views(buffers), watch))
        # Looked at and stored under one lock: of racing creators one wins.
        with self._space.lock:
            if mode == "create" and key in self._space.objects:
                raise AlreadyExists(f"{key} already exists in {self.url}")
            self._space.objects[key] = data
            self._space.times[key] = time.time()

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Store a copy of what `stream` makes. See `Streamer.put_stream`."""
        # All of it first, so that a stream which fails leaves nothing stored.
        data = bytearray()
        for piece in stream:
            data += piece
        self.put(key, [data], mode=mode)

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Fill `buffers` from `offset` of `key`. See `Store.read_into`."""
        into = Scatter(fill_views(offset, buffers))
        # A replace stores other bytes and changes none, so what is copied here is of one version.
        part = memoryview(self._get(key))[offset : offset + into.nbytes]
        into.write(0, part)
        return part.nbytes

    def size(self, key: str) -> int:
        """Return the size of `key` in bytes. See `Store.size`."""
        return len(self._get(key))

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects below `prefix` as they are now. See `Store.list_entries`."""
        return iter(self._entries(prefix))

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the names one level below `prefix`. See `Store.list_children`."""
        tails = (entry.key[len(prefix) :].partition("/") for entry in self._entries(prefix))
        return sorted({name + slash for name, slash, _ in tails})

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects under `keys`. See `Store.delete`."""
        for key in check_keys(keys):
            # Taken for each key, since `keys` may be a listing of this very space.
            with self._space.lock:
                self._space.objects.pop(key, None)
                self._space.times.pop(key, None)

    def delete_exactly(self, key: str, data: bytes) -> bool:
        """Remove `key` if it holds `data`. See `ExactDeleter.delete_exactly`."""
        check_key(key)
        with self._space.lock:
            if self._space.objects.get(key) != data:
                return False
            del self._space.objects[key], self._space.times[key]
            return True

    def close(self) -> None:
        """Release nothing: the space belongs to the process."""

    def _get(self, key: str) -> bytes:
        check_key(key)
        with self._space.lock:
            try:
                return self._space.objects[key]
            except KeyError:
                raise NotFound(f"no object {key} in {self.url}") from None

    def _entries(self, prefix: str) -> list[Entry]:
        check_prefix(prefix)
        with self._space.lock:
            objects = self._space.objects
            return [
                Entry(key, len(objects[key]), self._space.times[key])
                for key in sorted(objects)
                if key.startswith(prefix)
            ]
