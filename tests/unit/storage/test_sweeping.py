"""What a sweep of a store removes: exactly what it wrote itself, where it is told to look."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.storage import LocalStore
from dist_ckpt.testing.stores import FaultyStore
from tests.unit.storage.test_local import NOBODY

OURS = ".tmp-0123456789abcdef"


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half")
    return path


@contextmanager
def unreadable(folder: Path) -> Iterator[None]:
    """Nobody may look into `folder`, and this process is nobody."""
    folder.chmod(0)
    user = os.geteuid()
    if user == 0:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        os.seteuid(user)
        folder.chmod(0o755)


@pytest.mark.parametrize(
    "name",
    [
        ".tmp-left",
        ".tmp-",
        ".tmp-0123456789abcde",
        ".tmp-0123456789abcdef0",
        ".tmp-0123456789ABCDEF",
        ".tmp-0123456789abcdeg",
        ".tmp-0123456789abcdef.swp",
        "x.tmp-0123456789abcdef",
        ".tmp-0123456789abcdef\n",
        ".tmp-٠123456789abcdef",
    ],
)
def test_names_that_are_almost_ours_stay(tmp_path: Path, name: str) -> None:
    theirs = put(tmp_path / "a" / name)
    ours = put(tmp_path / "a" / OURS)
    assert LocalStore(tmp_path).sweep() == 1
    assert theirs.read_bytes() == b"half"
    assert not ours.exists()


def test_what_only_bears_such_a_name_stays(tmp_path: Path) -> None:
    (tmp_path / OURS).mkdir()
    (tmp_path / OURS / "file").write_bytes(b"theirs")
    (tmp_path / "target").write_bytes(b"theirs")
    (tmp_path / ".tmp-1111111111111111").symlink_to(tmp_path / "target")
    (tmp_path / ".tmp-2222222222222222").symlink_to("nowhere")
    os.mkfifo(tmp_path / ".tmp-3333333333333333")
    before = sorted(os.listdir(tmp_path))
    assert LocalStore(tmp_path).sweep() == 0
    assert sorted(os.listdir(tmp_path)) == before
    assert (tmp_path / OURS / "file").read_bytes() == b"theirs"


def test_who_sweeps_says_what_may_go_and_where_to_look(tmp_path: Path) -> None:
    asked: list[str] = []

    def may_go(key: str) -> bool:
        asked.append(key)
        return key in ("a/", "a/b/", f"a/b/{OURS}")

    for folder in ("", "a/", "a/b/", "a/c/", "d/"):
        put(tmp_path / folder / OURS)
    store = FaultyStore(LocalStore(tmp_path), [])
    assert store.sweep(may_go=may_go) == 1
    assert not (tmp_path / "a" / "b").exists()
    assert sorted(asked) == sorted(
        [OURS, "a/", f"a/{OURS}", "a/b/", f"a/b/{OURS}", "a/c/", "d/"]
    ), "what does not count is not looked into"


def test_links_are_not_followed(tmp_path: Path) -> None:
    theirs = put(tmp_path / "theirs" / "step" / OURS)
    run = tmp_path / "run"
    put(run / "a" / OURS)
    (run / "step").symlink_to(tmp_path / "theirs" / "step")
    (run / "self").symlink_to("self")
    (run / "up").symlink_to("..")
    store = LocalStore(run)
    assert store.sweep("step/") == 0
    assert store.sweep("up/theirs/") == 0
    assert store.sweep() == 1
    assert theirs.read_bytes() == b"half"
    # The root itself may be one.
    put(run / "a" / OURS)
    (tmp_path / "link").symlink_to(run)
    assert LocalStore(tmp_path / "link").sweep() == 1


def test_a_closed_folder_keeps_nobody_from_the_others(tmp_path: Path) -> None:
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents:  # as pytest makes them, only their owner enters them
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(0o755)
    kept = put(tmp_path / "b" / OURS)
    gone = [put(tmp_path / folder / OURS) for folder in ("a", "c")]
    for path in gone:
        path.parent.chmod(0o777)
        path.chmod(0o666)
    store = LocalStore(tmp_path)
    with unreadable(tmp_path / "b"):
        # It is not even looked into where nothing of ours may be in it.
        assert store.sweep(may_go=lambda key: not key.startswith(("a/", "b/"))) == 1
        with pytest.raises(StorageError, match="let this user") as caught:
            store.sweep()
        assert caught.value.kind is ErrorKind.PERMISSION
    assert not any(path.exists() for path in gone)
    assert kept.exists()
