"""Large bytes, arrays and tensors inside of Python values under stock calls: stored as they are."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlanner, WriteItem
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

import dist_ckpt
from dist_ckpt.dcp import Reader, Writer
from dist_ckpt.errors import IncompatibleError, IntegrityError
from dist_ckpt.foreign import dcp_runs
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore
from tests.older_torch import ALONE, needs_background_saves_alone

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

NBYTES = 400_000


def noise(nbytes: int = NBYTES) -> bytes:
    return np.random.default_rng(1).bytes(nbytes)


class OwnBytes(DefaultSavePlanner):
    """Serializes the values itself, by `torch.save`."""

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        return super().resolve_data(write_item)


class RawBytes(DefaultSavePlanner):
    """Gives what it is given, as Megatron does."""

    def transform_object(self, write_item: WriteItem, object: Any) -> Any:  # noqa: A002
        return object


def filled_stream() -> io.BytesIO:
    stream = io.BytesIO(noise())
    stream.seek(7)
    return stream


VALUES: dict[str, Callable[[], Any]] = {
    "bytes": noise,
    "bytearray": lambda: bytearray(noise()),
    "array": lambda: np.frombuffer(noise(), np.int32).reshape(10, -1),
    "records": lambda: np.zeros(NBYTES // 12, [("a", "<i4"), ("b", "<f8")]),
    "in containers": lambda: [("x", {"y": noise()}), None],
    "tensors": lambda: (torch.arange(NBYTES // 16), torch.ones(NBYTES // 8).view(10, -1).T, "x"),
}
PLANNERS: dict[str, type[DefaultSavePlanner]] = {"stock": DefaultSavePlanner, "own": OwnBytes}


def alike(first: Any, second: Any) -> bool:
    if isinstance(first, torch.Tensor):
        return torch.equal(first, second)
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and np.array_equal(first, second)
    if isinstance(first, io.BytesIO):
        return (first.tell(), first.getvalue()) == (second.tell(), second.getvalue())
    if isinstance(first, list | tuple):
        return type(first) is type(second) and all(map(alike, first, second))
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(alike(first[k], second[k]) for k in first)
    return type(first) is type(second) and bool(first == second)


def stored_nbytes(root: Path) -> int:
    return sum(path.stat().st_size for path in root.rglob("*") if path.is_file())


@pytest.mark.parametrize("planner", PLANNERS.values(), ids=PLANNERS)
@pytest.mark.parametrize("kind", VALUES)
def test_comes_back_and_takes_no_more_than_its_bytes(
    kind: str, planner: type[SavePlanner], tmp_path: Path
) -> None:
    value = VALUES[kind]()
    # Both are called so that a name made of the one might be that of the other.
    state = {"w": torch.ones(3), "x": value, "x.0": value, "1.x": 5}
    save(state, storage_writer=Writer(tmp_path), planner=planner(), **ALONE)
    found = {"w": torch.zeros(3), "x": None, "x.0": None, "1.x": None}
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert alike(found, state)
    # As text it were a third more.
    assert stored_nbytes(tmp_path) < 2 * NBYTES * 1.1
    assert list(Reader(tmp_path).read_metadata().state_dict_metadata) == list(state)


def test_stream_of_a_planner_that_gives_it_as_it_is(tmp_path: Path) -> None:
    stream = filled_stream()
    save({"x": stream}, storage_writer=Writer(tmp_path), **ALONE)
    found: dict[str, Any] = {"x": None}
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert alike(found["x"], stream)
    assert stored_nbytes(tmp_path) < NBYTES * 1.1
    archive = io.BytesIO()
    torch.save({"big": torch.arange(NBYTES // 8), "small": 3}, archive)
    archive.seek(0)
    writer = Writer(tmp_path, step=1)
    save({"x": archive}, storage_writer=writer, planner=RawBytes(), **ALONE)
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert alike(found["x"], {"big": torch.arange(NBYTES // 8), "small": 3})
    assert stored_nbytes(tmp_path) < 2 * NBYTES * 1.1


@needs_background_saves_alone
def test_background_save_has_the_bytes_of_its_call(tmp_path: Path) -> None:
    array = np.zeros(NBYTES, np.uint8)
    future = async_save({"x": array}, storage_writer=Writer(tmp_path), **ALONE)
    array[:] = 9
    future.result()  # type: ignore[union-attr]  # a response only where a stager is given
    found: dict[str, Any] = {"x": None}
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert not found["x"].any()


def test_dist_ckpt_reads_them_in_the_part_that_the_value_is_in(tmp_path: Path) -> None:
    model = nn.Linear(3, 4)
    state = {
        "model": {**model.state_dict(), "_extra_state": noise()},
        "buffer": {"array": np.arange(NBYTES // 8), "deep": [{"data": noise()}]},
        "odd name": noise(),
    }
    save(state, storage_writer=Writer(tmp_path), **ALONE)
    with dist_ckpt.open_checkpoint(tmp_path) as opened:
        assert set(opened.parts) == {"model", "buffer", "state"}
        assert alike(opened.read_values("buffer")["value"], state["buffer"])
        assert alike(opened.read_values("state")["value"], {"odd name": noise()})

    class Keeps(nn.Linear):
        extra: bytes = b""

        def get_extra_state(self) -> bytes:
            return self.extra

        def set_extra_state(self, state: bytes) -> None:
            self.extra = state

    fresh, values = Keeps(3, 4), {"array": None, "deep": None}
    dist_ckpt.load({"model": fresh, "buffer": values}, tmp_path, strict=False)
    assert torch.equal(fresh.weight, model.weight)
    assert alike(values, state["buffer"])
    assert fresh.extra == noise()


def test_whole_optimizer_inside_of_one_value(tmp_path: Path) -> None:
    model = nn.Linear(100, 100)
    optimizer = torch.optim.AdamW(model.parameters())
    torch.autograd.backward(model(torch.ones(100)).sum())
    optimizer.step()
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    planner = DefaultSavePlanner(flatten_state_dict=False)
    save(state, storage_writer=Writer(tmp_path), planner=planner, **ALONE)
    # Both moments and the weights, whose bytes are no text.
    assert stored_nbytes(tmp_path) < 3 * 40_000 * 1.15
    fresh = nn.Linear(100, 100)
    moved = torch.optim.AdamW(fresh.parameters())
    parts = {"model": fresh, "optimizer": moved}
    report = dist_ckpt.load(parts, tmp_path, strict=False)
    assert not report.unexpected
    assert alike(fresh.state_dict(), model.state_dict())
    assert alike(moved.state_dict()["state"], optimizer.state_dict()["state"])


def test_reader_gives_the_large_values_of_a_checkpoint_of_dist_ckpt(tmp_path: Path) -> None:
    values = {"data": noise(), "array": np.arange(NBYTES // 8), "steps": 3, "t": torch.arange(4)}
    dist_ckpt.save({"model": nn.Linear(2, 2), "app": values}, tmp_path)
    found: dict[str, Any] = {
        "app": {"data": None, "array": None, "steps": None, "t": torch.zeros(4, dtype=torch.int64)}
    }
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert alike(found["app"], values)


def test_damage_is_told_to_who_wants_the_value_alone(tmp_path: Path) -> None:
    state = {"w": torch.ones(3), "x": noise()}
    save(state, storage_writer=Writer(tmp_path), **ALONE)
    (file,) = tmp_path.rglob("state.r00000.safetensors")
    data = bytearray(file.read_bytes())
    data[data.index(noise()) + 9] ^= 1
    file.write_bytes(data)
    found: dict[str, Any] = {"w": torch.zeros(3)}
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert torch.equal(found["w"], torch.ones(3))
    with pytest.raises(CheckpointException) as caught:
        load({"x": None}, storage_reader=Reader(tmp_path), **ALONE)
    assert isinstance(caught.value.failures[0][0], IntegrityError)


def test_rules_of_names_say_whether_there_are_such(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A release that would take them for entries must not read them; others go on as they did."""
    save({"w": torch.ones(3), "x": b"few"}, storage_writer=Writer(tmp_path), **ALONE)
    save({"w": torch.ones(3), "x": noise()}, storage_writer=Writer(tmp_path, step=1), **ALONE)
    runs = Repository(LocalStore(tmp_path))
    assert [runs.open(step).manifest.versions[dcp_runs.NAMING] for step in (0, 1)] == ["1", "2"]
    monkeypatch.setattr("dist_ckpt.dcp.commit.naming_version", lambda **_: "3")
    save({"w": torch.ones(3)}, storage_writer=Writer(tmp_path, step=2), **ALONE)
    with pytest.raises(IncompatibleError, match="its names follow rules 3"):
        _ = Reader(tmp_path).read_metadata().state_dict_metadata
