"""A run: what is listed, what is opened, and what an outage or an empty place looks like."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import (
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format.names import manifest_key
from dist_ckpt.repository import Repository, keep
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Operation, Rule
from tests.unit.repository.runs import new_store, put_files, save

STEP = st.integers(0, 10**10 - 1)


@given(st.sets(STEP, max_size=5), st.sets(STEP, max_size=5))
def test_steps_are_the_committed_ones(committed: set[int], begun: set[int]) -> None:
    store = new_store()
    repository = Repository(store)
    claim = save(store, *committed)
    for step in begun - committed:
        put_files(repository.begin(step, claim), b"never committed")
    assert repository.steps() == sorted(committed)
    assert repository.latest() == max(committed, default=None)


def test_the_newest_is_found_without_asking_for_all() -> None:
    inner = new_store()
    claim = save(inner, *range(20))
    put_files(Repository(inner).begin(99, claim), b"in flight")
    store = CrashStore(inner)
    assert Repository(store).latest() == 19
    assert [kind for kind, _ in store.operations] == ["list_children", "size", "size"]


def test_foreign_names_are_no_steps() -> None:
    store = new_store()
    for name in ("step-1", "step-00000000001", "Step-0000000001", "step-000000000x"):
        store.put(f"{name}/manifest.json", [b"{}"])
    store.put("step-0000000002", [b"a file, not a folder"])
    assert Repository(store).steps() == []


@pytest.mark.parametrize("operation", ["list_children", "size", "read_into"])
def test_an_outage_never_looks_like_an_empty_run(operation: Operation) -> None:
    inner = new_store()
    claim = save(inner, 0, 1)
    down = FaultyStore(inner, [Rule(operation, Fail(StorageError("down")), nth=None)])
    repository = Repository(down)
    looking = [
        repository.steps,
        repository.latest,
        lambda: repository.open(2),
        lambda: repository.begin(2, claim),
    ]
    reading = [
        lambda: repository.open(1),
        lambda: repository.verify(1),
        lambda: repository.collect(claim=claim, in_flight=()),
    ]
    if operation != "size":  # of which it asks none
        looking.append(repository.open_latest)
        reading.append(repository.open_latest)
    for use in (
        lambda: repository.retain(keep.latest(1), claim=claim, protected=()),
        *(reading if operation == "read_into" else looking),
    ):
        with pytest.raises(StorageError, match="down"):
            use()


@pytest.mark.parametrize("operation", ["size", "read_into"])
def test_what_is_listed_and_not_found_is_never_exchanged_for_an_older_one(
    operation: Operation,
) -> None:
    inner = new_store()
    save(inner, 0, 1)
    lost = Rule(operation, Fail(NotFound("404")), key="step-0000000001/manifest.json", nth=None)
    repository = Repository(FaultyStore(inner, [lost]))
    if operation == "size":
        assert repository.open_latest().step == 1
    else:
        with pytest.raises(IntegrityError, match=r"is listed in .*, and not found"):
            repository.open_latest()


def test_opening_what_is_not_there_says_what_is() -> None:
    store = new_store()
    repository = Repository(store)
    for use in (repository.open_latest, lambda: repository.open(1)):
        with pytest.raises(NotFound, match="is no run") as nothing:
            use()
        assert nothing.value.kind == ErrorKind.NO_RUN
    repository.claim()
    with pytest.raises(NotFound, match="no committed checkpoint"):
        repository.open_latest()
    save(store, *range(10, 17))
    with pytest.raises(NotFound, match=r"step 9 .* nearest are 10, 11, 12") as caught:
        repository.open(9)
    assert caught.value.kind == ErrorKind.NO_CHECKPOINT
    with pytest.raises(UsageError, match="bad step"):
        repository.open(-1)


def test_the_newest_is_opened_and_never_exchanged_for_an_older_one() -> None:
    store = new_store()
    save(store, 1, 2)
    assert Repository(store).open_latest().step == 2
    store.put(manifest_key(2), [b"{"], mode="replace")
    with pytest.raises(IntegrityError, match="step 2"):
        Repository(store).open_latest()
    store.put(manifest_key(2), [b'{"format": 99}'], mode="replace")
    with pytest.raises(IncompatibleError, match="99"):
        Repository(store).open_latest()


def test_every_attempt_has_a_save_id_of_its_own() -> None:
    repository = Repository(new_store())
    claim = repository.claim()
    ids = {repository.begin(1, claim).save_id for _ in range(50)}
    assert len(ids) == 50
    assert all(save_id.startswith("c000001-") for save_id in ids)
