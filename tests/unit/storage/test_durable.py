"""What a put has done to the disk at each of its steps: in order, killed, and failing."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ckpt.errors import AlreadyExists, StorageError
from dist_ckpt.storage import Entry, LocalStore, PutMode, disk, read_all
from tests.unit.storage.crash_put import NEW

REPOSITORY = Path(__file__).parents[3]
MODES: list[PutMode] = ["create", "replace"]


def put_new(store: LocalStore, mode: PutMode) -> None:
    store.put("a/b/key", [memoryview(NEW)[:7], memoryview(NEW)[7:]], mode=mode)


@pytest.fixture(params=["buffered", "direct"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the bytes of a put travel: the order around them must be the same."""
    if request.param == "direct":
        monkeypatch.setattr(disk, "DIRECT_BYTES", 8192)
        monkeypatch.setattr(disk, "PIECE_BYTES", 8192)
    return str(request.param)


def temporaries(root: Path) -> list[Path]:
    return list(root.rglob(".tmp-*"))


class Trace:
    """The calls that change or flush the disk, with the paths they are about."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls: list[tuple[str, str]] = []
        for name in ("mkdir", "link", "replace", "unlink", "rmdir"):
            self._watch(monkeypatch, name, lambda args: os.fspath(args[-1]))
        for name in ("fsync", "writev", "pwrite"):
            self._watch(monkeypatch, name, lambda args: os.readlink(f"/proc/self/fd/{args[0]}"))

    def _watch(
        self, monkeypatch: pytest.MonkeyPatch, name: str, path: Callable[[tuple[str, ...]], str]
    ) -> None:
        real = getattr(os, name)

        def call(*args: str) -> object:
            self.calls.append((name, path(args)))
            return real(*args)

        monkeypatch.setattr(os, name, call)

    def positions(self, name: str, path: Path | str) -> list[int]:
        return [n for n, call in enumerate(self.calls) if call == (name, str(path))]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("made_by_another", [False, True])
def test_bytes_then_name_then_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: PutMode, made_by_another: bool, way: str
) -> None:
    root = tmp_path / "new" / "run"
    store = LocalStore(root)
    if made_by_another:
        # Another process made the folders, and was killed before it flushed their names.
        (root / "a" / "b").mkdir(parents=True)
    trace = Trace(monkeypatch)
    put_new(store, mode)

    call = "pwrite" if way == "direct" else "writev"
    written = {path for name, path in trace.calls if name == call}
    assert len(written) == 1
    (temporary,) = written
    assert Path(temporary).parent == root / "a" / "b"
    final = root / "a" / "b" / "key"
    (named,) = trace.positions("link" if mode == "create" else "replace", final)
    (flushed,) = trace.positions("fsync", temporary)
    assert max(trace.positions(call, temporary)) < flushed < named
    assert named < max(trace.positions("fsync", final.parent))
    if mode == "create":
        # The removal of the temporary name is flushed with the name that stays.
        (removed,) = trace.positions("unlink", temporary)
        assert removed < max(trace.positions("fsync", final.parent))
    for folder in (root.parent, root, root / "a", root / "a" / "b"):
        made = max([-1, *trace.positions("mkdir", folder)])
        assert made < max(trace.positions("fsync", folder.parent)), f"{folder} may be lost"


def test_root_that_existed_is_where_flushing_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    trace = Trace(monkeypatch)
    store.put("key", [b"."])
    assert trace.positions("fsync", tmp_path)
    assert not trace.positions("fsync", tmp_path.parent)


def test_root_that_was_removed_is_flushed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "x" / "run"
    root.mkdir(parents=True)
    store = LocalStore(root)
    root.rmdir()
    root.parent.rmdir()
    trace = Trace(monkeypatch)
    store.put("key", [b"."])
    for folder in (root, root.parent):
        assert max(trace.positions("mkdir", folder)) < max(trace.positions("fsync", folder.parent))


def test_deletion_is_flushed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    for key in ("a/1", "a/2", "b/1"):
        store.put(key, [b"."])
    trace = Trace(monkeypatch)
    store.delete(["a/1", "b/1", "b/2", "gone/1"])
    for key in ("a/1", "b/1"):
        path = tmp_path / key
        assert max(trace.positions("unlink", path)) < max(trace.positions("fsync", path.parent))
    # Another deleter may have emptied and removed this one, and not flushed that yet.
    assert trace.positions("fsync", tmp_path)


@pytest.mark.parametrize(
    ("way", "mode", "old"),
    [
        *(
            (way, mode, old)
            for way in ("buffered", "direct")
            for mode, old in (("create", None), ("replace", None), ("replace", b"old"))
        ),
        ("linkless", "create", None),  # a replacement needs no link
    ],
)
def test_killed_at_every_call(tmp_path: Path, mode: PutMode, old: bytes | None, way: str) -> None:
    if old is not None:
        for number in range(1, 80):
            LocalStore(tmp_path / str(number)).put("a/b/key", [old])
    command = [sys.executable, "-m", "tests.unit.storage.crash_put", str(tmp_path), mode, way]
    # `make coverage` leaves this one out: its own calls would be counted, a thousand of them.
    bare = {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}
    result = subprocess.run(
        command, cwd=REPOSITORY, env=bare, capture_output=True, text=True, check=True
    )
    survivor = int(result.stdout)
    seen = set()
    for number in range(1, survivor):
        store = LocalStore(tmp_path / str(number))
        entries = list(store.list_entries())
        data = read_all(store, "a/b/key") if entries else None
        seen.add(data)
        assert data in (old, NEW), f"killed at call {number}"
        assert entries == ([] if data is None else [Entry("a/b/key", len(data))])
        assert store.list_children() == ([] if data is None else ["a/"])

        left = len(temporaries(tmp_path / str(number)))
        assert store.sweep() == left <= 1
        assert not temporaries(tmp_path / str(number))
        assert list(store.list_entries()) == entries
        # The next attempt finds nothing in its way.
        store.put("a/b/next", [b"next"])
        put_new(store, "replace")
        assert read_all(store, "a/b/key") == NEW
    assert seen == {old, NEW}, "the sweep missed the call that makes the object visible"
    assert read_all(LocalStore(tmp_path / str(survivor)), "a/b/key") == NEW


_FAILING = ("mkdir", "open", "writev", "pwrite", "fsync", "link", "replace")


class FailAt:
    """Lets the n-th of the calls fail that can fail before a put is done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
        self.left = number
        self.failed = ""
        for place, name in [
            *((os, name) for name in _FAILING),
            (fcntl, "flock"),
            (fcntl, "fcntl"),
        ]:
            self._wrap(monkeypatch, place, name)

    def _wrap(self, monkeypatch: pytest.MonkeyPatch, place: object, name: str) -> None:
        real = getattr(place, name)

        def call(*args: object, **kwargs: object) -> object:
            self.left -= 1
            if self.left == 0:
                self.failed = name
                raise OSError(errno.EIO, "the disk has had enough")
            return real(*args, **kwargs)

        monkeypatch.setattr(place, name, call)


@pytest.mark.parametrize("mode", MODES)
def test_failing_at_every_call(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, mode: PutMode, way: str
) -> None:
    failed: list[str] = []
    for number in range(1, 100):
        store = LocalStore(tmp_path / str(number))
        with monkeypatch.context() as patch:
            fault = FailAt(patch, number)
            if not _raises_storage_error(store, mode):
                break
        failed.append(fault.failed)
        assert not temporaries(tmp_path), f"left behind when {fault.failed} failed"
        if failed[-3:] == ["replace", "open", "fsync"] or failed[-2:] == ["replace", "open"]:
            # The one exception of the contract: the old bytes are gone, the new ones are whole.
            assert read_all(store, "a/b/key") == NEW
        else:
            assert list(store.list_entries()) == []
            assert store.list_children() == []
        put_new(store, "replace")
        assert read_all(store, "a/b/key") == NEW
    assert {"mkdir", "open", "flock", "fsync"} < set(failed)
    assert {"fcntl", "pwrite"} <= set(failed) if way == "direct" else "writev" in failed
    assert failed[-3:] == ["link" if mode == "create" else "replace", "open", "fsync"]


def _raises_storage_error(store: LocalStore, mode: PutMode) -> bool:
    try:
        put_new(store, mode)
    except StorageError as error:
        return "the disk has had enough" in str(error) and "a/b/key" in str(error)
    return False


def test_writes_that_are_short_are_gone_on_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.writev
    monkeypatch.setattr(os, "writev", lambda fd, views: real(fd, [bytes(views[0])[:3]]))
    store = LocalStore(tmp_path)
    store.put("key", [b"0123456", b"7", b"", b"89abcdef" * 3])
    assert read_all(store, "key") == b"0123456789abcdef89abcdef89abcdef"
    monkeypatch.setattr(os, "writev", lambda fd, views: 0)
    with pytest.raises(StorageError, match="took no byte"):
        store.put("other", [b"."])
    assert not temporaries(tmp_path)


def test_link_whose_answer_was_lost_is_a_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.link

    def link(source: str, target: str) -> None:
        real(source, target)
        raise FileExistsError(errno.EEXIST, "sent again by the client, and refused")

    monkeypatch.setattr(os, "link", link)
    store = LocalStore(tmp_path)
    store.put("key", [b"mine"])
    assert read_all(store, "key") == b"mine"
    assert not temporaries(tmp_path)


@pytest.mark.parametrize("removed_since", [False, True])
def test_link_of_another_is_no_success(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, removed_since: bool
) -> None:
    real = os.link

    def link(source: str, target: str) -> None:
        # A backup tool gave the temporary a second name, and another writer was faster.
        real(source, tmp_path / "backup")
        if not removed_since:
            Path(target).write_bytes(b"theirs")
        raise FileExistsError(errno.EEXIST, "exists")

    monkeypatch.setattr(os, "link", link)
    store = LocalStore(tmp_path)
    with pytest.raises(AlreadyExists):
        store.put("key", [b"mine"])
    if not removed_since:
        assert read_all(store, "key") == b"theirs"


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_file_system_whose_folders_cannot_be_flushed_is_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    real = os.fsync
    flushed: list[int] = []

    def fsync(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(code, "no such thing for a folder")
        flushed.append(fd)
        real(fd)

    monkeypatch.setattr(os, "fsync", fsync)
    store = LocalStore(tmp_path)
    store.put("a/key", [b"."])
    assert len(flushed) == 1
    store.delete(["a/key"])
    assert list(store.list_entries()) == []


class TestSweep:
    def test_removes_what_no_living_writer_holds(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("step/save/key", [b"."])
        for folder in ("step/save", "step/dead", "claims", "."):
            (tmp_path / folder).mkdir(exist_ok=True)
            (tmp_path / folder / ".tmp-0123456789abcdef").write_bytes(b"half")
        (tmp_path / "theirs").mkdir()
        assert [entry.key for entry in store.list_entries()] == ["step/save/key"]
        assert store.sweep("step/dead/") == 1
        assert not (tmp_path / "step" / "dead").exists()
        assert store.sweep("no/such/") == 0
        assert store.sweep() == 3
        assert not temporaries(tmp_path)
        # Folders that held nothing of ours are left alone.
        assert sorted(path.name for path in tmp_path.iterdir()) == ["step", "theirs"]
        assert read_all(store, "step/save/key") == b"."

    def test_spares_a_put_that_goes_on(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        store = LocalStore(tmp_path)
        reached, released = threading.Event(), threading.Event()
        real = os.fsync

        def fsync(fd: int) -> None:
            reached.set()
            released.wait()
            real(fd)

        monkeypatch.setattr(os, "fsync", fsync)
        writer = threading.Thread(target=store.put, args=("a/key", [b"whole"]))
        writer.start()
        reached.wait()
        try:
            assert len(temporaries(tmp_path)) == 1
            assert store.sweep() == 0
            assert len(temporaries(tmp_path)) == 1
        finally:
            released.set()
            writer.join()
        assert read_all(store, "a/key") == b"whole"

    @pytest.mark.parametrize("sweeper_still_holds_it", [False, True])
    def test_put_that_lost_its_temporary_takes_another(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sweeper_still_holds_it: bool
    ) -> None:
        real = fcntl.flock
        stolen: list[int] = []

        def flock(fd: int, operation: int) -> None:
            if not stolen:
                stolen.append(fd)
                (path,) = temporaries(tmp_path)
                path.unlink()
                if sweeper_still_holds_it:
                    raise BlockingIOError(errno.EAGAIN, "locked by the sweep")
            real(fd, operation)

        monkeypatch.setattr(fcntl, "flock", flock)
        store = LocalStore(tmp_path)
        store.put("a/key", [b"whole"])
        assert stolen
        assert read_all(store, "a/key") == b"whole"
        assert not temporaries(tmp_path)

    def test_leaves_everything_where_there_are_no_locks(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(fd: int, operation: int) -> None:
            raise OSError(errno.ENOLCK, "no locks here")

        monkeypatch.setattr(fcntl, "flock", flock)
        store = LocalStore(tmp_path)
        store.put("key", [b"."])
        (tmp_path / ".tmp-0123456789abcdef").write_bytes(b"half")
        assert store.sweep() == 0
        assert len(temporaries(tmp_path)) == 1

    def test_failing_lock_is_an_error_and_leaves_nothing(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def flock(fd: int, operation: int) -> None:
            raise OSError(errno.EIO, "broken")

        store = LocalStore(tmp_path)
        (tmp_path / ".tmp-0123456789abcdef").write_bytes(b"half")
        monkeypatch.setattr(fcntl, "flock", flock)
        with pytest.raises(StorageError, match="broken"):
            store.sweep()
        with pytest.raises(StorageError, match="broken"):
            store.put("key", [b"."])
        assert len(temporaries(tmp_path)) == 1


def test_folder_that_keeps_vanishing_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.open

    def open_(path: str, flags: int, *args: int) -> int:
        if flags & os.O_CREAT:
            raise FileNotFoundError(errno.ENOENT, "pruned", path)
        return real(path, flags, *args)

    monkeypatch.setattr(os, "open", open_)
    with pytest.raises(StorageError, match="or was removed again, each of"):
        LocalStore(tmp_path).put("a/key", [b"."])


def test_folder_that_vanished_once_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.mkdir
    calls: list[str] = []

    def mkdir(path: str) -> None:
        calls.append(path)
        if len(calls) == 1:
            # Another writer made it, and a deleter pruned it before anybody could look.
            raise FileExistsError(errno.EEXIST, "exists", path)
        real(path)

    monkeypatch.setattr(os, "mkdir", mkdir)
    store = LocalStore(tmp_path)
    store.put("a/key", [b"."])
    assert calls == [str(tmp_path / "a")] * 2
    assert store.size("a/key") == 1
