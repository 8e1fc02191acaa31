"""Beginning anew and going back: nothing newer is left in the run, nothing good is lost."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import pytest

import dist_ckpt
from dist_ckpt import Checkpointer, events, keep, policy
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    FencedError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format.names import DISCARDS, discard_key, manifest_key
from dist_ckpt.repository import Repository, discard
from dist_ckpt.storage import LocalStore
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.wrapper import CHANGES, Operation, StoreWrapper
from dist_ckpt.training.recorder import Pulse
from tests.unit.lifecycle.training import (
    LOSS,
    claims,
    keys,
    manifest_of,
    new_store,
    run_of,
    state,
    steps,
)

T = TypeVar("T")


@pytest.fixture
def store() -> MemoryStore:
    return new_store()


# ---------------------------------------------------------------- a run that exists


@pytest.mark.parametrize("how", [{"every_steps": 1}, {"when": policy.at(5)}, {}])
def test_who_forgets_to_restore_is_refused_at_the_first_save(
    store: MemoryStore, how: dict[str, Any]
) -> None:
    run_of(store, 1, 2)
    before = keys(store)
    with Checkpointer(store, state(), keep=keep.latest(1), save_last=False, **how) as ckpt:
        with pytest.raises(UsageError, match=r"restore\(\) was not called") as caught:
            ckpt.step(5) if how else ckpt.save(5)
        assert caught.value.kind == ErrorKind.NOT_RESTORED
        assert "restore('none', discard_newer=True)" in str(caught.value)
        assert keys(store) == before, "nor claimed"
        # The way out is open.
        assert ckpt.restore() == 2
        ckpt.save(6)
    assert steps(store) == [2, 6]  # 2 is what it went on from


def test_also_at_the_end(store: MemoryStore) -> None:
    run_of(store, 1)
    ckpt = Checkpointer(store, state(), every_steps=100)
    ckpt.step(7)
    with pytest.raises(UsageError, match="was not called"):
        ckpt.close()
    assert (steps(store), len(claims(store))) == ([1], 1)


def test_a_step_that_is_there_or_behind_is_refused_before_the_run_is_taken_over(
    store: MemoryStore,
) -> None:
    run_of(store, 1, 5)
    before = claims(store)
    with Checkpointer(store, state()) as ckpt:
        for step in (1, 3, 5):
            with pytest.raises(UsageError, match=r"restore\(\)"):
                ckpt.save(step)
    assert claims(store) == before


def test_save_without_a_loop_adds_to_a_run(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    run_of(store, 3)
    assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize("step", [2, 3])
def test_a_save_that_is_refused_takes_the_run_from_nobody(store: MemoryStore, step: int) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.step(3)
        ckpt.wait()
        before = keys(store)
        with pytest.raises((AlreadyExists, UsageError)):
            dist_ckpt.save(state(), store, step=step)
        assert keys(store) == before
        ckpt.step(4)
    assert steps(store) == [3, 4]


def test_a_restore_from_a_place_that_has_none_takes_the_run_from_nobody(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.step(3)
        ckpt.wait()
        before = keys(store)
        with pytest.raises(NotFound, match="is no run"):
            Checkpointer(store, state(), every_steps=1).restore(url=new_store(), discard_newer=True)
        assert keys(store) == before
        ckpt.step(4)
    assert steps(store) == [3, 4]


@pytest.mark.parametrize("back", [False, True])
def test_a_restore_of_a_step_that_is_not_there_takes_the_run_from_nobody(
    store: MemoryStore, *, back: bool
) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.step(3)
        ckpt.wait()
        before = keys(store)
        with pytest.raises(NotFound, match=r"no checkpoint of step 2 in .*: the nearest are 3"):
            Checkpointer(store, state(), every_steps=1).restore(step=2, discard_newer=back)
        assert keys(store) == before
        ckpt.step(4)
    assert steps(store) == [3, 4]


@pytest.mark.parametrize("restores", [True, False])
def test_who_was_replaced_before_its_first_save_is_told_that(
    store: MemoryStore, *, restores: bool
) -> None:
    with Checkpointer(store, state(), every_steps=1, save_last=False) as ckpt:
        assert ckpt.restore() == 0
        with Checkpointer(store, state(), every_steps=1) as other:
            other.restore()
            other.step(1)
        if restores:
            ckpt.restore(step=1)
        # And not to give up what the other job has saved.
        with pytest.raises(FencedError):
            ckpt.save(1 + restores).wait()


@pytest.mark.parametrize("ways", ["none", "url", "flags"])
def test_beginning_anew_is_to_be_meant(store: MemoryStore, ways: str) -> None:
    run_of(store, 1, 7)
    elsewhere = new_store()
    run_of(elsewhere, 3)

    def begin(**how: Any) -> tuple[Checkpointer, int]:
        if ways == "flags":
            args = {"checkpoint_dir": store.url, "checkpoint_interval": 2, **how}
            ckpt = Checkpointer.from_args(args, values)
            return ckpt, ckpt.restore()
        ckpt = Checkpointer(store, values, every_steps=2)
        if ways == "url":
            return ckpt, ckpt.restore(url=elsewhere, **how)
        return ckpt, ckpt.restore("none", **how)

    values = state(0)
    with pytest.raises(UsageError, match=r"discard.newer"):
        begin()
    assert len(claims(store)) == 2, "what is refused takes nothing over"
    ckpt, start = begin(discard_newer=True)
    with ckpt:
        assert start == (3 if ways == "url" else 0)
        assert steps(store) == [], "hidden"
        assert sorted(Repository(store).hidden()) == [1, 7]
        for step in range(start + 1, start + 3):
            ckpt.step(step)
        ckpt.wait()
        assert not Repository(store).hidden(), "collected after the commit"
    assert steps(store) == ([4, 5] if ways == "url" else [2])
    assert store.list_children("discards/") == []


# ---------------------------------------------------------------- going back


@pytest.mark.parametrize("which", ["step", "best", "flags"])
def test_going_back_is_decided_at_the_restore(store: MemoryStore, which: str) -> None:
    for step, loss in ((10, 2.0), (20, 1.0), (30, 3.0), (40, 4.0)):
        run_of(store, step, **{LOSS: loss})
    before = keys(store)
    values = state()

    def back(**how: Any) -> tuple[Checkpointer, int]:
        if which == "flags":
            args = {"checkpoint_dir": store.url, "checkpoint_interval": 5, "resume": 20, **how}
            ckpt = Checkpointer.from_args(args, values)
            return ckpt, ckpt.restore()
        ckpt = Checkpointer(store, values, every_steps=5, keep=keep.best(LOSS) | keep.latest(9))
        if which == "best":
            return ckpt, ckpt.restore("best", **how)
        return ckpt, ckpt.restore(step=20, **how)

    with pytest.raises(UsageError, match=r"newer than step 20 \(30, 40\)") as caught:
        back()
    assert caught.value.kind == ErrorKind.STEP_BEHIND
    assert "discard_newer=True" in str(caught.value)
    assert keys(store) == before
    assert values["weights"]["w"].tolist() == [0.0] * 4, "nothing was restored either"

    ckpt, start = back(discard_newer=True)
    with ckpt:
        assert start == 20
        assert values["weights"]["w"].tolist() == [20.0] * 4
        assert steps(store) == [10, 20]
        assert dist_ckpt.load(state(), store, step=40).step == 40, "still there, by its number"
        for step in range(21, 31):
            values["weights"]["w"].fill_(-step)
            ckpt.step(step)
    assert steps(store) == [10, 20, 25, 30]
    assert not Repository(store).hidden()
    loaded = state()
    assert dist_ckpt.load(loaded, store).step == 30
    assert loaded["weights"]["w"].tolist() == [-30.0] * 4, "the new one, under an old number"


def test_the_first_save_may_be_of_a_step_that_was_given_up(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    with Checkpointer(store, state()) as ckpt:
        assert ckpt.restore(step=1, discard_newer=True) == 1
        ckpt.save(2).wait()
    assert steps(store) == [1, 2]
    assert manifest_of(store, 2).claim == 3


def test_a_restart_before_the_first_save_stays_where_it_went_back_to(store: MemoryStore) -> None:
    run_of(store, 1, 2, 3)
    Checkpointer(store, state(), every_steps=1).restore(step=1, discard_newer=True)
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 1
        ckpt.step(2)
        ckpt.step(3)
    assert steps(store) == [1, 2, 3]
    assert {manifest_of(store, step).claim for step in (2, 3)} == {5}


def test_what_was_given_up_can_be_had_back_until_it_is_collected(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    Checkpointer(store, state(), every_steps=1).restore(step=1, discard_newer=True)
    assert steps(store) == [1]
    store.delete([discard_key(3)])
    assert steps(store) == [1, 2]


@pytest.mark.parametrize("again", [False, True])
def test_training_does_not_go_on_from_what_was_given_up(store: MemoryStore, *, again: bool) -> None:
    run_of(store, 1, 2)
    ckpt = Checkpointer(store, state(), every_steps=1)
    ckpt.restore(step=1, discard_newer=True)
    before = keys(store)
    with pytest.raises(UsageError, match=r"step 2 in .* was given up") as caught:
        Checkpointer(store, state(), every_steps=1).restore(step=2, discard_newer=again)
    assert caught.value.kind == ErrorKind.STEP_BEHIND
    assert keys(store) == before, "nor claimed"
    with pytest.raises(UsageError, match="was given up"):
        ckpt.restore(step=2, discard_newer=again)
    # Both ways that it names: only to look, and all the same.
    assert dist_ckpt.load(state(), store, step=2).step == 2
    store.delete([discard_key(3)])
    assert ckpt.restore(step=2) == 2


def test_who_only_looked_at_what_was_given_up_does_not_train_on_from_it(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    Checkpointer(store, state(), every_steps=1).restore(step=1, discard_newer=True)
    before = keys(store)
    with Checkpointer(store, state()) as ckpt:
        assert ckpt.restore(step=2) == 2, "to look"
        with pytest.raises(UsageError, match=r"step 2 in .* was given up"):
            ckpt.save(3)
    assert keys(store) == before, "nor claimed"
    with Checkpointer(store, state()) as ckpt:
        assert ckpt.restore(step=1) == 1
        ckpt.save(2).wait()
    assert steps(store) == [1, 2]


def test_what_took_the_place_of_what_was_given_up_was_not(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        ckpt.restore(step=1, discard_newer=True)
        ckpt.step(2)
    assert Checkpointer(store, state(), every_steps=1).restore(step=2) == 2


class Dying(StoreWrapper):
    """Does nothing any more after so many changes, as a process that was killed."""

    delete_batch = 1

    def __init__(self, inner: Store, changes: int) -> None:
        super().__init__(inner)
        self.left = changes

    def around(self, operation: Operation, key: str, run: Callable[[], T]) -> T:
        if self.left <= 0:
            raise StorageError("dead")
        self.left -= operation in CHANGES
        return run()


def test_a_crash_at_any_moment_of_going_back_leaves_one_history(store: MemoryStore) -> None:
    for changes in itertools.count(1):
        inner = new_store()
        run_of(inner, 1, 2, 3)
        dying = Dying(inner, changes)
        with suppress(dist_ckpt.CheckpointError):
            # It is never closed, and what it would say of itself has no place in what follows.
            ckpt = Checkpointer(dying, state(-1), timeout_seconds=600, status_seconds=None)
            ckpt.restore(step=1, discard_newer=True)
            ckpt.save(2)
            ckpt.wait()
        old = {2: 2, 3: 3}
        found = {step: manifest_of(inner, step).claim for step in steps(inner)}
        # Given up as a whole, and not before the user said so; deleted only after the commit.
        assert found in ({1: 1} | old, {1: 1}, {1: 1, 2: 4}), changes
        if found == {1: 1}:
            assert list(Repository(inner).hidden()) in ([3, 2], [3]), "2 gives way to the new one"
        with Checkpointer(inner, state(), every_steps=1) as again:
            newest = again.restore()
            assert newest == max(found)
            again.step(newest + 1)
        assert max(steps(inner)) == newest + 1
        if dying.left > 0:
            return


def test_what_takes_the_place_of_a_hidden_one_meanwhile_is_not_collected(
    store: MemoryStore,
) -> None:
    run_of(store, 1, 2)
    repository = Repository(store)
    repository.discard(claim=repository.claim(), after=1)
    old = manifest_of(store, 2).save_id
    listed = repository.hidden()
    there = {key: read_all(store, key) for key in keys(store) if old in key or DISCARDS in key}
    # Between the listing and the deletion. What this job tidied up, the end of which its last
    # line waits for, is put back: so it is when the deletion comes first.
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 1
        ckpt.step(2)
    for key, data in there.items():
        store.put(key, [data], mode="replace")
    new = manifest_of(store, 2)
    assert discard.collect(store, listed, claim=new.claim) == []
    assert steps(store) == [1, 2]
    assert manifest_of(store, 2).save_id == new.save_id != old
    assert repository.verify(2).ok
    assert not [key for key in keys(store) if old in key], "its own files are gone all the same"


def test_a_failed_restore_gives_nothing_up(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    save_id = manifest_of(store, 1).save_id
    store.put(f"step-0000000001/{save_id}/weights.r00000.safetensors", [b""], mode="replace")
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        with pytest.raises(IntegrityError):
            ckpt.restore(step=1, discard_newer=True)
        assert steps(store) == [1, 2]
        assert ckpt.restore() == 2


def test_what_is_pinned_is_not_given_up(store: MemoryStore) -> None:
    run_of(store, 1, 2, 3)
    Repository(store).pin(3)
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        with pytest.raises(UsageError, match=r"gives up what is pinned in .*: step 3;"):
            ckpt.restore(step=1, discard_newer=True)
        Repository(store).unpin(3)
        assert ckpt.restore(step=1, discard_newer=True) == 1
        Repository(store).pin(3)  # later than that it stays, hidden
        ckpt.step(2)
        ckpt.wait()
    assert (steps(store), list(Repository(store).hidden())) == ([1, 2], [3])


def test_a_newer_one_with_an_unreadable_manifest_is_no_obstacle(store: MemoryStore) -> None:
    run_of(store, 1, 2, 3)
    store.put(manifest_key(3), [b"{"], mode="replace")
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        assert ckpt.restore(step=1, discard_newer=True) == 1
        for step in (2, 3, 4):
            ckpt.step(step)
    assert steps(store) == [1, 2, 3, 4]
    assert Repository(store).verify(3).ok


@pytest.mark.parametrize("name", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_command_that_is_restarted_does_not_give_up_what_it_saved(
    store: MemoryStore, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_of(store, 1, 2)
    for restart in ("0", "1"):
        monkeypatch.setenv(name, restart)
        with Checkpointer(store, state(), every_steps=1) as ckpt:
            if restart == "0":
                assert ckpt.restore(step=1, discard_newer=True) == 1
                ckpt.step(2)
                ckpt.step(3)
                continue
            with pytest.raises(UsageError, match=rf"restart \({name}=1\) would give up step 2, 3"):
                ckpt.restore(step=1, discard_newer=True)
            assert ckpt.restore(step=3, discard_newer=True) == 3, "nothing is newer"
    assert steps(store) == [1, 2, 3]


def test_nothing_is_newer_than_the_newest(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        with pytest.raises(UsageError, match="nothing is newer than the newest"):
            ckpt.restore(discard_newer=True)
        with pytest.raises(UsageError, match="restores nothing"):
            ckpt.restore("none", strict=False)
    for said in ({"auto_resume": True}, {"resume": "newest"}):
        with pytest.raises(UsageError, match="--discard-newer gives up"):
            dist_ckpt.flags.parse({"checkpoint_dir": "x", "discard_newer": True, **said})


def test_a_damaged_discard_is_an_error_and_no_guess(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    store.put(discard_key(2), [b"{}"])
    with pytest.raises(IntegrityError, match=r"discards/000002\.json .* delete it"):
        Repository(store).steps()
    store.delete([discard_key(2)])
    store.put("discards/notes.txt", [b"somebody else's"])
    assert steps(store) == [1, 2]


def test_training_back_from_what_it_saved_itself_is_refused_at_the_next_step(
    store: MemoryStore,
) -> None:
    with Checkpointer(store, state(), when=policy.better(LOSS) | policy.every(1)) as ckpt:
        for step, loss in enumerate([3.0, 1.0, 2.0], 1):
            ckpt.step(step, metrics={LOSS: loss})
        assert ckpt.restore("best") == 2, "to look at, as at the end of a training"
        for tell in (ckpt.step, ckpt.save, ckpt.epoch_end):
            with pytest.raises(UsageError, match=r"newer than step 2 \(3\)"):
                tell(7)
        assert ckpt.restore("best", discard_newer=True) == 2
        ckpt.step(3)
    assert steps(store) == [1, 2, 3]


@pytest.mark.parametrize("back", [{"step": 2}, {"which": "best"}])
def test_what_a_job_saved_itself_is_given_up_like_all_else(
    store: MemoryStore, back: dict[str, Any]
) -> None:
    with Checkpointer(store, state(), when=policy.better(LOSS) | policy.every(1)) as ckpt:
        for step, loss in enumerate([3.0, 1.0, 2.0, 4.0, 5.0], 1):
            ckpt.step(step, metrics={LOSS: loss})
        assert ckpt.restore(**back, discard_newer=True) == 2
        assert steps(store) == [1, 2], "the others are hidden at once"
        assert {manifest_key(step) for step in (3, 4, 5)} <= set(keys(store)), "and all there"
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        assert ckpt.restore() == 2, "a restart does not go on from what was given up"
        ckpt.step(4)
    assert steps(store) == [1, 2, 4]
    assert discard.read(store) == []


def test_the_best_that_was_given_up_is_no_measure_any_more(store: MemoryStore) -> None:
    when = policy.better(LOSS)
    with Checkpointer(store, state(), when=when, keep=keep.latest(9), save_last=False) as ckpt:
        for step, loss in enumerate([5.0, 4.0, 1.0], 1):
            ckpt.step(step, metrics={LOSS: loss})
        assert ckpt.restore(step=2, discard_newer=True) == 2
        for step, loss in enumerate([4.5, 3.0, 3.5, 2.0], 3):
            ckpt.step(step, metrics={LOSS: loss})
    assert steps(store) == [1, 2, 4, 6]


@pytest.mark.parametrize("as_path", [str, Path, "{}/".format])
def test_a_step_directory_of_the_run_itself_is_that_step(
    tmp_path: Path, as_path: Callable[[Path], str | Path]
) -> None:
    run = tmp_path / "run"
    run_of(LocalStore(run), 1, 2, 3)
    places = [as_path(run / f"step-000000000{step}") for step in (1, 2, 3)]
    with Checkpointer(run, state(), every_steps=1) as ckpt:
        with pytest.raises(UsageError, match=r"newer than step 2 \(3\)"):
            ckpt.restore(url=places[1])
        assert ckpt.restore(url=places[2]) == 3, "the newest one"
        ckpt.step(4)
    with Checkpointer(run, state(), every_steps=1) as ckpt:
        assert ckpt.restore(url=places[1], discard_newer=True) == 2
        ckpt.step(5)
    assert Repository(LocalStore(run)).steps() == [1, 2, 5]
    with Checkpointer(tmp_path / "other", state(), every_steps=1) as ckpt:
        assert ckpt.restore(url=places[0]) == 1
        ckpt.step(1)


def test_the_run_itself_as_a_place_is_its_newest(tmp_path: Path) -> None:
    run, link = tmp_path / "run", tmp_path / "link"
    link.symlink_to(run)
    for place in (run, f"{run}/", f"file://{run}", link):
        ckpt = Checkpointer(run, state(), every_steps=1)
        with ckpt, pytest.raises(NotFound, match=r"no checkpoint in .* to go on from"):
            ckpt.restore(url=place)
    run_of(LocalStore(run), 1, 2, 3)
    for place in (run, f"{run}/", f"file://{run}", link, link / "step-0000000003"):
        with Checkpointer(run, state(), every_steps=1) as ckpt:
            assert ckpt.restore(url=place) == 3
            with pytest.raises(UsageError, match="nothing is newer than the newest"):
                ckpt.restore(url=run, discard_newer=True)
    with Checkpointer(run, state(), every_steps=1) as ckpt:
        assert ckpt.restore(url=link / "step-0000000002", discard_newer=True) == 2
        ckpt.step(4)
    assert Repository(LocalStore(run)).steps() == [1, 2, 4]


@pytest.mark.parametrize("step", ["best", "2", 1.5, -1, True, [2]])
@pytest.mark.parametrize("discard_newer", [False, True])
def test_what_is_no_step_is_refused_before_what_is_newer(
    store: MemoryStore, step: Any, *, discard_newer: bool
) -> None:
    run_of(store, 1, 2, 3)
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        with pytest.raises(UsageError, match=r"bad step|step= is a number") as caught:
            ckpt.restore(step=step, discard_newer=discard_newer)
        assert ('restore("best")' in str(caught.value)) == isinstance(step, str)
    assert Repository(store).steps() == [1, 2, 3]


def test_the_status_is_not_that_of_what_was_given_up(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        handle = ckpt.save(3)
        assert handle.wait()
    pulse = Pulse()
    pulse.tell(3)
    pulse.begun(handle)
    assert (pulse.now(), pulse.step, pulse.commit) == ("training", 3, 3)
    pulse.restored(1)
    assert (pulse.now(), pulse.step, pulse.commit) == ("training", None, 1)


def test_a_job_goes_back_and_on_and_back_again(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1) as ckpt:
        for step in (1, 2, 3, 4):
            ckpt.step(step)
        assert ckpt.restore(step=3, discard_newer=True) == 3
        assert ckpt.restore(step=2, discard_newer=True) == 2
        assert steps(store) == [1, 2]
        saved = [ckpt.save(step) for step in (3, 5)]
        assert all(handle.wait() for handle in saved), "a step that was given up is saved anew"
        assert ckpt.restore("none", discard_newer=True) == 0
        assert steps(store) == []
        ckpt.step(1)
    assert steps(store) == [1]


def test_who_was_replaced_does_not_take_the_run_back_by_going_back(store: MemoryStore) -> None:
    with Checkpointer(store, state(), every_steps=1, save_last=False) as ckpt:
        ckpt.step(1)
        ckpt.step(2)
        ckpt.save(3).wait()
        with Checkpointer(store, state(), every_steps=1) as successor:
            assert successor.restore() == 3
            with pytest.raises(FencedError):
                ckpt.restore(step=1, discard_newer=True)
            successor.step(4)
    assert steps(store) == [1, 2, 3, 4]


@pytest.mark.parametrize("known", [30, 10, None])
def test_of_two_bounds_under_one_claim_a_folder_gets_the_lower(
    store: MemoryStore, known: int | None
) -> None:
    if known is not None:
        discard.put(store, claim=3, after=known)
    discard.spread(store, [(20, 3), (25, 3), (7, 4)])
    found = {each.claim: each.after for each in discard.read(store)}
    assert found == {3: 10 if known == 10 else 20, 4: 7}


def test_given_up_checkpoints_are_told_by_events(store: MemoryStore) -> None:
    run_of(store, 1, 2)
    found: list[events.Event] = []
    leave = events.subscribe(found.append)
    try:
        with Checkpointer(store, state(), every_steps=1) as ckpt:
            ckpt.restore(step=1, discard_newer=True)
            ckpt.step(3)
    finally:
        leave()
    gone = [each for each in found if isinstance(each, events.CheckpointDeleted)]
    assert [(each.step, each.reason) for each in gone] == [(2, "given up by going back")]
