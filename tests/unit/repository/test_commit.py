"""The commit: one create-only put, of which what is stored decides and not what was answered."""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import pytest

from dist_ckpt.errors import (
    AlreadyExists,
    CoordinationError,
    ErrorKind,
    FencedError,
    StorageError,
    UsageError,
)
from dist_ckpt.format.names import claim_key, manifest_key, new_save_id
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.repository import Repository, Transaction
from dist_ckpt.repository.commit import check_owner, highest_claim, take_claim
from dist_ckpt.run import Run
from dist_ckpt.storage.base import Capabilities, Store, read_all
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule
from tests.unit.repository.runs import (
    MODEL,
    commit,
    keys,
    manifest_of,
    new_store,
    put_files,
    save,
)

MANIFESTS = "*/manifest.json"

_T = TypeVar("_T")


def begin(store: Store, step: int = 1) -> Transaction:
    repository = Repository(store)
    return repository.begin(step, repository.claim())


def test_nothing_is_listed_before_the_manifest() -> None:
    store = new_store()
    attempt = begin(store)
    index = put_files(attempt, b"abc")
    assert Repository(store).steps() == []
    attempt.commit(encode_whole(index), manifest_of(attempt, index))
    assert Repository(store).steps() == [1]
    assert keys(store)[-1] == "step-0000000001/manifest.json"
    assert all(key.split("/")[1] == attempt.save_id for key in keys(store)[1:-1])


def test_the_index_and_then_the_manifest_are_put_last() -> None:
    store = CrashStore(new_store(), kinds=["put"])
    commit(begin(store))
    names = [key.rsplit("/", 1)[1] for _, key in store.operations]
    assert names[-2:] == ["index.msgpack", "manifest.json"]
    assert len(set(store.operations)) == len(store.operations), "nothing is put twice"


def test_a_lost_answer_to_the_commit_is_a_commit() -> None:
    store = FaultyStore(
        new_store(), [Rule("put", Fail(StorageError("no answer"), after=True), key=MANIFESTS)]
    )
    commit(begin(store))
    assert store.fired == [1]
    assert Repository(store).steps() == [1]
    assert Repository(store).verify(1).ok


def test_a_lost_answer_whose_retry_meets_its_own_manifest_is_a_commit() -> None:
    # A backend that retries by itself reports what the second try found.
    lost = Fail(AlreadyExists("it is there"), after=True)
    store = FaultyStore(new_store(), [Rule("put", lost, key=MANIFESTS)])
    commit(begin(store))
    assert Repository(store).steps() == [1]


def test_a_commit_that_failed_is_an_error_and_leaves_nothing_listed() -> None:
    store = FaultyStore(new_store(), [Rule("put", Fail(StorageError("down")), key=MANIFESTS)])
    with pytest.raises(StorageError, match="down"):
        commit(begin(store))
    assert Repository(store).steps() == []


def test_when_nobody_can_tell_the_failure_stands() -> None:
    store = FaultyStore(
        new_store(),
        [
            Rule("put", Fail(StorageError("no answer"), after=True), key=MANIFESTS),
            Rule("read_into", Fail(StorageError("down")), key=MANIFESTS),
        ],
    )
    with pytest.raises(StorageError, match="no answer"):
        commit(begin(store))
    assert store.fired == [1, 1]


def test_of_two_attempts_at_one_step_the_second_fails_and_harms_nothing() -> None:
    store = new_store()
    repository = Repository(store)
    claim = repository.claim()
    first, second = repository.begin(7, claim), repository.begin(7, claim)
    commit(first, b"first")
    before = read_all(store, "step-0000000007/manifest.json")
    with pytest.raises(AlreadyExists, match="step 7 is already committed") as caught:
        commit(second, b"second")
    assert caught.value.kind == ErrorKind.STEP_EXISTS
    assert read_all(store, "step-0000000007/manifest.json") == before
    assert repository.open(7).manifest.save_id == first.save_id
    assert repository.verify(7).ok


def test_a_newer_claim_stops_the_commit() -> None:
    store = new_store()
    attempt = begin(store)
    Repository(store).claim()
    with pytest.raises(FencedError, match=r"claim 1 .* superseded by claim 2"):
        commit(attempt)
    assert Repository(store).steps() == []


def test_the_last_word_comes_after_the_index_and_the_claims_and_before_the_manifest() -> None:
    store = new_store()
    attempt = begin(store)
    index = put_files(attempt, b"abc")
    seen: list[list[str]] = []

    def refuse() -> None:
        seen.append(keys(store))
        raise CoordinationError("too late")

    with pytest.raises(CoordinationError, match="too late"):
        attempt.commit(encode_whole(index), manifest_of(attempt, index), confirm=refuse)
    assert any(key.endswith("/index.msgpack") for key in seen[0])
    assert Repository(store).steps() == []


def test_an_attempt_never_writes_over_another() -> None:
    store = new_store()
    attempt = begin(store)
    put_files(attempt, b"abc")
    with pytest.raises(AlreadyExists):
        attempt.put_file(MODEL, [b"other"])
    with pytest.raises(UsageError):
        attempt.put_file("../escape", [b""])


def test_a_save_id_must_be_one() -> None:
    with pytest.raises(UsageError, match="bad save_id"):
        Transaction(new_store(), 1, "../../etc")


def test_begin_refuses_before_anything_is_written() -> None:
    store = new_store()
    claim = save(store, 3)
    before = keys(store)
    with pytest.raises(AlreadyExists, match="step 3"):
        Repository(store).begin(3, claim)
    with pytest.raises(UsageError, match="bad step"):
        Repository(store).begin(-1, claim)
    assert keys(store) == before
    Repository(store).claim()
    with pytest.raises(FencedError):
        Repository(store).begin(4, claim)


# ---------------------------------------------------------------- instead of a damaged one


def damaged_run() -> tuple[MemoryStore, bytes]:
    """Return a run whose step 1 is damaged, and its manifest."""
    store = new_store()
    save(store, 1, content=b"damaged")
    return store, read_all(store, manifest_key(1))


def replace(attempt: Transaction, manifest: bytes, content: bytes) -> None:
    index = put_files(attempt, content)
    attempt.commit(encode_whole(index), manifest_of(attempt, index), replaces=manifest)


def attempt_of(store: Store, claim: int) -> Transaction:
    return Transaction(store, 1, new_save_id(claim))


def test_the_damaged_manifest_makes_way() -> None:
    store, found = damaged_run()
    attempt = attempt_of(store, Repository(store).claim())
    replace(attempt, found, b"good")
    assert Repository(store).open(1).manifest.save_id == attempt.save_id
    assert Repository(store).verify(1).ok


def test_another_manifest_than_the_damaged_one_stays() -> None:
    store, found = damaged_run()
    claim = Repository(store).claim()
    replace(attempt_of(store, claim), found, b"good")
    good = read_all(store, manifest_key(1))
    with pytest.raises(AlreadyExists):
        replace(attempt_of(store, claim), found, b"late")
    assert read_all(store, manifest_key(1)) == good


@pytest.mark.parametrize(
    ("kind", "where"),
    [
        *itertools.product(("memory", "local", "linkless"), ("claims", "delete", "put")),
        # Between its look and its deletion a plain store has the window that the protocol names.
        *itertools.product(("plain",), ("claims", "put")),
    ],
)
def test_a_fenced_job_never_takes_away_what_its_successor_saved(
    kind: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is suspended wherever that may be: right behind its look at the claims, too."""
    inner: Store = new_store()
    if kind in ("local", "linkless"):
        inner = LocalStore(tmp_path, single_writer=True)
    if kind == "linkless":

        def no_link(*_: object) -> None:
            raise PermissionError(1, "no links")

        monkeypatch.setattr(os, "link", no_link)
    save(inner, 1, content=b"damaged")
    found = read_all(inner, manifest_key(1))
    succeeded: list[str] = []

    class Suspended(StoreWrapper):
        def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
            places = {
                "claims": operation == "list_children" and key == "claims/",
                "delete": operation == "delete" and key == manifest_key(1),
                "put": operation == "put" and key == manifest_key(1),
            }
            if where == "claims":
                result = run()
                if places[where] and not succeeded:
                    succeed()
                return result
            if places[where] and not succeeded:
                succeed()
            return run()

    def succeed() -> None:
        succeeded.append("")
        attempt = attempt_of(inner, Repository(inner).claim())
        # Where the first one has deleted the damaged one already, there is nothing to replace.
        replace(attempt, found, b"of the new owner")
        succeeded.append(attempt.save_id)

    old = Repository(inner).claim()
    store: Store = Suspended(inner)
    if kind == "plain":
        store = Plain(store)
    with pytest.raises(FencedError):
        replace(attempt_of(store, old), found, b"of the old one")
    assert Repository(inner).open(1).manifest.save_id == succeeded[1]
    assert Repository(inner).verify(1).ok
    assert keys(inner)[-1] == manifest_key(1)


class Plain:
    """A store of somebody's own, with the seven methods and nothing besides."""

    def __init__(self, inner: Store) -> None:
        self.url, self.capabilities = inner.url, inner.capabilities
        self.put, self.read_into, self.size = inner.put, inner.read_into, inner.size
        self.list_entries, self.list_children = inner.list_entries, inner.list_children
        self.delete, self.close = inner.delete, inner.close


# Claims: one winner for each number, and the highest owns the run.


def test_numbers_begin_at_one_and_rise() -> None:
    store = new_store()
    assert highest_claim(store) == 0
    assert [take_claim(store), take_claim(store), take_claim(store)] == [1, 2, 3]
    assert keys(store) == [f"claims/{number:06d}.json" for number in (1, 2, 3)]


def test_sixteen_threads_take_sixteen_claims() -> None:
    store = new_store()
    start = threading.Barrier(16)

    def race() -> int:
        start.wait()
        return take_claim(store)

    with ThreadPoolExecutor(16) as pool:
        taken = [future.result() for future in [pool.submit(race) for _ in range(16)]]
    assert sorted(taken) == list(range(1, 17))
    assert highest_claim(store) == 16


def test_only_the_highest_owns() -> None:
    store = new_store()
    older, newer = take_claim(store), take_claim(store)
    check_owner(store, newer)
    with pytest.raises(FencedError, match=r"claim 1 .* claim 2"):
        check_owner(store, older)


def test_foreign_names_are_no_claims() -> None:
    store = new_store()
    for name in ("1.json", "000009.json.bak", "0000010.json", "notes.txt"):
        store.put(f"claims/{name}", [b"{}"])
    assert take_claim(store) == 1


class LateListing(MemoryStore):
    """A place whose listings never show what was put last."""

    def list_children(self, prefix: str = "") -> list[str]:
        return super().list_children(prefix)[:-1]


def test_a_listing_that_lags_does_not_turn_in_circles() -> None:
    store = LateListing(new_store().url.removeprefix("memory://"))
    assert [take_claim(store), take_claim(store), take_claim(store)] == [1, 2, 3]


def test_an_outage_is_no_claim() -> None:
    store = FaultyStore(new_store(), [Rule("list_children", Fail(StorageError("down")))])
    with pytest.raises(StorageError, match="down"):
        take_claim(store)
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
        take_claim(store)
    stray = claim_key(number)
    store.put(stray, [content])
    first = take_claim(store)
    assert first == (5 if number != 5 else 6), "a free number follows the last claim"
    check_owner(store, first)
    second = take_claim(store)
    assert second > first
    check_owner(store, second)
    assert highest_claim(store) == second
    for older in (4, first):
        with pytest.raises(FencedError, match=f"claim {second}"):
            check_owner(store, older)
    assert read_all(store, stray) == content, "it is left where it is"


def test_the_last_number_is_no_claim_whatever_it_says() -> None:
    store = new_store()
    own = take_claim(store)
    store.put(claim_key(999_999), [json.dumps({"claim": 999_999}).encode()])
    check_owner(store, own)
    assert take_claim(store) == own + 1
    with pytest.raises(FencedError):
        check_owner(store, own)


def test_when_the_numbers_are_used_up_it_is_said() -> None:
    store = new_store()
    store.put(claim_key(999_998), [json.dumps({"claim": 999_998}).encode()])
    with pytest.raises(UsageError, match="another run"):
        take_claim(store)


def test_a_number_that_comes_later_fences_whatever_it_holds() -> None:
    """It may be a claim that was damaged: to go on would let two jobs own the run."""
    store = new_store()
    own = take_claim(store)
    store.put(claim_key(7), [b""])
    with pytest.raises(FencedError, match="claim 7"):
        check_owner(store, own)
    again = take_claim(store)
    check_owner(store, again)
    with pytest.raises(FencedError):
        check_owner(store, own)


def test_a_damaged_claim_is_followed_by_a_higher_one() -> None:
    store = new_store()
    older, damaged = take_claim(store), take_claim(store)
    store.put(claim_key(damaged), [b"{"], mode="replace")
    newer = take_claim(store)
    assert newer > damaged
    for each in (older, damaged):
        with pytest.raises(FencedError):
            check_owner(store, each)


def test_a_claim_that_may_not_be_read_counts() -> None:
    inner = new_store()
    take_claim(inner)
    take_claim(inner)
    denied = StorageError("denied", kind=ErrorKind.PERMISSION)
    store = FaultyStore(inner, [Rule("read_into", Fail(denied), key=claim_key(2), nth=None)])
    assert take_claim(store) == 3
    with pytest.raises(FencedError):
        check_owner(store, 2)


def test_strays_are_told_once(caplog: pytest.LogCaptureFixture) -> None:
    store = new_store()
    store.put(claim_key(77), [b"{}"])
    for _ in range(3):
        take_claim(store)
    assert caplog.text.count("000077.json") == 1


@pytest.mark.parametrize("below", ["000002.json", "000002.json/a/b"])
def test_a_folder_called_like_a_claim_is_gone_round(tmp_path: Path, below: str) -> None:
    store = LocalStore(tmp_path)
    assert take_claim(store) == 1
    (tmp_path / "claims" / below).mkdir(parents=True)
    if below.count("/"):
        (tmp_path / "claims" / below / "file").touch()
    assert take_claim(store) == 3
    with pytest.raises(FencedError):
        check_owner(store, 1)


def test_a_place_that_takes_no_claim_at_all_says_so(tmp_path: Path) -> None:
    (tmp_path / "claims").write_bytes(b"a file where a folder should be")
    with pytest.raises(UsageError, match="no object can bear the name of a folder"):
        take_claim(LocalStore(tmp_path))


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
