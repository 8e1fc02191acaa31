"""A live object that stands in a value twice takes one stored value, and never that of another."""

from __future__ import annotations

import dataclasses
from argparse import Namespace
from array import array
from collections import OrderedDict, defaultdict, deque
from io import BytesIO
from typing import Any

import numpy as np
import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from tests.unit.lifecycle.training import new_store


@dataclasses.dataclass
class Meter:
    """What many programs make once as a default."""

    total: float = 0.0
    seen: list[int] = dataclasses.field(default_factory=list)


dist_ckpt.register_type(Meter, name="unit-met-twice-meter")


def loaded(stored: Any, live: Any) -> Any:
    """Return what becomes of `live`."""
    store = new_store()
    dist_ckpt.save({"value": stored}, store)
    state = {"value": live}
    dist_ckpt.load(state, store)
    return state["value"]


def pairs() -> dict[str, tuple[Any, Any, Any]]:
    """Return two values, and one that is live for both."""
    return {
        "list": ([1], [2, {"x": 3}], [0]),
        "dict": ({"a": 1}, {"b": [2]}, {}),
        "OrderedDict": (OrderedDict(a=1), OrderedDict(b=2), OrderedDict()),
        "defaultdict": (defaultdict(int, a=1), defaultdict(int, a=2), defaultdict(int)),
        "deque": (deque([1], 5), deque([2, 3], 5), deque([9], 5)),
        "set": ({1}, {2}, {3}),
        "bytearray": (bytearray(b"one"), bytearray(b"two"), bytearray(b"xxx")),
        "array": (array("d", [1]), array("d", [2]), array("d", [3])),
        "Namespace": (Namespace(a=1), Namespace(a=2), Namespace(a=3)),
        "BytesIO": (BytesIO(b"one"), BytesIO(b"two"), BytesIO()),
        "dataclass": (Meter(1.0, [1]), Meter(2.0, [2]), Meter()),
        "ndarray": (np.ones(3), np.array([0.0, -0.0, 2.0]), np.zeros(3)),
        "signed zero": ([0.0], [-0.0], [1.0]),
    }


def content(value: Any) -> Any:
    if isinstance(value, BytesIO):
        return value.getvalue()
    return (value.dtype, value.tobytes()) if isinstance(value, np.ndarray) else repr(value)


@pytest.mark.parametrize("name", pairs())
def test_what_was_two_comes_back_as_two(name: str) -> None:
    first, second, live = pairs()[name]
    found = loaded({"a": first, "b": second}, {"a": live, "b": live})
    assert found["a"] is live, "who holds it sees the change"
    assert content(found["a"]) == content(first)
    assert content(found["b"]) == content(second)


@pytest.mark.parametrize("name", pairs())
def test_what_was_one_stays_one(name: str) -> None:
    first, _, live = pairs()[name]
    found = loaded({"a": first, "b": [first]}, {"a": live, "b": [live]})
    assert found["a"] is found["b"][0] is live
    assert content(live) == content(first)


def test_as_keys_of_one_default() -> None:
    live = dict.fromkeys(["train", "val", "test"], Meter())
    found = loaded({"train": Meter(1.0), "val": Meter(2.0, [1]), "test": Meter(1.0)}, live)
    assert [found[each].total for each in ("train", "val", "test")] == [1.0, 2.0, 1.0]
    assert found["val"].seen == [1]


def test_views_that_share_elements_keep_what_each_was() -> None:
    base = np.full(6, 7.0)
    found = loaded({"a": np.ones(4), "b": np.zeros(4)}, {"a": base[:4], "b": base[2:]})
    assert found["a"].tolist() == [1] * 4
    assert found["b"].tolist() == [0] * 4
    assert base.tolist() == [1, 1, 1, 1, 7, 7]


def test_views_that_agree_stay_views() -> None:
    stored = np.arange(10.0)
    base = np.zeros(10)
    live = {"a": base[:6], "odd": base[1::2], "back": base[::-1], "all": base, "none": base[:0]}
    views = {"a": stored[:6], "odd": stored[1::2], "back": stored[::-1], "all": stored}
    found = loaded({**views, "none": stored[:0]}, live)
    assert base.tolist() == stored.tolist()
    assert all(each is base or each.base is base for each in found.values())


@pytest.mark.parametrize("size", [3, 100], ids=["small", "large"])
def test_an_array_whose_elements_are_one_memory_is_replaced(size: int) -> None:
    base = np.full(2 * size, 7.0)
    windows = np.lib.stride_tricks.as_strided(base, (size, size), (8, 8))
    stored = np.arange(float(size * size)).reshape(size, size)
    found = loaded({"x": stored}, {"x": windows})
    assert found["x"].tolist() == stored.tolist()
    assert base.tolist() == [7] * 2 * size


def test_no_step_of_these_leads_to_an_element_twice() -> None:
    base = np.zeros((4, 6, 2))
    live = [base[::-1, 1::2, 0].T, base[:, ::-2, 1], np.zeros((5, 5)).diagonal()]
    live[-1].setflags(write=True)
    stored = [np.random.default_rng(1).random(each.shape) for each in live]
    found = loaded(stored, list(live))
    for mine, held, each in zip(found, live, stored, strict=True):
        assert mine is held
        assert mine.tolist() == each.tolist()


def test_columns_of_one_array_are_apart() -> None:
    base = np.zeros((3, 2))
    found = loaded({"x": np.ones(3), "y": np.full(3, 2.0)}, {"x": base[:, 0], "y": base[:, 1]})
    assert base.tolist() == [[1, 2]] * 3
    assert found["x"].base is base


@pytest.mark.parametrize("make", [torch.zeros, np.zeros])
def test_what_is_filled_before_anything_can_stand_beside_it_is_refused(make: Any) -> None:
    live, size = make(50_000), 50_000  # large arrays are tensors in the checkpoint
    with pytest.raises(IncompatibleError, match=r"value\.a and value/value\.b, which share memory"):
        loaded({"a": make(size) + 1, "b": make(size)}, {"a": live, "b": live})
    assert live.sum() == 0
    found = loaded({"a": make(size) + 1, "b": make(size) + 1}, {"a": live, "b": live})
    assert found["a"] is found["b"] is live
    assert live.sum() == size
