"""Any file system of fsspec as a store, with no more promised than fsspec keeps."""

from __future__ import annotations

import errno
import os
import posixpath
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import fsspec
from fsspec.spec import AbstractBufferedFile

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    ErrorKind,
    NotFound,
    StorageError,
    UsageError,
    describe,
    without_secrets,
)
from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    PutMode,
    Scatter,
    Store,
    Stream,
    Watch,
    check_key,
    check_keys,
    check_mode,
    check_prefix,
    fill_views,
    flat_views,
    is_key,
    watched,
)
from dist_ckpt.storage.retry import RetryStore

_WHOLE_BYTES = 8 << 20
"""Up to here an object is joined in memory: what commits a checkpoint then appears at once."""

# How often an object may be replaced during one read of its end.
_LOOKS = 20

_OBJECT_STORES = frozenset({"gs", "gcs", "az", "abfs", "abfss", "adl", "oci", "oss"})
"""Services that keep what they accepted, have no folders, and list what was put before."""

_FULL = (errno.ENOSPC, errno.EDQUOT)


class FsspecStore:
    """A folder of a file system of fsspec.

    Of what all those file systems have in common, nothing is atomic: `mode="create"` looks first
    and writes then. A run can be read from here, and written to by a single writer.

    Args:
        url: as fsspec takes it, `gs://bucket/run`. It is parsed, and nothing is contacted yet.
        storage_options: what the file system takes.

    Raises:
        UsageError: fsspec does not know the scheme, a package is missing, or an option is wrong.
    """

    def __init__(self, url: str, *, storage_options: Mapping[str, Any] | None = None) -> None:
        self._url = url.rstrip("/")
        self._scheme = url.partition("://")[0]
        # A listing that was true a minute ago decides nothing here, and what is shared within
        # the process (the cache of instances) would be shared with a child after a fork.
        self._options = {
            "use_listings_cache": False,
            "skip_instance_cache": True,
            **(storage_options or {}),
        }
        self._systems: dict[int, Any] = {}
        try:
            known = fsspec.get_filesystem_class(self._scheme)
        except (ImportError, ValueError) as error:
            raise UsageError(f"bad url {url!r}: {error}") from error
        self._root = str(known._strip_protocol(self._url))  # noqa: SLF001  what subclasses override

    def __repr__(self) -> str:
        return f"FsspecStore({without_secrets(self._url)!r})"

    def __getstate__(self) -> dict[str, Any]:
        # Another process makes its own connections.
        return {**self.__dict__, "_systems": {}}

    @property
    def url(self) -> str:
        """As it was given, without credentials: those belong into `storage_options`."""
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        """No atomic create; the rest where it is known of the scheme."""
        service = self._scheme in _OBJECT_STORES
        return Capabilities(
            atomic_create=False, strong_list=service or self._scheme == "memory", durable=service
        )

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Write `buffers`, and compare the size at the end. See `Store.put`.

        A small object is written by one call, a larger one buffer by buffer: then it appears when
        it is closed, on most file systems, and is discarded or removed when writing fails.
        """
        self._put(key, Stream.of(flat_views(buffers)), mode, watch)

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Write what `stream` makes, as `put` does. See `Streamer.put_stream`."""
        self._put(key, stream, mode, None)

    def _put(self, key: str, stream: Stream, mode: PutMode, watch: Watch | None) -> None:
        path = self._path(key)
        check_mode(mode)
        nbytes = stream.nbytes
        with self._mapped(f"put {key}"):
            system = self._system()
            if self._scheme not in _OBJECT_STORES:
                self._check_way(system, key)
            if mode == "create" and system.exists(path):
                raise AlreadyExists(f"{key} already exists in {self.url}")
            if self._scheme not in _OBJECT_STORES:
                # Some of those take "make the folder" for "make the bucket", which is not ours.
                system.makedirs(posixpath.dirname(path), exist_ok=True)
            self._write(system, path, stream, watch)
            stored = int(system.info(path)["size"])
            if stored != nbytes:
                raise OSError(errno.EIO, f"{stored} of {nbytes} bytes were stored")

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Fill `buffers` from `offset` of `key`. See `Store.read_into`."""
        path = self._path(key)
        into = Scatter(fill_views(offset, buffers))
        size = self.size(key)
        for _ in range(_LOOKS):
            wanted = max(0, min(into.nbytes, size - offset))
            if not wanted:
                return 0
            with self._mapped(f"read {key}", key):
                data = self._system().cat_file(path, start=offset, end=offset + wanted)
                if len(data) > wanted:
                    raise OSError(errno.EIO, f"{len(data)} bytes came, {wanted} were asked for")
                into.write(0, data)
            if len(data) == into.nbytes:
                return len(data)
            # It was the size that ended the read: an object that took its place since has another.
            before, size = size, self.size(key)
            if size == before:
                return len(data)
        raise StorageError(f"cannot read {key} in {self.url}: it was replaced {_LOOKS} times")

    def size(self, key: str) -> int:
        """Return the size of `key` in bytes. See `Store.size`."""
        path = self._path(key)
        with self._mapped(f"look at {key}", key):
            info = self._system().info(path)
        if info["type"] != "file":
            raise NotFound(f"no object {key} in {self.url}: it is a folder")
        return int(info["size"])

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects below `prefix`. See `Store.list_entries`."""
        return iter(self._entries(check_prefix(prefix)))

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the names one level below `prefix`. See `Store.list_children`."""
        # By the objects, not the folders: one that holds no object does not count.
        tails = (entry.key[len(prefix) :] for entry in self._entries(check_prefix(prefix)))
        return sorted({name + slash for name, slash, _ in (tail.partition("/") for tail in tails)})

    def delete(self, keys: Iterable[str]) -> None:
        """Remove the objects under `keys`. See `Store.delete`."""
        for key in check_keys(keys):
            path = self._path(key)
            with self._mapped(f"delete {key}"):
                system = self._system()
                try:
                    if system.info(path)["type"] == "file":
                        system.rm_file(path)
                except (FileNotFoundError, NotADirectoryError):
                    continue

    def close(self) -> None:
        """Forget the file system of this process."""
        self._systems.pop(os.getpid(), None)

    def _path(self, key: str) -> str:
        return f"{self._root}/{check_key(key)}"

    def _system(self) -> Any:
        # One for each process: connections and event loops do not survive a fork.
        pid = os.getpid()
        found = self._systems.get(pid)
        if found is None:
            found = self._systems.setdefault(pid, fsspec.filesystem(self._scheme, **self._options))
        return found

    def _write(self, system: Any, path: str, stream: Stream, watch: Watch | None) -> None:
        # Files in memory appear when they are opened, and what they replace is lost by then.
        whole = self._scheme == "memory"
        if whole or stream.nbytes <= _WHOLE_BYTES:
            # One request, after which the object is there whole; it takes nothing but bytes.
            system.pipe_file(path, b"".join(watched(stream, watch)))
            return
        existed = system.exists(path)
        file = system.open(path, "wb", autocommit=False)
        try:
            for piece in watched(stream, watch):
                file.write(piece)
            file.close()
            if hasattr(file, "commit"):  # files of wrapped libraries appear by being closed
                file.commit()
        except BaseException:
            if isinstance(file, AbstractBufferedFile):
                # Otherwise it would still be finished, cut short, when garbage is collected.
                file.closed = True
            if hasattr(file, "discard"):
                file.discard()
            if not existed and system.exists(path):
                system.rm_file(path)
            raise

    def _check_way(self, system: Any, key: str) -> None:
        """Refuse a key below an object, and one below which there are objects."""
        path = self._path(key)
        if not system.isfile(path) and system.isdir(path) and system.find(path):
            raise UsageError(f"cannot put {key} in {self.url}: it is a folder")
        parent = posixpath.dirname(key)
        while parent:
            if system.isfile(self._path(parent)):
                raise UsageError(f"cannot put {key} in {self.url}: {parent} is an object")
            parent = posixpath.dirname(parent)

    def _entries(self, prefix: str) -> list[Entry]:
        top = f"{self._root}/{prefix}".rstrip("/")
        with self._mapped(f"list {prefix or 'all'}"):
            try:
                found = self._system().find(top, detail=True)
            except (FileNotFoundError, NotADirectoryError):
                return []
        start = len(self._root) + 1
        keys = {path[start:]: info for path, info in found.items()}
        return [
            Entry(key, int(keys[key]["size"]), _modified(keys[key]))
            # `find` of an object yields that object, which is not below the folder of its name.
            for key in sorted(keys)
            if is_key(key) and key.startswith(prefix)
        ]

    @contextmanager
    def _mapped(self, doing: str, reading: str | None = None) -> Iterator[None]:
        """Turn what a file system may raise, which is anything, into an error of this package."""
        where = f"cannot {doing} in {self.url}"
        try:
            yield
        except (CheckpointError, MemoryError):
            raise
        except (FileNotFoundError, NotADirectoryError, IsADirectoryError) as error:
            if reading is not None:
                raise NotFound(f"no object {reading} in {self.url}") from error
            raise StorageError(f"{where}: {describe(error)}; does the place exist?") from error
        except PermissionError as error:
            raise StorageError(
                f"{where}: {describe(error)}; check the credentials and their rights",
                kind=ErrorKind.PERMISSION,
            ) from error
        except (TypeError, ImportError) as error:
            raise UsageError(f"{where}: {describe(error)}; correct the storage_options") from error
        except Exception as error:
            full = isinstance(error, OSError) and error.errno in _FULL
            late = isinstance(error, TimeoutError)
            kind = ErrorKind.STORAGE_FULL if full else ErrorKind.TIMEOUT if late else None
            raise StorageError(f"{where}: {describe(error)}", kind=kind) from error


def _modified(info: Mapping[str, Any]) -> float | None:
    """Return when a file was written, which file systems tell under several names, or not."""
    for name in ("mtime", "LastModified", "last_modified", "modified", "created"):
        value = info.get(name)
        if isinstance(value, datetime):
            return (value if value.tzinfo else value.replace(tzinfo=UTC)).timestamp()
        if isinstance(value, int | float):
            return float(value)
    return None


# What fsspec can read but not list truthfully, and other names of local disks.
_NO_STORES = frozenset({"http", "https", "data", "local", "reference", "cached", "dir"})

_PACKAGES: Mapping[str, str] = {
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "adl": "adlfs",
    "oci": "ocifs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
    "hf": "huggingface_hub",
}


def open_fsspec(
    url: str, scheme: str, rest: str, *, storage_options: Mapping[str, Any] | None = None
) -> Store:
    """Return the store that a url of a file system of fsspec names; it repeats what failed.

    Args:
        url: as it was written, for messages.
        scheme: what stands before `://`.
        rest: what follows that.
        storage_options: for the file system.

    Raises:
        UsageError: fsspec has no such file system, or one that cannot be a store, or it needs a
            package.
    """
    if scheme in _NO_STORES or scheme not in {*fsspec.available_protocols(), *fsspec.registry}:
        known = ", ".join(f"{name}://" for name in ("file", "memory", "s3", *_PACKAGES))
        raise UsageError(f"bad url {url!r}: unknown scheme {scheme!r}; known are paths, {known}")
    host = rest.partition("/")[0]
    if "@" in host and ":" in host.rpartition("@")[0]:
        # Not shown: it holds a password, and messages travel far.
        raise UsageError(f"bad {scheme} url: put credentials into storage_options, not the url")
    try:
        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = _PACKAGES.get(scheme)
        install = f"pip install {package}" if package else str(error)
        raise UsageError(f"bad url {url!r}: {scheme}:// needs a package: {install}") from error
    # Here whole operations; S3 repeats its single requests itself, which is cheaper.
    return RetryStore(FsspecStore(f"{scheme}://{rest}", storage_options=storage_options))
