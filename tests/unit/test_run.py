"""A run as an operator sees it: what is listed, what may go, what a copy is."""

from __future__ import annotations

import fcntl
import itertools
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import torch

import dist_ckpt
from dist_ckpt import Checkpointer, Run, keep, policy
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.names import INDEX, REMOVED, manifest_key, step_dir
from dist_ckpt.repository import Repository
from dist_ckpt.repository.history import EpochNote, put_epoch_note
from dist_ckpt.repository.listed import similar_beside
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.storage.base import Capabilities, Entry, Store, read_all, temporary_name
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from dist_ckpt.testing.stores import CrashStore, Fail, FaultyStore, Rule
from dist_ckpt.threads import Worker

_T = TypeVar("_T")

LOSS = "loss"
_names = itertools.count()


@pytest.fixture
def store() -> MemoryStore:
    return MemoryStore(f"unit-run-{next(_names)}")


def fill(store: Store, *losses: float, first: int = 1) -> None:
    """Save a step for each of `losses`, with other values each."""
    state = {"model": {"w": torch.zeros(1000), "still": torch.ones(300_000)}}
    with Checkpointer(store, state, when=policy.never()) as ckpt:
        ckpt.restore()
        for step, loss in enumerate(losses, first):
            state["model"]["w"].fill_(step)
            ckpt.save(step, metrics={LOSS: loss}).wait()


class Asked(StoreWrapper):
    """Counts what is asked of a place, which has folders or not."""

    def __init__(self, inner: Store, *, flat: bool) -> None:
        super().__init__(inner)
        self.flat = flat
        self.counts: Counter[str] = Counter()

    @property
    def capabilities(self) -> Capabilities:
        return replace(self.inner.capabilities, flat=self.flat)

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        self.counts[operation] += 1
        return run()


class CutOffError(Exception):
    """What ends a call in the middle."""


def cut_off(store: Store, *, at: int) -> FaultyStore:
    """Return a store that ends whatever is done at its change number `at`, and all after that."""
    rules = [Rule("put", Fail(CutOffError()), nth=nth) for nth in range(at, at + 9)]
    return FaultyStore(store, rules)


def damage(store: Store, step: int) -> None:
    data = read_all(store, manifest_key(step))
    store.put(manifest_key(step), [data[:-9]], mode="replace")


def unfinished(store: Store, step: int, claim: int) -> str:
    folder = f"step-{step:010}/c{claim:06}-{'0' * 16}"
    store.put(f"{folder}/model.r00000.safetensors", [b"half"])
    return f"{folder}/"


def test_what_is_there_is_listed_with_what_it_is(store: MemoryStore) -> None:
    fill(store, 3.0, 1.0, 2.0)
    run = Run(store)
    run.pin(1, reason="the first")
    damage(store, 2)
    unfinished(store, 8, 0)
    unfinished(store, 9, 1)
    found = run.listed()
    assert [(each.step, each.state) for each in found] == [
        (1, "committed"),
        (2, "damaged"),
        (3, "committed"),
        (8, "aborted"),
        (9, "in flight"),
    ]
    assert [each.marks for each in found] == [("pinned",), (), ("latest",), (), ()]
    assert found[0].metrics == {LOSS: 3.0}
    assert found[0].nbytes == sum(
        entry.nbytes
        for entry in store.list_entries("step-0000000001/")
        if not entry.key.endswith(("manifest.json", "pin.json"))
    )
    assert "cut short" in found[1].problem
    assert (run.latest(), run.best(LOSS), run.best(LOSS, "max"), run.best("f1")) == (3, 3, 1, None)
    assert [record.step for record in run.records()] == [1, 3]


def test_reading_and_deleting_claim_nothing(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0, 3.0)
    before = store.list_children("claims/")
    run = Run(store)
    run.keep(keep.latest(1))
    run.verify(3)
    run.sweep()
    assert store.list_children("claims/") == before


def test_a_plan_says_why_and_does_nothing(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0, 3.0, 4.0)
    run = Run(store)
    run.pin(2)
    damage(store, 3)
    plan = run.plan_keep(keep.best(LOSS))
    assert [(each.step, each.kept, each.reasons) for each in plan] == [
        (1, True, ("best loss #1",)),
        (2, True, ("pinned",)),
        (3, True, ("damaged",)),
        (4, True, ("the newest",)),
    ]
    assert run.steps() == [1, 2, 3, 4]
    (gone,) = [each for each in run.keep(keep.latest(1)) if not each.kept]
    assert (gone.step, gone.reasons) == (1, ("not kept by keep.latest(1)",))
    assert gone.nbytes > 1_200_000
    assert run.steps() == [2, 3, 4]
    assert list(store.list_entries("step-0000000001/")) == []


def test_what_a_run_went_on_from_stays(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0)
    fill(store, 3.0, first=3)
    (first, second, third) = Run(store).plan_keep(keep.latest(1))
    assert not first.kept
    assert second.reasons == ("the one that the run went on from",)
    assert third.kept


@pytest.mark.parametrize("step", [1, 2, 3])
def test_one_is_removed_unless_it_is_protected(store: MemoryStore, step: int) -> None:
    fill(store, 1.0, 2.0, 3.0)
    run = Run(store)
    run.pin(2)
    if step > 1:
        with pytest.raises(
            UsageError, match=r"is not removed: it is (pinned|the newest)"
        ) as caught:
            run.remove(step)
        assert caught.value.kind is ErrorKind.PROTECTED
        assert run.steps() == [1, 2, 3]
    run.remove(step, force=step > 1)
    assert run.steps() == [each for each in (1, 2, 3) if each != step]
    with pytest.raises(NotFound, match=rf"no checkpoint of step {step} .*the nearest are"):
        run.remove(step)


@pytest.mark.parametrize("saves", [20, pytest.param(200, marks=pytest.mark.soak)])
def test_a_live_job_goes_on_beside_it_and_keeps_what_it_writes(
    store: MemoryStore, saves: int
) -> None:
    state = {"n": torch.ones(10)}
    run = Run(store)
    with Checkpointer(store, state, when=policy.never(), keep=keep.latest(5)) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait()
        for step in range(2, saves + 1):
            ckpt.save(step)
            run.keep(keep.latest(2))
            run.sweep()
            assert run.verify(run.steps()[-1]).ok
        ckpt.wait()
        assert run.latest() == saves
    assert all(run.verify(step).ok for step in run.steps())


def test_what_killed_jobs_left_goes_and_what_the_owner_writes_stays(store: MemoryStore) -> None:
    fill(store, 1.0)
    fill(store, 2.0, first=2)
    old, own = unfinished(store, 8, 1), unfinished(store, 9, 2)
    assert Run(store).sweep() == [old]
    assert [entry.key for entry in store.list_entries(own)]
    assert Run(store).steps() == [1, 2]


def test_no_place_no_step_no_number() -> None:
    nowhere = Run(MemoryStore(f"unit-run-{next(_names)}"))
    for look in (nowhere.listed, lambda: nowhere.verify(1), lambda: nowhere.plan_keep(keep.all())):
        with pytest.raises(NotFound) as caught:
            look()
        assert caught.value.kind is ErrorKind.NO_RUN
    with pytest.raises(UsageError):
        nowhere.pin(-1)
    with pytest.raises(UsageError):
        Run("")


@pytest.mark.parametrize("below", ["17", "llama/lr-3/17", "claims"])
def test_of_a_folder_of_runs_one_is_named(tmp_path: Path, below: str) -> None:
    dist_ckpt.save({"epoch": 1}, tmp_path / "runs" / below, step=1)
    folder = tmp_path / "runs"
    for look in (
        Run(folder).newest,
        lambda: Run(folder).verify(1),
        lambda: dist_ckpt.load({"epoch": 0}, folder),
        lambda: dist_ckpt.open_checkpoint(folder),
        lambda: dist_ckpt.export(folder, tmp_path / "out"),
    ):
        with pytest.raises(
            NotFound, match=rf"a folder of runs, such as \S+/runs/{below}: name one"
        ) as told:
            look()
        assert told.value.kind is ErrorKind.NO_RUN


def test_a_copy_is_whole_and_byte_by_byte_the_same(store: MemoryStore, tmp_path: Path) -> None:
    fill(store, 1.0, 2.0)
    copied = Run(store).copy(2, str(tmp_path / "copy"))
    there = Run(str(tmp_path / "copy"))
    assert (copied.step, copied.kept) == (2, 0)
    assert there.verify(2).ok
    assert there.verify(2).nbytes == copied.nbytes
    state = {"model": {"w": torch.zeros(1000), "still": torch.zeros(300_000)}}
    dist_ckpt.load(state, str(tmp_path / "copy"), skip="rng")
    assert state["model"]["w"][0] == 2
    again = Run(store).copy(2, there)
    assert (again.files, again.nbytes, again.kept) == (0, 0, copied.files)


def test_a_copy_that_was_cut_off_is_gone_on_with(store: MemoryStore) -> None:
    fill(store, 1.0)
    for at in itertools.count(1):
        target = MemoryStore(f"unit-run-{next(_names)}")
        try:
            Run(store).copy(1, cut_off(target, at=at))
        except CutOffError:
            assert Repository(target).steps() == []
            kept = Run(store).copy(1, target).kept
            assert kept in (min(at - 1, 2), 0)
            assert Run(target).verify(1).ok
        else:
            break
    assert at == 5, "two files, the index and the manifest"


def test_what_is_not_copied(store: MemoryStore) -> None:
    fill(store, 1.0)
    other = MemoryStore(f"unit-run-{next(_names)}")
    fill(other, 2.0)
    with pytest.raises(AlreadyExists, match="another checkpoint"):
        Run(store).copy(1, other)
    name = Repository(store).open(1).index.files[0].name
    key = next(entry.key for entry in store.list_entries() if entry.key.endswith(name))
    data = bytearray(read_all(store, key))
    data[-1] ^= 1
    store.put(key, [bytes(data)], mode="replace")
    empty = MemoryStore(f"unit-run-{next(_names)}")
    with pytest.raises(IntegrityError, match="differs from its digest"):
        Run(store).copy(1, empty)
    assert list(empty.list_entries()) == [], "there is nothing to go on with"


class Retained(StoreWrapper):
    """The retention of the job deletes `step` when a file of it is to be read."""

    def __init__(self, inner: Store, step: int) -> None:
        super().__init__(inner)
        self._step = step

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        ours = key.startswith(step_dir(self._step)) and key.endswith(".safetensors")
        if operation == "read_into" and ours and self._step in Run(self.inner).steps():
            Run(self.inner).remove(self._step, force=True)
        return run()


def test_what_is_deleted_while_it_is_copied_is_not_damaged(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0, 3.0)
    empty, mirrored = (MemoryStore(f"unit-run-{next(_names)}") for _ in range(2))
    with pytest.raises(NotFound, match="deleted or replaced") as caught:
        Run(Retained(store, 2)).copy(2, empty)
    assert caught.value.kind is ErrorKind.NO_CHECKPOINT
    assert list(empty.list_entries()) == []
    done = Run(Retained(store, 1)).mirror(mirrored, best=Criterion(LOSS))
    assert [each.step for each in done.copied] == [3]


def test_a_deletion_that_was_cut_off_is_ended_by_the_next(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0)
    keys = sorted(entry.key for entry in store.list_entries("step-0000000001/"))
    data = {key: read_all(store, key) for key in keys}
    for at in itertools.count(1):
        for key, each in data.items():
            store.put(key, [each], mode="replace")
        faulty = FaultyStore(store, [Rule("delete", Fail(CutOffError()), nth=at)])
        try:
            Run(faulty).keep(keep.latest(1))
        except CutOffError:
            assert Run(store).verify(2).ok
            Run(store).keep(keep.latest(1))
        assert Run(store).steps() == [2]
        assert [entry.key for entry in store.list_entries("step-0000000001/")] == [], at
        if faulty.fired == [0]:
            break
    assert at > len(keys), "one by one, and the mark"


class Slow(StoreWrapper):
    """Each read takes a second; those behind the eighth wait for one another in pairs."""

    def __init__(self, inner: Store, clock: list[float]) -> None:
        super().__init__(inner)
        self._clock, self._pair, self._reads = clock, threading.Barrier(2), itertools.count(1)

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        if operation == "read_into":
            self._clock[0] += 1
            if next(self._reads) > 8:
                self._pair.wait(60)
        return run()


def test_what_is_waited_for_is_looked_at_by_several_threads_and_what_is_at_hand_by_one(
    store: MemoryStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(store, *[1.0] * 10)
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "thread_time", lambda: 0.0)
    started: list[Worker] = []
    monkeypatch.setattr(Worker, "start", started.append)
    assert [each.step for each in Run(store).listed()] == [*range(1, 11)]
    assert started == []
    monkeypatch.undo()
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    assert [each.step for each in Run(Slow(store, clock)).listed()] == [*range(1, 11)]


def half_a_mark(run: Path, step: int) -> Path:
    """Leave what a writer leaves that is killed while it puts a mark beside a checkpoint."""
    folder = run / step_dir(step) / Run(str(run)).manifest(step).save_id
    left = folder / temporary_name()
    left.write_bytes(b"{")
    return left


def test_half_a_mark_of_removal_goes_with_what_was_to_be_removed(tmp_path: Path) -> None:
    fill(LocalStore(tmp_path), 1.0, 2.0)
    left = half_a_mark(tmp_path, 1)
    run = Run(str(tmp_path))
    run.keep(keep.latest(1))
    assert run.steps() == [2]
    assert not left.parent.parent.exists(), "the job that owns the run may never come back"


def test_half_a_mark_goes_with_a_sweep_and_half_a_file_of_the_owner_stays(tmp_path: Path) -> None:
    fill(LocalStore(tmp_path), 1.0, 2.0)
    left = half_a_mark(tmp_path, 1)
    own = tmp_path / unfinished(LocalStore(tmp_path), 9, 1) / temporary_name()
    own.write_bytes(b"data")
    run = Run(str(tmp_path))
    assert run.sweep() == []
    assert (left.exists(), own.exists()) == (False, True)
    assert all(run.verify(step).ok for step in run.steps())


def test_half_a_mark_whose_writer_lives_stays(tmp_path: Path) -> None:
    fill(LocalStore(tmp_path), 1.0, 2.0)
    left = half_a_mark(tmp_path, 1)
    with left.open("rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        Run(str(tmp_path)).sweep()
        assert left.exists()


def test_a_sweep_that_is_refused_removes_the_rest_and_says_what_is_left(
    store: MemoryStore,
) -> None:
    fill(store, 1.0, 1.0)
    fill(store, 2.0, first=3)
    closed, open_ = unfinished(store, 8, 1), unfinished(store, 9, 1)
    denied = StorageError("not yours", kind=ErrorKind.PERMISSION)
    faulty = FaultyStore(store, [Rule("delete", Fail(denied), key=f"{closed}*", nth=None)])
    with pytest.raises(StorageError, match=f"1 folders were removed.*{closed}: not yours") as told:
        Run(faulty).sweep()
    assert told.value.kind is ErrorKind.PERMISSION
    assert [entry.key for entry in store.list_entries(open_)] == []
    assert [entry.key for entry in store.list_entries(closed)]
    # A policy does what it can, and what others closed is told.
    Run(faulty).keep(keep.latest(1))
    assert Run(store).steps() == [2, 3], "the run went on from 2"


def test_a_mark_of_removal_alone_changes_nothing(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0)
    folder = f"step-0000000001/{Repository(store).open(1).save_id}"
    store.put(f"{folder}/{REMOVED}", [b"{}"])
    assert Run(store).sweep() == []
    assert Run(store).steps() == [1, 2]
    assert Run(store).verify(1).ok
    assert f"{folder}/{INDEX}" in [entry.key for entry in store.list_entries()]


def test_a_sample_reads_a_share_and_sizes_alone_read_nothing(store: MemoryStore) -> None:
    fill(store, 1.0)
    run = Run(store)
    whole = run.verify(1)
    shares = [run.verify(1, sample=(share, 3)).nbytes for share in (1, 2, 3)]
    assert sum(shares) == whole.nbytes
    assert run.verify(1, sample=(0, 1)).nbytes == 0
    key = next(e.key for e in store.list_entries() if e.key.endswith(".safetensors"))
    store.put(key, [read_all(store, key)[:-1]], mode="replace")
    assert not run.verify(1, sample=(0, 1)).ok


def test_a_difference_is_found_without_reading_data(store: MemoryStore) -> None:
    def save(step: int, **parts: torch.Tensor) -> None:
        named = {part: {"w": tensor} for part, tensor in parts.items()}
        dist_ckpt.save(named, store, step=step)

    save(1, a=torch.zeros(1000), b=torch.ones(1000))
    save(2, a=torch.zeros(1000), b=torch.zeros(1000))
    save(3, a=torch.zeros(7), c=torch.zeros(2))
    run = Run(store)
    assert [(each.part, each.kind) for each in run.diff(1, 2)] == [("b", "values")]
    found = {each.part: (each.kind, each.here, each.there) for each in run.diff(2, 3)}
    assert found == {
        "a": ("shape", "float32[1000]", "float32[7]"),
        "b": ("only here", "float32[1000]", ""),
        "c": ("only there", "", "float32[2]"),
    }
    assert run.diff(2, 2) == []


def test_a_newer_format_is_no_damage_whatever_share_is_read(store: MemoryStore) -> None:
    fill(store, 1.0)
    store.put(manifest_key(1), [b'{"format": 999}'], mode="replace")
    assert Run(store).listed()[0].state == "newer format"
    for sample in (None, (0, 1), (1, 2)):
        with pytest.raises(IncompatibleError):
            Run(store).verify(1, sample=sample)


def test_what_was_noted_after_the_save_goes_with_a_copy(store: MemoryStore) -> None:
    fill(store, 1.0)
    other = MemoryStore(f"unit-run-{next(_names)}")
    Run(store).copy(1, other)
    note = EpochNote(3, {"f1": 0.5})
    put_epoch_note(store, 1, Run(store).manifest(1).save_id, note)
    for _ in range(2):
        Run(store).copy(1, other)
        (record,) = Run(other).records()
        assert (record.epoch, record.metrics) == (3, {LOSS: 1.0, "f1": 0.5})


def test_only_what_is_old_is_swept_where_storage_tells_its_age(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "run")
    fill(store, 1.0)
    fill(store, 2.0, first=2)
    old, young = unfinished(store, 7, 1), unfinished(store, 8, 1)
    for path in (tmp_path / "run" / old).iterdir():
        os.utime(path, (0, 0))
    run = Run(store)
    assert run.leftovers() == [old, young]
    assert run.sweep(older_than=timedelta(days=2)) == [old]
    assert run.leftovers() == [young]
    assert run.sweep(older_than=timedelta()) == [young]


def test_nothing_is_swept_by_age_where_storage_tells_none(store: MemoryStore) -> None:
    class Ageless(FaultyStore):
        def list_entries(self, prefix: str = "") -> Iterator[Entry]:
            return (Entry(each.key, each.nbytes) for each in super().list_entries(prefix))

    fill(store, 1.0)
    fill(store, 2.0, first=2)
    left = unfinished(store, 7, 1)
    with pytest.raises(UsageError, match="sweep without an age"):
        Run(Ageless(store, [])).sweep(older_than=timedelta(days=2))
    assert Run(store).leftovers() == [left]


def test_a_run_that_began_while_it_was_looked_for_is_not_like_itself(tmp_path: Path) -> None:
    dist_ckpt.save({"n": 1}, tmp_path / "run-17")
    assert similar_beside(str(tmp_path / "run-17"), None) == ""
    assert "'run-17'" in similar_beside(str(tmp_path / "run-71"), None)


def test_a_listing_costs_two_looks_a_checkpoint(tmp_path: Path) -> None:
    inner = LocalStore(tmp_path / "run")
    fill(inner, *map(float, range(20)))
    store = CrashStore(inner)
    assert len(Run(store).listed()) == 20
    counts = Counter(operation for operation, _ in store.operations)
    assert counts == {"list_children": 21, "read_into": 20}


def test_names_like_a_mistyped_one_are_told(tmp_path: Path) -> None:
    dist_ckpt.save({"n": 1}, tmp_path / "pretrain-17")
    with pytest.raises(NotFound, match=r"is no run.*did you mean 'pretrain-17'\?") as caught:
        Run(str(tmp_path / "pretrian-17")).listed()
    assert caught.value.kind is ErrorKind.NO_RUN
    with pytest.raises(NotFound) as caught:
        Run(str(tmp_path / "nowhere" / "near")).listed()
    assert "mean" not in caught.value.message


def test_runs_below_a_place(tmp_path: Path) -> None:
    for name in ("a", "deep/er/b"):
        dist_ckpt.save({"n": 1}, tmp_path / name)
    (tmp_path / "empty").mkdir()
    assert Run(str(tmp_path)).runs_below() == [f"{tmp_path}/a", f"{tmp_path}/deep/er/b"]
    assert Run(str(tmp_path / "a")).runs_below() == [str(tmp_path / "a")]


def test_a_folder_of_somebody_else_hides_no_run_beside_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for name in ("a", "lost+found", "z"):
        dist_ckpt.save({"n": 1}, tmp_path / name)
    denied = StorageError("not yours", kind=ErrorKind.PERMISSION)
    below = FaultyStore(
        LocalStore(str(tmp_path)),
        [Rule("list_children", Fail(denied), key="lost+found/", nth=None)],
    )
    assert Run(below).runs_below() == [f"{tmp_path}/a", f"{tmp_path}/z"]
    assert [record.getMessage() for record in caplog.records].count("not yours") == 1
    itself = FaultyStore(LocalStore(str(tmp_path)), [Rule("list_children", Fail(denied), nth=None)])
    with pytest.raises(StorageError, match="not yours"):
        Run(itself).runs_below()


def test_nothing_of_it_needs_torch() -> None:
    program = (
        "import sys, dist_ckpt, dist_ckpt.cli\n"
        "dist_ckpt.Run('memory://nothing').steps()\n"
        "assert not {'torch', 'fsspec', 's3fs'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_newest_is_found_without_a_look_at_the_others(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0, 3.0, 4.0)
    damage(store, 4)
    looked = CrashStore(store, at=None, kinds=("read_into",))
    assert Run(looked).newest().step == 3, "the newest that can be read"
    assert {key.partition("/")[0] for _, key in looked.operations} == {
        "step-0000000003",
        "step-0000000004",
    }
    there = MemoryStore(f"unit-run-{next(_names)}")
    assert [each.step for each in Run(store).mirror(there).copied] == [3]
    with pytest.raises(NotFound, match="is no run"):
        Run(MemoryStore(f"unit-run-{next(_names)}")).mirror(there)


def test_what_a_killed_copy_left_goes_with_the_next_one_or_by_its_age(tmp_path: Path) -> None:
    source, target = LocalStore(tmp_path / "source"), LocalStore(tmp_path / "target")
    fill(source, 1.0, 2.0)
    run = Run(source)
    halves = []
    for step in (1, 2):
        save_id = run.manifest(step).save_id
        halves.append(tmp_path / "target" / f"step-{step:010}" / save_id / f".tmp-{'0' * 16}")
        halves[-1].parent.mkdir(parents=True)
        halves[-1].write_bytes(b"half")
    run.copy(1, target)
    assert [each.exists() for each in halves] == [False, True]
    assert Run(target).verify(1).ok
    left = halves[1].with_name("model.r00000.safetensors")
    left.write_bytes(b"half")
    assert Run(target).sweep() == [], "another copy may be writing it"
    os.utime(left, (0, 0))
    assert Run(target).sweep(older_than=timedelta(days=2)) == [
        f"{halves[1].parent.relative_to(tmp_path / 'target')}/"
    ]
    assert not halves[1].exists()
    assert Run(target).steps() == [1]


def test_the_best_of_a_run_is_marked_and_stays(store: MemoryStore) -> None:
    kept = keep.best(LOSS) | keep.best("f1", mode="max") | keep.latest(9)
    with Checkpointer(store, {"n": 1}, when=policy.never(), keep=kept) as ckpt:
        ckpt.restore()
        for step, loss in enumerate((3.0, 1.0, 2.0, 4.0), 1):
            ckpt.save(step, metrics={LOSS: loss, "f1": loss if step < 4 else 0.0}).wait()
    run = Run(store)
    assert [each.marks for each in run.listed()] == [
        ("best f1",),
        ("best loss",),
        (),
        ("latest",),
    ]
    for step, why in ((1, "the best by f1"), (2, "the best by loss"), (4, "the newest")):
        with pytest.raises(UsageError, match=why) as refused:
            run.remove(step)
        assert refused.value.kind is ErrorKind.PROTECTED
    assert [each.step for each in run.keep(keep.latest(1)) if not each.kept] == [3]
    run.remove(2, force=True)
    assert run.steps() == [1, 4]
    assert [str(each) for each in run.criteria()] == ["lowest loss", "highest f1"]


def test_what_is_said_of_the_best_in_unknown_words_is_passed_over(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0)
    manifest = Run(store).manifest(2)
    for said in (7, ["", None, 3], {"loss": "min"}):
        origin = {**manifest.origin, "best": said}
        data = manifest_format.encode(msgspec.structs.replace(manifest, origin=origin))
        store.put(manifest_key(2), [data], mode="replace")
        assert [each.marks for each in Run(store).listed()] == [(), ("latest",)]


def test_a_metric_that_no_checkpoint_has_keeps_none_and_is_refused(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0, 3.0)
    for policy_ in (keep.best("lost"), keep.latest(1) | keep.best("lost")):
        with pytest.raises(UsageError, match="did you mean 'loss'"):
            Run(store).keep(policy_)
    assert Run(store).steps() == [1, 2, 3]
    there = MemoryStore(f"unit-run-{next(_names)}")
    done = Run(store).mirror(there, best=Criterion("lost"), keep=1)
    assert [each.step for each in done.copied] == [3], "a mirror may wait for one to have it"


def test_the_latest_is_the_newest_that_can_be_read(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, 1.0, 2.0, 3.0)
    unfinished(store, 9, 1)
    damage(store, 3)
    run = Run(store)
    assert run.latest() == run.newest().step == 2
    assert [each.marks for each in run.listed() if each.step == 2] == [("latest",)]
    assert [(each.step, each.state) for each in run.newest_down()] == [
        (3, "damaged"),
        (2, "committed"),
    ]
    assert "step 3 in" in caplog.text
    damage(store, 1)
    damage(store, 2)
    for look in (run.latest, run.newest, run.criteria):
        with pytest.raises(IntegrityError, match="step 3"):
            look()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        *(
            (lambda run, each=each: run.verify(1, sample=each), "(2, 10) for the second tenth")
            for each in ((0, 0), (0, 2), (2, 1), (-1, 3), (1.5, 2), (0, True), (1,), "5%", 3)
        ),
        *(
            (lambda run, name=name, each=each: getattr(run, name)(each), "keep.latest(3)")
            for name in ("plan_keep", "keep")
            for each in (None, "latest(1)", keep.latest)
        ),
        (lambda run: run.plan_keep(3), "such as keep.latest(3), not 3"),
        (lambda run: run.sweep(older_than=5), "takes a timedelta, not 5"),
        (lambda run: run.mirror("nowhere", best=LOSS), "takes a Criterion, not 'loss'"),
    ],
)
def test_what_makes_no_sense_is_a_usage_error(
    store: MemoryStore, call: Callable[[Run], object], says: str
) -> None:
    fill(store, 1.0, 2.0)
    with pytest.raises(UsageError) as caught:
        call(Run(store))
    assert says in caught.value.message
    assert Run(store).steps() == [1, 2]
    assert Run(store).verify(1, sample=(1, 1)).nbytes == Run(store).verify(1).nbytes
    assert Run(store).verify(1, sample=(0, 1)).nbytes == 0


def test_a_mirror_of_a_run_in_itself_deletes_nothing(tmp_path: Path) -> None:
    url, link = str(tmp_path / "run"), str(tmp_path / "link")
    fill(LocalStore(url), 1.0, 2.0, 3.0)
    os.symlink(url, link)
    before = [entry.key for entry in LocalStore(url).list_entries()]
    for one, other in ((url, url), (url, link), (link, url)):
        with pytest.raises(UsageError, match="itself, of which a mirror deletes nothing"):
            Run(one).mirror(other, keep=1)
    assert Run(url).mirror(url).copied == ()
    assert [entry.key for entry in LocalStore(url).list_entries()] == before


def test_a_mirror_tells_of_a_metric_that_nothing_has(
    store: MemoryStore, caplog: pytest.LogCaptureFixture
) -> None:
    fill(store, 1.0, 2.0)
    there = MemoryStore(f"unit-run-{next(_names)}")
    assert [each.step for each in Run(store).mirror(there, best=Criterion("lost")).copied] == [2]
    assert "did you mean 'loss'" in caplog.text


def test_epochs_that_no_checkpoint_ended_keep_none_and_are_refused(store: MemoryStore) -> None:
    fill(store, 1.0, 2.0)
    with pytest.raises(UsageError, match="end of an epoch"):
        Run(store).keep(keep.every(epochs=2))
    assert Run(store).steps() == [1, 2]


def test_where_there_are_no_folders_a_run_is_listed_by_the_page(store: MemoryStore) -> None:
    fill(store, *map(float, range(20)))
    Run(store).pin(7, reason="kept")
    put_epoch_note(store, 9, Repository(store).open(9).manifest.save_id, EpochNote(3, {LOSS: 0.5}))
    by_folder = Run(places := Asked(store, flat=False)).listed()
    by_page = Run(pages := Asked(store, flat=True)).listed()
    assert by_page == by_folder
    assert [each.step for each in by_page if "pinned" in each.marks] == [7]
    assert by_page[8].metrics[LOSS] == 0.5
    assert pages.counts["list_entries"] == 1
    assert places.counts["list_children"] - pages.counts["list_children"] == 20
    # Of many files a page holds few checkpoints.
    for number in range(2001):
        store.put(f"step-0000000001/other/{number}", [b""])
    assert Run(crowded := Asked(store, flat=True)).listed() == by_folder
    assert crowded.counts["list_children"] == places.counts["list_children"]
