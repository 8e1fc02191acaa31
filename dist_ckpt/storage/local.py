"""A directory as a store: local disks, and shared file systems that keep POSIX promises."""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import TypeVar

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    ErrorKind,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    MayGo,
    PutMode,
    Stream,
    Watch,
    check_key,
    check_keys,
    check_mode,
    check_prefix,
    everything,
    fill_views,
    flat_views,
    is_key,
    is_temporary,
)
from dist_ckpt.storage.disk import (
    NO_LOCKS,
    DirectIO,
    Naming,
    lock,
    look_again,
    nearest_existing,
    remove_exactly,
    sync_directory,
    write_file,
)

_FULL = (errno.ENOSPC, errno.EDQUOT)
_FORBIDDEN = (errno.EACCES, errno.EPERM, errno.EROFS)
# A link that leads back to itself leads to nothing.
_NOT_THERE = (errno.ENOENT, errno.ENOTDIR, errno.ELOOP)
_LOOKS = 3

ResultT = TypeVar("ResultT")


class LocalStore:
    """The directory `path`, which need not exist: the first `put` creates it.

    Keys are paths below it. Links to directories are followed when reading, writing and listing,
    and never when deleting. Files whose names are no valid keys are left alone and not listed.

    Args:
        path: relative to the working directory of now; links on it are followed now, once.
        single_writer: the caller promises that one host at a time creates objects there. It counts
            only on a mount without hard links, where creating is refused otherwise.

    Raises:
        UsageError: no path, one that is no Unicode text, or one relative to a directory that is
            not there.
        StorageError: nobody can tell what exists there: no permission, or a broken disk.
    """

    def __init__(self, path: str | os.PathLike[str], *, single_writer: bool = False) -> None:
        text = os.fspath(path)
        if not text or "\0" in text:
            raise UsageError(f"bad path {text!r}: it is empty or holds a null character")
        try:
            text.encode()  # as it is told to other ranks
        except UnicodeEncodeError:
            raise UsageError(
                f"bad path {text!r}: it is no valid UTF-8. Rename the folder, or give a link to it"
            ) from None
        try:
            self._url = os.path.abspath(text)
        except FileNotFoundError:
            raise UsageError(
                f"the directory in which this process works was deleted, so the path {text!r} "
                "leads nowhere: give an absolute one"
            ) from None
        # A link on the way (`current` to the run of today) may point elsewhere tomorrow, and the
        # files of one job must not come into the run of another. One into nothing, such as a disk
        # that is not mounted, is refused later: nothing is made where it would lead.
        met = self._url
        while not os.path.lexists(met):
            met = os.path.dirname(met)
        self._root = os.path.realpath(self._url) if os.path.exists(met) else self._url
        self._direct = DirectIO()
        self._naming = Naming(single_writer=single_writer)
        # What did not exist at this point may have been created since by a process that has not
        # made it durable yet, so every put makes the directories from here down durable itself.
        with self._mapped("find out what exists", self._root):
            self._anchor = nearest_existing(self._root)

    def __repr__(self) -> str:
        return f"LocalStore({self._url!r})"

    @property
    def url(self) -> str:
        """The absolute path, as it was given."""
        return self._url

    @property
    def capabilities(self) -> Capabilities:
        """Everything: hard links are atomic, and files and directories are flushed to disk.

        `direct_io` turns false where a mount was met that does not take it, and `atomic_create`
        where one was met that has no hard links, unless a single writer was promised.
        """
        return Capabilities(
            atomic_create=self._naming.atomic,
            strong_list=True,
            durable=True,
            direct_io=not self._direct.refused,
        )

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Write `buffers` to a temporary file, flush it, then name it. See `Store.put`."""
        # A buffer that cannot be had fails here, before anything is on the disk.
        views = flat_views(buffers)
        self._put(key, Stream.of(views), mode, watch)

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Write what `stream` makes, as `put` does. See `Streamer.put_stream`."""
        self._put(key, stream, mode, None)

    def _put(self, key: str, stream: Stream, mode: PutMode, watch: Watch | None) -> None:
        path = self._path(key)
        check_mode(mode)
        with self._mapped(f"put {key}", path, needed_bytes=stream.nbytes):
            try:
                write_file(
                    path,
                    stream,
                    mode=mode,
                    anchor=self._anchor,
                    direct=self._direct,
                    naming=self._naming,
                    watch=watch,
                )
            except FileExistsError as error:
                # A link is refused with the same code where a folder has the name, which is no
                # object.
                if os.path.isdir(path):
                    raise IsADirectoryError(errno.EISDIR, "it is a folder", path) from error
                raise AlreadyExists(f"{key} already exists in {self.url}") from error

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Fill `buffers` from `offset` of `key`. See `Store.read_into`."""
        path = self._path(key)
        views = fill_views(offset, buffers)
        with self._mapped(f"read {key}", path, reading=key):
            return self._current(path, lambda: self._read(key, views, offset))

    def size(self, key: str) -> int:
        """Return the size of `key` in bytes. See `Store.size`."""
        path = self._path(key)
        with self._mapped(f"look at {key}", path, reading=key):
            # By path, not from an open file: only reading needs the right to read.
            status = self._current(path, lambda: os.stat(path))
        self._check_regular(key, status)
        return status.st_size

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects below `prefix`, without unfinished ones. See `Store.list_entries`."""
        check_prefix(prefix)
        return self._walk(prefix)

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the names one level below `prefix`. See `Store.list_children`."""
        check_prefix(prefix)
        names: list[str] = []
        for name, _ in self._scan(prefix):
            if not name.endswith("/") or self._may_hold_object(prefix + name):
                names.append(name)
        return names

    def delete(self, keys: Iterable[str]) -> None:
        """Remove `keys` and the folders that this leaves empty. See `Store.delete`."""
        directories: dict[str, None] = {}
        for key in check_keys(keys):
            path = self._path(key)
            directory = os.path.dirname(path)
            with self._mapped(f"delete {key}", path):
                if directory not in directories:
                    self._check_root()
                    self._check_no_link(key, directory)
                    directories[directory] = None
                _unlink(path)
        # Also where another deleter was faster, whose removals may not be durable yet.
        for directory in directories:
            with self._mapped(f"delete objects in {directory}", directory):
                # Flushed before pruned: a pruned folder cannot be flushed any more.
                self._sync_nearest(directory)
                prune(directory, self._root)

    def delete_exactly(self, key: str, data: bytes) -> bool:
        """Remove `key` if it holds `data`. See `ExactDeleter.delete_exactly`."""
        path = self._path(key)
        directory = os.path.dirname(path)
        with self._mapped(f"delete {key}", path):
            self._check_no_link(key, directory)
            if not remove_exactly(path, data, self._naming):
                return False
            self._sync_nearest(directory)
            prune(directory, self._root)
        return True

    def sweep(self, prefix: str = "", *, may_go: MayGo = everything) -> int:
        """Remove the temporary files of killed writers below `prefix`. See `Sweeper.sweep`.

        A folder that cannot be looked into keeps nobody from the others.

        Raises:
            StorageError: the first thing that failed, once everything else is done.
        """
        check_prefix(prefix)
        # Links are not followed, here and in the walk: what is behind them may belong to others.
        if self._is_behind_link(os.path.join(self._root, prefix)):
            return 0
        removed, failures = sweep_files(self._root, prefix, may_go)
        with self._mapped(f"sweep {prefix or 'all'}", self._root):
            for error in failures:
                raise error
        return removed

    def close(self) -> None:
        """Release nothing: no file stays open between calls."""

    def _read(self, key: str, views: Sequence[memoryview], offset: int) -> int:
        # Not to be held up by a pipe that bears the name of an object.
        try:
            fd = os.open(self._path(key), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device without driver
                self._check_regular(key, os.stat(self._path(key)))
            raise
        try:
            self._check_regular(key, os.fstat(fd))
            return self._direct.read(fd, views, offset)
        finally:
            os.close(fd)

    def _current(self, path: str, look: Callable[[], ResultT]) -> ResultT:
        """Return `look()` at `path`, whatever this host remembers of a folder that it shares."""
        for _ in range(_LOOKS - 1):
            try:
                return look()
            except OSError as error:
                # Stale: another host replaced or removed the file while we had it open.
                if error.errno not in (errno.ENOENT, errno.ESTALE):
                    raise
            look_again(self._root, os.path.dirname(path))
        return look()

    def _path(self, key: str) -> str:
        return os.path.join(self._root, check_key(key))

    def _scan(self, prefix: str) -> list[tuple[str, os.DirEntry[str]]]:
        """Return the names in the folder `prefix`, directories with a `/`, in the order of keys."""
        path = os.path.join(self._root, prefix)
        with self._mapped(f"list {path}", path):
            try:
                entries = self._current(path, lambda: _valid_entries(path))
            except OSError as error:
                if error.errno not in _NOT_THERE:
                    raise
                # A missing folder holds nothing; a root that is a file is a mistake.
                self._check_root()
                return []
            # The slash takes part in the order: "a-b" comes before "a/b".
            named = ((_listed_name(entry), entry) for entry in entries)
            return sorted((pair for pair in named if pair[0]), key=lambda item: item[0])

    def _may_hold_object(self, folder: str) -> bool:
        """Whether an object lies below `folder`, or nobody can tell."""
        try:
            # A killed writer or a deleter may leave folders that hold no object.
            return next(self._walk(folder), None) is not None
        except StorageError:
            # Its name is there for all to see, and one closed folder (`lost+found`, a colleague's)
            # hides none of the others; whoever wants to read in it is told what is wrong.
            return True

    def _walk(self, prefix: str) -> Iterator[Entry]:
        for name, entry in self._scan(prefix):
            if name.endswith("/"):
                if not (entry.is_symlink() and self._leads_back(prefix, entry.path)):
                    yield from self._walk(prefix + name)
                continue
            with self._mapped(f"look at {entry.path}", entry.path):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue  # deleted since, or a link into nothing
            yield Entry(prefix + name, status.st_size, status.st_mtime)

    def _leads_back(self, prefix: str, link: str) -> bool:
        """Whether `link` points to a folder on the way to it: following it would never end."""
        parts = prefix.split("/")
        way = (os.path.join(self._root, *parts[:count]) for count in range(len(parts)))
        return os.path.realpath(link) in map(os.path.realpath, way)

    def _sync_nearest(self, directory: str) -> None:
        """Make removals in `directory` durable, or its own removal where it is gone."""
        while len(directory) >= len(self._root):
            try:
                sync_directory(directory)
            except (FileNotFoundError, NotADirectoryError):
                directory = os.path.dirname(directory)
            else:
                break

    def _check_regular(self, key: str, status: os.stat_result) -> None:
        if not stat.S_ISREG(status.st_mode):
            what = "a folder" if stat.S_ISDIR(status.st_mode) else "a special file"
            raise NotFound(f"no object {key} in {self.url}: it is {what}")

    def _check_root(self) -> None:
        """A root that cannot become a directory is a mistake; one that is missing is empty."""
        path = nearest_existing(self._root)
        if not os.path.isdir(path):
            raise UsageError(f"{path} is not a directory, nor a link to one: choose another place")

    def _check_no_link(self, key: str, directory: str) -> None:
        if self._is_behind_link(directory):
            raise StorageError(
                f"cannot delete {key} in {self.url}: a link leads out of the way to it, and what "
                "is behind may belong to others",
                kind=ErrorKind.PERMISSION,
            )

    def _is_behind_link(self, directory: str) -> bool:
        """Whether a link lies between the root, which may be one itself, and `directory`."""
        root = os.path.realpath(self._root)
        relative = os.path.relpath(directory, self._root)
        return os.path.realpath(directory) != os.path.normpath(os.path.join(root, relative))

    @contextmanager
    def _mapped(
        self, doing: str, path: str, *, reading: str | None = None, needed_bytes: int = 0
    ) -> Iterator[None]:
        """Turn every OSError of the body into an error of this package: the one edge."""
        # An outage must never look like an empty or missing place, so each errno is told apart.
        try:
            yield
        except CheckpointError:
            # NotFound and AlreadyExists are OSErrors too, and already say what they mean.
            raise
        except OSError as error:
            if error.errno in _NOT_THERE:
                # The look at the root may fail by itself, of a mount that is going away.
                with self._mapped(doing, self._root):
                    self._check_root()
                if reading is not None:
                    raise NotFound(f"no object {reading} in {self.url}") from error
            raise self._failure(error, doing, path, needed_bytes) from error

    def _failure(self, error: OSError, doing: str, path: str, needed_bytes: int) -> CheckpointError:
        message = f"cannot {doing} in {self.url}: {error.strerror}"
        if error.errno in _FULL:
            # Few file systems count what a quota leaves as free, so it has no figure here.
            room = "make room"
            if error.errno == errno.EDQUOT:
                room = "the quota leaves no room for them: make some, or raise it"
            free = ""
            # Nobody may be able to tell, and that is not what failed.
            with suppress(OSError):
                free = f" and {free_bytes(path)} are free there"
            return StorageError(
                f"{message}; {needed_bytes} bytes were needed{free}; {room}",
                kind=ErrorKind.STORAGE_FULL,
            )
        if error.errno == errno.EFBIG:
            return StorageError(
                f"{message}; {needed_bytes} bytes are over the size limit for a file; raise it"
                " (ulimit -f) or use another file system"
            )
        if error.errno in _FORBIDDEN:
            return StorageError(
                f"{message}; let this user read and write it, or choose another place",
                kind=ErrorKind.PERMISSION,
            )
        if error.errno in (errno.ENOTDIR, errno.EISDIR):
            return UsageError(f"{message}; no object can bear the name of a folder, or be one")
        if error.errno == errno.ENAMETOOLONG:
            return UsageError(f"{message}; choose a shorter key")
        return StorageError(f"{message}; check the disk and its mount")


def _unlink(path: str) -> None:
    """Remove the file `path` if there is one. A folder is not one."""
    with suppress(FileNotFoundError, NotADirectoryError, IsADirectoryError):
        os.unlink(path)


def _valid_entries(path: str) -> list[os.DirEntry[str]]:
    with os.scandir(path) as found:
        return [entry for entry in found if is_key(entry.name)]


def _listed_name(entry: os.DirEntry[str]) -> str:
    """Return how a listing shows `entry`: a folder with a `/`, what is neither as ""."""
    try:
        if entry.is_dir():
            return entry.name + "/"
        return entry.name if entry.is_file() else ""
    except OSError:
        # A link that leads round in circles, or to where nobody may look, is no object of ours;
        # what it points to cannot be told from nothing.
        if entry.is_symlink():
            return ""
        raise


def free_bytes(path: str) -> int:
    """Return what the file system of `path`, or of where it would be, has left for this user."""
    status = os.statvfs(nearest_existing(path))
    return status.f_bavail * status.f_frsize


def prune(directory: str, root: str) -> None:
    """Remove `directory` and those above it, below `root`, as far as they are empty."""
    while len(directory) > len(root):
        try:
            os.rmdir(directory)
        except FileNotFoundError:
            pass
        except OSError:
            # Not empty, in use, or not ours to remove: an empty folder is never listed anyway.
            return
        directory = os.path.dirname(directory)


# What killed writers left in a directory: by its exact names, and never through a link.


def sweep_files(root: str, prefix: str, may_go: MayGo) -> tuple[int, list[OSError]]:
    """Remove the temporary files of killed writers below the folder `prefix` of `root`.

    Returns:
        How many there were, and what failed: a folder that cannot be looked into, or a file that
        cannot be removed, keeps nobody from the others.
    """
    removed = 0
    failures: list[OSError] = []
    for directory, folders, names in os.walk(
        os.path.join(root, prefix).rstrip("/"), onerror=failures.append
    ):
        here = os.path.relpath(directory, root) + "/"
        here = "" if here == "./" else here
        # A folder that may hold nothing of ours is not looked into: it may be large, or closed.
        folders[:] = [name for name in folders if is_key(here + name) and may_go(f"{here}{name}/")]
        count = 0
        for name in names:
            if is_temporary(name) and may_go(here + name):
                try:
                    count += _remove_abandoned(os.path.join(directory, name))
                except OSError as error:
                    failures.append(error)
        if count:
            prune(directory, root)
        removed += count
    # A folder that was there a moment ago was emptied by somebody else.
    return removed, [error for error in failures if not isinstance(error, FileNotFoundError)]


def _remove_abandoned(path: str) -> bool:
    """Remove the temporary file `path` unless its writer lives; return whether it was removed."""
    try:
        # What bears such a name and is a link, a pipe or a folder was made by somebody else.
        if not stat.S_ISREG(os.lstat(path).st_mode):
            return False
        fd = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
    except FileNotFoundError:
        return False
    try:
        if not lock(fd):
            return False
        # Still locked: a writer that opened it just now finds it gone and takes another name.
        os.unlink(path)
        return True
    except FileNotFoundError:
        return False
    except OSError as error:
        # Without locks nobody can tell that the writer is dead, so the file stays.
        if error.errno in NO_LOCKS:
            return False
        raise
    finally:
        os.close(fd)
