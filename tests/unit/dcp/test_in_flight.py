"""Several stock saves of one process through one Writer at once, and what failed ones leave.

With process groups: `tests/distributed/test_in_flight.py`.
"""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from concurrent.futures import Future
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save, save

from dist_ckpt.dcp import Reader, Writer
from dist_ckpt.errors import AlreadyExists, ErrorKind, StorageError, UsageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore, MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Hang, Rule
from tests.older_torch import ALONE, needs_background_saves_alone

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is")

AT_ONCE = 6


def state(step: int) -> dict[str, Any]:
    return {"model": {"w": torch.full((999,), float(step))}, "step": step}


def is_whole(place: Any, step: int) -> bool:
    found = state(-1)
    load(found, storage_reader=Reader(place, step=step), **ALONE)
    return found["step"] == step and bool((found["model"]["w"] == step).all())


def begin(
    writer: Writer, step: int, value: dict[str, Any] | None = None, **more: Any
) -> Future[Any]:
    started = async_save(
        value or state(step), checkpoint_id=str(step), storage_writer=writer, **ALONE, **more
    )
    assert isinstance(started, Future)
    return started


def cause(of: BaseException | None) -> BaseException:
    assert isinstance(of, CheckpointException)
    return of.failures[0][0]


def files(root: Path) -> list[str]:
    return sorted(path.name for path in root.rglob("*.safetensors"))


@needs_background_saves_alone
@pytest.mark.parametrize("stager", [None, BlockingAsyncStager], ids=["ours", "theirs"])
@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.soak)])
def test_each_of_several_in_flight_is_what_was_saved(
    rounds: int, stager: type[BlockingAsyncStager] | None, tmp_path: Path
) -> None:
    writer = Writer(tmp_path)
    for first in range(0, rounds * AT_ONCE, AT_ONCE):
        steps = range(first, first + AT_ONCE)
        more: dict[str, Any] = {"async_stager": stager()} if stager else {}
        started = {step: begin(writer, step, **more) for step in steps}
        for step, future in started.items():
            future.result()
            assert is_whole(tmp_path, step)
    assert Repository(LocalStore(tmp_path)).steps() == list(range(rounds * AT_ONCE))
    assert len(list((tmp_path / "claims").iterdir())) == 1  # the run was taken over once


@needs_background_saves_alone
def test_training_goes_on_while_they_wait_and_they_end_in_the_order_of_the_calls() -> None:
    hang, inner = Hang(), MemoryStore("in-flight/order")
    writer = Writer(FaultyStore(inner, [Rule("put", hang, key="*/extra.*")]))
    value = state(0)
    first = begin(writer, 0, value)
    value["model"]["w"].fill_(1)  # after the call: the copy is made in it
    value["step"] = 1
    hang.reached.wait()
    others = [begin(writer, 1, value), begin(writer, 2)]
    assert not any(each.done() for each in (first, *others))
    hang.release()
    for future in (first, *others):
        future.result()
    assert all(is_whole(inner, step) for step in range(3))
    created = [Repository(inner).open(step).manifest.created for step in range(3)]
    assert created == sorted(created)


@needs_background_saves_alone
def test_one_that_fails_and_one_step_twice_beside_others(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    started = [
        begin(writer, 1),
        begin(writer, 2, {"model": {"bad": object()}}),
        begin(writer, 3),
        begin(writer, 3, state(4)),
        begin(writer, 5),
    ]
    errors = [each.exception() for each in started]
    assert [errors[i] for i in (0, 2, 4)] == [None] * 3
    assert "cannot store model.bad" in str(cause(errors[1]))
    assert isinstance(cause(errors[3]), AlreadyExists)
    assert all(is_whole(tmp_path, step) for step in (1, 3, 5))
    assert Repository(LocalStore(tmp_path)).steps() == [1, 3, 5]
    assert len(files(tmp_path)) == 2 * 3


@needs_background_saves_alone
def test_a_save_waits_for_those_in_flight_and_keeps_the_step_of_its_thread(tmp_path: Path) -> None:
    writer = Writer(tmp_path, step=7)
    started = [begin(writer, step) for step in (1, 2)]
    save(state(3), checkpoint_id="3", storage_writer=writer, **ALONE)
    assert all(each.done() for each in started)
    assert Repository(LocalStore(tmp_path)).steps() == [1, 2, 3]


@needs_background_saves_alone
def test_a_staged_state_that_is_never_saved_holds_nobody_up(tmp_path: Path) -> None:
    writer = Writer(tmp_path)
    writer.stage(state(1))
    refused = async_save(state(2), checkpoint_id="no step", storage_writer=writer, **ALONE)
    begin(writer, 3).result()
    assert isinstance(refused, Future)
    assert isinstance(cause(refused.exception()), UsageError)
    assert is_whole(tmp_path, 3)


class Counted(DefaultSavePlanner):
    """A planner whose plans can be counted, and which fails where it is told to."""

    plans: ClassVar[list[weakref.ref[WriteItem]]] = []

    def __init__(self, error: BaseException | None = None) -> None:
        super().__init__()
        self._error = error

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        self.plans.append(weakref.ref(new_plan.items[0]))
        return super().finish_plan(new_plan)

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if self._error is not None:
            raise self._error
        return super().resolve_data(write_item)


def test_failed_saves_leave_neither_files_nor_plans(tmp_path: Path) -> None:
    full = StorageError("no space", kind=ErrorKind.STORAGE_FULL)
    rules = [
        Rule("put", Fail(full), key="*/model.*"),
        Rule("put", Fail(full), key="*/extra.*", nth=1),
        Rule("put", Fail(full), key="*/index.*"),
        Rule("put", Fail(full), key="*/manifest.json"),
    ]
    writer = Writer(FaultyStore(LocalStore(tmp_path), rules))
    for step, error in enumerate([*[None] * 4, ValueError("no"), KeyboardInterrupt()]):
        with pytest.raises(CheckpointException):
            save(
                state(step),
                checkpoint_id=str(step),
                storage_writer=writer,
                planner=Counted(error),
                **ALONE,
            )
        assert files(tmp_path) == []
    full.__traceback__ = full.__context__ = error = None  # they keep what was called
    gc.collect()
    assert sum(each() is not None for each in Counted.plans) == 0
    save(state(9), checkpoint_id="9", storage_writer=writer, **ALONE)
    assert is_whole(tmp_path, 9)
    assert {path.name for path in tmp_path.iterdir()} == {"claims", "step-0000000009"}


class OfUser(RuntimeError):
    """Can be pickled, and not be made again from that."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


@pytest.mark.parametrize(
    "error",
    [
        ValueError("no"),
        OfUser(1, 2),
        torch.OutOfMemoryError("none left"),
        MemoryError(),
        OSError(5, "x"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_the_planner_raises_keeps_its_class(error: Exception) -> None:
    writer = Writer(MemoryStore("in-flight/planner"))
    with pytest.raises(CheckpointException) as caught:
        save(state(1), storage_writer=writer, planner=Counted(error), **ALONE)
    assert cause(caught.value) is error


def test_a_full_disk_is_the_error_of_stock_and_ours(tmp_path: Path) -> None:
    class Full(LocalStore):
        def put(self, key: str, *args: Any, **kwargs: Any) -> None:
            if key.endswith(".safetensors"):
                raise OSError(28, "No space left on device")
            super().put(key, *args, **kwargs)

    with pytest.raises(CheckpointException) as caught:
        save(state(1), storage_writer=Writer(Full(tmp_path)), **ALONE)
    error = cause(caught.value)
    assert isinstance(error, StorageError)
    assert error.kind is ErrorKind.STORAGE_FULL
    assert isinstance(error, OSError)
    assert error.errno == 28
    again = copy.copy(error)  # as a pickle makes it
    assert (type(again), str(again), again.errno, again.kind) == (
        type(error),
        str(error),
        28,
        error.kind,
    )


def test_many_top_level_keys_are_few_files_and_stay_parts(tmp_path: Path) -> None:
    many = {f"key{i}": {"w": torch.full((3,), float(i))} for i in range(300)}
    many["large"] = {"w": torch.ones(5 << 20)}
    save(many, storage_writer=Writer(tmp_path), **ALONE)
    assert files(tmp_path) == ["key0.r00000.safetensors", "large.r00000.safetensors"]
    assert Repository(LocalStore(tmp_path)).verify(0).problems == ()
    found = {key: {"w": torch.zeros_like(value["w"])} for key, value in many.items()}
    load(found, storage_reader=Reader(tmp_path), **ALONE)
    assert all(torch.equal(found[key]["w"], many[key]["w"]) for key in many)
    assert len(Repository(LocalStore(tmp_path)).open(0).manifest.parts) == 301


def test_copies_of_a_writer_share_its_claim(tmp_path: Path) -> None:
    before = set(threading.enumerate())
    writer = Writer(tmp_path, metrics={"loss": 1.0})
    other = copy.deepcopy(writer)
    for step, each in enumerate([writer, other, writer, other]):
        save(state(step), checkpoint_id=str(step), storage_writer=each, **ALONE)
    assert Repository(LocalStore(tmp_path)).open(3).manifest.metrics == {"loss": 1.0}
    assert len(set(threading.enumerate()) - before) < 10
