"""What a job says of itself: who it is for, and what becomes of it when it cannot be read."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import msgspec
import pytest

from dist_ckpt.errors import ErrorKind, StorageError, UsageError
from dist_ckpt.format.names import claim_key, parse_claim, parse_status, status_key
from dist_ckpt.repository import Repository, commit, status
from dist_ckpt.repository.commit import highest_claim, take_claim
from dist_ckpt.repository.status import JobStatus, Phase
from dist_ckpt.run import Run
from dist_ckpt.storage.base import Store
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule
from tests.unit.repository.runs import keys, new_store, save


@pytest.fixture
def another_process(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Have the claims that follow be those of another process."""
    return lambda: monkeypatch.setattr(commit, "process_names", {})


def said(number: int = 1, *, beat: int = 0, phase: Phase = "training", **more: object) -> JobStatus:
    at = datetime.now(UTC) - timedelta(hours=7)  # of a host whose clock is far behind
    found = JobStatus(
        claim=number,
        host="node-7",
        pid=42,
        world_size=8,
        phase=phase,
        step=120,
        commit=100,
        lag_steps=20,
        beat=beat,
        every_seconds=0.02,
        heartbeat=at.isoformat(),
    )
    return msgspec.structs.replace(found, **more)


def look(store: Store) -> None:
    status.check_alone(store, most_seconds=10)


def test_it_has_a_name_that_is_no_claim() -> None:
    assert status_key(3) == "claims/000003.status.json"
    assert parse_status("000003.status.json") == 3
    assert parse_claim("000003.status.json") is None
    assert [parse_status(name) for name in ("3.status.json", "000003.json", "000003.status")] == [
        None
    ] * 3


def test_people_read_that_of_the_owner() -> None:
    store = new_store()
    assert Run(store).status() is None
    take_claim(store)
    assert Run(store).status() is None, "it has said nothing yet"
    status.put_status(store, said())
    found = Run(store).status()
    assert found is not None
    assert found.in_words().startswith(
        "claim 1, process 42 on node-7, training, step 120, newest checkpoint 100, "
        "20 steps not saved, last heard of 252"
    )
    take_claim(store)
    assert Run(store).status() is None, "another one has taken the run over"
    assert highest_claim(store) == 2


@pytest.mark.parametrize(
    "content",
    [b"", b"{}", b"[]", b"{", b"\xff", b'{"claim": 1, "phase": "asleep"}', b"[" * 5000],
)
def test_a_damaged_one_is_none(content: bytes) -> None:
    store = new_store()
    take_claim(store)
    store.put(status_key(1), [content])
    assert Run(store).status() is None
    look(store)
    assert take_claim(store) == 2


def test_one_that_was_copied_under_another_number_is_none() -> None:
    store = new_store()
    take_claim(store)
    store.put(status_key(1), [msgspec.json.encode(said(7))])
    assert Run(store).status() is None


def test_one_of_a_newer_release_is_read_as_far_as_it_is_known() -> None:
    store = new_store()
    take_claim(store)
    newer = {**said().as_json(), "gpus": 8, "heartbeat": "tomorrow"}
    store.put(status_key(1), [msgspec.json.encode(newer)])
    found = Run(store).status()
    assert found is not None
    assert (found.step, found.age_seconds) == (120, None)


def test_what_this_user_may_not_read_is_none_and_an_outage_is_one() -> None:
    forbidden = StorageError("access denied", kind=ErrorKind.PERMISSION)
    for error, known in ((forbidden, True), (StorageError("unreachable"), False)):
        for rule in (
            Rule("read_into", Fail(error), key="*.status.json"),
            Rule("list_children", Fail(error), key="claims/"),
        ):
            inner = new_store()
            take_claim(inner)
            run = Run(FaultyStore(inner, [rule]))
            if known:
                assert run.status() is None
            else:
                with pytest.raises(StorageError, match="unreachable"):
                    run.status()


@pytest.mark.parametrize("phase", status.OVER)
def test_nobody_waits_for_a_job_that_is_over_or_never_said_a_word(phase: Phase) -> None:
    store = CrashStore(new_store(), kinds=["read_into"])
    look(store)
    take_claim(store)
    look(store)
    status.put_status(store, said(phase=phase, every_seconds=1000.0))
    before = len(store.operations)
    look(store)
    looks = [key for _, key in store.operations[before:] if key == status_key(1)]
    assert looks == [status_key(1)], "once is enough"


def test_a_job_whose_word_changes_is_alive_and_one_that_is_silent_is_not() -> None:
    store = new_store()
    take_claim(store)
    status.put_status(store, said())
    look(store)  # after three of its intervals
    over = threading.Event()
    status.put_status(store, said(every_seconds=60.0))

    def beat() -> None:
        for count in range(1, 10**6):
            status.put_status(store, said(beat=count, every_seconds=60.0))
            if over.wait(0.001):
                return

    thread = threading.Thread(target=beat)
    thread.start()
    with pytest.raises(UsageError, match="process 42 on node-7, training at step 120") as caught:
        look(store)
    over.set()
    thread.join()
    assert caught.value.kind is ErrorKind.IN_USE


def test_who_takes_the_run_over_meanwhile_is_alive() -> None:
    class Overtaken(FaultyStore):
        """Another job claims the run while this one looks."""

        def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
            count = super().read_into(key, offset, *buffers)
            if key == status_key(1) and highest_claim(self.inner) == 1:
                take_claim(self.inner)
            return count

    store = Overtaken(new_store(), [])
    take_claim(store)
    status.put_status(store, said())
    with pytest.raises(UsageError, match="claim 2"):
        look(store)


def test_what_one_process_begins_again_and_again_is_no_start_in_vain(
    another_process: Callable[[], None],
) -> None:
    repository = Repository(new_store())
    another_process()
    for _ in range(2):
        repository.claim()
    another_process()
    for _ in range(5):
        repository.claim()
    assert status.starts_in_vain(repository.store, 7, None) == 2
    another_process()
    assert status.starts_in_vain(repository.store, 8, None) == 7


def test_starts_in_vain_are_counted_by_the_claims(another_process: Callable[[], None]) -> None:
    store = new_store()
    repository = Repository(store)
    for _ in range(3):
        repository.claim()
    save(store, 10, claim=3)
    assert status.starts_in_vain(store, 3, 10) == 0
    for _ in range(4):
        repository.claim()
    another_process()
    assert status.starts_in_vain(store, 7, 10) == 3
    # One that had nothing to do was none in vain, and neither were those before it in this row.
    status.put_status(store, said(5, phase="ended"))
    assert status.starts_in_vain(store, 7, 10) == 1
    assert status.starts_in_vain(store, 7, None) == 1
    status.put_status(store, said(5, phase="failed"))
    assert status.starts_in_vain(store, 7, 10) == 3
    assert status.starts_in_vain(store, 7, None) == 6
    # A stray is no start, as little as a status is.
    store.put("claims/000005.json.bak", [b""])
    assert status.starts_in_vain(store, 7, 10) == 3


def test_what_older_jobs_said_is_removed_with_the_rest_of_them() -> None:
    store = new_store()
    for number in (1, 2, 3):
        take_claim(store)
        status.put_status(store, said(number))
    store.put("claims/notes.status.json", [b"of somebody else"])
    Repository(store).collect(claim=3, in_flight=())
    assert keys(store) == [
        claim_key(1),
        claim_key(2),
        claim_key(3),
        status_key(3),
        "claims/notes.status.json",
    ]
    Run(store).sweep()
    assert status_key(3) in keys(store)
