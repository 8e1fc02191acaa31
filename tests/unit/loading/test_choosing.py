"""Which checkpoint is loaded, and when none is."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, NotFound, StorageError
from dist_ckpt.format.names import manifest_key
from dist_ckpt.loading import choosing
from dist_ckpt.loading.choosing import Choice, choose
from dist_ckpt.loading.loader import Loader
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Coordinators
from dist_ckpt.repository import Repository
from dist_ckpt.saving.saver import Saver
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule
from tests.unit.ranks.rounds import links, on_every_rank
from tests.unit.repository.runs import MODEL, new_store, put_files, save


def run(*steps: int) -> MemoryStore:
    store = new_store()
    save(store, *steps)
    return store


def damage(store: Store, step: int) -> None:
    save_id = Repository(store).open(step).manifest.save_id
    key = f"step-{step:010d}/{save_id}/{MODEL}"
    store.put(key, [read_all(store, key)[:-1]], mode="replace")


def newest(
    store: Store, *, fall_back: bool = True, refused: dict[int, str] | None = None
) -> Choice:
    return choose(Repository(store), None, refused or {}, fall_back=fall_back)


def test_the_newest_with_what_rank_0_read() -> None:
    store = run(1, 2)
    choice = newest(store)
    assert (choice.step, choice.refused) == (2, {})
    assert choice.checkpoint is not None
    assert choice.checkpoint.manifest_bytes == read_all(store, manifest_key(2))


def test_a_manifest_that_is_listed_and_not_found_is_damage_and_no_free_place() -> None:
    def losing(key: str, nth: int | None = None) -> Store:
        return FaultyStore(run(1, 2), [Rule("read_into", Fail(NotFound("404")), key=key, nth=nth)])

    choice = newest(losing(manifest_key(2)))
    assert choice.step == 1
    assert "is listed in" in choice.refused[2]
    with pytest.raises(IntegrityError, match=r"no checkpoint in .* can be restored"):
        newest(losing("*/manifest.json"))
    # One look that missed it is none: it may have been committed in between.
    assert (newest(losing(manifest_key(2), nth=1)).step) == 2


def test_damaged_ones_are_passed_over_with_the_reason() -> None:
    store = run(1, 2, 3)
    damage(store, 3)
    store.put(manifest_key(2), [b"{"], mode="replace")
    choice = newest(store)
    assert choice.step == 1
    assert MODEL in choice.refused[3]
    assert "manifest" in choice.refused[2]
    again = newest(store, refused={3: "a flipped bit"})
    assert again.refused[3] == "a flipped bit", "what was found in the data is not forgotten"


def test_without_falling_back_damage_is_an_error() -> None:
    store = run(1, 2)
    damage(store, 2)
    with pytest.raises(IntegrityError, match=MODEL):
        newest(store, fall_back=False)
    with pytest.raises(IntegrityError, match=MODEL):
        choose(Repository(store), 2, {}, fall_back=True)


def test_one_that_was_asked_for_is_never_exchanged() -> None:
    store = run(1, 2)
    assert choose(Repository(store), 1, {}, fall_back=True).step == 1
    with pytest.raises(NotFound, match="step 5"):
        choose(Repository(store), 5, {}, fall_back=True)


def test_when_all_are_damaged_nothing_begins_anew() -> None:
    store = run(1, 2)
    for step in (1, 2):
        damage(store, step)
    with pytest.raises(IntegrityError, match=r"step 1: .*step 2: ") as caught:
        newest(store)
    assert caught.value.kind == ErrorKind.MALFORMED


def test_what_was_never_committed_is_nothing_to_choose() -> None:
    store = new_store()
    assert newest(store) == Choice(None)
    repository = Repository(store)
    put_files(repository.begin(9, repository.claim()), b"a crash before the commit")
    assert newest(store) == Choice(None)
    save(store, 3)
    assert newest(store).step == 3


def test_each_thing_is_asked_for_once() -> None:
    """On an object store each of these waits for an answer of its own."""
    store = CrashStore(run(1, 2))
    assert newest(store).step == 2
    kinds = [kind for kind, _ in store.operations]
    manifest_and_index = ["read_into", "read_into"]
    assert kinds[:3] == ["list_children", *manifest_and_index]
    # One for each file, and the values are read meanwhile.
    assert sorted(kinds[3:]) == ["read_into", "size", "size"]


def test_a_newer_format_is_no_damage() -> None:
    store = run(1, 2)
    store.put(manifest_key(2), [b'{"format": 99}'], mode="replace")
    with pytest.raises(IncompatibleError, match="99"):
        newest(store)


def test_an_outage_is_neither_damage_nor_emptiness() -> None:
    for rule in (
        Rule("list_children", Fail(StorageError("down"))),
        Rule("size", Fail(StorageError("down")), key="*.safetensors"),
        Rule("read_into", Fail(StorageError("down")), key="*/manifest.json"),
    ):
        with pytest.raises(StorageError, match="down"):
            newest(FaultyStore(run(1, 2), [rule]))


def test_older_ones_are_not_asked_about() -> None:
    """A run on an object store has many, and each answer takes its time."""
    asked = Fail(StorageError("asked"))
    store = FaultyStore(run(1, 2, 3), [Rule("read_into", asked, key=manifest_key(1), nth=None)])
    assert newest(store).step == 3
    assert newest(store, refused={3: "damaged"}).step == 2
    with pytest.raises(StorageError, match="asked"):
        newest(store, refused={3: "damaged", 2: "damaged"})


def test_one_that_is_deleted_meanwhile_is_passed_over() -> None:
    inner = run(1, 2)

    class Goes(FaultyStore):
        def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
            if key == manifest_key(2):
                inner.delete([key])
            return super().read_into(key, offset, *buffers)

    choice = newest(Goes(inner, []))
    assert (choice.step, choice.refused) == (1, {})


def test_one_that_takes_the_place_of_the_newest_meanwhile_is_found() -> None:
    """The run goes on, and keeps one checkpoint."""
    inner = run(1)

    class Goes(FaultyStore):
        def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
            if key == manifest_key(1) and Repository(inner).latest() == 1:
                save(inner, 2)
                inner.delete([manifest_key(1)])
            return super().read_into(key, offset, *buffers)

    assert newest(Goes(inner, [])).step == 2


def test_lost_files_of_parts_that_nobody_wants_are_no_damage() -> None:
    store = run(1)
    damage(store, 1)
    choice = choose(
        Repository(store),
        1,
        {},
        fall_back=False,
        selects_part=lambda part: part != "model",
    )
    assert choice.step == 1


def test_ranks_share_the_look_at_the_sizes_of_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """What one of them finds in its share has all of them take the checkpoint before."""
    world, place = 2, MemoryStore("unit-choosing-sizes")
    stores = [MeterStore(place) for _ in range(world)]

    def on_all(work: Callable[[Job, TrainState], None]) -> None:
        shared = links(world)

        def on(rank: int) -> None:
            job = Job(stores[rank], timeout_seconds=600)
            job.coordinators = Coordinators(*(JobCoordinator(shared[rank]) for _ in range(2)))
            work(job, TrainState(rng=None, weights={"w": torch.ones(1 << 16)}))

        for result in on_every_rank([partial(on, rank) for rank in range(world)]):
            assert result is None, result

    def save_two(job: Job, state: TrainState) -> None:
        saver = Saver(job, state, keep=None, metadata={})
        for step in (1, 2):
            saver.start(step, {}).wait()
        saver.close()

    def load_one(job: Job, state: TrainState) -> None:
        alone = {"exchange": "never"}
        report = Loader(job, state).load(None, options=alone, fall_back=True, own=True)
        assert report is not None
        assert report.step == 1

    on_all(save_two)
    files = Repository(place).open(2).files
    monkeypatch.setattr(choosing, "MANY_FILES", 1)
    second = next(Repository(place).open(2).key(name) for name, _ in files[1::world])
    place.put(second, [b"short"], mode="replace")
    on_all(load_one)
    looked = [store.usage().operations["size"].count for store in stores]
    assert all(looked), "each at its share"
