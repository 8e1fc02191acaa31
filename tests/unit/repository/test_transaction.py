"""The commit: one create-only put, of which what is stored decides and not what was answered."""

from __future__ import annotations

import pytest

from dist_ckpt.errors import (
    AlreadyExists,
    CoordinationError,
    ErrorKind,
    FencedError,
    StorageError,
    UsageError,
)
from dist_ckpt.repository import Repository, Transaction
from dist_ckpt.storage.base import Store, read_all
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


def begin(store: Store, step: int = 1) -> Transaction:
    repository = Repository(store)
    return repository.begin(step, repository.claim())


def test_nothing_is_listed_before_the_manifest() -> None:
    store = new_store()
    attempt = begin(store)
    index = put_files(attempt, b"abc")
    assert Repository(store).steps() == []
    attempt.commit(index, lambda stored: manifest_of(attempt, index, stored))
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
        attempt.commit(index, lambda stored: manifest_of(attempt, index, stored), confirm=refuse)
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
