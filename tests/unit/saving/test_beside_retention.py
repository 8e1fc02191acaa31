"""A reader whose checkpoint is deleted under it: the newer one, or not found, never damage."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load

import dist_ckpt
from dist_ckpt.errors import IntegrityError, NotFound
from dist_ckpt.format.names import manifest_key, step_dir
from dist_ckpt.repository import Repository
from dist_ckpt.repository.history import delete_checkpoint
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.wrapper import Operation
from dist_ckpt.testing.stores import CrashStore, FaultyStore, Flip, Rule
from tests.older_torch import ALONE

_names = itertools.count()


def state(value: int = 0) -> dict[str, Any]:
    return {"weights": {"w": torch.full((1000,), float(value))}, "count": {"n": value}}


def value_of(values: dict[str, Any]) -> tuple[float, int]:
    (number,) = set(values["weights"]["w"].tolist())
    return number, values["count"]["n"]


class Meanwhile(CrashStore):
    """Lets a trainer go on at the `nth` operation of a kind on keys that hold `part`."""

    def __init__(self, inner: Store, operation: Operation, part: str, nth: int = 1) -> None:
        super().__init__(inner)
        self.then: Callable[[], object] = lambda: None
        self.done = False
        self._wanted = (operation, part)
        self._left = nth

    def around(self, operation: Operation, key: str, run: Callable[[], Any]) -> Any:
        wanted, part = self._wanted
        if not self.done and operation == wanted and part in key:
            self._left -= 1
            if not self._left:
                self.done = True
                self.then()
        return super().around(operation, key, run)


def commit_and_collect(inner: Store, *, gone: int, new: int | None) -> None:
    """Do what a trainer does that keeps one checkpoint; `new` may be the same step anew."""
    if new is not None and new != gone:
        dist_ckpt.save(state(new), inner, step=new)
    delete_checkpoint(inner, gone)
    if new == gone:
        dist_ckpt.save(state(new), inner, step=new)


MOMENTS: list[tuple[Operation, str]] = [
    ("read_into", "manifest.json"),
    ("read_into", "index.msgpack"),
    ("size", "weights.r"),
    ("read_into", "extra.r"),
    ("read_into", "weights.r"),
]


@pytest.fixture
def inner() -> Store:
    store = MemoryStore(f"beside-retention-{next(_names)}")
    for step in (3, 5):
        dist_ckpt.save(state(step), store, step=step)
    return store


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("new", [6, 5])
@pytest.mark.parametrize("how", ["load", "restore"])
def test_who_asks_for_the_newest_gets_the_newer_one(
    inner: Store, moment: tuple[Operation, str], new: int, how: str
) -> None:
    store = Meanwhile(inner, *moment)
    store.then = lambda: commit_and_collect(inner, gone=5, new=new)
    values = state()
    if how == "load":
        report = dist_ckpt.load(values, store)
    else:
        with dist_ckpt.Checkpointer(store, values) as ckpt:
            assert ckpt.restore() == new
            assert ckpt.restored is not None
            report = ckpt.restored
    assert store.done
    assert report.step == new
    assert report.refused == {}, "nothing is damaged"
    assert value_of(values) == (new, new)


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
@pytest.mark.parametrize("how", ["load", "restore"])
def test_who_asks_for_that_step_is_told_that_it_is_gone(
    inner: Store, moment: tuple[Operation, str], how: str
) -> None:
    store = Meanwhile(inner, *moment)
    store.then = lambda: commit_and_collect(inner, gone=5, new=6)
    values = state()
    with pytest.raises(NotFound, match="step 5"):
        if how == "load":
            dist_ckpt.load(values, store, step=5)
        else:
            with dist_ckpt.Checkpointer(store, values) as ckpt:
                ckpt.restore(step=5)
    assert store.done


@pytest.mark.parametrize("moment", MOMENTS, ids=str)
def test_when_nothing_newer_came_the_older_one_is_the_newest(
    inner: Store, moment: tuple[Operation, str]
) -> None:
    store = Meanwhile(inner, *moment)
    store.then = lambda: delete_checkpoint(inner, 5)
    values = state()
    assert dist_ckpt.load(values, store).step == 3
    assert value_of(values) == (3, 3)


def test_a_step_that_is_deleted_by_a_best_policy_is_no_reason_to_go_back(inner: Store) -> None:
    """Of 3, which is the best, and 6, which came meanwhile, the newer one is taken."""
    store = Meanwhile(inner, "read_into", manifest_key(5))
    store.then = lambda: commit_and_collect(inner, gone=5, new=6)
    assert dist_ckpt.load(state(), store).step == 6


def test_what_is_still_there_is_damaged(inner: Store) -> None:
    store = FaultyStore(inner, [Rule("read_into", Flip(-1), key="*weights.r*", nth=None)])
    with pytest.raises(IntegrityError):
        dist_ckpt.load(state(), store)
    with pytest.raises(IntegrityError), dist_ckpt.open_checkpoint(store) as opened:
        opened["weights/value.w"].read()


def test_an_opened_one_says_that_it_is_gone(inner: Store) -> None:
    with dist_ckpt.open_checkpoint(inner) as opened:
        commit_and_collect(inner, gone=5, new=6)
        with pytest.raises(NotFound, match=r"step 5 .* deleted or replaced"):
            opened["weights/value.w"].read()
        with pytest.raises(NotFound, match=r"step 5 .* deleted or replaced"):
            opened["weights/value.w"][3:5]
        with pytest.raises(NotFound, match=r"step 5 .* deleted or replaced"):
            opened.read_values("count")


@pytest.mark.parametrize("moment", MOMENTS[:2], ids=str)
def test_opening_the_newest_opens_the_newer_one(
    inner: Store, moment: tuple[Operation, str]
) -> None:
    store = Meanwhile(inner, *moment)
    store.then = lambda: commit_and_collect(inner, gone=5, new=6)
    with dist_ckpt.open_checkpoint(store) as opened:
        assert opened.step == 6
    other = Meanwhile(inner, *moment)
    other.then = lambda: commit_and_collect(inner, gone=6, new=7)
    with pytest.raises(NotFound, match="step 6"):
        dist_ckpt.open_checkpoint(other, step=6)


def test_a_verification_says_that_it_is_gone(inner: Store) -> None:
    store = Meanwhile(inner, "size", "weights.r")
    store.then = lambda: commit_and_collect(inner, gone=5, new=6)
    with pytest.raises(NotFound, match="step 5"):
        Repository(store).verify(5)
    assert Repository(store).verify(6).ok


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.filterwarnings("ignore:torch.distributed is unavailable")  # torch 2.6 says so
def test_stock_load_says_that_it_is_gone() -> None:
    inner = MemoryStore(f"beside-retention-{next(_names)}")
    dist_ckpt.save({"model": nn.Linear(100, 100)}, inner, step=5)
    store = Meanwhile(inner, "read_into", "model.r")

    def go_on() -> None:
        dist_ckpt.save({"model": nn.Linear(100, 100)}, inner, step=6)
        delete_checkpoint(inner, 5)

    store.then = go_on
    values = {"model": nn.Linear(100, 100).state_dict()}
    with pytest.raises(CheckpointException) as caught:
        load(values, storage_reader=dist_ckpt.dcp.Reader(store), **ALONE)
    (failure,) = caught.value.failures.values()
    assert isinstance(failure[0], NotFound)
    assert "deleted or replaced" in str(failure[0])
    load(values, storage_reader=dist_ckpt.dcp.Reader(store), **ALONE)


def test_a_step_directory_is_still_there(inner: Store, tmp_path: Path) -> None:
    dist_ckpt.save(state(1), str(tmp_path), step=1)
    store = LocalStore(tmp_path)
    opened = Repository(store).open(1)
    assert opened.still_there()
    (tmp_path / step_dir(1)).rename(tmp_path / "elsewhere")
    assert not opened.still_there()
