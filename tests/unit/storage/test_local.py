"""What is special about a directory as a store: its root, foreign files, links, and full disks."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dist_ckpt.errors import CheckpointError, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.storage import Entry, LocalStore, Store, read_all
from dist_ckpt.storage.disk import aligned_buffer

REPOSITORY = Path(__file__).parents[3]
NOBODY = 65534


def every_method(store: Store) -> list[Callable[[], object]]:
    return [
        lambda: store.put("a/key", [b"."]),
        lambda: store.size("a/key"),
        lambda: store.read_into("a/key", 0, memoryview(bytearray(1))),
        lambda: list(store.list_entries()),
        lambda: list(store.list_entries("a/")),
        lambda: store.list_children(),
        lambda: store.delete(["a/key"]),
    ]


class TestRoot:
    def test_is_not_created_before_the_first_put(self, tmp_path: Path) -> None:
        root = tmp_path / "run"
        store = LocalStore(root)
        assert list(store.list_entries()) == []
        assert store.list_children() == []
        with pytest.raises(NotFound, match="key"):
            store.size("key")
        store.delete(["key"])
        assert store.sweep() == 0
        assert not root.exists()
        store.put("key", [b"."])
        assert (root / "key").read_bytes() == b"."

    def test_stays_when_it_is_emptied(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path / "run")
        store.put("a/b/key", [b"."])
        store.delete(["a/b/key"])
        assert list((tmp_path / "run").iterdir()) == []

    def test_is_fixed_when_the_store_is_made(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        store = LocalStore("run")
        assert store.url == str(tmp_path / "run")
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path / "elsewhere")
        store.put("key", [b"."])
        assert (tmp_path / "run" / "key").exists()

    @pytest.mark.parametrize("below", ["", "run", "deeper/run"])
    def test_that_is_or_is_below_a_file_is_refused(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_bytes(b"theirs")
        store = LocalStore(tmp_path / "file" / below)
        for call in every_method(store):
            with pytest.raises(UsageError, match=f"{tmp_path}/file is not a directory"):
                call()
        assert (tmp_path / "file").read_bytes() == b"theirs"

    def test_that_is_a_broken_link_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "run").symlink_to("nowhere")
        for call in every_method(LocalStore(tmp_path / "run")):
            with pytest.raises(UsageError, match="run is not a directory, nor a link to one"):
                call()

    @pytest.mark.parametrize("path", ["", "a\0b"])
    def test_that_is_no_path_is_refused(self, path: str) -> None:
        with pytest.raises(UsageError, match="bad path"):
            LocalStore(path)

    def test_may_be_a_link(self, tmp_path: Path) -> None:
        (tmp_path / "real").mkdir()
        (tmp_path / "link").symlink_to("real")
        store = LocalStore(tmp_path / "link")
        store.put("a/key", [b"."])
        assert list(LocalStore(tmp_path / "real").list_entries()) == [Entry("a/key", 1)]
        store.delete(["a/key"])
        assert list(store.list_entries()) == []


class TestKeys:
    def test_object_and_folder_of_one_name(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("a/b", [b"."])
        with pytest.raises(UsageError, match=r"a/b/c.*no object can bear the name of a folder"):
            store.put("a/b/c", [b"."])
        with pytest.raises(UsageError, match=r"put a .*it is a folder"):
            store.put("a", [b"."])
        with pytest.raises(UsageError, match=r"put a .*no object can bear the name of a folder"):
            store.put("a", [b"."], mode="replace")
        with pytest.raises(NotFound, match="it is a folder"):
            store.read_into("a", 0, memoryview(bytearray(1)))

    def test_too_long_for_the_file_system(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        for call in (
            lambda: store.put("x" * 300, [b"."]),
            lambda: store.put("x" * 300 + "/y", [b"."]),
            lambda: store.size("x" * 300),
        ):
            with pytest.raises(UsageError, match="shorter key"):
                call()
        assert list(tmp_path.iterdir()) == []


class TestForeignThings:
    def test_names_that_are_no_keys_are_neither_listed_nor_touched(self, tmp_path: Path) -> None:
        store = LocalStore(tmp_path)
        store.put("a/key", [b"."])
        for name in (b"back\\slash", b"new\nline", b"not-utf8-\xff", b".tmp-0123456789abcdef"):
            Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "a"), name))).write_bytes(b"!")
        (tmp_path / "back\\slash").mkdir()
        (tmp_path / "back\\slash" / "x").write_bytes(b"!")
        assert list(store.list_entries()) == [Entry("a/key", 1)]
        assert store.list_children() == ["a/"]
        assert store.list_children("a/") == ["key"]
        store.delete(["a/key"])
        assert len(list((tmp_path / "a").iterdir())) == 4
        assert store.list_children() == []

    def test_special_files_are_no_objects_and_hold_nobody_up(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        (tmp_path / "broken").symlink_to("nowhere")
        store = LocalStore(tmp_path)
        assert list(store.list_entries()) == []
        assert store.list_children() == []
        for key in ("pipe", "broken"):
            with pytest.raises(NotFound, match=key):
                store.size(key)
            with pytest.raises(NotFound, match=key):
                store.read_into(key, 0, memoryview(bytearray(1)))

    def test_links_that_lead_round_in_circles_are_nothing(self, tmp_path: Path) -> None:
        (tmp_path / "round").symlink_to("round")
        (tmp_path / "there").symlink_to("back")
        (tmp_path / "back").symlink_to("there")
        store = LocalStore(tmp_path)
        store.put("a/key", [b"."])
        (tmp_path / "a" / "loop").symlink_to("loop")
        assert store.list_children() == ["a/"]
        assert [entry.key for entry in store.list_entries()] == ["a/key"]
        assert store.list_children("round/") == []
        for key in ("round", "there/below", "a/loop"):
            with pytest.raises(NotFound, match=key):
                store.size(key)
            with pytest.raises(NotFound, match=key):
                store.read_into(key, 0, memoryview(bytearray(1)))
        with pytest.raises(UsageError, match="round is not a directory"):
            LocalStore(tmp_path / "round" / "run").list_children()
        assert store.sweep() == 0

    def test_links_are_followed_but_never_in_circles(self, tmp_path: Path) -> None:
        fast = LocalStore(tmp_path / "fast")
        fast.put("step/key", [b"."])
        store = LocalStore(tmp_path / "run")
        store.put("a/key", [b"."])
        (tmp_path / "run" / "linked").symlink_to(tmp_path / "fast" / "step")
        (tmp_path / "run" / "a" / "up").symlink_to("..")
        (tmp_path / "run" / "self").symlink_to(".")
        (tmp_path / "run" / "file").symlink_to(tmp_path / "fast" / "step" / "key")
        (tmp_path / "fast" / "step" / "back").symlink_to(tmp_path / "run")
        assert [e.key for e in store.list_entries()] == ["a/key", "file", "linked/key"]
        assert store.list_children() == ["a/", "file", "linked/", "self/"]
        assert read_all(store, "linked/key") == b"."

    def test_nothing_behind_a_link_is_deleted(self, tmp_path: Path) -> None:
        theirs = LocalStore(tmp_path / "theirs")
        theirs.put("step/key", [b"."])
        run = tmp_path / "run"
        run.mkdir()
        (run / "step").symlink_to(tmp_path / "theirs" / "step")
        (tmp_path / "theirs" / "step" / ".tmp-0123456789abcdef").write_bytes(b"half")
        store = LocalStore(run)
        with pytest.raises(StorageError, match="link"):
            store.delete(["step/key"])
        assert store.sweep() == 0
        assert read_all(theirs, "step/key") == b"."


def test_object_deleted_during_a_listing_is_left_out(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    for key in ("a", "b", "c/1", "c/2", "d"):
        store.put(key, [b"."])
    listing = store.list_entries()
    assert next(listing).key == "a"
    store.delete(["b", "c/1", "c/2"])
    assert [entry.key for entry in listing] == ["d"]


def test_short_reads_are_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = LocalStore(tmp_path)
    store.put("key", [b"0123456789"])
    real = os.preadv
    monkeypatch.setattr(os, "preadv", lambda fd, views, at: real(fd, [views[0][:3]], at))
    target = bytearray(9)
    assert store.read_into("key", 2, memoryview(target)) == 8
    assert target == b"23456789\0"


# ---------------------------------------------------------------- shared with other hosts


class Server:
    """What a host remembers of a shared folder, and when it asks the server again."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
        self.asked: list[str] = []
        self._code = code
        self._open, self._stat, self._scandir = os.open, os.stat, os.scandir
        monkeypatch.setattr(os, "scandir", self.scandir)
        monkeypatch.setattr(os, "open", self.open)
        monkeypatch.setattr(os, "stat", self.stat)

    def open(self, path: str, flags: int, mode: int = 0o777) -> int:
        if flags & os.O_DIRECTORY:
            self.asked.append(path)
        else:
            self._check(path)
        return self._open(path, flags, mode)

    def stat(self, path: str) -> os.stat_result:
        self._check(path)
        return self._stat(path)

    def scandir(self, path: str) -> Any:
        self._check(path)
        return self._scandir(path)

    def _check(self, path: str) -> None:
        if os.path.dirname(path) not in self.asked:
            raise OSError(self._code, os.strerror(self._code), path)


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ESTALE])
@pytest.mark.parametrize("call", ["size", "read_into", "list_entries"])
def test_what_a_host_remembers_of_a_shared_folder_is_not_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    LocalStore(tmp_path).put("a/b/key", [b"12345"])
    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        server = Server(patch, code)
        found: dict[str, Callable[[], int]] = {
            "size": lambda: store.size("a/b/key"),
            "read_into": lambda: store.read_into("a/b/key", 0, memoryview(bytearray(9))),
            "list_entries": lambda: next(iter(store.list_entries("a/b/"))).nbytes,
        }
        count = found[call]()
    assert count == 5
    # From the top down: what is remembered of a folder decides what is seen of those below.
    assert server.asked == [str(tmp_path), str(tmp_path / "a"), str(tmp_path / "a" / "b")]


def test_file_replaced_while_it_is_read_is_read_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("key", [b"old " * 10])
    real = os.preadv
    failures: list[int] = []

    def preadv(fd: int, views: list[memoryview], offset: int) -> int:
        if offset and not failures:
            failures.append(offset)
            LocalStore(tmp_path).put("key", [b"new " * 10], mode="replace")
            raise OSError(errno.ESTALE, "stale file handle")
        return real(fd, [views[0][:7]], offset)

    monkeypatch.setattr(os, "preadv", preadv)
    target = bytearray(40)
    assert store.read_into("key", 0, memoryview(target)) == 40
    assert target == b"new " * 10
    assert failures == [7]


def test_file_that_is_always_stale_is_one_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = LocalStore(tmp_path)
    store.put("key", [b"."])

    def preadv(*args: object) -> int:
        raise OSError(errno.ESTALE, "stale file handle")

    monkeypatch.setattr(os, "preadv", preadv)
    with pytest.raises(StorageError, match="stale file handle"):
        store.read_into("key", 0, memoryview(bytearray(1)))


def test_buffers_are_not_joined_in_memory(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    buffers = [bytearray(4 << 20) for _ in range(4)]
    tracemalloc.start()
    try:
        store.put("key", buffers)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 1 << 20


# ---------------------------------------------------------------- no permission


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user may enter, which pytest's own are not."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name)
        path.chmod(0o755)
        yield path


@contextmanager
def no_privileges() -> Iterator[None]:
    """Run the body without the rights of root, where the tests have them."""
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)


def check_forbidden(call: Callable[[], object], url: str) -> None:
    with pytest.raises(StorageError, match=f"{url}.*let this user") as caught:
        call()
    assert caught.value.kind == ErrorKind.PERMISSION


def test_directory_that_cannot_be_written(open_folder: Path) -> None:
    root = open_folder / "run"
    root.mkdir()
    store = LocalStore(root)
    store.put("a/key", [b"."])
    (root / "a").chmod(0o555)
    root.chmod(0o555)
    try:
        with no_privileges():
            check_forbidden(lambda: store.put("a/new", [b"."]), store.url)
            check_forbidden(lambda: store.put("new/key", [b"."]), store.url)
            check_forbidden(lambda: store.delete(["a/key"]), store.url)
            assert list(store.list_entries()) == [Entry("a/key", 1)]
    finally:
        root.chmod(0o755)
        (root / "a").chmod(0o755)


def test_directory_that_cannot_be_read_is_not_an_empty_one(open_folder: Path) -> None:
    root = open_folder / "run"
    store = LocalStore(root)
    store.put("a/key", [b"."])
    (root / "a").chmod(0)
    try:
        with no_privileges():
            check_forbidden(lambda: list(store.list_entries()), store.url)
            check_forbidden(lambda: store.list_children("a/"), store.url)
            assert store.list_children() == ["a/"], "its name is there for all to see"
            check_forbidden(lambda: store.size("a/key"), store.url)
            check_forbidden(lambda: store.sweep(), store.url)
    finally:
        (root / "a").chmod(0o755)


def test_a_closed_folder_beside_hides_no_other(open_folder: Path) -> None:
    root = open_folder / "run"
    store = LocalStore(root)
    store.put("a/key", [b"."])
    store.put("lost+found/key", [b"."])
    (root / "linked").symlink_to("lost+found/key")
    (root / "lost+found").chmod(0)
    try:
        with no_privileges():
            assert store.list_children() == ["a/", "lost+found/"]
            check_forbidden(lambda: store.size("lost+found/key"), store.url)
            check_forbidden(lambda: list(store.list_entries()), store.url)
            assert list(store.list_entries("a/")) == [Entry("a/key", 1)]
    finally:
        (root / "lost+found").chmod(0o755)


# ---------------------------------------------------------------- no room


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB; only root can make one."""
    path = tmp_path / "small"
    path.mkdir()
    mount = shutil.which("mount")
    if mount is None or os.geteuid() != 0:
        pytest.skip("only root can mount a file system that is small enough to fill")
    command = [mount, "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(path)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting is not allowed here, as in most containers")
    yield path
    subprocess.run(["umount", str(path)], check=True)


def test_full_disk(small_disk: Path) -> None:
    store = LocalStore(small_disk / "run")
    store.put("a/old", [bytes(300_000)])
    free = os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_frsize
    for mode in ("create", "replace"):
        with pytest.raises(StorageError, match=f"2000000 bytes were needed and {free}") as caught:
            store.put("a/new" if mode == "create" else "a/old", [bytes(2_000_000)], mode=mode)
        assert caught.value.kind == ErrorKind.STORAGE_FULL
        assert [path.name for path in (small_disk / "run" / "a").iterdir()] == ["old"]
    assert read_all(store, "a/old") == bytes(300_000)
    store.put("a/new", [bytes(300_000)])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["pwrite", "fsync", "link"])
def test_no_room_for_a_large_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    store = LocalStore(tmp_path / "run")
    calls: list[object] = []

    def fail(*args: object) -> None:
        calls.append(args)
        raise OSError(code, os.strerror(code))

    data = aligned_buffer(2 << 20)
    with monkeypatch.context() as patch:
        patch.setattr(os, call, fail)
        with pytest.raises(StorageError, match=f"{2 << 20} bytes were needed and ") as caught:
            store.put("key", [data])
    assert caught.value.kind == ErrorKind.STORAGE_FULL
    assert ("quota" in str(caught.value)) == (code == errno.EDQUOT)
    assert len(calls) == 1, "nothing is tried again on a full disk"
    assert list(store.list_entries()) == []
    assert not list(tmp_path.rglob(".tmp-*"))


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
@pytest.mark.parametrize("call", ["writev", "fsync", "mkdir", "link"])
def test_no_room_is_told_wherever_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, call: str
) -> None:
    store = LocalStore(tmp_path / "run")

    def fail(*args: object) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(StorageError, match=r"12 bytes were needed and [0-9]+ are free") as caught:
        store.put("key", [b"123456"] * 2)
    assert caught.value.kind == ErrorKind.STORAGE_FULL
    monkeypatch.undo()
    assert list(store.list_entries()) == []
    assert not list(tmp_path.rglob(".tmp-*"))


def test_limit_on_the_size_of_a_file(tmp_path: Path) -> None:
    script = (
        "import resource, sys\n"
        "from dist_ckpt.storage import LocalStore\n"
        "store = LocalStore(sys.argv[1])\n"
        "limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (5000, limit))\n"
        "try:\n"
        "    store.put('key', [bytes(3000), bytes(3000)])\n"
        "except Exception as error:\n"
        "    sys.stdout.write(f'{type(error).__name__}: {error}')\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path)]
    result = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("StorageError: cannot put key in ")
    assert "6000 bytes are over the size limit" in result.stdout
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("call", ["put", "size", "read_into", "list", "delete", "sweep"])
def test_failing_disk_is_one_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(tmp_path)
    store.put("a/key", [b"."])

    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(errno.EIO, "input/output error")

    for name in ("open", "stat", "lstat", "scandir", "unlink"):
        monkeypatch.setattr(os, name, fail)
    calls: dict[str, Callable[[], object]] = {
        "put": lambda: store.put("a/new", [b"."]),
        "size": lambda: store.size("a/key"),
        "read_into": lambda: store.read_into("a/key", 0, memoryview(bytearray(1))),
        "list": lambda: list(store.list_entries()),
        "delete": lambda: store.delete(["a/key"]),
        "sweep": lambda: store.sweep(),
    }
    error: BaseException | None = None
    try:
        calls[call]()
    except CheckpointError as caught:
        error = caught
    # Patched names are needed by pytest itself, even to show a failure.
    monkeypatch.undo()
    assert isinstance(error, StorageError)
    assert error.kind == ErrorKind.STORAGE
    assert "input/output error" in str(error)
    assert isinstance(error.__cause__, OSError)


def failing(code: int) -> Callable[..., object]:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError(code, os.strerror(code))

    return fail


@pytest.mark.parametrize("code", [errno.ENOENT, errno.ENOTDIR])
def test_a_look_at_the_root_that_fails_is_one_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    store = LocalStore(tmp_path)
    store.put("a/key", [b"."])
    with monkeypatch.context() as patch:
        patch.setattr(os, "open", failing(code))
        patch.setattr(os, "lstat", failing(errno.EIO))
        with pytest.raises(StorageError) as error:
            store.read_into("a/key", 0, memoryview(bytearray(1)))
    assert error.value.kind == ErrorKind.STORAGE
    assert "Input/output error" in str(error.value)


@pytest.mark.parametrize("call", ["statvfs", "lstat"])
def test_a_full_disk_is_told_where_nobody_knows_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    store = LocalStore(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(errno.ENOSPC))
        patch.setattr(os, call, failing(errno.ENOSPC))
        with pytest.raises(StorageError) as error:
            store.put("key", [b"123"])
    assert error.value.kind == ErrorKind.STORAGE_FULL
    assert "3 bytes were needed; make room" in str(error.value)


@pytest.mark.parametrize("above", [False, True])
def test_a_link_that_is_turned_elsewhere_does_not_lead_there(tmp_path: Path, above: bool) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    link = tmp_path / "current"
    link.symlink_to("one")
    store = LocalStore(link / "run" if above else link)
    assert store.url == str(link / "run" if above else link), "called as it was given"
    store.put("a/first", [b"1"])
    link.unlink()
    link.symlink_to("two")
    store.put("a/second", [b"2"])
    assert store.list_children("a/") == ["first", "second"]
    store.delete(["a/first"])
    assert [path.name for path in (tmp_path / "one").rglob("*") if path.is_file()] == ["second"]
    assert list((tmp_path / "two").iterdir()) == []
    assert list(LocalStore(link).list_entries()) == [], "who opens it now is where it points now"


@pytest.mark.parametrize("path", ["link", "link/run", "link/a/b"])
def test_nothing_is_made_where_a_link_leads_that_leads_nowhere(tmp_path: Path, path: str) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "not mounted" / "data")
    with pytest.raises(UsageError, match="is not a directory, nor a link to one"):
        LocalStore(tmp_path / path).put("a/key", [b"."])
    assert [each.name for each in tmp_path.iterdir()] == ["link"]
