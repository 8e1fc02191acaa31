"""A directory of a network file system keeps the contract, seen from two hosts at once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from dist_ckpt.storage import LocalStore, Store
from dist_ckpt.testing import StoreContract


class TestCephFS(StoreContract):
    """Two mounts with caches of their own stand for two hosts."""

    @pytest.fixture
    def store(self, shared_folder: Callable[[int], Path]) -> Store:
        return LocalStore(shared_folder(0))

    @pytest.fixture
    def other(self, shared_folder: Callable[[int], Path]) -> Store:
        return LocalStore(shared_folder(1))
