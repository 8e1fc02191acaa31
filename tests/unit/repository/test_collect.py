"""What is deleted, in which order, and what never is (commit-v1, section 6)."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import FencedError, StorageError
from dist_ckpt.format.names import manifest_key, new_save_id, step_dir
from dist_ckpt.repository import Repository, keep
from dist_ckpt.repository.collect import delete_checkpoint
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Operation, Rule
from tests.unit.repository.runs import commit, keys, manifest_of, new_store, put_files, save

FOREIGN = (
    "notes.txt",
    "step-0000000001/README",
    "step-0000000001/plots/loss.png",
    "step-1/manifest.json",
    "step-0000000001/c000001-zzzzzzzzzzzzzzzz/index.msgpack",
    "claims/old.json",
)


def test_retention_keeps_what_the_policy_keeps() -> None:
    store = new_store()
    claim = save(store, 1, 2, 3, 4)
    gone = Repository(store).retain(keep.latest(2), claim=claim, protected={1})
    assert dict(gone) == {2: "not kept by keep.latest(2)"}
    assert Repository(store).steps() == [1, 3, 4]
    assert not [key for key in keys(store) if key.startswith(step_dir(2))]
    for step in (1, 3, 4):
        assert Repository(store).verify(step).ok


def test_a_job_that_was_replaced_deletes_nothing() -> None:
    store = new_store()
    old = save(store, 1, 2)
    Repository(store).claim()
    before = keys(store)
    with pytest.raises(FencedError):
        Repository(store).retain(keep.latest(1), claim=old, protected=())
    assert keys(store) == before


def test_the_manifest_goes_first_then_the_data_then_the_index() -> None:
    store = CrashStore(new_store())
    save(store, 1)
    delete_checkpoint(store, 1)
    deleted = [key for kind, key in store.operations if kind == "delete"]
    assert deleted[0] == manifest_key(1)
    assert [key.rsplit("/", 1)[1] for key in deleted[1:]] == [
        "extra.r00000.safetensors",
        "model.r00000.safetensors",
        "index.msgpack",
    ]


@given(st.integers(1, 4))
def test_a_deletion_that_fails_leaves_no_half_a_checkpoint(nth: int) -> None:
    inner = new_store()
    claim = save(inner, 1, 2)
    store = FaultyStore(inner, [Rule("delete", Fail(StorageError("down"), after=True), nth=nth)])
    with pytest.raises(StorageError):
        Repository(store).retain(keep.latest(1), claim=claim, protected=())
    assert Repository(inner).steps() == [2]
    # What remains is garbage that the owner removes next time.
    Repository(inner).collect(claim=claim, in_flight=())
    assert not [key for key in keys(inner) if key.startswith(step_dir(1))]


def test_foreign_files_are_never_deleted() -> None:
    store = new_store()
    claim = save(store, 1, 2)
    attempt = Repository(store).begin(3, claim)
    put_files(attempt, b"dead")
    inside = f"step-0000000003/{attempt.save_id}/core.dump"
    for key in (*FOREIGN, inside):
        store.put(key, [b"mine"])
    Repository(store).retain(keep.latest(1), claim=claim, protected=())
    Repository(store).collect(claim=claim, in_flight=())
    left = set(keys(store))
    assert left >= {*FOREIGN, inside}
    assert Repository(store).steps() == [2]
    assert left - {*FOREIGN, inside} == {
        key for key in left if key.startswith((step_dir(2), "claims/00"))
    }


def test_garbage_is_what_no_manifest_names_and_nobody_is_writing() -> None:
    store = new_store()
    repository = Repository(store)
    old = repository.claim()
    dead = repository.begin(5, old)
    put_files(dead, b"dead")
    loser = repository.begin(1, old)
    put_files(loser, b"lost the race")
    own = repository.claim()
    save(store, 1, claim=own)
    writing, given_up = repository.begin(6, own), repository.begin(6, own)
    put_files(writing, b"now")
    put_files(given_up, b"failed")
    removed = repository.collect(claim=own, in_flight={writing.save_id})
    assert removed == [
        f"step-0000000001/{loser.save_id}/",
        f"step-0000000005/{dead.save_id}/",
        f"step-0000000006/{given_up.save_id}/",
    ]
    attempts = {key.split("/")[1] for key in keys(store) if key.startswith("step-")}
    assert attempts == {"manifest.json", repository.open(1).manifest.save_id, writing.save_id}
    assert repository.verify(1).ok


def test_attempts_of_a_newer_claim_are_left_alone() -> None:
    store = new_store()
    repository = Repository(store)
    own, newer = repository.claim(), repository.claim()
    attempt = repository.begin(5, newer)
    put_files(attempt, b"the new owner writes this")
    assert repository.collect(claim=own, in_flight=()) == []
    commit_files = [key for key in keys(store) if attempt.save_id in key]
    assert len(commit_files) == 2


@pytest.mark.parametrize("manifest", [b"{", b'{"format": 99}'], ids=["damaged", "newer"])
def test_the_files_of_a_manifest_that_cannot_be_read_are_left(manifest: bytes) -> None:
    store = new_store()
    claim = save(store, 1)
    store.put(manifest_key(1), [manifest], mode="replace")
    before = keys(store)
    assert Repository(store).collect(claim=claim, in_flight=()) == []
    assert keys(store) == before


@pytest.mark.parametrize("operation", ["list_children", "read_into"])
def test_an_outage_deletes_nothing(operation: Operation) -> None:
    inner = new_store()
    claim = save(inner, 1)
    store = FaultyStore(inner, [Rule(operation, Fail(StorageError("down")), nth=None)])
    before = keys(inner)
    with pytest.raises(StorageError):
        Repository(store).collect(claim=claim, in_flight=())
    assert keys(inner) == before


def test_an_attempt_that_commits_while_garbage_is_looked_for_stays() -> None:
    inner = new_store()
    repository = Repository(inner)
    claim = repository.claim()
    attempt = repository.begin(1, claim)

    class CommitsMeanwhile(FaultyStore):
        def list_children(self, prefix: str = "") -> list[str]:
            found = super().list_children(prefix)
            if attempt.save_id + "/" in found:
                commit_rest()
            return found

    index = put_files(attempt, b"abc")

    def commit_rest() -> None:
        if not repository.steps():
            attempt.commit(index, lambda stored: manifest_of(attempt, index, stored))

    Repository(CommitsMeanwhile(inner, [])).collect(claim=claim, in_flight=())
    assert repository.verify(1).ok


def test_save_ids_alone_tell_whose_an_attempt_is() -> None:
    store = new_store()
    claim = save(store, 1)
    foreign = f"step-0000000002/{new_save_id(claim)}x/model.r00000.safetensors"
    store.put(foreign, [b"not ours"])
    Repository(store).collect(claim=claim, in_flight=())
    assert foreign in keys(store)
    assert commit(Repository(store).begin(2, claim)).step == 2
