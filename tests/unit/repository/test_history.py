"""Pins and late metrics: small objects of one very checkpoint, which outlive restarts."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ckpt.errors import NotFound, StorageError
from dist_ckpt.format.names import PIN, file_key, manifest_key
from dist_ckpt.repository import History, Repository, keep
from dist_ckpt.repository.history import EpochNote, put_epoch_note
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import commit, keys, new_store, save


def test_a_pinned_checkpoint_stays_until_it_is_unpinned() -> None:
    store = new_store()
    claim = save(store, 1, 2, 3)
    Repository(store).pin(1, reason="the one in the paper")
    Repository(store).pin(1)  # a second time changes nothing
    # Somebody else, later: nothing is remembered but what is stored.
    assert Repository(store).retain(keep.latest(1), claim=claim) == {
        2: "not kept by keep.latest(1)"
    }
    assert Repository(store).pinned() == [1]
    assert Repository(store).verify(1).ok
    save_id = Repository(store).open(1).manifest.save_id
    assert b"the one in the paper" in _read(store, file_key(1, save_id, PIN))
    Repository(store).unpin(1)
    assert list(Repository(store).retain(keep.latest(1), claim=claim)) == [1]
    assert not [key for key in keys(store) if key.startswith("step-0000000001/")]


def _read(store: Store, key: str) -> bytes:
    return read_all(store, key)


def test_what_is_not_there_cannot_be_pinned() -> None:
    store = new_store()
    save(store, 1)
    with pytest.raises(NotFound, match="nearest are 1"):
        Repository(store).pin(2)


def test_a_pin_that_comes_too_late_says_so() -> None:
    store = new_store()
    save(store, 1, 2)

    class DeletesMeanwhile(FaultyStore):
        def put(self, key: str, *arguments: Any, **keywords: Any) -> None:
            super().put(key, *arguments, **keywords)
            self.inner.delete([manifest_key(1)])

    with pytest.raises(NotFound, match="no checkpoint of step 1"):
        Repository(DeletesMeanwhile(store, [])).pin(1)
    assert not [key for key in keys(store) if key.endswith(PIN)]


def test_a_pin_that_cannot_be_looked_for_deletes_nothing() -> None:
    store = new_store()
    claim = save(store, 1, 2)
    broken = FaultyStore(store, [Rule("size", Fail(StorageError("down")), key=f"*/{PIN}")])
    with pytest.raises(StorageError):
        Repository(broken).retain(keep.latest(1), claim=claim)
    assert Repository(store).steps() == [1, 2]


def test_a_note_tells_epoch_and_metrics_that_came_after_the_save() -> None:
    store = new_store()
    repository = Repository(store)
    claim = repository.claim()
    manifest = commit(repository.begin(5, claim), metrics={"loss": 1.0, "f1": 0.5})
    put_epoch_note(store, 5, manifest.save_id, EpochNote(2, {"loss": 0.5, "gap": float("nan")}))
    (record,) = repository.records()
    assert (record.epoch, record.metrics["loss"], record.metrics["f1"]) == (2, 0.5, 0.5)
    assert record.metrics["gap"] != record.metrics["gap"]


def test_a_note_goes_with_its_checkpoint_and_is_not_of_the_next_one() -> None:
    store = new_store()
    claim = save(store, 5, 6)
    save_id = Repository(store).open(5).manifest.save_id
    put_epoch_note(store, 5, save_id, EpochNote(1, {"loss": 0.1}))
    # Deleted by hand, in part, and saved again.
    store.delete([manifest_key(5)])
    save(store, 5, claim=claim)
    assert Repository(store).records()[0].metrics == {}
    Repository(store).collect(claim=claim, in_flight=())
    assert not [key for key in keys(store) if save_id in key]


def test_manifests_are_read_once_and_what_was_deleted_is_gone() -> None:
    inner = new_store()
    save(inner, 1, 2, 3)
    twice = Fail(StorageError("read twice"))
    store = FaultyStore(inner, [Rule("read_into", twice, key="*/manifest.json", nth=4)])
    history = History(store)
    assert [record.step for record in history.read([1, 2, 3])] == [1, 2, 3]
    assert [record.step for record in history.read([3, 1])] == [1, 3]
    inner.delete([manifest_key(2)])
    assert [record.step for record in History(inner).read([1, 2, 3])] == [1, 3]
    # Step 2 was not asked for above, so it would be read again.
    with pytest.raises(StorageError, match="read twice"):
        save(inner, 2)
        history.read([1, 2, 3])


def test_a_damaged_manifest_or_note_has_no_record() -> None:
    store = new_store()
    save(store, 1, 2, 3)
    store.put(manifest_key(1), [b"{}"], mode="replace")
    save_id = Repository(store).open(2).manifest.save_id
    store.put(file_key(2, save_id, "epoch.json"), [b'{"metrics": {"loss": "low"}}'])
    assert [record.step for record in Repository(store).records()] == [3]


def test_damaged_checkpoints_count_for_nothing_and_are_left_for_people() -> None:
    store = new_store()
    claim = save(store, 1, 2, 3, 4)
    store.put(manifest_key(3), [b"{}"], mode="replace")
    gone = Repository(store).retain(keep.latest(1), claim=claim, damaged={4})
    # 2 is the newest that a restart could use.
    assert list(gone) == [1]
    assert Repository(store).steps() == [2, 3, 4]
