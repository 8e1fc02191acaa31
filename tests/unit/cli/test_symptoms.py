"""A place that is not fit for checkpoints: what is said of it, and what to do."""

from __future__ import annotations

import itertools
import os
import signal
from pathlib import Path

import pytest

from dist_ckpt import Run
from dist_ckpt.cli.symptoms import Check, examine
from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import Store, resolve
from dist_ckpt.storage.base import Buffer, PutMode, Watch
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Flip, Rule
from tests.services.s3 import S3Service
from tests.unit.cli.shell import Shell
from tests.unit.cli.test_going_on import start

_names = itertools.count()
NO_RIGHT = Fail(StorageError("no right to do that", kind=ErrorKind.PERMISSION))


def place() -> MemoryStore:
    return MemoryStore(f"symptoms-{next(_names)}")


class Overwriting(MemoryStore):
    """A store whose create takes the place of what is there."""

    def put(
        self,
        key: str,
        buffers: list[Buffer],  # type: ignore[override]
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key, buffers, mode="replace", watch=watch)


def by_name(store: MemoryStore | FaultyStore) -> dict[str, Check]:
    return {each.name: each for each in examine(Run(store), {})}


def test_a_place_that_is_fit_is_left_as_it_was() -> None:
    store = place()
    store.put("theirs", [b"1"])
    found = by_name(store)
    assert {each.state for each in found.values()} == {"ok"}
    assert [entry.key for entry in store.list_entries()] == ["theirs"]
    assert "hard links" not in found, "memory has none, and needs none"


@pytest.mark.parametrize(
    ("rule", "failed", "last"),
    [
        (Rule("list_children", NO_RIGHT), "list", "list"),
        (Rule("put", NO_RIGHT, "*/object"), "put", "put"),
        (Rule("read_into", Flip(), "*/object"), "read after write", "leftovers"),
        (Rule("read_into", Flip(), nth=2), "throughput", "leftovers"),
        (Rule("delete", NO_RIGHT), "delete", "delete"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_fails_is_told_with_a_remedy(rule: Rule, failed: str, last: str) -> None:
    store = FaultyStore(place(), [rule])
    found = by_name(store)
    assert store.fired[0] == 1
    assert {name for name, each in found.items() if each.state == "fail"} == {failed}
    assert found[failed].remedy
    assert list(found)[-1] == last


def test_a_create_that_overwrites_is_no_place_for_two_jobs() -> None:
    found = by_name(Overwriting(f"symptoms-{next(_names)}"))
    assert found["create-only"].state == "fail"
    assert "two jobs" in found["create-only"].remedy


def test_what_killed_jobs_left_is_told() -> None:
    store = place()
    for _ in range(2):
        Repository(store).claim()
    store.put("step-0000000001/c000001-0000000000000000/model.r00000.safetensors", [b"half"])
    found = by_name(store)["leftovers"]
    assert (found.state, "dist-ckpt sweep" in found.remedy) == ("warn", True)


def test_the_exit_code_says_that_a_place_is_not_fit(shell: Shell, tmp_path: Path) -> None:
    code, out, said = shell.code("doctor", "/proc/nothing/run")
    assert (code, "fail" in out) == (1, True)
    assert "not fit for checkpoints: put" in said
    (tmp_path / "file").write_text("")
    for command in ("doctor", "bench", "ls"):
        for place in (tmp_path / "file", tmp_path / "file" / "run"):
            code, out, said = shell.code(command, str(place))
            assert (code, out, "is not a directory" in said) == (2, "", True), command


def test_a_bucket_that_is_not_there_is_no_run_and_no_place(
    shell: Shell, filled: str, s3_service: S3Service
) -> None:
    bucket = "s3://there-is-no-such-bucket"
    asked = (
        *(["ls", "{}"], ["show", "{}"], ["latest", "{}"], ["verify", "{}@10"], ["rm", "{}@10"]),
        *(["sweep", "{}"], ["keep", "{}", "latest(1)"], ["cp", "{}", "out"], ["compare", "{}"]),
        *(["mirror", "{}", "out"], ["export", "{}@10", "out"], ["import", "{}", "out"]),
    )
    target = (
        *(["cp", filled, "{}"], ["mirror", filled, "{}"], ["export", filled, "{}"]),
        *(["export", filled, "{}/w.safetensors"], ["average", filled, filled, "{}"]),
        *(["import", f"{filled}.pt", "{}"], ["doctor", "{}"], ["bench", "{}"]),
    )
    for wanted, commands in ((10, asked), (1, target)):
        for command in commands:
            for place in (bucket, f"{bucket}/run"):
                code, _, said = shell.code(*(each.format(place) for each in command))
                assert code == wanted, (command, said)
                assert "create the bucket" in said or command[0] == "doctor"


def scratches(store: Store) -> list[str]:
    return [name for name in store.list_children() if name.startswith("dist-ckpt-scratch-")]


def check_what_a_killed_bench_left(shell: Shell, url: str) -> None:
    """Kill a bench, and look from beside another one that lives."""
    store = resolve(url)
    endless = ("bench", url, "--size", "1", "--files", "1", "--repeat", "1000000")
    with start(*endless) as living:
        while not scratches(store):
            assert living.poll() is None
        (used,) = scratches(store)
        living.send_signal(signal.SIGSTOP)  # alive all the same, and in nobody's way
        for command in (("sweep", url), ("doctor", url)):
            with start(*endless) as killed:
                while len(scratches(store)) < 2:
                    assert killed.poll() is None
                killed.send_signal(signal.SIGKILL)
                killed.communicate()
            (left,) = {*scratches(store)} - {used}
            assert Run(store).leftovers() == [left]
            assert left in shell.screen(*command)
            assert scratches(store) == [used]
        living.kill()
        living.communicate()
    assert shell.json("sweep", url)["removed"] == [used]


def test_what_a_killed_bench_left_is_named_and_removed(shell: Shell, tmp_path: Path) -> None:
    check_what_a_killed_bench_left(shell, str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_what_a_killed_bench_left_on_s3_is_named_and_removed(
    shell: Shell, s3_service: S3Service, s3_name: str
) -> None:
    url = s3_service.url(s3_name)
    check_what_a_killed_bench_left(shell, url)
    assert s3_service.uploads(s3_name) == []


def test_what_is_not_certainly_left_stays(tmp_path: Path) -> None:
    store = resolve(str(tmp_path))
    name = "dist-ckpt-scratch-0123456789abcdef"
    elsewhere = b'{"space": "another host", "pid": 1, "began": "1"}'
    for folder, key, data in (
        (name, "owner.json", elsewhere),
        (f"{name[:-1]}e", "object", b"no owner"),
        (f"{name[:-1]}d", "theirs", b"of somebody else"),
        (f"{name}0", "object", b"not called like one"),
    ):
        store.put(f"{folder}/{key}", [data])
    before = [entry.key for entry in store.list_entries()]
    assert Run(store).sweep() == Run(store).leftovers() == []
    assert [entry.key for entry in store.list_entries()] == before
    for path in tmp_path.rglob("*"):
        os.utime(path, (0, 0))
    assert Run(store).sweep() == [f"{name[:-1]}e/", f"{name}/"], "those are old"
    assert len(scratches(store)) == 2
