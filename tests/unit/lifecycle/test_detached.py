"""A step directory that was copied, renamed or linked opens, and nothing is written there."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dist_ckpt
from dist_ckpt import Checkpointer
from dist_ckpt.errors import IntegrityError, NotFound, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.repository.detached import DetachedStep
from dist_ckpt.storage import resolve
from tests.unit.lifecycle.training import LOSS, keys, new_store, run_of, state

STEP = "step-0000000020"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    run_of(str(tmp_path / "run"), 10, 20, 30, **{LOSS: 1.0})
    return tmp_path / "run"


def copied(run: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copytree(run / STEP, to)
    return to


def linked(run: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    to.symlink_to(run / STEP)
    return to


def moved(run: Path, to: Path) -> Path:
    to.parent.mkdir(parents=True, exist_ok=True)
    (run / STEP).rename(to)
    return to


@pytest.mark.parametrize("make", [copied, linked, moved])
@pytest.mark.parametrize("name", ["best", "run/latest", STEP, "step-0000000099", "model.pt", "a b"])
def test_it_is_opened_by_what_its_manifest_says(
    run: Path, make: Callable[[Path, Path], Path], name: str, tmp_path: Path
) -> None:
    place = make(run, tmp_path / "elsewhere" / name)
    before = sorted(place.rglob("*"))
    live = state()
    report = dist_ckpt.load(live, place)
    assert (report.step, report.verified) == (20, True)
    assert live["weights"]["w"].tolist() == [20.0] * 4
    assert dist_ckpt.load(live, f"{place}/", step=20).step == 20
    assert dist_ckpt.load(live, resolve(place)).step == 20, "given as a store"
    with dist_ckpt.open_checkpoint(place) as opened:
        assert opened.step == 20
        assert opened.read_values("weights")["value"]["w"].tolist() == [20.0] * 4
    with pytest.raises(UsageError, match="is the checkpoint of step 20, not of step 30"):
        dist_ckpt.open_checkpoint(place, step=30)
    with pytest.raises(UsageError, match="is the checkpoint of step 20, not of step 30"):
        dist_ckpt.load(live, place, step=30)
    assert sorted(place.rglob("*")) == before


def test_a_training_begins_from_it(run: Path, tmp_path: Path) -> None:
    place = linked(run, tmp_path / "best")
    live = state()
    with Checkpointer(tmp_path / "new", live, every_steps=5) as ckpt:
        assert ckpt.restore(url=place) == 20
        ckpt.step(25)
    assert Repository(resolve(tmp_path / "new")).steps() == [25]


def test_it_is_no_run(run: Path, tmp_path: Path) -> None:
    place = copied(run, tmp_path / "best")
    with pytest.raises(NotFound, match="no run, but the checkpoint of step 20 by itself"):
        dist_ckpt.load(state(), place, step="best", metric=LOSS)
    with pytest.raises(UsageError, match="give the run"):
        dist_ckpt.load(state(), run / STEP, step="best", metric=LOSS)
    with pytest.raises(UsageError, match="give the run"):
        dist_ckpt.open_checkpoint(run / STEP, step="best", metric=LOSS)


def test_damage_is_found_there_too(run: Path, tmp_path: Path) -> None:
    place = copied(run, tmp_path / "best")
    (path,) = place.glob("*/weights*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError):
        dist_ckpt.load(state(), place)
    path.unlink()
    with pytest.raises(IntegrityError, match="missing"):
        dist_ckpt.load(state(), place)


def test_another_programs_manifest_is_not_ours(tmp_path: Path) -> None:
    for content in ({"name": "web app"}, [1], "text", {"step": "x", "save_id": 1}):
        (tmp_path / "manifest.json").write_text(json.dumps(content))
        with pytest.raises(NotFound):
            dist_ckpt.load(state(), tmp_path)


def test_nothing_is_changed_in_a_detached_step() -> None:
    store = new_store()
    run_of(store, 1)
    step = DetachedStep(store, 1)
    with pytest.raises(StorageError, match="read-only"):
        step.put("step-0000000001/x", [b""])
    with pytest.raises(StorageError, match="read-only"):
        step.delete(["step-0000000001/x"])


def test_a_read_only_place_is_read(run: Path) -> None:
    store = resolve(run, read_only=True)
    before = keys(store)
    live = state()
    assert dist_ckpt.load(live, store, step="best", metric=LOSS).step == 10
    assert dist_ckpt.load(live, store, step=20).step == 20
    assert dist_ckpt.open_checkpoint(store, step=30).step == 30
    assert Checkpointer(store, live).restore(step=20) == 20
    weights = {"w": torch.zeros(4)}
    with pytest.raises(StorageError, match="read-only"):
        Checkpointer(store, {"weights": weights}, every_steps=1).restore()
    assert keys(store) == before


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", [f"run/{STEP}", "elsewhere"])
def test_no_run_is_begun_inside_of_it(run: Path, name: str, tmp_path: Path) -> None:
    place = run / STEP if name.startswith("run/") else copied(run, tmp_path / name)
    before = sorted(place.rglob("*"))
    with pytest.raises(UsageError, match=r"no run.*restore\(step=20\) takes this"):
        Checkpointer(place, state(), every_steps=1).restore()
    with pytest.raises(UsageError, match="one checkpoint, of step 20, and no run"):
        dist_ckpt.save(state(), place, step=40)
    with pytest.raises(CheckpointException, match="one checkpoint, of step 20, and no run"):
        dcp_save({"w": torch.ones(2)}, storage_writer=dist_ckpt.dcp.Writer(place), no_dist=True)
    assert sorted(place.rglob("*")) == before, "nothing was written"
    with Checkpointer(tmp_path / "next", state(), every_steps=1) as ckpt:
        assert ckpt.restore(url=place) == 20, "another place begins from it"


def test_a_manifest_of_others_does_not_make_a_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"name": "of a web page"}')
    dist_ckpt.save(state(3), tmp_path, step=3)
    live = state()
    assert dist_ckpt.load(live, tmp_path).step == 3
