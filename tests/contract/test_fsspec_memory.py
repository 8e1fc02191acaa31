"""A file system of fsspec keeps the contract, but for what it declares not to do."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import fsspec
import pytest

from dist_ckpt.errors import UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import Store
from dist_ckpt.storage.fsspec import FsspecStore
from dist_ckpt.testing import StoreContract
from tests.contract import checkpoints

_numbers = itertools.count()


@pytest.fixture
def url() -> Iterator[str]:
    name = f"memory://contract-{next(_numbers)}"
    yield name
    system = fsspec.filesystem("memory")
    if system.exists(name):
        system.rm(name, recursive=True)


class TestFsspecMemory(StoreContract):
    """Its create is not atomic, and it says so."""

    @pytest.fixture
    def store(self, url: str) -> Store:
        return FsspecStore(url)

    @pytest.fixture
    def other(self, url: str) -> Store:
        return FsspecStore(url)

    def test_declares_that_its_create_is_not_atomic(self, store: Store) -> None:
        assert not store.capabilities.atomic_create


def test_is_no_place_to_commit_to(url: str) -> None:
    repository = Repository(FsspecStore(url))
    with pytest.raises(UsageError, match="atomically"):
        checkpoints.save(repository, 1, [b"data"])
    assert repository.steps() == []
