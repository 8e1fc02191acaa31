"""Stock planners, the users' and torch's own, with our Writer and Reader: nothing is unheard."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    DefaultSavePlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.planner import (
    LoadPlanner,
    ReadItem,
    SavePlan,
    SavePlanner,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_loader import (
    _load_state_dict,
    _load_state_dict_from_keys,
    load,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader

import dist_ckpt
from dist_ckpt.dcp import Reader, Writer, planners
from dist_ckpt.errors import IncompatibleError, IntegrityError, NotFound, UsageError
from dist_ckpt.foreign.dcp_files import value_in as _value_in
from dist_ckpt.storage import MemoryStore
from tests.older_torch import ALONE

# It says that there is one process, which is meant here.
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

_numbers = itertools.count()
_HAS_CACHE = hasattr(SavePlanner, "_cached_global_plan")


def memory() -> MemoryStore:
    return MemoryStore(f"planners/{next(_numbers)}")


def training() -> dict[str, Any]:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.rand(2, 3)).sum())
    optimizer.step()
    weights, moments = get_state_dict(model, optimizer)
    return {
        "epoch": 3,
        "model": weights,
        "optim": moments,
        "list": [torch.ones(2), {"deep": torch.zeros(1)}],
        "numbered": {1: {2: torch.ones(1)}},
        "planner_data": {"of": torch.ones(1)},
    }


def like(first: Any, second: Any) -> bool:
    """Tell whether two trees are the same, the order of their keys too."""
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, dict):
        return list(first) == list(second) and all(like(first[k], second[k]) for k in first)
    if isinstance(first, list):
        return len(first) == len(second) and all(map(like, first, second))
    return bool(first == second)


def everything(reader: StorageReader) -> dict[str, Any]:
    found: dict[str, Any] = {}
    planner: LoadPlanner = _EmptyStateDictLoadPlanner()  # type: ignore[no-untyped-call]
    _load_state_dict(found, storage_reader=reader, planner=planner, no_dist=True)
    return found


def refusal(error: CheckpointException) -> str:
    return str(error.failures[0][0])


def test_tree_comes_back_from_a_run_and_from_a_stock_directory(tmp_path: Path) -> None:
    state = training()
    save(state, storage_writer=Writer(tmp_path / "run"), **ALONE)
    save(state, checkpoint_id=tmp_path / "stock", **ALONE)
    stock = FileSystemReader(tmp_path / "stock")
    wanted = everything(stock)
    for place in ("run", "stock", "run/step-0000000000"):
        reader = Reader(tmp_path / place)
        assert like(everything(reader), wanted)
        found = _load_state_dict_from_keys("optim.state", storage_reader=reader)
        assert like(found, {"optim": {"state": state["optim"]["state"]}})
        metadata, known = reader.read_metadata(), stock.read_metadata()
        assert metadata.planner_data == known.planner_data
        assert list(metadata.state_dict_metadata) == list(known.state_dict_metadata)
        assert getattr(metadata, "version", None) == getattr(known, "version", None)
        assert metadata.storage_meta is not None
        assert metadata.storage_meta.save_id
        assert metadata.storage_meta.load_id
        # As a path it names the checkpoint that was read.
        assert like(everything(Reader(str(metadata.storage_meta.checkpoint_id))), wanted)


def test_tree_of_an_optimizer_that_dist_ckpt_saved(tmp_path: Path) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(3, 4))
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.rand(2, 3)).sum())
    optimizer.step()
    dist_ckpt.save({"model": model, "optim": optimizer}, tmp_path)
    found = _load_state_dict_from_keys("optim.state.0.weight", storage_reader=Reader(tmp_path))
    state = optimizer.state[next(model.parameters())]
    assert like(
        dict(sorted(found["optim"]["state"]["0.weight"].items())), dict(sorted(state.items()))
    )


class WithNotes(DefaultSavePlanner):
    """As in the documentation of torch."""

    notes: Any = "of this rank"

    def create_local_plan(self) -> SavePlan:
        return replace(super().create_local_plan(), planner_data=self.notes)

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        plans, metadata = super().create_global_plan(all_plans)
        return plans, replace(metadata, planner_data=[plan.planner_data for plan in plans])


@pytest.mark.parametrize("notes", ["text", {"w": 3}, {"w": ["x", 1]}, None, (1, {2})], ids=str)
def test_planner_data_of_users_come_back(notes: Any) -> None:
    planner, store = WithNotes(flatten_state_dict=False), memory()
    planner.notes = notes
    state = {"w": torch.ones(3), "deep": {"v": torch.zeros(1)}}
    save(state, storage_writer=Writer(store), planner=planner, **ALONE)
    assert Reader(store).read_metadata().planner_data == [notes]
    found = {"w": torch.zeros(3), "deep": None}
    as_saved = DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    load(found, storage_reader=Reader(store), planner=as_saved, **ALONE)
    assert like(found, state)


def test_planner_data_that_only_a_pickle_could_store_are_refused() -> None:
    planner, store = WithNotes(flatten_state_dict=False), memory()
    planner.notes = object()
    with pytest.raises(CheckpointException) as caught:
        save({"w": torch.ones(3)}, storage_writer=Writer(store), planner=planner, **ALONE)
    assert "cannot store planner_data" in refusal(caught.value)
    with pytest.raises(NotFound):
        _ = Reader(store).read_metadata().planner_data


def test_damaged_tree_is_found(tmp_path: Path) -> None:
    save(training(), storage_writer=Writer(tmp_path), **ALONE)
    (path,) = tmp_path.rglob("planner_data.*")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(IntegrityError, match="differs from its digest"):
        _ = Reader(tmp_path).read_metadata().state_dict_metadata


class Doubles(DefaultSavePlanner):
    """Changes what is stored, values and tensors."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        changed = object if isinstance(object, (tuple, set)) else object * 2
        return super().transform_object(write_item, changed)


class Bytes(DefaultSavePlanner):
    """Gives bytes, as Megatron does: what is stored is what they say, and no BytesIO."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        return object


class Resolves(SavePlanner):
    """Derived from nothing: there is no value to look up."""

    def set_up_planner(
        self, state_dict: Any, storage_meta: Any = None, is_coordinator: bool = False
    ) -> None:
        self.stock = DefaultSavePlanner()
        self.stock.set_up_planner(state_dict, storage_meta, is_coordinator)

    def create_local_plan(self) -> SavePlan:
        return self.stock.create_local_plan()

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        return self.stock.create_global_plan(all_plans)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        return self.stock.finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return self.stock.resolve_data(write_item)


def test_what_planners_make_of_values_is_stored() -> None:
    archive = io.BytesIO()
    torch.save({"t": torch.ones(2), "l": [1, (2, None)]}, archive)
    cases: list[tuple[Any, dict[str, Any], dict[str, Any]]] = [
        (
            Doubles(),
            {"n": 3, "kept": (1,), "set": {1}, "w": torch.ones(2)},
            {"n": 6, "kept": (1,), "set": {1}, "w": torch.full((2,), 2.0)},
        ),
        (Bytes(), {"b": archive}, {"b": {"t": torch.ones(2), "l": [1, (2, None)]}}),
        (Resolves(), {"n": 3, "w": torch.ones(2)}, {"n": 3, "w": torch.ones(2)}),
    ]
    for planner, state, wanted in cases:
        store = memory()
        save(state, storage_writer=Writer(store), planner=planner, **ALONE)
        found = {key: torch.zeros(2) if key == "w" else None for key in state}
        load(found, storage_reader=Reader(store), **ALONE)
        assert like(found, wanted)


@pytest.mark.parametrize("data", [b"raw", b"\x80\x02N.", b""])
def test_bytes_of_planners_that_are_no_values_are_refused(data: bytes) -> None:
    store = memory()
    with pytest.raises(CheckpointException) as caught:
        save({"v": io.BytesIO(data)}, storage_writer=Writer(store), planner=Bytes(), **ALONE)
    assert isinstance(caught.value.failures[0][0], UsageError)
    assert "Bytes gave bytes for 'v'" in refusal(caught.value)


class InTurn(DefaultLoadPlanner):
    """Has one tensor in hand at a time, and notes what it is asked."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.asked: list[str] = []
        self.dtype = dtype
        self.hand: torch.Tensor | None = None

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        assert self.hand is None
        self.asked.append(f"resolve {read_item.dest_index.fqn}")
        self.hand = torch.empty(tuple(read_item.lengths), dtype=self.dtype)
        return self.hand

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        assert self.hand is not None
        assert tensor.data_ptr() == self.hand.data_ptr()
        self.asked.append(f"commit {read_item.dest_index.fqn}")
        self.lookup_tensor(read_item.dest_index).copy_(tensor)
        self.hand = None

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        self.asked.append(f"bytes {read_item.dest_index.fqn}")
        super().load_bytes(read_item, value)


def test_load_planner_is_asked_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    store, state = memory(), {"a": torch.arange(3.0), "n": 1, "z": torch.ones(2, 2)}
    save(state, storage_writer=Writer(store), **ALONE)
    wanted = ["resolve a", "commit a", "bytes n", "resolve z", "commit z"]
    found: dict[str, Any] = {}
    for nbytes in (1, 1 << 20):  # a window for each, and one for all
        monkeypatch.setattr("dist_ckpt.dcp.reader.IN_FLIGHT_BYTES", nbytes)
        planner = InTurn(torch.float32)
        found = {"a": torch.zeros(3), "n": 0, "z": torch.zeros(2, 2)}
        load(found, storage_reader=Reader(store), planner=planner, **ALONE)
        assert planner.asked == wanted
        assert like(found, state)
    with pytest.raises(CheckpointException) as caught:
        load(found, storage_reader=Reader(store), planner=InTurn(torch.float16), **ALONE)
    assert "cast=True" in refusal(caught.value)
    load(found, storage_reader=Reader(store, cast=True), planner=InTurn(torch.float16), **ALONE)
    assert like(found, state)


def test_cast_converts_and_never_makes_another_thing_of_a_number() -> None:
    store = memory()
    save({"w": torch.tensor([1.5, 2.0])}, storage_writer=Writer(store), **ALONE)
    found = {"w": torch.zeros(2, dtype=torch.bfloat16)}
    load(found, storage_reader=Reader(store, cast=True), **ALONE)
    assert found["w"].tolist() == [1.5, 2.0]
    with pytest.raises(CheckpointException) as caught:
        load(
            {"w": torch.zeros(2, dtype=torch.int64)},
            storage_reader=Reader(store, cast=True),
            **ALONE,
        )
    assert isinstance(caught.value.failures[0][0], IncompatibleError)
    assert "cast=True" not in refusal(caught.value)


@pytest.mark.skipif(not _HAS_CACHE, reason="this torch caches no plans")
def test_cached_plans_are_no_hindrance_and_stay_usable(tmp_path: Path) -> None:
    writer = Writer(tmp_path / "run")

    def saved(step: int, size: int, **place: Any) -> None:
        planner = DefaultSavePlanner(enable_plan_caching=True)
        state = {"w": torch.full((size,), float(step)), "n": step}
        save(
            state,
            planner=planner,
            **(place or {"storage_writer": writer, "checkpoint_id": step}),
            **ALONE,
        )

    def loaded(size: int) -> tuple[float, int]:
        found: dict[str, Any] = {"w": torch.zeros(size), "n": 0}
        load(found, storage_reader=Reader(tmp_path / "run"), **ALONE)
        return float(found["w"].sum()), found["n"]

    # The plan stays, changes, and is in the cache from a save through torch's own writer.
    for step, size in enumerate((2, 2, 3, 3)):
        saved(step, size)
        assert loaded(size) == (step * size, step)
    saved(9, 3, checkpoint_id=tmp_path / "stock-3")
    saved(9, 3, checkpoint_id=tmp_path / "stock-4")
    saved(4, 3)
    assert loaded(3) == (12, 4)
    with pytest.raises(CheckpointException):
        saved(4, 3)  # it exists
    caches = ("save_plan", "final_save_plan", "all_plans", "global_plan", "metadata")
    assert [getattr(SavePlanner, f"_cached_{name}", {}) for name in caches] == [{}] * 5
    saved(9, 3, checkpoint_id=tmp_path / "stock-5")
    saved(5, 3)
    assert loaded(3) == (15, 5)


def test_forms_of_checkpoint_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "7"  # called like a step
    forms = [
        0,
        "1",
        "step-2",
        "step_3",
        "global_step4",
        "7/step-5",
        run / "6",
        f"{run}/step-0000000007/",
    ]
    for step, form in enumerate(forms):
        save({"n": step}, checkpoint_id=form, storage_writer=Writer("7"), **ALONE)
    found: dict[str, Any] = {"n": None}
    for step, form in enumerate(forms):
        load(found, checkpoint_id=form, storage_reader=Reader(run), **ALONE)
        assert found == {"n": step}
    load(found, checkpoint_id=run, storage_reader=Reader(run, step=2), **ALONE)
    assert found == {"n": 2}
    for form, said in {
        "epoch_3": "where 3 is what steps are counted by, give 3",
        "best": "checkpoint_id=1000",
        "else/step-9": "give checkpoint_id=9 for the step of that run",
        "-3": "is no step",
        "s3://bucket/step-3": "lies in 's3://bucket'",
    }.items():
        for storage in (Reader(run), Writer(run)):
            with pytest.raises(UsageError, match=said):
                storage.reset(form)


def test_where_there_is_nothing_it_is_said(tmp_path: Path) -> None:
    for place, said in {"nowhere": "check the path", "": "no .metadata of torch"}.items():
        (tmp_path / "file").touch()
        with pytest.raises(CheckpointException) as caught:
            load({"w": torch.zeros(3)}, storage_reader=Reader(tmp_path / place), **ALONE)
        assert isinstance(caught.value.failures[0][0], NotFound)
        assert said in refusal(caught.value)


def test_index_of_a_value_is_that_of_the_state_dict() -> None:
    class Looks(DefaultSavePlanner):
        def lookup_object(self, index: MetadataIndex) -> Any:
            return f"looked up {index.fqn}"

    store = memory()
    save({"n": 1}, storage_writer=Writer(store), planner=Looks(), **ALONE)
    found = {"n": None}
    load(found, storage_reader=Reader(store), **ALONE)
    assert found == {"n": "looked up n"}


def test_items_that_are_no_bytes_are_refused() -> None:
    class Gives(DefaultSavePlanner):
        def resolve_data(self, write_item: WriteItem) -> Any:
            assert write_item.type == WriteItemType.BYTE_IO
            return "text"

    with pytest.raises(CheckpointException) as caught:
        save({"n": 1}, storage_writer=Writer(memory()), planner=Gives(), **ALONE)
    assert "gave a str for value 'n'" in refusal(caught.value)


class Counts(DefaultSavePlanner):
    """Pickles by itself, and changes what is called so."""

    def resolve_data(self, write_item: WriteItem) -> Any:
        if write_item.type != WriteItemType.BYTE_IO:
            return super().resolve_data(write_item)
        value = self.lookup_object(write_item.index)
        if write_item.index.fqn == "changed":
            value = [*value, "more"]
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer


def test_what_a_planner_pickles_and_does_not_change_is_no_pickle_to_be_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    read: list[bytes] = []

    def value_in(data: bytes) -> Any:
        read.append(data)
        return _value_in(data)

    monkeypatch.setattr(planners, "value_in", value_in)
    values = {"tuple": tuple(range(1000)), "list": [2.5, "x"], "changed": [1]}
    place = memory()
    save(values, storage_writer=Writer(place), planner=Counts(), **ALONE)
    found = everything(Reader(place))
    assert found == {**values, "changed": [1, "more"]}
    assert type(found["tuple"]) is tuple
    assert len(read) == 1
