"""Wrappers that hide their prefix in the state dict: model and optimizer agree on every name."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import AdamW

import dist_ckpt
from dist_ckpt.state.model import ModelPart
from dist_ckpt.storage.memory import MemoryStore

_stores = count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-wrappers-{next(_stores)}")


class Fabric(nn.Module):
    """Holds the module twice and shows the inner state dict, as Fabric's wrapper does."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self._forward_module = nn.DataParallel(module)
        self._original_module = module

    def state_dict(
        self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False
    ) -> Any:
        return self._original_module.state_dict(
            destination=destination, prefix=prefix, keep_vars=keep_vars
        )

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self._original_module.load_state_dict(state_dict, strict, assign)


class Engine(nn.Module):
    """Shows the inner state dict without gradients, and takes no options."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def state_dict(self) -> Any:  # type: ignore[override]
        return self.module.state_dict()

    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        return self.module.load_state_dict(state_dict)


class Engine2(nn.Module):
    """An engine with torch's options."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def state_dict(self, *args: Any, **options: Any) -> Any:
        return self.module.state_dict(*args, **options)

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:
        return self.module.load_state_dict(state_dict, strict, assign)


class Asymmetric(nn.Module):
    """Hides the prefix by a hook, and has no method to take it back."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.inner = module
        itself: Any = self
        itself.register_state_dict_post_hook(self._hide)

    @staticmethod
    def _hide(module: nn.Module, state: Any, prefix: str, *_: Any) -> None:
        for key in [key for key in state if key.startswith(f"{prefix}inner.")]:
            state[prefix + key.removeprefix(f"{prefix}inner.")] = state.pop(key)


class Adding(Engine):
    """Adds a counter of its own to the state dict."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__(module)
        self.steps = 0

    def state_dict(self) -> Any:  # type: ignore[override]
        return {**self.module.state_dict(), "engine_steps": self.steps}

    def load_state_dict(self, state_dict: Any) -> Any:  # type: ignore[override]
        state = dict(state_dict)
        self.steps = state.pop("engine_steps")
        return self.module.load_state_dict(state)


class Nested(nn.Module):
    """A module one child of which is wrapped."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.body = Fabric(module)


def net(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "plain": lambda m: m,
    "fabric": Fabric,
    "engine": Engine,
    "asymmetric": Asymmetric,
    "adding": Adding,
    "engine in fabric": lambda m: Fabric(Engine2(m)),
    "data parallel in engine": lambda m: Engine(nn.DataParallel(m)),
}


def trained(model: nn.Module) -> AdamW:
    optimizer = AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


@pytest.mark.parametrize("second", WRAPPERS)
@pytest.mark.parametrize("first", WRAPPERS)
def test_names_agree_and_all_load_into_each_other(first: str, second: str) -> None:
    inner, other = net(1), net(2)
    one, two = WRAPPERS[first](inner), WRAPPERS[second](other)
    part = ModelPart(one)
    captured = part.capture()
    plain = dict(inner.named_parameters())
    assert set(part.parameter_names().values()) == plain.keys()
    assert {name: id(plain[name]) for name in plain} == {
        name: key for key, name in part.parameter_names().items()
    }
    assert captured.tensors.keys() == inner.state_dict().keys()
    optimizer = trained(one)
    store = new_store()
    dist_ckpt.save({"model": one, "optimizer": optimizer}, store)
    again = AdamW(two.parameters())
    strict = (first == "adding") == (second == "adding")
    dist_ckpt.load({"model": two, "optimizer": again}, store, strict=strict)
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in inner.state_dict().items())
    for mine, theirs in zip(inner.parameters(), other.parameters(), strict=True):
        for key, value in optimizer.state[mine].items():
            assert torch.equal(value, again.state[theirs][key])


def test_a_wrapped_child_hides_its_prefix_too() -> None:
    inner = net(1)
    model: Any = Nested(inner)
    part = ModelPart(model)
    names = {f"body.{name}" for name, _ in net(1).named_parameters()}
    assert set(part.parameter_names().values()) == names
    store = new_store()
    dist_ckpt.save({"model": model, "optimizer": trained(model)}, store)
    plain: Any = nn.ModuleDict({"body": net(2)})
    dist_ckpt.load({"model": plain, "optimizer": AdamW(plain.parameters())}, store)
    assert torch.equal(plain["body"][0].weight, inner[0].weight)


def test_what_the_state_dict_leaves_out_has_its_own_name() -> None:
    class Adapter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = net(1)

        def state_dict(self, *args: Any, **options: Any) -> Any:
            state = self.module.state_dict(*args, **options)
            return {name: value for name, value in state.items() if name.startswith("2.")}

    model = Adapter()
    names = ModelPart(model).parameter_names()
    assert set(names.values()) == {name for name, _ in net(1).named_parameters()}
    assert ModelPart(model).capture().tensors.keys() == {"2.weight", "2.bias"}


def test_the_counter_of_an_engine_comes_back() -> None:
    one, two = Adding(net(1)), Adding(net(2))
    one.steps = 7
    store = new_store()
    dist_ckpt.save({"model": one}, store)
    dist_ckpt.load({"model": two}, store)
    assert two.steps == 7
    assert torch.equal(two.module.state_dict()["0.weight"], one.module.state_dict()["0.weight"])
