"""Optimizers that keep more than torch's do, keep it elsewhere, or have others inside."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import SGD, Adam, AdamW, Optimizer

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.state.values import StatefulPart
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.state.roundtrip import load, save

Make = Callable[[nn.Module], Any]


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Any, *, times: int = 3, first: int = 0) -> None:
    for i in range(first, first + times):
        optimizer.zero_grad()
        model(torch.full((2, 3), i + 0.5)).square().sum().backward()
        optimizer.step()


class Counting(AdamW):
    """Has a counter of its own, which its two methods know of, and which changes every step."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        self.calls += 1
        for group in self.param_groups:
            group["lr"] = 0.1 / (1 + self.calls % 3)
        return super().step(closure)

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "calls": self.calls, "seen": {"at": [self.calls, (1, 2)]}}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.calls = state_dict["calls"]
        assert state_dict["seen"] == {"at": [self.calls, (1, 2)]}


class Slow(Optimizer):
    """A lookahead: slow weights in a state of its own, another optimizer inside."""

    def __init__(self, inner: Optimizer, every: int = 2) -> None:
        self.inner = inner
        super().__init__([{"params": g["params"]} for g in inner.param_groups], {})
        self.param_groups = inner.param_groups
        self.every, self.count = every, 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.inner.step()
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                slow = self.state[p].setdefault("slow", p.detach().clone())
                if self.count % self.every == 0:
                    slow.lerp_(p, 0.5)
                    p.copy_(slow)

    def state_dict(self) -> dict[str, Any]:
        return {"fast": self.inner.state_dict(), "slow": super().state_dict(), "count": self.count}

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict["fast"])
        super().load_state_dict(state_dict["slow"])
        self.param_groups = self.inner.param_groups
        self.count = state_dict["count"]


class Sharp(Optimizer):
    """As SAM is often written: it says nothing of the state of the optimizer inside."""

    def __init__(self, params: Any, base: Any, **options: Any) -> None:
        super().__init__(params, dict(options))
        self.base_optimizer = base(self.param_groups, **options)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["old"] = p.detach().clone()
        self.base_optimizer.step()

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Both(Optimizer):
    """Two behind one face, which does not know of their state either."""

    def __init__(self, matrices: list[Any], others: list[Any]) -> None:
        super().__init__([*matrices, *others], {})
        self.pair = [SGD(matrices, lr=0.1, momentum=0.9), Adam(others, lr=0.1)]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.pair:
            each.step()


class Told(Both):
    """Two behind one face, whose state it tells as a list."""

    def state_dict(self) -> Any:
        return [each.state_dict() for each in self.pair]

    def load_state_dict(self, state_dict: Any) -> None:
        for each, state in zip(self.pair, state_dict, strict=True):
            each.load_state_dict(state)


class Proxy:
    """No optimizer by class, as engines and wrappers of frameworks are."""

    def __init__(self, optimizer: Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def param_groups(self) -> Any:
        return self.optimizer.param_groups

    def zero_grad(self) -> None:
        self.optimizer.zero_grad()

    def step(self) -> None:
        self.optimizer.step()

    def state_dict(self) -> Any:
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.optimizer.load_state_dict(state_dict)


class Container(Optimizer):
    """As torchtitan's: an optimizer for each part of the model, told by torch's own functions."""

    def __init__(self, model: nn.Module) -> None:
        self.parts = list(model.children())
        self.parts = [part for part in self.parts if list(part.parameters())]
        self.model = model
        self.optimizers = [AdamW(part.parameters(), lr=0.1) for part in self.parts]
        super().__init__(list(model.parameters()), {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for each in self.optimizers:
            each.step()

    def state_dict(self) -> Any:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        get = functools.partial(get_optimizer_state_dict, options=options)
        return {k: v for o in self.optimizers for k, v in get(self.model, o).items()}

    def load_state_dict(self, state_dict: Any) -> None:
        options = StateDictOptions(flatten_optimizer_state_dict=True)
        for each in self.optimizers:
            set_optimizer_state_dict(self.model, each, state_dict, options=options)


def split(model: nn.Module) -> tuple[list[Any], list[Any]]:
    matrices = [p for p in model.parameters() if p.ndim == 2]
    return matrices, [p for p in model.parameters() if p.ndim != 2]


class Odd(Optimizer):
    """Keeps what has no name: numbers as keys, dicts in dicts, a list, text, no dict at all."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.ndim == 1:
                self.state[p] = self.state.get(p) or 0.0
                self.state[p] += 1.0
                p.sub_(p.grad, alpha=0.1 / self.state[p])
                continue
            state = self.state[p]
            state[0] = state.get(0, 0) + p.grad
            state["deep"] = {"a": [state[0] * 2, {"b": (state[0] * 3,)}], 3: "x"}
            state["mode"] = "ab"
            p.sub_(state["deep"]["a"][1]["b"][0], alpha=0.01)


class OddAndTold(Odd):
    """The same, by contract: torch's `load_state_dict` would make characters of the text."""

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)


FACES: dict[str, Make] = {
    "own counter": lambda m: Counting(m.parameters()),
    "lookahead": lambda m: Slow(AdamW(m.parameters(), lr=0.1)),
    "lookahead around a counter": lambda m: Slow(Counting(m.parameters())),
    "sharpness": lambda m: Sharp(m.parameters(), SGD, lr=0.1, momentum=0.9),
    "two, told by nobody": lambda m: Both(*split(m)),
    "two, told as a list": lambda m: Told(*split(m)),
    "proxy": lambda m: Proxy(AdamW(m.parameters(), lr=0.1)),
    "proxy of a lookahead": lambda m: Proxy(Slow(AdamW(m.parameters(), lr=0.1))),
    "container": lambda m: Container(m),
    "odd": lambda m: Odd(m.parameters()),
    "odd and told": lambda m: OddAndTold(m.parameters()),
}


@pytest.mark.parametrize("make", FACES.values(), ids=FACES.keys())
def test_training_goes_on_as_if_it_had_not_stopped(make: Make, tmp_path: Path) -> None:
    model = net()
    optimizer = make(model)
    step(model, optimizer)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    fresh = net(1)
    other = make(fresh)
    dist_ckpt.load({"model": fresh, "optimizer": other}, tmp_path)
    step(model, optimizer, times=4, first=3)
    step(fresh, other, times=4, first=3)
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))


@pytest.mark.parametrize("make", FACES.values(), ids=FACES.keys())
def test_a_used_one_goes_back(make: Make, tmp_path: Path) -> None:
    model = net()
    optimizer = make(model)
    step(model, optimizer, times=2)
    state = {"model": model, "optimizer": optimizer}
    dist_ckpt.save(state, tmp_path)
    step(model, optimizer, times=3, first=2)
    there = [p.detach().clone() for p in model.parameters()]
    dist_ckpt.load(state, tmp_path)
    step(model, optimizer, times=3, first=2)
    assert all(map(torch.equal, model.parameters(), there))


def test_several_in_a_list_or_a_dict_are_one_part(tmp_path: Path) -> None:
    def build(seed: int) -> tuple[nn.Module, list[Optimizer]]:
        model = net(seed)
        matrices, others = split(model)
        return model, [SGD(matrices, lr=0.1, momentum=0.9), Adam(others, lr=0.1)]

    kinds: tuple[Callable[[Any], Any], ...] = (list, tuple, lambda pair: dict(enumerate(pair)))
    for number, kind in enumerate(kinds):
        model, pair = build(0)
        for each in pair:
            step(model, each)
        root = tmp_path / str(number)
        dist_ckpt.save({"model": model, "optimizers": kind(pair)}, root)
        fresh, other = build(1)
        dist_ckpt.load({"model": fresh, "optimizers": kind(other)}, root)
        for one, two in zip(pair, other, strict=True):
            step(model, one, times=2, first=9)
            step(fresh, two, times=2, first=9)
        assert all(map(torch.equal, fresh.parameters(), model.parameters()))


def test_hooks_are_called_and_what_they_say_is_kept() -> None:
    heard: list[str] = []

    def build(seed: int) -> tuple[nn.Module, Optimizer]:
        model = net(seed)
        optimizer = AdamW(model.parameters(), lr=0.1)
        optimizer.register_state_dict_pre_hook(lambda _: heard.append("before saving"))
        optimizer.register_state_dict_post_hook(lambda _, sd: {**sd, "note": {"at": 7}})
        optimizer.register_load_state_dict_pre_hook(
            lambda _, sd: heard.append(f"before loading {sd['note']['at']}")
        )
        optimizer.register_load_state_dict_post_hook(lambda _: heard.append("after loading"))
        return model, optimizer

    model, optimizer = build(0)
    step(model, optimizer)
    saved = save(OptimizerPart(optimizer, models=[ModelPart(model)]))
    fresh, other = build(1)
    load(OptimizerPart(other, models=[ModelPart(fresh)]), saved)
    assert heard[0] == "before saving"
    assert heard[-2:] == ["before loading 7", "after loading"]
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[one]["exp_avg"], other.state[two]["exp_avg"])


def test_the_container_is_stored_as_what_is_in_it_and_takes_no_step() -> None:
    model = net()
    container = Container(model)
    captured = OptimizerPart(container, models=[ModelPart(model)]).capture()
    assert not captured.tensors
    assert not any(each.state for each in container.optimizers)
    step(model, container)
    names = list(OptimizerPart(container, models=[ModelPart(model)]).capture().tensors)
    assert names[0] == "state.0.weight.step"
    # So a plain optimizer with these groups takes it.
    groups = [{"params": list(model[0].parameters())}, {"params": list(model[2].parameters())}]  # type: ignore[index]
    saved = save(OptimizerPart(container, models=[ModelPart(model)]))
    load(OptimizerPart(AdamW(groups), models=[ModelPart(model)]), saved)


def test_a_wrapper_that_adds_nothing_and_a_plain_one_take_each_others() -> None:
    class AcceleratedOptimizer(Proxy):
        pass

    model = net()
    plain, wrapped = AdamW(model.parameters()), AcceleratedOptimizer(AdamW(model.parameters()))
    step(model, plain)
    saved = save(OptimizerPart(plain, models=[ModelPart(model)]))
    assert not load(OptimizerPart(wrapped, models=[ModelPart(model)]), saved).unlike
    saved = save(OptimizerPart(wrapped, models=[ModelPart(model)]))
    assert not load(OptimizerPart(plain, models=[ModelPart(model)]), saved).unlike


# ------------------------------------------------------------------ of another kind


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(Adam, SGD), (AdamW, Adam), (Adam, AdamW), (torch.optim.NAdam, torch.optim.RAdam)],
)
def test_another_optimizer_is_refused_by_name_and_taken_when_meant(
    theirs: Any, ours: Any, tmp_path: Path
) -> None:
    model = net()
    optimizer = theirs(model.parameters(), lr=0.25)
    step(model, optimizer)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    fresh = net(1)
    other = ours(fresh.parameters(), lr=0.5)
    state = {"model": fresh, "optimizer": other}
    with pytest.raises(IncompatibleError, match=rf"{theirs.__name__}.*{ours.__name__}"):
        dist_ckpt.load(state, tmp_path)
    assert other.param_groups[0]["lr"] == 0.5
    assert not other.state
    dist_ckpt.load(state, tmp_path, skip=["optimizer"])
    assert other.param_groups[0]["lr"] == 0.5
    dist_ckpt.load(state, tmp_path, strict=False)
    assert other.param_groups[0]["lr"] == 0.25
    if ours is AdamW:  # even then it is one, as torch sees to it
        assert other.param_groups[0].get("decoupled_weight_decay", True) is True


def test_a_checkpoint_that_does_not_say_its_class_loads() -> None:
    model = net()
    optimizer = AdamW(model.parameters(), lr=0.25)
    step(model, optimizer)
    saved = save(OptimizerPart(optimizer, models=[ModelPart(model)]))
    objects = {
        name: data.replace(b'"@class":"torch.AdamW","@dtypes":"float32",', b"").replace(
            b',"@class":"torch.AdamW","@dtypes":"float32"', b""
        )
        for name, data in saved.objects.items()
    }
    assert not any(b"@class" in data for data in objects.values())
    fresh = net(1)
    other = AdamW(fresh.parameters())
    load(OptimizerPart(other, models=[ModelPart(fresh)]), type(saved)(saved.tensors, objects))
    assert other.param_groups[0]["lr"] == 0.25
    assert other.param_groups[0].get("decoupled_weight_decay", True) is True


# ------------------------------------------------------------------ memory and dtype


class Columns(Optimizer):
    """Keeps matrices by columns, one of them in a list, as factorizations return them."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            if p.ndim == 2:
                columns = torch.linalg.qr(p.grad @ p.grad.T + torch.eye(len(p)))[0]
                self.state[p]["q"] = columns.T.contiguous().T
                self.state[p]["list"] = [self.state[p]["q"].T.clone().T, torch.ones(2, 3, 4).mT]


class ColumnsAndTold(Columns):
    def state_dict(self) -> dict[str, Any]:
        own = [v["q"].clone() for v in self.state.values()]
        return {**super().state_dict(), "copies": own}

    def load_state_dict(self, state_dict: Any) -> None:
        self.copies = state_dict.pop("copies")
        super().load_state_dict(state_dict)


@pytest.mark.parametrize("cls", [Columns, ColumnsAndTold])
def test_the_order_of_elements_in_memory_comes_back(cls: Any) -> None:
    model = net()
    optimizer = cls(model.parameters())
    step(model, optimizer)
    saved = save(OptimizerPart(optimizer, models=[ModelPart(model)]))
    for used in (False, True):
        fresh = net(1)
        other = cls(fresh.parameters())
        for parameter in fresh.parameters() if used else ():
            other.state[parameter]["q"] = torch.zeros(len(parameter), len(parameter))
        load(OptimizerPart(other, models=[ModelPart(fresh)]), saved)
        mine, theirs = optimizer.state[model[0].weight], other.state[fresh[0].weight]  # type: ignore[index]
        assert mine["q"].stride() == (1, 4)
        assert theirs["q"].stride() == mine["q"].stride()
        assert torch.equal(theirs["q"], mine["q"])
        for one, two in zip(mine["list"], theirs["list"], strict=True):
            assert one.stride() == two.stride()
        if cls is ColumnsAndTold:
            assert [each.stride() for each in other.copies] == [(1, 4), (1, 2)]


@pytest.mark.parametrize("make", [AdamW, Counting], ids=["in place", "by contract"])
def test_cast_moments_follow_their_parameter(make: Any, tmp_path: Path) -> None:
    model = net()
    optimizer = make(model.parameters())
    step(model, optimizer)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    fresh = net(1).to(torch.bfloat16)
    other = make(fresh.parameters())
    dist_ckpt.load({"model": fresh, "optimizer": other}, tmp_path, cast=True)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        mine, theirs = optimizer.state[one], other.state[two]
        assert theirs["step"].dtype == torch.float32
        assert torch.equal(theirs["exp_avg"], mine["exp_avg"].to(torch.bfloat16))
        assert theirs["exp_avg"].dtype == torch.bfloat16
    fresh(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    other.step()


class Wide(Optimizer):
    """Keeps its moments in float32 whatever its parameters are in."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            moment = self.state[p].setdefault("wide", torch.zeros(p.shape))
            moment.add_(p.grad.float(), alpha=1 / 3)
            p.sub_(moment.to(p.dtype), alpha=0.1)


class WideAndTold(Wide):
    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)  # which casts to the dtype of the parameter


@pytest.mark.parametrize("cls", [Wide, WideAndTold])
@pytest.mark.parametrize("cast", [False, True])
def test_moments_of_another_dtype_than_their_parameter_stay_so(
    cls: Any, cast: bool, tmp_path: Path
) -> None:
    def build(seed: int) -> tuple[nn.Module, Any]:
        model = net(seed).to(torch.bfloat16)
        return model, cls(model.parameters())

    model, optimizer = build(0)
    model(torch.ones(1, 3, dtype=torch.bfloat16)).sum().backward()
    optimizer.step()
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    fresh, other = build(1)
    dist_ckpt.load({"model": fresh, "optimizer": other}, tmp_path, cast=cast)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert other.state[two]["wide"].dtype == torch.float32
        assert torch.equal(optimizer.state[one]["wide"], other.state[two]["wide"])


# ------------------------------------------------------------------ parameters of nobody


def test_what_was_stored_of_a_wrapper_as_one_value_loads() -> None:
    model = net()
    optimizer = Proxy(AdamW(model.parameters(), lr=0.25))
    step(model, optimizer)
    saved = save(StatefulPart(optimizer, name="optimizer"))
    fresh = net(1)
    other = Proxy(AdamW(fresh.parameters()))
    load(OptimizerPart(other, models=[ModelPart(fresh)]), saved)
    assert other.param_groups[0]["lr"] == 0.25
    assert len(other.optimizer.state) == 4


class Averaging(Proxy):
    """As wrappers of the schedule-free kind: only an attribute tells what the parameters are."""

    def __init__(self, optimizer: Optimizer) -> None:
        super().__init__(optimizer)
        self.train_mode = False

    @torch.no_grad()
    def _swap(self, sign: float) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.add_(sign * self.optimizer.state[p].get("exp_avg", torch.zeros(())))

    def train(self) -> None:
        if not self.train_mode:
            self._swap(1.0)
        self.train_mode = True

    def eval(self) -> None:
        if self.train_mode:
            self._swap(-1.0)
        self.train_mode = False


@pytest.mark.parametrize("saved_in", ["train", "eval"])
@pytest.mark.parametrize("loaded_in", ["train", "eval"])
def test_a_mode_that_only_an_attribute_tells_comes_back(
    saved_in: str, loaded_in: str, tmp_path: Path
) -> None:
    def build(seed: int) -> tuple[nn.Module, Averaging]:
        model = net(seed)
        return model, Averaging(Adam(model.parameters(), lr=0.1))

    model, optimizer = build(0)
    optimizer.train()
    step(model, optimizer)
    getattr(optimizer, saved_in)()
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path)
    fresh, other = build(1)
    getattr(other, loaded_in)()
    dist_ckpt.load({"model": fresh, "optimizer": other}, tmp_path)
    for each in (optimizer, other):
        each.train()
    step(model, optimizer, first=3)
    step(fresh, other, first=3)
    assert all(map(torch.equal, fresh.parameters(), model.parameters()))


class Opaque(Proxy):
    """Tells its state in a form of its own, as engines do."""

    def state_dict(self) -> Any:
        kept = self.optimizer.state
        return {
            "moments": [
                kept[p]["exp_avg"].clone().T
                for g in self.param_groups
                for p in g["params"]
                if p in kept
            ]
        }

    def load_state_dict(self, state_dict: Any) -> None:
        parameters = [p for g in self.param_groups for p in g["params"]]
        for p, moment in zip(parameters, state_dict["moments"], strict=True):
            self.optimizer.state[p]["exp_avg"] = moment.T
        self.strides = [moment.stride() for moment in state_dict["moments"]]


@pytest.mark.filterwarnings("ignore:The use of `x.T`")
def test_a_form_of_its_own_comes_back_and_what_it_leaves_out_too() -> None:
    model = net()
    optimizer = Opaque(AdamW(model.parameters(), lr=0.25))
    step(model, optimizer)
    saved = save(OptimizerPart(optimizer, models=[ModelPart(model)]))
    fresh = net(1)
    other = Opaque(AdamW(fresh.parameters()))
    load(OptimizerPart(other, models=[ModelPart(fresh)]), saved)
    assert other.strides[0] == (1, 3)
    assert other.param_groups[0]["lr"] == 0.25
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        for key, value in optimizer.optimizer.state[one].items():
            assert torch.equal(other.optimizer.state[two][key], value)


def test_what_is_stepped_and_in_no_part_is_named() -> None:
    model, second = net(), nn.Linear(2, 2)
    masters = [p.detach().clone().requires_grad_() for p in model.parameters()]
    for parameters in (masters, [*model.parameters(), *second.parameters()]):
        with pytest.raises(UsageError, match=r"part 'optimizer' steps parameters.* shape \["):
            TrainState(model=model, optimizer=AdamW(parameters))
        with pytest.raises(UsageError, match=r"steps parameters that are in no part"):
            TrainState(model=model, optimizers=[AdamW(parameters)])
    TrainState(model=model, masters=masters, optimizer=AdamW(masters))
    TrainState(model=model, head=second, o=AdamW([*model.parameters(), *second.parameters()]))
    TrainState(model=dict(model.state_dict()), optimizer=AdamW(model.parameters()))
    temperature = nn.Parameter(torch.ones(()))
    both = AdamW([*model.parameters(), temperature])
    TrainState(model=model, temperature=temperature, optimizer=both)


def test_an_optimizer_alone_is_a_state() -> None:
    TrainState(optimizer=AdamW(net().parameters()), epoch=3)
    TrainState(rng=None, optimizer=AdamW(net().parameters()))


class Aside(torch.optim.SGD):
    """Keeps a tensor of each parameter where neither torch nor we look."""

    def __init__(self, parameters: Any, by: Callable[[torch.Tensor], Any]) -> None:
        super().__init__(parameters, lr=0.1)
        self.by = by
        self.buffers: dict[Any, Any] = {}
        self.seen = {0: "no tensor"}
        self.mine = [p for group in self.param_groups for p in group["params"]]

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                self.buffers[self.by(parameter)] = {"average": parameter.detach().clone()}
        super().step(closure)


class InOrder(Aside):
    """Keeps them in the order of the parameters."""

    def __init__(self, parameters: Any, by: Callable[[list[torch.Tensor]], Any]) -> None:
        super().__init__(parameters, id)
        self.arrange = by

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.buffers = self.arrange([torch.zeros_like(parameter) for parameter in self.mine])
        torch.optim.SGD.step(self, closure)


@pytest.mark.parametrize(
    ("by", "told"),
    [
        (list, True),
        (tuple, True),
        (lambda made: {"first": made, "second": made}, True),
        (lambda made: {str(number): each for number, each in enumerate(made)}, True),
        (lambda made: [{"second": made}], True),
        (lambda made: [each.new_zeros(3) for each in made], False),
        (lambda made: {"shapes": [each.shape for each in made]}, False),
        (lambda made: [[], {}], False),
    ],
)
def test_and_so_are_those_in_the_order_of_the_parameters(
    by: Callable[[list[torch.Tensor]], Any],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
    *,
    told: bool,
) -> None:
    model = nn.Linear(2, 1)
    optimizer = InOrder(model.parameters(), by)
    optimizer.step()
    dist_ckpt.save({"model": model, "optimizer": optimizer}, tmp_path / "run")
    assert ("InOrder keeps tensors of its parameters in buffers" in caplog.text) == told


class TellsAside(Aside):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "buffers": list(self.buffers.values())}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict({k: v for k, v in state_dict.items() if k != "buffers"})


@pytest.mark.parametrize("kind", [Aside, TellsAside])
@pytest.mark.parametrize("by", [id, lambda parameter: parameter])
def test_tensors_that_a_state_dict_does_not_tell_are_named_once(
    kind: type[Aside], by: Callable[[torch.Tensor], Any], caplog: pytest.LogCaptureFixture
) -> None:
    model = nn.Linear(2, 1)
    optimizer = kind(model.parameters(), by)
    run = MemoryStore(f"unit-aside-{kind.__name__}-{by is id}")
    with dist_ckpt.Checkpointer(run, {"model": model, "optimizer": optimizer}, every_steps=1) as c:
        for step in (1, 2, 3):
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            c.step(step)
    said = "Aside keeps tensors of its parameters in buffers, which its state_dict() does not tell"
    assert caplog.text.count(said) == (1 if kind is Aside else 0)
