"""Each rank opens the checkpoint that rank 0 named by its own look at the place."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import pytest
import torch

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import manifest_key
from dist_ckpt.loading.choosing import open_told
from dist_ckpt.loading.loader import Loader, LoadReport
from dist_ckpt.ranks.coordinator import JobCoordinator
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Coordinators
from dist_ckpt.repository.commit import read_manifest
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from tests.unit.ranks.rounds import links, on_every_rank
from tests.unit.repository.runs import new_store, save

T = TypeVar("T")

STEP = 2


def run(*steps: int) -> MemoryStore:
    store = new_store()
    save(store, *steps)
    return store


def digest_of(store: Store) -> str:
    return bytes_digest(read_manifest(store, STEP))


def test_the_one_that_was_named_is_opened() -> None:
    store = run(1, STEP)
    assert open_told(store, STEP, digest_of(store)).step == STEP


def test_what_is_not_there_as_rank_0_saw_it_is_refused_as_damage() -> None:
    store = run(1, STEP)
    digest = digest_of(store)
    with pytest.raises(IntegrityError, match="not the one that rank 0 read"):
        open_told(run(STEP), STEP, digest)
    store.delete([manifest_key(STEP)])
    with pytest.raises(IntegrityError, match="it is not found here") as caught:
        open_told(store, STEP, digest)
    assert caught.value.kind is ErrorKind.MISSING_FILE


class Host(StoreWrapper):
    """A place that is called alike on every host."""

    @property
    def url(self) -> str:
        return "/data/run"

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        return run()


class Beside(StoreWrapper):
    """Somebody changes the run right before this rank looks at the manifest of the step."""

    def __init__(self, inner: Store, change: Callable[[], None]) -> None:
        super().__init__(inner)
        self._changes = [change]

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        if key == manifest_key(STEP) and self._changes:
            self._changes.pop()()
        return run()


def loads(stores: Sequence[Store], step: int | None = None) -> list[Any]:
    """Load on as many ranks as there are stores; return what each got."""

    def rank(number: int, store: Store, member: JobCoordinator) -> Callable[[], LoadReport | None]:
        job = Job(store, timeout_seconds=120)
        job.coordinators = Coordinators(member, member)
        model = torch.nn.Module()
        model.register_buffer("w", torch.zeros(7, dtype=torch.uint8))
        state = TrainState(rng=None, model=model)
        options = {"only": "model", "exchange": "never"}
        return lambda: Loader(job, state).load(step, options=options, fall_back=True, own=False)

    members = [JobCoordinator(link) for link in links(len(stores))]
    works = [rank(*each) for each in zip(range(len(stores)), stores, members, strict=True)]
    return on_every_rank(works)


def test_ranks_take_what_is_there_by_then_where_one_came_too_late() -> None:
    store = run(1, STEP)

    def retention() -> None:
        save(store, 3)
        store.delete([manifest_key(STEP)])

    reports = loads([store, Beside(store, retention), store])
    assert [(report.step, report.refused) for report in reports] == [(3, {})] * 3


def test_a_step_that_is_gone_is_not_found_on_all_ranks() -> None:
    store = run(1, STEP)
    late = Beside(store, lambda: store.delete([manifest_key(STEP)]))
    errors = loads([store, late, store], STEP)
    assert [type(error) for error in errors] == [NotFound] * 3
    assert len({str(error) for error in errors}) == 1


def test_a_rank_with_another_place_is_named_on_all_ranks() -> None:
    errors = loads([Host(run(STEP)), Host(run(1))])
    assert [type(error) for error in errors] == [IntegrityError] * 2
    for error in errors:
        assert "do the hosts not share the place" in str(error)
