"""How often a store is asked as a run grows: by the page, or not more often than before."""

from __future__ import annotations

from collections import Counter

from dist_ckpt import events, keep
from dist_ckpt.format.names import manifest_key, shard_name, step_dir
from dist_ckpt.repository import Repository
from dist_ckpt.repository.history import History, delete_checkpoint
from dist_ckpt.repository.tally import Tally
from dist_ckpt.storage.meter import MeterStore
from tests.unit.repository.runs import new_store, save

MANY = 120


class Asked:
    """Counts what is asked of a store."""

    def __init__(self) -> None:
        self.inner = new_store()
        self.store = MeterStore(self.inner)
        self._before: Counter[str] = Counter()

    def since(self) -> Counter[str]:
        """Return what was asked since this was called last."""
        now = Counter({kind: use.count for kind, use in self.store.usage().operations.items()})
        found = now - self._before
        self._before = now
        return found


def test_retention_after_a_commit_asks_no_more_of_many_checkpoints_than_of_few() -> None:
    found = []
    for count in (5, MANY):
        asked = Asked()
        claim = save(asked.inner, *range(count))
        run, history = Repository(asked.store), History(asked.store)
        policy = keep.latest(count)
        assert not run.retain(policy, claim=claim, history=history)
        first = asked.since()
        assert first["read_into"] == 2 * count, "the manifest of each, and its note"
        save(asked.inner, count, claim=claim)
        assert list(run.retain(policy, claim=claim, history=history)) == [0]
        found.append(asked.since())
    assert found[0] == found[1]
    # The listing of the run, the new manifest and its note, three that stay, the pin of the one
    # that goes, the claims; and its three deletions, with the two listings that these need.
    assert found[1].total() <= 10 + 5


def test_what_was_deleted_by_hand_keeps_no_room_though_its_folder_is_left() -> None:
    asked = Asked()
    claim = save(asked.inner, 1, 2, 3, 4)
    run, history = Repository(asked.store), History(asked.store)
    assert not run.retain(keep.latest(4), claim=claim, history=history)
    asked.inner.delete([manifest_key(3)])
    save(asked.inner, 5, claim=claim)
    # By what is remembered 1 would go; of those that are there it is one of four.
    assert not run.retain(keep.latest(4), claim=claim, history=history)
    assert run.steps() == [1, 2, 4, 5]


def test_what_could_not_be_deleted_whole_is_remembered_as_gone() -> None:
    asked = Asked()
    claim = save(asked.inner, 1, 2, 3)
    run, history = Repository(asked.store), History(asked.store)
    assert sorted(run.retain(keep.latest(2), claim=claim, history=history)) == [1]
    assert not history.knows(1)
    assert run.steps() == [2, 3]


def test_a_folder_of_many_files_is_listed_once_to_be_deleted() -> None:
    asked = Asked()
    claim = save(asked.inner, 7)
    (attempt,) = asked.inner.list_children(f"{step_dir(7)}/")[:1]
    for rank in range(1, MANY):
        asked.inner.put(f"{step_dir(7)}/{attempt}{shard_name('model', rank)}", [b""])
    asked.since()
    delete_checkpoint(asked.store, 7)
    said = asked.since()
    assert said["list_children"] == 2
    assert said["delete"] <= 4
    assert not list(asked.inner.list_entries(f"{step_dir(7)}/"))
    assert claim


def test_garbage_is_looked_for_without_listing_what_newer_jobs_write() -> None:
    asked = Asked()
    old = save(asked.inner, 1)
    save(asked.inner, 2)
    asked.since()
    assert not Repository(asked.store).collect(claim=old, in_flight=())
    # The run, each step, the claims twice; not the attempt of the newer claim.
    assert asked.since()["list_children"] <= 4


def test_a_sum_is_kept_as_it_grows() -> None:
    heard: list[int] = []

    def hear(event: events.Event) -> None:
        if isinstance(event, events.WorkProgressed):
            heard.append(event.nbytes_done)

    leave = events.subscribe(hear)
    tally = Tally("memory://x", "copying", 30)
    for item, nbytes in (("a", 10), ("b", 5), ("a", 2), ("b", 20)):
        tally.note(item, nbytes)
    leave()
    assert heard == [10, 15, 7, 22]
