"""A place that is not fit for checkpoints: what is said of it, and what to do."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

from dist_ckpt import Run
from dist_ckpt.cli.symptoms import Check, examine
from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Buffer, PutMode, Watch
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Flip, Rule
from tests.unit.cli.shell import Shell

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
        (Rule("put", NO_RIGHT), "put", "put"),
        (Rule("read_into", Flip()), "read after write", "leftovers"),
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
    (tmp_path / "file").write_text("")
    code, out, said = shell.code("doctor", str(tmp_path / "file" / "run"))
    assert (code, "fail" in out) == (1, True)
    assert "not fit for checkpoints: list" in said
