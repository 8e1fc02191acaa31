"""Foreign, broken and absurd things inside a run: passed by, told once, and left where they are."""

from __future__ import annotations

import json
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events, keep
from dist_ckpt.errors import AlreadyExists, StorageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import manifest_key, step_dir
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from tests.unit.storage.test_local import no_privileges


def state(value: float = 0.0) -> dict[str, Any]:
    return {"weights": {"w": torch.full((100,), value)}}


@pytest.fixture
def run() -> Iterator[Path]:
    """A run with steps 1 and 2 in a folder that every user may enter."""
    with tempfile.TemporaryDirectory() as name:
        path = Path(name) / "run"
        for step in (1, 2):
            dist_ckpt.save(state(step), str(path), step=step)
        for folder in (path.parent, path, *path.rglob("*")):
            folder.chmod(0o777 if folder.is_dir() else 0o666)
        yield path


@pytest.fixture
def heard() -> Iterator[list[events.Event]]:
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    yield found
    leave()


def put(path: Path, data: bytes = b"theirs") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def raw(folder: Path, name: bytes) -> None:
    with open(os.path.join(os.fsencode(folder), name), "wb") as file:
        file.write(b"theirs")


def step_99(run: Path) -> Path:
    """Return where the manifest of step 99 would be, in a folder that is there."""
    (run / step_dir(99)).mkdir()
    return run / step_dir(99) / "manifest.json"


def socket(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o666)


def hole(path: Path) -> None:
    path.touch()
    os.truncate(path, 10**12)


def closed(path: Path) -> None:
    put(path / "inside")
    path.chmod(0)


def edited(run: Path, step: int, /, **said: Any) -> None:
    """Let the manifest of `step` say something else, and end in the right digest all the same."""
    path = run / manifest_key(step)
    fields = json.loads(path.read_bytes())
    del fields["digest"]
    text = json.dumps({**fields, "step": step, **said}, indent=2).encode().removesuffix(b"\n}")
    path.write_bytes(text + f',\n  "digest": "{bytes_digest(text)}"\n}}\n'.encode())


def absurd(**said: Any) -> Callable[[Path], None]:
    """Return what adds step 90, a copy of step 2 whose manifest says something else."""

    def make(run: Path) -> None:
        folder = run / step_dir(90)
        folder.mkdir()
        (folder / "manifest.json").write_bytes((run / manifest_key(2)).read_bytes())
        edited(run, 90, **said)

    return make


def odd_old(**said: Any) -> Callable[[Path], None]:
    """Return what lets step 1, which is whole, say something odd of itself."""
    return lambda run: edited(run, 1, **said)


STRAYS: dict[str, Callable[[Path], None]] = {
    "dangling link": lambda run: (run / "link").symlink_to("nowhere"),
    "dangling step": lambda run: (run / step_dir(99)).symlink_to("nowhere"),
    "dangling claim": lambda run: (run / "claims" / "000003.json").symlink_to("nowhere"),
    "dangling manifest": lambda run: step_99(run).symlink_to("nowhere"),
    "link round in circles": lambda run: (run / "round").symlink_to("round"),
    "step round in circles": lambda run: (run / step_dir(99)).symlink_to(step_dir(99)),
    "claim round in circles": lambda run: (run / "claims" / "000009.json").symlink_to(
        "000009.json"
    ),
    "manifest round in circles": lambda run: step_99(run).symlink_to("manifest.json"),
    "link to the run": lambda run: (run / "up").symlink_to("."),
    "closed folder": lambda run: closed(run / "lost+found"),
    "closed folder in a step": lambda run: closed(run / step_dir(2) / "lost+found"),
    "closed folder among the claims": lambda run: closed(run / "claims" / "lost+found"),
    "closed attempt": lambda run: closed(run / step_dir(7) / "c000001-0123456789abcdef"),
    "file for a step": lambda run: put(run / step_dir(99)),
    "file for an attempt": lambda run: put(run / step_dir(99) / "c000001-0123456789abcdef"),
    "folder for a manifest": lambda run: put(run / step_dir(99) / "manifest.json" / "x"),
    "folder for a claim": lambda run: put(run / "claims" / "000003.json" / "x"),
    "empty folder for a claim": lambda run: (run / "claims" / "000003.json").mkdir(),
    "no claim": lambda run: put(run / "claims" / "000077.json"),
    "last claim": lambda run: put(run / "claims" / "999999.json", b"{}"),
    "claim that says so": lambda run: put(run / "claims" / "999999.json", b'{"claim": 999999}'),
    "not UTF-8": lambda run: raw(run, b"\xff\xfe"),
    "not UTF-8 among the claims": lambda run: raw(run / "claims", b"00000\xff.json"),
    "not UTF-8 in a step": lambda run: raw(run / step_dir(2), b"\xffmanifest.json"),
    "pipe": lambda run: os.mkfifo(run / "pipe"),
    "pipe for a manifest": lambda run: os.mkfifo(step_99(run)),
    "socket": lambda run: socket(run / "socket"),
    "socket for a manifest": lambda run: socket(step_99(run)),
    "socket for a claim": lambda run: socket(run / "claims" / "000003.json"),
    "hole for a manifest": lambda run: hole(step_99(run)),
    "nested run": lambda run: dist_ckpt.save(state(), str(run / "nested"), step=99),
    "too large a step": lambda run: put(run / "step-99999999999" / "manifest.json", b"{}"),
    "empty step": lambda run: (run / step_dir(99)).mkdir(),
    "negative time": absurd(created="-0001-01-01T00:00:00+00:00"),
    "absurd step": absurd(step=10**30),
    "negative step": absurd(step=-1),
    "no ranks": absurd(world_size=0),
    "too many ranks": absurd(world_size=10**30),
    "absurd parent": absurd(parent_step=10**30),
    "absurd size": absurd(index={"key": "x", "nbytes": 10**30, "digest": "0" * 16}),
    "metric too large": absurd(metrics={"loss": 10**400}),
    "negative epoch": absurd(epoch=-1),
    "claim too large": absurd(claim=10**30),
    "old: huge epoch": odd_old(epoch=10**15),
    "old: no metric": odd_old(metrics={"loss": "nan"}),
    "old: infinite metric": odd_old(metrics={"loss": "-inf"}),
    "old: far future": odd_old(created="9999-12-31T23:59:59+00:00"),
    "old: before Christ or nearly": odd_old(created="0001-01-01T00:00:00+00:00"),
    "old: absurd age": odd_old(origin={"elapsed_seconds": 10**400}),
    "old: negative age": odd_old(origin={"elapsed_seconds": -(10**400)}),
    "old: no age": odd_old(origin={"elapsed_seconds": True, "started": ["x"], "command": 3}),
}


@pytest.mark.parametrize("kind", STRAYS)
def test_a_run_goes_on_and_the_stray_stays(
    kind: str, run: Path, heard: list[events.Event], caplog: pytest.LogCaptureFixture
) -> None:
    before = {*map(str, run.rglob("*"))}
    STRAYS[kind](run)
    strays = {*map(str, run.rglob("*"))} - before
    policy = keep.latest(1) | keep.best("loss") | keep.newer_than(1e-6) | keep.every(epochs=10)
    values = state()
    with no_privileges():
        with dist_ckpt.Checkpointer(str(run), values, keep=policy, timeout_seconds=600) as ckpt:
            assert ckpt.restore() == 2
            assert (values["weights"]["w"] == 2).all()
            for step in (3, 5):
                ckpt.save(step, metrics={"loss": 1.0 + step})
                ckpt.wait()
        repository = Repository(LocalStore(run))
        assert max(step for step in repository.steps() if step < 90) == 5
        assert repository.verify(5).ok
        # A reader that takes the newest and passes nothing over meets what claims to be newer.
        if not any(isinstance(each, events.CheckpointRefused) for each in heard):
            assert dist_ckpt.load(values, str(run)).step == 5
        with dist_ckpt.Checkpointer(str(run), values, timeout_seconds=600) as ckpt:
            assert ckpt.restore() == 5
    assert strays <= {*map(str, run.rglob("*"))}, "it is left where it is"
    failed = [each for each in heard if isinstance(each, events.RetentionFailed)]
    assert failed == []
    told = [record.message for record in caplog.records if "passed over" not in record.message]
    assert len(told) == len(set(told)), "said once"


@pytest.mark.parametrize("name", ["index.msgpack", "weights.r00000.safetensors"])
def test_a_socket_in_the_place_of_a_file_is_damage(name: str, run: Path) -> None:
    (file,) = run.glob(f"{step_dir(2)}/*/{name}")
    file.unlink()
    socket(file)
    values = state()
    with dist_ckpt.Checkpointer(str(run), values) as ckpt:
        assert ckpt.restore() == 1
        assert (values["weights"]["w"] == 1).all()


@pytest.mark.parametrize("make", [socket, os.mkfifo, lambda path: path.symlink_to("nowhere")])
def test_what_bears_the_name_of_a_manifest_and_is_none_is_named(
    make: Callable[[Path], None], run: Path
) -> None:
    make(step_99(run))
    with dist_ckpt.Checkpointer(str(run), state()) as ckpt:
        assert ckpt.restore() == 2
        with pytest.raises(AlreadyExists, match=r"99/manifest\.json is in .* cannot be read: if a"):
            ckpt.save(99).wait()
        ckpt.save(100).wait()


def test_a_step_that_may_not_be_read_is_no_damage(run: Path) -> None:
    """It may be the newest good one: nobody goes back behind it without being told to."""
    (run / step_dir(2)).chmod(0)
    try:
        with no_privileges():
            with dist_ckpt.Checkpointer(str(run), state()) as ckpt:
                with pytest.raises(StorageError, match="let this user"):
                    ckpt.restore()
                assert ckpt.restore(step=1) == 1
            assert Repository(LocalStore(run)).steps() == [1]
    finally:
        (run / step_dir(2)).chmod(0o777)
    assert Repository(LocalStore(run)).steps() == [1, 2]


def test_an_old_step_that_may_not_be_read_keeps_no_other_from_going(
    run: Path, heard: list[events.Event]
) -> None:
    (run / step_dir(1)).chmod(0)
    try:
        with (
            no_privileges(),
            dist_ckpt.Checkpointer(str(run), state(), keep=keep.latest(1)) as ckpt,
        ):
            assert ckpt.restore() == 2
            for step in (3, 4, 5):
                ckpt.save(step)
                ckpt.wait()
    finally:
        (run / step_dir(1)).chmod(0o777)
    assert Repository(LocalStore(run)).steps() == [1, 2, 5], "2 is what the run went on from"
    told = [each for each in heard if isinstance(each, events.PassedBy)]
    assert {each.url for each in told} == {str(run)}
    assert len(told) == len({each.reason for each in told}) > 0
