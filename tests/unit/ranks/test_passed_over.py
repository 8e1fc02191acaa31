"""What was passed over as damaged: said in one place, whatever is restored in between."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    FencedError,
    IncompatibleError,
    IntegrityError,
    UsageError,
)
from dist_ckpt.format.names import manifest_key
from dist_ckpt.ranks.job import PassedOver
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import CrashStore
from tests.unit.ranks.test_job import damage, run_of, save, state


def test_what_is_known_of_the_steps() -> None:
    known = PassedOver()
    assert known.steps == frozenset()
    known.add({3: b"three", 5: None})
    known.add({4: b"four"})
    assert known.steps == {3, 4, 5}
    assert [known.manifest(step) for step in (3, 4, 5, 6)] == [b"three", b"four", None, None]
    known.discard(4)
    known.discard(4)
    assert known.steps == {3, 5}


OTHERS: dict[str, dict[str, Any]] = {
    "another shape": {"model": nn.Linear(3, 2)},
    "another dtype": {"model": nn.Linear(2, 2).to(torch.float64)},
    "another part": {"model": nn.Linear(2, 2), "other": {"n": 0}},
    "another name": {"model": nn.Sequential(nn.Linear(2, 2))},
    "less": {"model": nn.Linear(2, 2, bias=False)},
}


Between = Callable[[dist_ckpt.Checkpointer, Path], object]

BETWEEN: dict[str, Between] = {
    "nothing": lambda *_: None,
    "restore that step": lambda ckpt, _: ckpt.restore(step=4),
    "restore an older one": lambda ckpt, _: (ckpt.restore(step=3), ckpt.restore(step=4)),
    "restore the best": lambda ckpt, _: ckpt.restore("best"),
    "roll back": lambda ckpt, _: ckpt.rollback(),
    "restore the newest": lambda ckpt, _: ckpt.restore(),
    "restore from elsewhere": lambda ckpt, root: restore_from_elsewhere(ckpt, root),
    "fail to restore it": lambda ckpt, _: fail_to_restore(ckpt),
}


def restore_from_elsewhere(ckpt: dist_ckpt.Checkpointer, root: Path) -> None:
    other = root.parent / f"{root.name}-other"
    run_of(other, 9)
    ckpt.restore(url=str(other), discard_newer=True)


def fail_to_restore(ckpt: dist_ckpt.Checkpointer) -> None:
    with pytest.raises(IntegrityError):
        ckpt.restore(step=5)


@pytest.mark.parametrize("between", BETWEEN)
def test_a_step_that_was_passed_over_can_be_saved_again(between: str, tmp_path: Path) -> None:
    values = state()
    if between == "roll back":
        values["model"] = nn.Linear(1, 1)  # of which there has to be one
    policy = keep.best("loss")
    with dist_ckpt.Checkpointer(str(tmp_path), values) as ckpt:
        for step in (3, 4, 5):
            values["weights"]["w"].fill_(step)
            ckpt.save(step, metrics={"loss": 10.0 - step}).wait()
    damage(tmp_path, 5)
    with dist_ckpt.Checkpointer(str(tmp_path), values, keep=policy) as ckpt:
        assert ckpt.restore() == 4
        BETWEEN[between](ckpt, tmp_path)
        save(ckpt, values, 5)
        ckpt.wait()
        assert ckpt.save(5).outcome == "committed", "it is done"
    assert Repository(LocalStore(tmp_path)).verify(5).ok


def test_what_was_passed_over_counts_for_nothing_until_it_is_saved_again(tmp_path: Path) -> None:
    values = state()
    with dist_ckpt.Checkpointer(str(tmp_path), values) as ckpt:
        for step in (3, 4, 5):
            ckpt.save(step, metrics={"loss": 10.0 - step}).wait()
    damage(tmp_path, 5)
    repository = Repository(LocalStore(tmp_path))
    with dist_ckpt.Checkpointer(str(tmp_path), values, keep=keep.best("loss")) as ckpt:
        assert ckpt.restore() == 4
        ckpt.restore(step=3)
        assert ckpt.restore("best") == 4, "not 5, whose metric is better and whose data is damaged"
        ckpt.save(6, metrics={"loss": 20.0})
        ckpt.wait()
        assert repository.steps() == [4, 5, 6], "the best is 4, and nothing deletes what is damaged"


def test_one_that_is_whole_after_all_is_not_saved_again(tmp_path: Path) -> None:
    run_of(tmp_path, 4, 5)
    (path,) = tmp_path.glob("step-0000000005/*/weights.*")
    whole = path.read_bytes()
    damage(tmp_path, 5)
    values = state()
    with dist_ckpt.Checkpointer(str(tmp_path), values) as ckpt:
        assert ckpt.restore() == 4
        path.write_bytes(whole)  # a disk came back, or a copy
        assert ckpt.restore() == 5
        assert ckpt.save(5).outcome == "committed", "it is done"
    assert path.read_bytes() == whole


def test_a_restore_that_fails_passes_nothing_over(tmp_path: Path) -> None:
    run_of(tmp_path, 4, 5)
    damage(tmp_path, 5)
    with dist_ckpt.Checkpointer(str(tmp_path), OTHERS["another part"]) as ckpt:
        with pytest.raises(IncompatibleError):
            ckpt.restore()
        with pytest.raises(UsageError, match="goes on from none of them"):
            ckpt.save(5)
    assert Repository(LocalStore(tmp_path)).steps() == [4, 5]


@pytest.mark.parametrize("kind", OTHERS)
def test_a_healthy_one_that_does_not_fit_is_never_called_damaged(
    kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (4, 5):
        dist_ckpt.save({"model": nn.Linear(2, 2)}, str(tmp_path), step=step)
    repository = Repository(LocalStore(tmp_path))
    with dist_ckpt.Checkpointer(str(tmp_path), OTHERS[kind]) as ckpt:
        with pytest.raises(IncompatibleError) as caught:
            ckpt.restore()
        with pytest.raises(CheckpointError):
            ckpt.save(5)
    said = f"{caught.value} {caplog.text}".lower()
    for word in ("damaged", "corrupt", "repair", "remove", "delete", "passed over"):
        assert word not in said
    assert all(repository.verify(step).ok for step in (4, 5))


def test_when_all_are_damaged_nobody_is_told_to_remove_them(tmp_path: Path) -> None:
    run_of(tmp_path, 4, 5)
    damage(tmp_path, 4, 5)
    with (
        dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt,
        pytest.raises(IntegrityError) as caught,
    ):
        ckpt.restore()
    said = str(caught.value).lower()
    assert "elsewhere" in said
    for word in ("repair", "remove", "delete"):
        assert word not in said


def test_only_the_very_manifest_that_was_found_damaged_is_replaced(tmp_path: Path) -> None:
    """Somebody brought the step back from a copy while the job trained."""
    run_of(tmp_path, 4, 5)
    damage(tmp_path, 5)
    values = state()
    with dist_ckpt.Checkpointer(str(tmp_path), values) as ckpt:
        assert ckpt.restore() == 4
        other = run_of(tmp_path.parent / f"{tmp_path.name}-copy", 5)
        good = read_all(other.store, manifest_key(5))
        (tmp_path / manifest_key(5)).write_bytes(good)
        values["weights"]["w"].fill_(50)
        with pytest.raises(AlreadyExists):
            ckpt.save(5).wait()
        assert (tmp_path / manifest_key(5)).read_bytes() == good
        ckpt.save(6).wait()


@pytest.mark.parametrize("operation", ["delete", "put"])
def test_a_job_that_was_replaced_at_the_last_moment_takes_nothing_away(
    operation: str, tmp_path: Path
) -> None:
    run_of(tmp_path, 4, 5)
    damage(tmp_path, 5)
    taken = False

    class Suspended(CrashStore):
        def around(self, kind, key, run):  # type: ignore[no-untyped-def]
            nonlocal taken
            if (kind, key) == (operation, manifest_key(5)) and not taken:
                taken = True
                with dist_ckpt.Checkpointer(str(tmp_path), state()) as new:
                    assert new.restore() == 4
                    new.save(5).wait()
            return super().around(kind, key, run)

    values = state()
    with dist_ckpt.Checkpointer(Suspended(LocalStore(tmp_path)), values) as old:
        assert old.restore() == 4
        with pytest.raises(FencedError):
            old.save(5).wait()
    assert taken
    repository = Repository(LocalStore(tmp_path))
    assert repository.verify(5).ok
    assert repository.open(5).manifest.claim == repository.claim() - 1, "it is the new job's"
