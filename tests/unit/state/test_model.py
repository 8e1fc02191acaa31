"""A module as a part: canonical names, live targets, extra state."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.optim.swa_utils import AveragedModel

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.module_state import canonical_name, wrapped_attribute
from dist_ckpt.state.part import Stored
from tests.unit.state.roundtrip import Saved, assert_same, load, save


class Block(nn.Module):
    """A submodule called `module`, a buffer of each kind, and a 0-dim integer buffer."""

    mask: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Linear(3, 2)
        self.norm = nn.BatchNorm1d(2)
        self.register_buffer("mask", torch.ones(2), persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.norm(self.module(x)) * self.mask
        return out


NAMES = [
    "module.weight",
    "module.bias",
    "norm.weight",
    "norm.bias",
    "norm.running_mean",
    "norm.running_var",
    "norm.num_batches_tracked",
]


def compiled(module: nn.Module) -> nn.Module:
    wrapped = torch.compile(module, backend="eager")
    assert isinstance(wrapped, nn.Module)
    return wrapped


def inner_checkpoint(module: nn.Module) -> nn.Module:
    assert isinstance(module, Block)
    module.norm = checkpoint_wrapper(module.norm)  # type: ignore[assignment]
    return module


WRAPPERS = {
    "plain": lambda m: m,
    "data_parallel": nn.DataParallel,
    "compile": compiled,
    "checkpoint": checkpoint_wrapper,
    "inner checkpoint": inner_checkpoint,
    "all": lambda m: compiled(nn.DataParallel(checkpoint_wrapper(inner_checkpoint(m)))),
}


@pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS.keys())
def test_no_wrapper_reaches_a_name_and_all_load_into_each_other(wrap: Any) -> None:
    torch.manual_seed(1)
    wrapped = ModelPart(wrap(Block()), name="model")
    assert list(wrapped.capture().tensors) == NAMES
    assert sorted(wrapped.parameter_names().values()) == sorted(NAMES[:4])
    saved = save(wrapped)
    torch.manual_seed(2)
    other = Block()
    load(ModelPart(other), saved)
    assert_same(save(ModelPart(other)), saved)
    torch.manual_seed(3)
    again = ModelPart(wrap(Block()))
    load(again, saved)
    assert_same(save(again), saved)


def test_a_subclass_of_a_wrapper_is_one() -> None:
    class Mine(nn.DataParallel[Block]):
        pass

    assert list(ModelPart(Mine(Block())).capture().tensors) == NAMES
    assert wrapped_attribute(Mine(Block())) == "module"
    assert wrapped_attribute(Block()) is None


def test_averaged_weights_are_called_as_those_of_the_model() -> None:
    average = AveragedModel(nn.DataParallel(nn.Linear(2, 1)))
    names = ["n_averaged", "weight", "bias"]
    assert list(ModelPart(average).capture().tensors) == names


def test_a_name_of_nothing_is_left_as_it_is() -> None:
    assert canonical_name(Block(), "gone.module.weight") == "gone.module.weight"


def test_targets_are_the_live_tensors_and_change_nothing() -> None:
    model = Block()
    part = ModelPart(model)
    saved = save(part)
    before = save(part)
    targets = part.targets(saved.stored())
    assert targets.tensors["module.weight"].data_ptr() == model.module.weight.data_ptr()
    assert not targets.tensors["module.weight"].requires_grad
    assert_same(save(part), before)
    weight = model.module.weight
    load(part, saved)
    assert model.module.weight is weight


def test_what_is_stored_and_what_is_live_are_compared_by_name() -> None:
    saved = save(ModelPart(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))))
    objects = {"0.extra": encode(1, path="x")}
    part = ModelPart(nn.Sequential(nn.Linear(2, 2), nn.Identity(), nn.Linear(2, 2, bias=False)))
    targets = part.targets(Saved(saved.tensors, objects).stored())
    assert targets.missing == ["2.weight"]
    assert targets.unexpected == ["1.bias", "1.weight", "0.extra"]
    assert sorted(targets.tensors) == ["0.bias", "0.weight"]


def test_buffers_are_those_whose_replicas_may_differ() -> None:
    captured = ModelPart(Block()).capture()
    assert captured.unequal == set(NAMES[4:])
    assert not captured.per_rank


def test_tied_parameters_have_every_name_and_optimizers_see_the_first() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
    model[1].weight = model[0].weight
    part = ModelPart(model)
    assert list(part.capture().tensors) == ["0.weight", "1.weight"]
    assert part.parameter_names() == {id(model[0].weight): "0.weight"}
    load(part, save(part))
    assert model[1].weight is model[0].weight


# ------------------------------------------------------------------ extra state and hooks


class Extra(nn.Module):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.state = state

    def get_extra_state(self) -> Any:
        return self.state

    def set_extra_state(self, state: Any) -> None:
        self.state = state


@pytest.mark.parametrize(
    "state", [None, {"scale": 0.5, "names": ("a",)}, {"amax": [torch.arange(3.0)], "n": 1}]
)
def test_extra_state_is_an_object_under_its_name(state: Any) -> None:
    part = ModelPart(nn.Sequential(Extra(state)))
    saved = save(part)
    assert list(saved.objects) == ["0._extra_state"]
    other = Extra("other")
    load(ModelPart(nn.Sequential(other)), saved)
    assert repr(other.state) == repr(state)
    assert_same(save(ModelPart(nn.Sequential(other))), saved)


def test_extra_state_that_is_a_tensor_may_change_its_size() -> None:
    saved = save(ModelPart(checkpoint_wrapper(Extra(torch.arange(5)))))
    assert saved.tensors.keys() == {"_extra_state", "linear.weight", "linear.bias"}
    other = Extra(torch.zeros(2, dtype=torch.int64))
    load(ModelPart(checkpoint_wrapper(other)), saved)
    assert torch.equal(other.state, torch.arange(5))


def test_extra_state_that_cannot_be_stored_is_named() -> None:
    part = ModelPart(nn.Sequential(Extra({"f": print})), name="net")
    with pytest.raises(UsageError, match=r"net\.0\._extra_state\.f"):
        part.capture()


def test_extra_state_that_the_module_refuses_is_incompatible() -> None:
    class Strict(Extra):
        def set_extra_state(self, state: Any) -> None:
            raise KeyError("no such thing")

    saved = save(ModelPart(Extra(1)))
    with pytest.raises(IncompatibleError, match=r"model: load_state_dict refused .*_extra_state"):
        load(ModelPart(Strict(1)), saved)


def test_a_copy_that_a_hook_makes_is_given_back_through_load_state_dict() -> None:
    def double(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[prefix + "weight"] = state[prefix + "weight"] * 2

    def halve(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        if prefix + "weight" in state:
            state[prefix + "weight"] = state[prefix + "weight"] / 2

    def hooked() -> Any:
        linear: Any = nn.Linear(2, 2)
        linear.register_state_dict_post_hook(double)
        linear.register_load_state_dict_pre_hook(halve)
        return linear

    one, two = hooked(), hooked()
    saved = save(ModelPart(one))
    assert torch.equal(saved.tensors["weight"], one.weight * 2)
    load(ModelPart(two), saved)
    assert torch.equal(two.weight, one.weight)
    assert torch.equal(two.bias, one.bias)


def test_an_entry_that_only_state_dict_knows_is_refused() -> None:
    def invent(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state[prefix + "invented"] = 1

    linear: Any = nn.Linear(1, 1)
    linear.register_state_dict_post_hook(invent)
    with pytest.raises(IncompatibleError, match="takes no such key"):
        load(ModelPart(linear), save(ModelPart(linear)))


def test_a_lenient_load_leaves_out_what_is_not_stored() -> None:
    extra = Extra("kept")
    ModelPart(extra).restore(Stored({}, {}, 0, 1, 1), {})
    assert extra.state == "kept"


# ------------------------------------------------------------------ refusals


def test_modules_without_data_are_refused() -> None:
    with torch.device("meta"):
        meta = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"model\.weight has no data .*to_empty"):
        ModelPart(meta).capture()
    with pytest.raises(UsageError, match=r"net\.weight has no data"):
        ModelPart(nn.LazyLinear(2), name="net").capture()


def test_two_names_that_fall_together_are_refused() -> None:
    def alias(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        state["weight"] = state["module.weight"].clone()

    wrapped: Any = nn.DataParallel(nn.Linear(1, 1))
    wrapped.register_state_dict_post_hook(alias)
    with pytest.raises(UsageError, match=r"'module.weight' and 'weight' are both called 'weight'"):
        ModelPart(wrapped).capture()


def test_flattened_parameters_are_refused() -> None:
    # FSDP1 itself needs a process group; what it is known by is its name.
    flat = type("FullyShardedDataParallel", (nn.Linear,), {})
    flat.__module__ = "torch.distributed.fsdp.fully_sharded_data_parallel"
    with pytest.raises(UsageError, match=r"net holds a FullyShardedDataParallel module at '1'"):
        ModelPart(nn.Sequential(nn.ReLU(), flat(1, 1)), name="net")
    with pytest.raises(UsageError, match=r"at 'its root', .*fully_shard.*dcp\.Writer"):
        ModelPart(flat(1, 1))
