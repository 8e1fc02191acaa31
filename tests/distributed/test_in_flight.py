"""Several stock saves of several ranks through one Writer at the same time; processes that save."""

from __future__ import annotations

import io
import threading
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.planner import WriteItem
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType, async_save, save

import dist_ckpt
from dist_ckpt.dcp import Planner, Reader, Writer
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.testing.ranks import run_ranks
from tests.services.s3 import S3Service

AT_ONCE = 6


def state(step: int) -> dict[str, Any]:
    # Of the rank too: what of one rank came to another's save would be seen.
    own = torch.full((99,), float(step))
    return {
        "model": {"w": torch.full((999,), float(step)), f"of{dist.get_rank()}": own},
        "step": step,
    }


def wrong(root: str, steps: range) -> list[int]:
    """Return which of `steps` are not what was saved, or not there."""
    found_wrong = []
    for step in steps:
        found = state(-1)
        try:
            load(found, storage_reader=Reader(root, step=step))
        except CheckpointException:
            found_wrong.append(step)
            continue
        tensors = found["model"].values()
        if found["step"] != step or not all(bool((each == step).all()) for each in tensors):
            found_wrong.append(step)
    return found_wrong


def begin(writer: Writer, step: int, value: Any = None, **more: Any) -> Future[Any]:
    started = async_save(
        value or state(step),
        checkpoint_id=str(step),
        storage_writer=writer,
        planner=Planner(),
        **more,
    )
    assert isinstance(started, Future)
    return started


def one_group(root: str, rounds: int) -> list[int]:
    writer, found = Writer(root), []
    for first in range(0, rounds * AT_ONCE, AT_ONCE):
        steps = range(first, first + AT_ONCE)
        started = [begin(writer, step) for step in steps]
        for each in started:
            each.result()
        found += wrong(root, steps)
    return found


def own_groups(root: str, rounds: int) -> list[int]:
    """Save over a group each, with a stager that knows nothing of the Writer: nobody waits."""
    groups = [dist.new_group() for _ in range(AT_ONCE)]
    writer, found = Writer(root), []
    for first in range(0, rounds * AT_ONCE, AT_ONCE):
        steps = range(first, first + AT_ONCE)
        started = [
            begin(writer, step, process_group=group, async_stager=BlockingAsyncStager())
            for step, group in zip(steps, groups, strict=True)
        ]
        for each in started:
            each.result()
        found += wrong(root, steps)
    return found


def both(root: str, rounds: int) -> list[int]:
    return one_group(f"{root}/one", rounds) + own_groups(f"{root}/own", rounds)


@pytest.mark.parametrize("rounds", [2, pytest.param(60, marks=pytest.mark.soak)])
def test_each_of_several_in_flight_is_what_was_saved(rounds: int, tmp_path: Path) -> None:
    assert run_ranks(2, both, str(tmp_path), rounds) == [[], []]
    for name in ("one", "own"):
        steps = Repository(resolve(tmp_path / name)).steps()
        assert steps == list(range(rounds * AT_ONCE))


def loaded_meanwhile(root: str) -> list[int]:
    """Load over the group on which saves are in flight; return what was the newest each time."""
    writer, found = Writer(root), []
    for first in (0, 3):
        started = [begin(writer, step) for step in range(first, first + 3)]
        live = state(-1)
        load(live, storage_reader=Reader(root))
        found.append(live["step"])
        for each in started:
            each.result()
    return found


def test_a_load_waits_for_the_saves_in_flight(tmp_path: Path) -> None:
    assert run_ranks(2, loaded_meanwhile, str(tmp_path)) == [[2, 5], [2, 5]]


def left(root: str) -> tuple[list[str], int]:
    """Return what saves that failed on rank 1 alone say, and what they leave when they are over."""
    writer, said = Writer(root), []
    bad = {f"of{dist.get_rank()}": object() if dist.get_rank() else 1}
    started = [
        begin(writer, step, {**state(step), **(bad if step % 2 else {})}) for step in range(6)
    ]
    for each in started:
        error = each.exception()
        said.append("" if error is None else str(error.failures[1][0]))  # type: ignore[attr-defined]
    try:
        save({**state(7), **bad}, checkpoint_id="7", storage_writer=writer)
    except CheckpointException as failed:
        said.append(str(failed.failures[1][0]))
    for thread in threading.enumerate():
        if thread.name == "dist_ckpt-tidy":
            thread.join(60)
    dist.barrier()
    folders = [path for path in Path(root).glob("step-*/*") if path.is_dir()]
    return said, len(folders)


def test_those_that_failed_on_another_rank_leave_nothing(tmp_path: Path) -> None:
    for said, folders in run_ranks(2, left, str(tmp_path)):
        assert [bool(each) for each in said] == [False, True] * 3 + [True]
        assert all("cannot store of1, a object" in each for each in said if each)
        assert folders == 3
    assert Repository(resolve(tmp_path)).steps() == [0, 2, 4]


class OfUser(LookupError):
    """Can be pickled, and not be made again from that."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}")


class Failing(DefaultSavePlanner):
    """A planner that raises on rank 1 what it is given."""

    def __init__(self, error: Exception) -> None:
        super().__init__()
        self._error = error

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        if dist.get_rank() == 1:
            raise self._error
        return super().resolve_data(write_item)


def raised(root: str) -> list[tuple[str, str]]:
    said = []
    for error in (
        ValueError("no"),
        OSError(28, "full"),
        OfUser(1, 2),
        ValueError(threading.Lock()),
    ):
        try:
            save(state(1), storage_writer=Writer(root), planner=Failing(error))
        except CheckpointException as failed:
            cause = failed.failures[1][0]
            said.append((type(cause).__name__, str(cause)))
    return said


def test_what_a_planner_raises_keeps_its_class_on_every_rank(tmp_path: Path) -> None:
    first, second = run_ranks(2, raised, str(tmp_path))
    assert first == second
    assert first[:3] == [
        ("ValueError", "no"),
        ("OSError", "[Errno 28] full"),
        ("LookupError", "OfUser: 1 and 2"),
    ]
    assert first[3][0] == "ValueError"


class OfProgram:
    """A type that is registered by the program, which the process of a save does not run."""

    def __init__(self, number: int) -> None:
        self.number = number


class Unsendable(OfProgram):
    """Another one, whose functions have no names."""


def number_of(value: OfProgram) -> int:
    return value.number


def in_processes(url: str) -> list[str]:
    dist_ckpt.register_type(OfProgram, name="of_program", encode=number_of, decode=OfProgram)
    dist_ckpt.register_type(
        Unsendable, name="unsendable", encode=lambda value: value.number, decode=Unsendable
    )
    writer = Writer(url, metrics={"loss": 0.5})
    process: dict[str, Any] = {"async_checkpointer_type": AsyncCheckpointerType.PROCESS}
    for each in [begin(writer, i, {**state(i), "own": OfProgram(i)}, **process) for i in range(3)]:
        each.result()
    # The program saves as well, and none takes the run from the other.
    save(state(3), checkpoint_id="3", storage_writer=writer)
    begin(writer, 4, **process).result()
    said = []
    for place, value in ((writer, Unsendable(1)), (Writer("memory://here"), 1)):
        error = begin(place, 9, {"own": value}, **process).exception()
        failures = getattr(error, "failures", None)
        said.append(str(failures[0][0] if failures else error))
    found: dict[str, Any] = {"own": None}
    load(found, storage_reader=Reader(url, step=1))
    assert isinstance(found["own"], OfProgram)
    assert found["own"].number == 1
    assert not wrong(url, range(5))
    return said


def test_processes_save_to_s3_what_the_program_registered(
    s3_service: S3Service, s3_name: str
) -> None:
    url = s3_service.url(s3_name)
    ((unsendable, nowhere),) = run_ranks(1, in_processes, url)
    assert (
        "registered as 'unsendable': make encode= and decode= functions of a module" in unsendable
    )
    assert "memory://here is in the memory of this process" in nowhere
    assert Repository(resolve(url)).open(2).manifest.metrics == {"loss": 0.5}
