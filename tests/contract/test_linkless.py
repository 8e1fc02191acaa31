"""A mount without hard links, a real one: the contract, and a run, by a single writer."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import FencedError, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore, Store, resolve
from dist_ckpt.testing import StoreContract

_numbers = itertools.count()


@pytest.fixture
def folder(linkless_folder: Path) -> Path:
    return linkless_folder / f"place-{next(_numbers)}"


class TestLinklessStore(StoreContract):
    large_bytes = 6 << 20

    @pytest.fixture
    def store(self, folder: Path) -> Store:
        return LocalStore(folder, single_writer=True)

    @pytest.fixture
    def other(self, store: Store) -> Store:
        return LocalStore(store.url, single_writer=True)


@pytest.fixture
def run(folder: Path) -> Iterator[Store]:
    store = resolve(str(folder), single_writer=True)
    yield store
    store.close()


def test_there_are_no_links(folder: Path) -> None:
    folder.mkdir()
    (folder / "file").write_bytes(b".")
    with pytest.raises(OSError, match="not permitted"):
        os.link(folder / "file", folder / "other")
    with pytest.raises(StorageError, match=r"no hard links.*single_writer=True"):
        dist_ckpt.save({"n": {"step": 1}}, str(folder / "run"))
    assert not list(folder.rglob(".tmp-*"))


def test_a_run_lives_there(run: Store) -> None:
    state = {"weights": {"w": torch.zeros(1 << 20)}}
    with dist_ckpt.Checkpointer(run, state, keep=keep.latest(2)) as ckpt:
        assert ckpt.restore() == 0
        for step in (1, 2, 3):
            state["weights"]["w"].fill_(step)
            ckpt.save(step)
    assert Repository(run).steps() == [2, 3]
    assert all(Repository(run).verify(step).ok for step in (2, 3))
    state["weights"]["w"].zero_()
    with dist_ckpt.Checkpointer(run, state) as old:
        assert old.restore() == 3
        assert (state["weights"]["w"] == 3).all()
        Repository(run).claim()
        with pytest.raises(FencedError):
            old.save(4).wait()
    assert Repository(run).steps() == [2, 3]
    # Whoever only reads needs no promise.
    assert dist_ckpt.load(state, run.url).step == 3
