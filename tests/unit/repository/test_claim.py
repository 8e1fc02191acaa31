"""Claims: one winner for each number, and the highest owns the run."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from dist_ckpt.errors import FencedError, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.repository.claim import check_owner, highest, take
from dist_ckpt.storage.base import Capabilities
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import keys, new_store


def test_numbers_begin_at_one_and_rise() -> None:
    store = new_store()
    assert highest(store) == 0
    assert [take(store), take(store), take(store)] == [1, 2, 3]
    assert keys(store) == [f"claims/{number:06d}.json" for number in (1, 2, 3)]


def test_sixteen_threads_take_sixteen_claims() -> None:
    store = new_store()
    start = threading.Barrier(16)

    def race() -> int:
        start.wait()
        return take(store)

    with ThreadPoolExecutor(16) as pool:
        taken = [future.result() for future in [pool.submit(race) for _ in range(16)]]
    assert sorted(taken) == list(range(1, 17))
    assert highest(store) == 16


def test_only_the_highest_owns() -> None:
    store = new_store()
    older, newer = take(store), take(store)
    check_owner(store, newer)
    with pytest.raises(FencedError, match=r"claim 1 .* claim 2"):
        check_owner(store, older)


def test_foreign_names_are_no_claims() -> None:
    store = new_store()
    for name in ("1.json", "000009.json.bak", "0000010.json", "notes.txt"):
        store.put(f"claims/{name}", [b"{}"])
    assert take(store) == 1


class LateListing(MemoryStore):
    """A place whose listings never show what was put last."""

    def list_children(self, prefix: str = "") -> list[str]:
        return super().list_children(prefix)[:-1]


def test_a_listing_that_lags_does_not_turn_in_circles() -> None:
    store = LateListing(new_store().url.removeprefix("memory://"))
    assert [take(store), take(store), take(store)] == [1, 2, 3]


def test_an_outage_is_no_claim() -> None:
    store = FaultyStore(new_store(), [Rule("list_children", Fail(StorageError("down")))])
    with pytest.raises(StorageError, match="down"):
        take(store)
    assert keys(store) == []


class Weak(MemoryStore):
    """A place that cannot do what a commit needs."""

    def __init__(self, name: str, capabilities: Capabilities) -> None:
        super().__init__(name)
        self._capabilities = capabilities

    @property
    def capabilities(self) -> Capabilities:
        return self._capabilities


@pytest.mark.parametrize(
    "capabilities",
    [
        Capabilities(atomic_create=False, strong_list=True, durable=True),
        Capabilities(atomic_create=True, strong_list=False, durable=True),
    ],
)
def test_a_place_that_cannot_commit_is_refused_untouched(capabilities: Capabilities) -> None:
    name = new_store().url.removeprefix("memory://")
    repository = Repository(Weak(name, capabilities))
    for use in (repository.claim, lambda: repository.begin(1, 1)):
        with pytest.raises(UsageError, match="choose another place"):
            use()
    assert keys(MemoryStore(name)) == []
