"""Modules on the meta device, and dicts of tensors: what becomes real, and what stays."""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

import pytest
import torch
from torch import nn

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.layout import materialise
from dist_ckpt.state.model import ModelPart, give_memory
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Part, Stored
from dist_ckpt.state.tensors import TensorsPart
from tests.unit.state.roundtrip import save


class Marked(nn.Parameter):
    """A parameter that a program tells from others by its class."""


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(3, 4, bias=False)
        self.outer = nn.Linear(3, 4, bias=False)
        self.outer.weight = self.inner.weight
        self.own = Marked(torch.ones(2), requires_grad=False)
        mean = torch.ones(2)
        self.register_buffer("mean", mean)
        self.alias = nn.Module()
        self.alias.register_buffer("mean", mean)


def on_meta() -> Tied:
    with torch.device("meta"):
        return Tied()


def fill(part: Part, stored: Stored, *, device: str | None = None) -> dict[str, torch.Tensor]:
    """Do what a load does with one part, with ones in place of what is read."""
    found = part.targets(stored)
    where = None if device is None else torch.device(device)
    tensors = materialise(found.tensors, device=where)
    for tensor in tensors.values():
        tensor.fill_(1)
    part.restore(stored, tensors)
    return tensors


def test_a_module_becomes_real_in_the_memory_that_was_read_into() -> None:
    module = on_meta()
    module.own.tag = "mine"  # type: ignore[attr-defined]
    weight, own = module.inner.weight, module.own
    optimizer = torch.optim.AdamW(module.parameters())
    stored = save(ModelPart(Tied())).stored()
    tensors = fill(ModelPart(module), stored)
    assert module.inner.weight is weight is module.outer.weight
    assert any(each is weight for each in optimizer.param_groups[0]["params"])
    assert weight.data_ptr() == tensors["inner.weight"].data_ptr(), "there is no second copy"
    assert tensors["inner.weight"] is tensors["outer.weight"], "tied once, read once"
    assert module.mean is module.alias.mean
    assert module.own is own
    assert (type(own), own.requires_grad, own.tag) == (Marked, False, "mine")  # type: ignore[attr-defined]
    assert weight.requires_grad
    (module.inner(torch.ones(1, 3)) * module.outer(torch.ones(1, 3))).sum().backward()
    optimizer.step()
    assert not torch.equal(weight, torch.ones(4, 3))


def test_an_optimizer_over_meta_parameters_gets_real_moments() -> None:
    real = nn.Linear(2, 2)
    adam = torch.optim.AdamW(real.parameters())
    real(torch.ones(1, 2)).sum().backward()
    adam.step()
    part = ModelPart(real)
    optimizer_stored = save(OptimizerPart(adam, models=[part])).stored()
    with torch.device("meta"):
        module = nn.Linear(2, 2)
    later = torch.optim.AdamW(module.parameters())
    into = ModelPart(module)
    fill(into, save(part).stored())
    fill(OptimizerPart(later, models=[into]), optimizer_stored)
    assert later.state[module.weight]["exp_avg"].device.type == "cpu"
    module(torch.ones(1, 2)).sum().backward()
    later.step()


def test_only_what_is_loaded_becomes_real() -> None:
    module = on_meta()
    stored = save(ModelPart(Tied())).stored()
    part = ModelPart(module)
    found = part.targets(stored)
    tensors = materialise(found.tensors, device=torch.device("cpu"))
    assert all(tensor.device.type == "meta" for tensor in module.parameters()), "until `restore`"
    part.restore(stored, {"own": tensors["own"]})
    assert module.own.device.type == "cpu"
    assert module.inner.weight.device.type == "meta"


def test_what_no_checkpoint_can_know_is_named() -> None:
    module: Any = on_meta()
    module.register_buffer("angles", torch.empty(2, device="meta"), persistent=False)
    with pytest.raises(IncompatibleError, match=r"model: angles on the meta device: .*persistent"):
        ModelPart(module).targets(save(ModelPart(Tied())).stored())
    module.angles = torch.ones(2)
    fill(ModelPart(module), save(ModelPart(Tied())).stored())
    assert torch.equal(module.angles, torch.ones(2)), "what is real already is left alone"


def test_a_parameter_that_something_holds_on_to_is_an_error_that_says_so() -> None:
    module = on_meta()
    held = module.inner.weight * 2  # a graph refers to the parameter
    memory = {id(module.inner.weight): torch.zeros(4, 3)}
    with pytest.raises(IncompatibleError, match=r"model: a parameter on the meta device cannot"):
        give_memory(module, memory, "model")
    assert held.device.type == "meta"


def test_a_dict_of_tensors_is_filled_where_it_lies() -> None:
    live = torch.zeros(2)
    shared = torch.empty(3, device="meta")
    tensors = {"a": live, "b": shared, "c": shared}
    stored = save(TensorsPart({"a": live, "b": torch.zeros(3), "c": torch.zeros(3)})).stored()
    fill(TensorsPart(tensors), stored)
    assert tensors["a"] is live
    assert torch.equal(live, torch.ones(2))
    assert tensors["b"] is tensors["c"]
    assert torch.equal(tensors["b"], torch.ones(3))


def test_a_dict_says_what_it_lacks_and_what_it_does_not_know() -> None:
    stored = save(TensorsPart({"a": torch.zeros(2), "old": torch.zeros(2)})).stored()
    found = TensorsPart({"a": torch.zeros(2), "new": torch.zeros(2)}).targets(stored)
    assert (list(found.tensors), found.missing, found.unexpected) == (["a"], ["new"], ["old"])


def test_dicts_that_cannot_be_loaded_are_refused() -> None:
    bad: Any = {"a": 1}
    with pytest.raises(UsageError, match="has a int under 'a'"):
        TensorsPart(bad)
    with pytest.raises(UsageError, match="module or a dict of tensors by name, not a list"):
        TensorsPart([torch.zeros(2)])
    fixed = MappingProxyType({"a": torch.empty(2, device="meta")})
    with pytest.raises(UsageError, match=r"model\.a is on the meta device: give a dict"):
        TensorsPart(fixed).targets(save(TensorsPart({"a": torch.zeros(2)})).stored())
