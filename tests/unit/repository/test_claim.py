"""Claims: one winner for each number, and the highest owns the run."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from dist_ckpt.errors import ErrorKind, FencedError, StorageError, UsageError
from dist_ckpt.format.names import claim_key
from dist_ckpt.repository import Repository
from dist_ckpt.repository.claim import check_owner, highest, take
from dist_ckpt.run import Run
from dist_ckpt.storage.base import Capabilities, read_all
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import keys, new_store, save


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


# ---------------------------------------------------------------- what is called like a claim


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"3", b'{"claim": 3}', b'{"claim": "999998"}', b"\xff", b"x" * 100_000],
)
@pytest.mark.parametrize("number", [5, 6, 4000, 999_998, 999_999])
def test_a_stray_among_the_claims_stops_nobody(number: int, content: bytes) -> None:
    store = new_store()
    for _ in range(4):
        take(store)
    stray = claim_key(number)
    store.put(stray, [content])
    first = take(store)
    assert first == (5 if number != 5 else 6), "a free number follows the last claim"
    check_owner(store, first)
    second = take(store)
    assert second > first
    check_owner(store, second)
    assert highest(store) == second
    for older in (4, first):
        with pytest.raises(FencedError, match=f"claim {second}"):
            check_owner(store, older)
    assert read_all(store, stray) == content, "it is left where it is"


def test_the_last_number_is_no_claim_whatever_it_says() -> None:
    store = new_store()
    own = take(store)
    store.put(claim_key(999_999), [json.dumps({"claim": 999_999}).encode()])
    check_owner(store, own)
    assert take(store) == own + 1
    with pytest.raises(FencedError):
        check_owner(store, own)


def test_when_the_numbers_are_used_up_it_is_said() -> None:
    store = new_store()
    store.put(claim_key(999_998), [json.dumps({"claim": 999_998}).encode()])
    with pytest.raises(UsageError, match="another run"):
        take(store)


def test_a_number_that_comes_later_fences_whatever_it_holds() -> None:
    """It may be a claim that was damaged: to go on would let two jobs own the run."""
    store = new_store()
    own = take(store)
    store.put(claim_key(7), [b""])
    with pytest.raises(FencedError, match="claim 7"):
        check_owner(store, own)
    again = take(store)
    check_owner(store, again)
    with pytest.raises(FencedError):
        check_owner(store, own)


def test_a_damaged_claim_is_followed_by_a_higher_one() -> None:
    store = new_store()
    older, damaged = take(store), take(store)
    store.put(claim_key(damaged), [b"{"], mode="replace")
    newer = take(store)
    assert newer > damaged
    for each in (older, damaged):
        with pytest.raises(FencedError):
            check_owner(store, each)


def test_a_claim_that_may_not_be_read_counts() -> None:
    inner = new_store()
    take(inner)
    take(inner)
    denied = StorageError("denied", kind=ErrorKind.PERMISSION)
    store = FaultyStore(inner, [Rule("read_into", Fail(denied), key=claim_key(2), nth=None)])
    assert take(store) == 3
    with pytest.raises(FencedError):
        check_owner(store, 2)


def test_strays_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    store = new_store()
    store.put(claim_key(77), [b"{}"])
    for _ in range(3):
        take(store)
    assert caplog.text.count("000077.json") == 1


@pytest.mark.parametrize("below", ["000002.json", "000002.json/a/b"])
def test_a_folder_called_like_a_claim_is_gone_round(tmp_path: Path, below: str) -> None:
    store = LocalStore(tmp_path)
    assert take(store) == 1
    (tmp_path / "claims" / below).mkdir(parents=True)
    if below.count("/"):
        (tmp_path / "claims" / below / "file").touch()
    assert take(store) == 3
    with pytest.raises(FencedError):
        check_owner(store, 1)


def test_a_place_that_takes_no_claim_at_all_says_so(tmp_path: Path) -> None:
    (tmp_path / "claims").write_bytes(b"a file where a folder should be")
    with pytest.raises(UsageError, match="no object can bear the name of a folder"):
        take(LocalStore(tmp_path))


def test_in_a_copy_without_claims_what_is_committed_next_is_newer() -> None:
    """Else what is given up there would count, and a restart would go on from it."""
    store, copy = new_store(), new_store()
    for step, number in ((10, 3), (20, 7)):
        save(store, step, claim=number)
    for step in (10, 20):
        Run(store).copy(step, Run(copy))
    repository = Repository(copy)
    number = repository.claim()
    assert number == 8
    repository.discard(claim=number, after=10)
    assert repository.steps() == [10]
    assert repository.claim() == 9
