"""Tensors that are several behind one face, of a small class that takes no time to be imported."""

from __future__ import annotations

import itertools
import json
from typing import Any

import pytest
import torch
from torch import nn
from torch.masked import masked_tensor
from torch.utils._pytree import tree_map

import dist_ckpt
from dist_ckpt.errors import CheckpointError, IncompatibleError, UsageError
from dist_ckpt.state import layout
from dist_ckpt.storage.memory import MemoryStore
from tests.distributed.scaled import Scaled, same, scaled

_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-wrapped-small-{next(_names)}")


def built(seed: int, *, steps: bool) -> tuple[Any, torch.optim.Optimizer]:
    model: Any = nn.Linear(4, 6)
    model.kept = nn.Parameter(scaled(3, seed), requires_grad=False)
    optimizer = torch.optim.AdamW(model.parameters())
    if steps:
        optimizer.state[model.weight] = {
            "step": torch.tensor(float(seed)),
            "exp_avg": scaled(6, seed + 1),
            "exp_avg_sq": scaled(6, seed + 2),
        }
    return model, optimizer


@pytest.mark.parametrize("steps", [False, True], ids=["fresh", "used"])
def test_weights_and_moments_come_back(steps: bool) -> None:
    store = new_store()
    model, optimizer = built(1, steps=True)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, store)
    live, other = built(5, steps=steps)
    weight = live.kept
    dist_ckpt.load({"model": live, "optimizer": other}, store)
    assert live.kept is weight
    assert same(live.kept, model.kept)
    for key, value in optimizer.state[model.weight].items():
        assert same(other.state[live.weight][key], value)


class Face(torch.Tensor):
    """A tensor that keeps its values in another one and does not say so."""

    @staticmethod
    def __new__(cls, behind: torch.Tensor) -> Any:
        make: Any = torch.Tensor._make_wrapper_subclass
        return make(cls, behind.shape, dtype=behind.dtype)

    def __init__(self, behind: torch.Tensor) -> None:
        self.behind = behind

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        def plain(item: Any) -> Any:
            return item.behind if isinstance(item, Face) else item

        given = tree_map(plain, (args, kwargs or {}))
        out = func(*given[0], **given[1])
        return tree_map(lambda item: Face(item) if isinstance(item, torch.Tensor) else item, out)


class Plain(torch.Tensor):
    """A class of its own for the memory of its own."""


def test_a_face_that_does_not_say_what_is_behind_it_is_refused_when_it_is_given() -> None:
    module: Any = nn.Module()
    module.w = nn.Parameter(Face(torch.arange(3.0)))
    with pytest.warns(UserWarning, match="prototype"):
        masked = masked_tensor(torch.ones(2), torch.tensor([True, False]))
    for state in ({"m": module}, {"x": [masked]}, {"x": {"w": Face(torch.ones(2))}}):
        with pytest.raises(UsageError, match=r"cannot store .* and has no __tensor_flatten__"):
            dist_ckpt.Checkpointer(new_store(), state)
    store = new_store()
    dist_ckpt.save({"x": [torch.arange(3.0).as_subclass(Plain), Face(torch.ones(0))]}, store)
    live = {"x": [torch.zeros(3).as_subclass(Plain), torch.ones(0)]}
    filled = live["x"][0]
    dist_ckpt.load(live, store)
    assert live["x"][0] is filled
    assert filled.tolist() == [0.0, 1.0, 2.0]


def test_other_kinds_are_refused_before_anything_changes() -> None:
    store = new_store()
    model, optimizer = built(1, steps=True)
    dist_ckpt.save({"model": model, "optimizer": optimizer, "ema": {"w": scaled(2, 1)}}, store)
    live, other = built(5, steps=True)
    before = live.weight.clone()
    other.state[live.weight]["exp_avg"].bits = 4
    with pytest.raises(IncompatibleError, match=r"Scaled with 8, and a .*Scaled with 4"):
        dist_ckpt.load({"model": live, "optimizer": other, "ema": {}}, store)
    assert torch.equal(live.weight, before)
    # As torch's own load: what an optimizer keeps becomes what was kept.
    other.state[live.weight]["exp_avg"] = torch.zeros(6, 4)
    dist_ckpt.load({"model": live, "optimizer": other, "ema": {}}, store)
    assert same(other.state[live.weight]["exp_avg"], scaled(6, 2))
    del layout.known_classes[layout.label_of(Scaled)]  # as in a program that has not seen the class
    with pytest.raises(IncompatibleError, match=r"the state of this program has no .*\.Scaled"):
        dist_ckpt.load({"ema": {}}, store, only="ema")


def test_a_plain_tensor_takes_the_place_of_several_and_the_other_way_round() -> None:
    store = new_store()
    kept = {"x": scaled(5, 1), "y": torch.ones(5, 4)}
    dist_ckpt.save({"kept": kept}, store)
    live: dict[str, Any] = {"x": torch.zeros(5, 4), "y": scaled(5, 2)}
    dist_ckpt.load({"kept": live}, store)
    assert same(live["x"], scaled(5, 1))
    assert type(live["y"]) is torch.Tensor
    assert live["y"].tolist() == [[1] * 4] * 5


@pytest.mark.parametrize("turned", [False, True])
def test_a_tensor_that_is_the_whole_value_stays_what_it_is(*, turned: bool) -> None:
    store = new_store()
    stored, live = torch.ones(5, 4), scaled(5, 2)
    if turned:
        stored, live = live, stored
    dist_ckpt.save({"x": stored}, store)
    before = live.clone() if turned else scaled(5, 2)
    with pytest.raises(IncompatibleError, match=r"missing in the checkpoint: x"):
        dist_ckpt.load({"x": live}, store)
    assert torch.equal(live, before) if turned else same(live, before)


def test_a_dict_takes_them_as_weights() -> None:
    store = new_store()
    dist_ckpt.save({"model": {"w": scaled(5, 1), "b": torch.ones(2)}}, store)
    live: dict[str, torch.Tensor] = {"w": scaled(5, 2), "b": torch.zeros(2)}
    kept = live["w"]
    dist_ckpt.load_weights(live, store)
    assert live["w"] is kept
    assert same(live["w"], scaled(5, 1))
    assert live["b"].tolist() == [1, 1]
    with pytest.raises(IncompatibleError, match=r"unexpected in the checkpoint: model/w\.codes"):
        dist_ckpt.load_weights({"w": torch.zeros(5, 4), "b": torch.zeros(2)}, store)
    with pytest.raises(IncompatibleError, match=r"model/w\.codes: stored int8\[5, 4\]"):
        dist_ckpt.load_weights({"w": scaled(6, 2), "b": torch.zeros(2)}, store)
    with pytest.raises(CheckpointError, match=r"two tensors would be stored as 'w\.mean'"):
        dist_ckpt.load_weights({"w": scaled(5, 2), "w.mean": torch.zeros(())}, store)


class Shows(nn.Linear):
    """Shows what is no parameter or buffer of its own, and takes nothing of it."""

    def __init__(self, fill: float, *, fresh: bool) -> None:
        super().__init__(2, 2)
        self.kept, self.fresh = torch.full((2,), fill), fresh

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[f"{prefix}kept"] = self.kept.clone() if self.fresh else self.kept


def test_what_a_module_shows_and_does_not_take_is_filled_or_refused_first() -> None:
    store = new_store()
    dist_ckpt.save({"model": nn.Sequential(Shows(1.0, fresh=False))}, store)
    live = nn.Sequential(Shows(2.0, fresh=False))
    dist_ckpt.load({"model": live}, store)
    assert shown(live).kept.tolist() == [1, 1]
    other = nn.Sequential(Shows(2.0, fresh=True))
    before = shown(other).weight.clone()
    with pytest.raises(IncompatibleError, match=r"load_state_dict takes no such key.*skip="):
        dist_ckpt.load({"model": other}, store)
    assert torch.equal(shown(other).weight, before)
    dist_ckpt.load({"model": other}, store, skip=["model/0.kept"])
    assert torch.equal(shown(other).weight, shown(live).weight)


def shown(model: nn.Sequential) -> Shows:
    (each,) = model
    assert isinstance(each, Shows)
    return each


class State:
    """How a parameter was quantized, as bitsandbytes keeps it: tensors, and a packed rest."""

    def __init__(self, scale: torch.Tensor, offset: int, dtype: str = "float32") -> None:
        self.scale, self.offset, self.dtype = scale, offset, dtype

    def as_dict(self, packed: bool = False) -> dict[str, torch.Tensor]:
        text = f'{{"offset":{self.offset},"dtype":"{self.dtype}"}}'
        rest = torch.tensor(list(text.encode()), dtype=torch.uint8)
        return {"scale": self.scale, "quant_state.test": rest}

    @classmethod
    def from_dict(cls, stored: dict[str, torch.Tensor], device: torch.device) -> State:
        rest = json.loads(bytes(stored["quant_state.test"].tolist()))
        return cls(stored["scale"], rest["offset"], rest["dtype"])


class Quantized(nn.Linear):
    def __init__(self, state: State) -> None:
        super().__init__(2, 2)
        self.weight.quant_state = self.quant_state = state  # type: ignore[attr-defined]

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for key, value in self.weight.quant_state.as_dict(packed=True).items():  # type: ignore[attr-defined]
            destination[f"{prefix}weight.{key}"] = value


def test_a_parameter_gets_back_what_it_was_quantized_with() -> None:
    store = new_store()
    dist_ckpt.save({"model": nn.Sequential(Quantized(State(torch.ones(3), 1234)))}, store)
    live = nn.Sequential(Quantized(State(torch.zeros(3), 1)))
    with pytest.raises(IncompatibleError, match="another shape"):  # of the packed rest: not here
        dist_ckpt.load({"model": nn.Sequential(nn.Linear(3, 2))}, store)
    dist_ckpt.load({"model": live}, store)
    found: Any = live[0].weight
    assert (found.quant_state.offset, found.quant_state.scale.tolist()) == (1234, [1, 1, 1])
    assert live[0].quant_state is found.quant_state
    hostile = new_store()
    state = State(torch.ones(3), 1, dtype="load")
    dist_ckpt.save({"model": nn.Sequential(Quantized(state))}, hostile)
    with pytest.raises(IncompatibleError, match=r"\['load'\] are no dtypes"):
        dist_ckpt.load({"model": live}, hostile)
