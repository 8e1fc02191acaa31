"""`torch.distributed.checkpoint` of one process, with our storage in the place of its own."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import dist_ckpt
from dist_ckpt.dcp import Planner, Reader, Writer
from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    FencedError,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore, MemoryStore, Store
from dist_ckpt.testing.stores import Fail, FaultyStore, Flip, Rule
from tests.older_torch import ALONE, needs_background_saves_alone

# It says that there is one process, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")


_numbers = itertools.count()


def network() -> nn.Module:
    return nn.Sequential(
        nn.Linear(30, 50), nn.BatchNorm1d(50), nn.Linear(50, 3, dtype=torch.bfloat16)
    )


def memory() -> MemoryStore:
    return MemoryStore(f"stock/{next(_numbers)}")


def equal(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    assert first.keys() == second.keys()
    return all(torch.equal(first[name], second[name]) for name in first)


def listed(store: Store) -> list[int]:
    return Repository(store).steps()


@contextmanager
def fails(kind: type[CheckpointError], match: str) -> Iterator[None]:
    """Expect what stock raises, which is no Exception, and our error as its cause of rank 0."""
    with pytest.raises(CheckpointException) as caught:
        yield
    error = caught.value.failures[0][0]
    assert isinstance(error, kind)
    assert match in str(error)
    assert type(error).__module__ == "dist_ckpt.errors"


STATE: dict[str, Any] = {
    "weights": {
        "half": torch.arange(6.0).to(torch.bfloat16).reshape(2, 3),
        "columns": torch.arange(20.0).reshape(4, 5).T[1:],
        "expanded": torch.ones(1, 4).expand(3, 4),
        "one": torch.tensor(7),
        "nothing": torch.empty(0, 3),
        "complex": torch.tensor([1 + 2j], dtype=torch.complex128),
    },
    "plain": {"nan": float("inf"), "names": ["a", ("b", None)], "bytes": b"\0", "of": {1, 2}},
    "list": [torch.ones(2), {"deep": torch.zeros(1)}],
    "epoch": 3,
    "flat.name": torch.arange(4),
    "state": {"x": torch.tensor([1.0])},
    "x": torch.tensor([2.0]),
    "not a part": {"y": torch.tensor([3.0])},
}


def blank(value: Any) -> Any:
    """Return the like of `value` with nothing of it."""
    if isinstance(value, torch.Tensor):
        return torch.full_like(value, 9).contiguous()
    if isinstance(value, dict):
        return {key: blank(inner) for key, inner in value.items()}
    if isinstance(value, list) and isinstance(value[0], torch.Tensor):
        return [blank(inner) for inner in value]
    return None


def same(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second) and first.dtype == second.dtype
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(same(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(same, first, second))
    return bool(first == second)


@pytest.mark.parametrize(
    ("planner", "flatten"),
    [
        (DefaultSavePlanner(), True),
        (DefaultSavePlanner(dedup_save_to_lowest_rank=True), True),
        (DefaultSavePlanner(flatten_state_dict=False), False),
        (Planner(), True),
        (Planner(flatten_state_dict=False), False),
    ],
)
def test_what_is_saved_is_loaded(planner: DefaultSavePlanner, flatten: bool) -> None:
    store = memory()
    save(STATE, storage_writer=Writer(store, step=5), planner=planner, **ALONE)
    assert listed(store) == [5]
    assert Repository(store).verify(5).problems == ()
    state = blank(STATE)
    load(
        state,
        storage_reader=Reader(store),
        # With sharded tensors to flatten, stock would load values into a copy of the state dict.
        planner=DefaultLoadPlanner(flatten_state_dict=flatten, flatten_sharded_tensors=flatten),
        **ALONE,
    )
    assert same(state, STATE)


def test_entries_become_parts(tmp_path: Path) -> None:
    writer = Writer(tmp_path, step=5, metrics={"loss": 0.5}, metadata={"note": "x"})
    save(STATE, storage_writer=writer, **ALONE)
    opened = Repository(LocalStore(tmp_path)).open_latest()
    assert set(opened.manifest.parts) == {"weights", "plain", "list", "state"}
    assert opened.manifest.metrics == {"loss": 0.5}
    assert opened.manifest.metadata == {"note": "x"}
    rest = {entry.name for entry in opened.index.tensors if entry.part == "state"}
    assert rest == {"flat.name", "state.x", "x", "not a part.y"}
    # A pickle would have its protocol's first bytes, or torch's zip.
    stored = b"".join(path.read_bytes() for path in tmp_path.rglob("*.safetensors"))
    assert b"PK\x03\x04" not in stored
    assert b"ccopy_reg" not in stored


def test_model_part_is_what_dist_ckpt_loads(tmp_path: Path) -> None:
    saved, loaded = network(), network()
    save({"model": saved.state_dict()}, storage_writer=Writer(tmp_path), **ALONE)
    dist_ckpt.load(dist_ckpt.TrainState(model=loaded, rng=None), tmp_path)
    assert equal(saved.state_dict(), loaded.state_dict())


class Application:
    """As in the tutorials of torch: model and optimizer behind one object."""

    def __init__(self) -> None:
        self.model = network()
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.25)

    def step(self) -> None:
        first, norm, _ = self.model.children()
        torch.autograd.backward(norm(first(torch.rand(4, 30))).sum())
        self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.model, self.optimizer)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.model.load_state_dict(state_dict["model"])
        self.loaded = state_dict["optimizer"]


@needs_background_saves_alone
def test_stateful_of_the_tutorial_and_a_background_save(tmp_path: Path) -> None:
    saved, loaded = Application(), Application()
    saved.step()
    loaded.step()
    writer = Writer(tmp_path)
    for step in (1, 2):
        future = async_save({"app": saved}, checkpoint_id=str(step), storage_writer=writer, **ALONE)
        future.result()  # type: ignore[union-attr]  # a response only where a stager is given
    loaded.optimizer.param_groups[0]["lr"] = 0.5
    reader = Reader(tmp_path)
    load({"app": loaded}, checkpoint_id="1", storage_reader=reader, **ALONE)
    assert equal(saved.model.state_dict(), loaded.model.state_dict())
    assert same(loaded.loaded, saved.state_dict()["optimizer"])
    assert listed(LocalStore(tmp_path)) == [1, 2]


def test_reader_takes_what_dist_ckpt_saved(tmp_path: Path) -> None:
    saved, loaded = Application(), Application()
    saved.step()
    loaded.step()
    loaded.optimizer.param_groups[0]["lr"] = 0.5
    state = {
        "model": saved.model,
        "optimizer": saved.optimizer,
        "epoch": 4,
        "ema": {"decay": 0.9, "shadow": {"w": torch.arange(3.0)}, "both": (1, torch.ones(2))},
    }
    dist_ckpt.save(state, tmp_path)
    template: dict[str, Any] = {
        "model": loaded.model.state_dict(),
        "optimizer": get_optimizer_state_dict(loaded.model, loaded.optimizer),
        "epoch": 0,
        "ema": {"decay": 0, "shadow": {"w": torch.zeros(3)}},
    }
    load(template, storage_reader=Reader(tmp_path), **ALONE)
    assert equal(saved.model.state_dict(), loaded.model.state_dict())
    wanted = get_optimizer_state_dict(saved.model, saved.optimizer)
    assert same(template["optimizer"], wanted)
    assert template["epoch"] == 4
    assert template["ema"]["decay"] == 0.9
    assert torch.equal(template["ema"]["shadow"]["w"], torch.arange(3.0))
    with pytest.raises(CheckpointException, match=r"Missing key.*ema\.both"):
        load({"ema": {"both": 0}}, storage_reader=Reader(tmp_path), **ALONE)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (object(), "cannot store model.deep, a object"),
        (lambda: None, "cannot store model.deep"),
        (torch.Generator(), "cannot store model.deep"),
        (torch.empty(2, device="meta"), "model.deep has no data"),
        (torch.eye(3).to_sparse(), "cannot store model.deep"),
        (torch.empty(2, dtype=torch.bits8), "'model.deep' has dtype bits8"),
    ],
    ids=["object", "lambda", "generator", "meta", "sparse", "dtype"],
)
def test_what_cannot_be_stored_is_named(value: object, match: str) -> None:
    store = memory()
    state = {"model": {"w": torch.ones(3), "deep": value}}
    with fails(UsageError, match):
        save(state, storage_writer=Writer(store), **ALONE)
    assert listed(store) == []


def test_failed_write_lists_nothing_and_leaves_no_trace(tmp_path: Path) -> None:
    rules = [Rule("put", Fail(StorageError("gone")), key="*/extra.*")]
    store = FaultyStore(LocalStore(tmp_path), rules)
    writer = Writer(store, step=1)
    with fails(StorageError, "gone"):
        save(STATE, storage_writer=writer, **ALONE)
    assert listed(store) == []
    assert list(tmp_path.rglob("*.safetensors")) == []
    save(STATE, storage_writer=writer, **ALONE)
    assert listed(store) == [1]
    assert len([path for path in (tmp_path / "step-0000000001").iterdir() if path.is_dir()]) == 1


def test_committed_step_is_not_overwritten_and_a_newer_writer_fences() -> None:
    store = memory()
    old = Writer(store)
    save(STATE, checkpoint_id="1", storage_writer=old, **ALONE)
    with fails(AlreadyExists, "step 1 is already committed"):
        save(STATE, storage_writer=Writer(store, step=1), **ALONE)
    save(STATE, checkpoint_id="2", storage_writer=old, **ALONE)  # nobody took the run from it
    save(STATE, storage_writer=Writer(store, step=3), **ALONE)
    with fails(FencedError, "superseded by claim 2"):
        save(STATE, checkpoint_id="4", storage_writer=old, **ALONE)
    assert listed(store) == [1, 2, 3]


def test_calls_that_cannot_work_are_refused() -> None:
    store = memory()
    with pytest.raises(UsageError, match="give checkpoint_id=1 for the step of that run"):
        save({}, checkpoint_id="runs/1", storage_writer=Writer(store), **ALONE)
    for name, is_step in {"12": True, "step-0000000012": True, "-1": False, "a/12": True}.items():
        assert Writer.validate_checkpoint_id(name) is is_step
        assert Reader.validate_checkpoint_id(name) is is_step
    writer = Writer(store)
    if not ALONE:
        return  # older than what cannot work
    with pytest.raises(UsageError, match="use_collectives"):
        save(STATE, storage_writer=writer, **ALONE, use_collectives=False)
    assert listed(store) == []


def test_reader_says_what_is_wrong_and_changes_nothing() -> None:
    store = memory()
    save({"w": torch.ones(3), "v": torch.ones(3)}, storage_writer=Writer(store), **ALONE)
    with fails(NotFound, "no checkpoint of step 9"):
        load({"w": 0}, storage_reader=Reader(store, step=9), **ALONE)
    with pytest.raises(NotFound):
        _ = Reader(memory()).read_metadata().state_dict_metadata
    state = {"v": torch.zeros(3), "w": torch.zeros(3, dtype=torch.int32)}
    with fails(IncompatibleError, "'w' is float32"):
        load(state, storage_reader=Reader(store), **ALONE)
    assert not state["v"].any()
    damaged = FaultyStore(store, [Rule("read_into", Flip(0), key="*/state.*", nth=None)])
    with fails(IntegrityError, "differs from its digest"):
        load({"w": torch.zeros(3)}, storage_reader=Reader(damaged), **ALONE)
