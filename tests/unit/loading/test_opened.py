"""Looking into a checkpoint without a model: names, slices and values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import dist_ckpt
from dist_ckpt.errors import IntegrityError, NotFound, UsageError
from dist_ckpt.loading.opened import OpenedCheckpoint, open_checkpoint
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

CUBE = torch.arange(5 * 4 * 3, dtype=torch.int32).reshape(5, 4, 3)
LARGE = torch.arange(4 << 20, dtype=torch.int32).reshape(4096, 1024)
NOTES = {"a": [1, 2.5], "t": torch.arange(3)}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = torch.nn.Module()
    for name, tensor in {"cube": CUBE, "large": LARGE, "one": torch.tensor(1.5)}.items():
        model.register_buffer(name, tensor)
    root = tmp_path_factory.mktemp("opened") / "run"
    dist_ckpt.save({"model": model, "notes": NOTES}, root, step=7, metrics={"loss": 0.5})
    return root


@pytest.fixture
def opened(run: Path) -> Iterator[OpenedCheckpoint]:
    with open_checkpoint(run) as checkpoint:
        yield checkpoint


class Counting(LocalStore):
    """A directory that counts the bytes of tensors read from it."""

    nbytes = 0

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Count and read."""
        if key.endswith(".safetensors"):
            self.nbytes += sum(map(len, buffers))
        return super().read_into(key, offset, *buffers)


def test_what_there_is_is_known_without_reading_it(run: Path) -> None:
    fault = Fail(OSError("read"))
    store = FaultyStore(LocalStore(run), [Rule("read_into", fault, key="*.safetensors", nth=None)])
    opened = open_checkpoint(store)
    assert (opened.step, opened.verified) == (7, True)
    assert opened.parts == ("model", "notes", "rng")
    assert opened.names == ("model/cube", "model/large", "model/one", "notes/value.t")
    info = opened.info["model/cube"]
    assert (info.part, info.name, info.dtype) == ("model", "cube", torch.int32)
    assert (info.shape, info.nbytes) == (CUBE.shape, CUBE.nbytes)
    assert opened.manifest is not None
    assert opened.manifest.metrics == {"loss": 0.5}
    assert repr(opened["model/one"]) == "<stored model/one: torch.float32[]>"
    assert "3 tensors" not in repr(opened)


def test_it_is_a_mapping(opened: OpenedCheckpoint) -> None:
    assert list(opened) == list(opened.names) == list(opened.keys())
    assert len(opened) == 4
    assert "model/cube" in opened
    assert opened.get("model/cubes") is None
    with pytest.raises(NotFound, match=r"no tensor 'model/cubes' \(did you mean 'model/cube'"):
        opened["model/cubes"]
    assert torch.equal(dict(opened)["model/one"].read(), torch.tensor(1.5))


SUBSCRIPTS = st.one_of(st.integers(-6, 6), st.slices(5).filter(lambda s: (s.step or 1) > 0))


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(items=st.lists(st.one_of(SUBSCRIPTS, st.just(...)), max_size=4))
def test_any_slice_is_what_torch_would_have_given(
    items: list[Any], opened: OpenedCheckpoint
) -> None:
    subscript = tuple(items) if len(items) != 1 else items[0]
    try:
        expected = CUBE[subscript]
    except IndexError:
        with pytest.raises((IndexError, UsageError)):
            opened["model/cube"][subscript]
        return
    if items.count(...) > 1:  # torch takes more than one; who writes that has made a slip
        with pytest.raises(UsageError, match="one ellipsis"):
            opened["model/cube"][subscript]
        return
    found = opened["model/cube"][subscript]
    assert torch.equal(found, expected)
    assert found.shape == expected.shape


@pytest.mark.parametrize(
    "subscript",
    [
        *(slice(None, None, -1),),
        *(None, True, [0, 1], torch.tensor([0]), np.array([0, 1]), (np.array([0, 1]), ...)),
    ],
)
def test_other_subscripts_say_what_to_do(subscript: Any, opened: OpenedCheckpoint) -> None:
    with pytest.raises(UsageError, match=r"flip what was read|read\(\) it|selects nothing"):
        opened["model/cube"][subscript]


@pytest.mark.parametrize("bad", [slice(None, None, 0), slice("a", "b"), slice(0.5, 2)])
def test_a_slice_of_what_is_no_integer_selects_nothing(bad: Any, opened: OpenedCheckpoint) -> None:
    with pytest.raises(UsageError, match="selects nothing of a stored tensor"):
        opened["model/cube"][bad]


@pytest.mark.parametrize(
    ("offsets", "memory"),
    [
        ((2, 0, 0), torch.empty(100, 1, 1, dtype=torch.int32)),
        ((-1, 0, 0), torch.empty(1, 1, 1, dtype=torch.int32)),
        ((0, 0), torch.empty(1, 1, dtype=torch.int32)),
        ((0, 0, 0), torch.empty(1, 1, dtype=torch.int32)),
        ((0, 0, 0), torch.empty(1, 1, 1, dtype=torch.int64)),
    ],
)
def test_a_box_that_there_is_not_is_no_damage(
    offsets: tuple[int, ...], memory: torch.Tensor, opened: OpenedCheckpoint
) -> None:
    with pytest.raises(UsageError, match=r"model/cube is .* and has no box"):
        opened.read_boxes([("model/cube", offsets, memory)])


def test_a_part_that_there_is_not_is_told(opened: OpenedCheckpoint) -> None:
    for ask in (opened.ties, opened.differs_by_rank, opened.read_encoded, opened.read_values):
        with pytest.raises(NotFound, match=r"no part 'modle' \(did you mean 'model'"):
            ask("modle")


def test_a_step_beyond_the_end_selects_the_first(opened: OpenedCheckpoint) -> None:
    assert torch.equal(opened["model/cube"][:: 10**30], CUBE[:1])


@pytest.mark.parametrize("kind", [np.int64, np.array])
def test_an_integer_may_be_of_numpy(kind: Any, opened: OpenedCheckpoint) -> None:
    stored = opened["model/cube"]
    assert torch.equal(stored[kind(1), ..., kind(-1)], stored.read()[1, ..., -1])


def test_a_slice_reads_its_range_only(run: Path) -> None:
    store = Counting(run)
    rows = open_checkpoint(store)["model/large"][2048:2050]
    assert torch.equal(rows, LARGE[2048:2050])
    # Two rows are 8 KiB, and lie in two blocks of 1 MiB at the most.
    assert 0 < store.nbytes <= 2 << 20


def test_what_is_read_is_verified_unless_that_is_declined(run: Path, tmp_path: Path) -> None:
    (path,) = run.glob("step-*/*/model*")
    damaged = tmp_path / "copy"
    for source in run.rglob("*"):
        if source.is_file():
            target = damaged / source.relative_to(run)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(source.read_bytes())
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    (damaged / path.relative_to(run)).write_bytes(data)
    assert path.name.startswith("model")
    opened = open_checkpoint(damaged)
    wrong = []
    for name in opened.names:
        try:
            opened[name].read()
        except IntegrityError:
            wrong.append(name)
    assert wrong, "the last block holds a tensor"
    unchecked = open_checkpoint(damaged, verify=False)
    assert not unchecked.verified
    for name in wrong:
        unchecked[name].read()


def test_values_come_with_the_tensors_in_them(opened: OpenedCheckpoint) -> None:
    notes = opened.read_values("notes")["value"]
    assert notes["a"] == NOTES["a"]
    assert torch.equal(notes["t"], torch.arange(3))
    assert opened.read_values("model") == {}
    assert set(opened.read_values("rng")) >= {"python", "torch"}
    with pytest.raises(NotFound, match=r"no part 'note' \(did you mean 'notes'"):
        opened.read_values("note")


@pytest.mark.parametrize("how", ["path", "text", "step directory", "store"])
def test_ways_to_name_it(how: str, run: Path) -> None:
    places: dict[str, Path | str | Store] = {
        "path": run,
        "text": f"file://{run}",
        "step directory": f"{run}/step-0000000007/",
        "store": LocalStore(run),
    }
    with open_checkpoint(places[how]) as opened:
        assert opened.step == 7
        assert torch.equal(opened["model/one"].read(), torch.tensor(1.5))


def test_what_is_not_there(run: Path, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no checkpoint of step 3"):
        open_checkpoint(run, step=3)
    with pytest.raises(NotFound, match="is no run"):
        open_checkpoint(tmp_path / "nothing")
    with pytest.raises(UsageError, match="checkpoint of step 7, not of step 3"):
        open_checkpoint(run / "step-0000000007", step=3)


def test_a_store_that_was_given_stays_open(run: Path) -> None:
    closed = []

    class Noting(LocalStore):
        def close(self) -> None:
            """Take note."""
            closed.append(self)

    with open_checkpoint(Noting(run)):
        pass
    assert closed == []
