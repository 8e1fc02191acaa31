"""An optimizer as a part: exact state, exact options, no step."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adafactor, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR

from dist_ckpt.errors import IntegrityError, UsageError
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.part import Stored, TensorSpec
from tests.unit.state.roundtrip import Saved, assert_same, load, save

Make = Callable[[Any], Optimizer]


def net(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def step(model: nn.Module, optimizer: Optimizer, *, times: int = 3) -> None:
    for i in range(times):
        optimizer.zero_grad()
        model(torch.full((2, 3), i + 0.5)).square().sum().backward()
        optimizer.step()


def part_of(optimizer: Optimizer, *models: nn.Module) -> OptimizerPart:
    names = ["model", "second"]
    parts = [ModelPart(m, name=n) for m, n in zip(models, names, strict=False)]
    return OptimizerPart(optimizer, models=parts)


def two_groups(params: Any) -> Optimizer:
    a, b, *rest = params
    second: dict[str, Any] = {"params": [b, *rest], "weight_decay": 0.0, "note": "x"}
    return AdamW([{"params": [a]}, second])


def empty_group(params: Any) -> Optimizer:
    groups: list[dict[str, Any]] = [{"params": []}, {"params": list(params), "lr": 0.1 + 0.2}]
    return Adam(groups)


MAKERS: dict[str, Make] = {
    "AdamW": lambda p: AdamW(p, lr=0.1),
    "AdamW fused": lambda p: AdamW(p, fused=True),
    "AdamW amsgrad foreach": lambda p: AdamW(p, amsgrad=True, foreach=True),
    "AdamW tensor lr": lambda p: AdamW(p, lr=torch.tensor(0.1)),
    "two groups": two_groups,
    "empty group": empty_group,
    "SGD": lambda p: SGD(p, lr=0.1),
    "SGD momentum": lambda p: SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adafactor": lambda p: Adafactor(p),
    "NAdam": lambda p: torch.optim.NAdam(p),
    "RAdam": lambda p: torch.optim.RAdam(p),
    "ASGD": lambda p: torch.optim.ASGD(p),
    "Rprop": lambda p: torch.optim.Rprop(p),
    "Adagrad": lambda p: torch.optim.Adagrad(p),
    "LBFGS-like objects": lambda p: Keeper(p),
}


class Keeper(Optimizer):
    """Keeps values of every kind, and some under keys that are no parameters."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 1e-3, "schedule": (1, [2.5])})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["n"] = state.get("n", 0) + 1
                state["history"] = [*state.get("history", []), p.grad.detach().clone()]
                state["dotted.key"] = p.detach().sum()
                p.data.sub_(p.grad, alpha=0.01)
        everything: Any = self.state
        everything["calls"] = everything.get("calls", 0) + 1


def exact(value: Any) -> Any:
    """Return optimizer values in a form whose equality is that of their bits."""
    if isinstance(value, torch.Tensor):
        return (value.dtype, tuple(value.shape), value.detach().view(-1).tolist(), value.device)
    if isinstance(value, dict):
        return {key: exact(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(exact(item) for item in value)
    return (type(value), value)


def full_state(optimizer: Optimizer) -> Any:
    return exact(optimizer.state_dict())


@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())
def test_state_and_options_come_back_exactly_into_fresh_objects(make: Make) -> None:
    model = net()
    optimizer = make(model.parameters())
    step(model, optimizer)
    saved, saved_model = save(part_of(optimizer, model)), save(ModelPart(model))
    expected = copy.deepcopy(full_state(optimizer))
    other = net(seed=1)
    restored = make(other.parameters())
    load(ModelPart(other), saved_model)
    load(part_of(restored, other), saved)
    assert full_state(restored) == expected
    assert_same(save(part_of(restored, other)), saved)
    step(model, optimizer, times=2)
    step(other, restored, times=2)
    assert full_state(restored) == full_state(optimizer)
    assert_same(save(ModelPart(other)), save(ModelPart(model)))


def test_the_names() -> None:
    model = net()
    optimizer = two_groups(model.parameters())
    step(model, optimizer)
    captured = part_of(optimizer, nn.DataParallel(model)).capture()
    names = [f"{i}.{kind}" for i in (0, 2) for kind in ("weight", "bias")]
    keys = ["step", "exp_avg", "exp_avg_sq"]
    assert list(captured.tensors) == [f"state.{name}.{key}" for name in names for key in keys]
    assert list(captured.objects) == ["param_groups.0.weight", "param_groups.0.bias"]
    group = decode(captured.objects["param_groups.0.bias"], tensors={})
    assert group["params"] == names[1:]
    assert group["betas"] == (0.9, 0.999)
    assert group["note"] == "x"
    live = optimizer.state[next(model.parameters())]["exp_avg"]
    assert captured.tensors["state.0.weight.exp_avg"].data_ptr() == live.data_ptr()


def test_a_tensor_learning_rate_is_a_tensor_beside_its_group() -> None:
    optimizer = AdamW(net().parameters(), lr=torch.tensor(0.1))
    captured = part_of(optimizer).capture()
    assert list(captured.tensors) == ["param_groups.group0.param0.lr"]


def test_a_never_stepped_optimizer_has_no_state_and_gets_none() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    saved = save(part_of(optimizer, model))
    assert not saved.tensors
    step(model, optimizer)
    load(part_of(optimizer, model), saved)
    assert not optimizer.state
    assert_same(save(part_of(optimizer, model)), saved)


def test_capturing_changes_nothing() -> None:
    model, twin = net(), net()
    one, two = AdamW(model.parameters()), AdamW(twin.parameters())
    for _ in range(3):
        save(part_of(one, model))
        step(model, one, times=1)
        step(twin, two, times=1)
    assert full_state(one) == full_state(two)


def test_schedulers_keep_hold_of_the_groups() -> None:
    def build(seed: int) -> tuple[nn.Module, Optimizer, OneCycleLR]:
        model = net(seed)
        optimizer = AdamW(model.parameters(), lr=0.3)
        return model, optimizer, OneCycleLR(optimizer, 0.7, total_steps=20)

    model, optimizer, scheduler = build(0)
    for _ in range(4):
        step(model, optimizer, times=1)
        scheduler.step()
    saved = save(part_of(optimizer, model))
    other, restored, other_scheduler = build(1)
    group = restored.param_groups[0]
    load(part_of(restored, other), saved)
    assert restored.param_groups[0] is group
    for key in ("lr", "initial_lr", "max_lr", "min_lr", "betas"):
        assert exact(group[key]) == exact(optimizer.param_groups[0][key])
    other_scheduler.load_state_dict(scheduler.state_dict())
    other_scheduler.step()
    scheduler.step()
    assert group["lr"] == optimizer.param_groups[0]["lr"]


# ------------------------------------------------------------------ options


def test_a_live_tensor_option_stays_itself_and_takes_the_value() -> None:
    model = net()
    saved = save(part_of(AdamW(model.parameters(), lr=torch.tensor(0.25)), model))
    lr = torch.tensor(0.1)
    optimizer = AdamW(model.parameters(), lr=lr)
    load(part_of(optimizer, model), saved)
    assert optimizer.param_groups[0]["lr"] is lr
    assert lr.item() == 0.25


@pytest.mark.parametrize("stored", [0.1, torch.tensor(0.1), torch.tensor(0.1, dtype=torch.float64)])
@pytest.mark.parametrize("live", [torch.float32, torch.float64, torch.int64])
def test_no_option_is_rounded_into_the_dtype_of_a_tensor(stored: Any, live: torch.dtype) -> None:
    model = net()
    saved = save(part_of(AdamW(model.parameters(), lr=stored), model))
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.7).double().to(live))
    load(part_of(optimizer, model), saved)
    loaded = optimizer.param_groups[0]["lr"]
    if stored == 0.1 and isinstance(stored, float) and live is torch.float32:
        assert loaded == torch.tensor(0.1)  # what the program would have made of it, too
    else:
        assert float(loaded) == float(stored)


def test_the_program_decides_if_a_learning_rate_is_a_tensor() -> None:
    model = net()
    as_float = save(part_of(AdamW(model.parameters(), lr=0.25), model))
    as_tensor = save(part_of(AdamW(model.parameters(), lr=torch.tensor(0.5)), model))
    optimizer = AdamW(model.parameters(), lr=torch.tensor(0.1))
    load(part_of(optimizer, model), as_float)
    assert optimizer.param_groups[0]["lr"].item() == 0.25
    optimizer = AdamW(model.parameters(), lr=0.1)
    load(part_of(optimizer, model), as_tensor)
    assert exact(optimizer.param_groups[0]["lr"]) == (float, 0.5)


def of_two_rates(model: nn.Sequential, first: Any, second: Any) -> AdamW:
    rates = zip((model[0], model[2]), (first, second), strict=True)
    groups = [{"params": list(each.parameters()), "lr": rate} for each, rate in rates]
    return AdamW(groups, betas=(torch.tensor(0.9), torch.tensor(0.99)), foreach=False)


@pytest.mark.parametrize("second", [torch.tensor(0.5), torch.tensor(0.25), 0.5])
def test_a_tensor_that_is_the_option_of_two_groups_holds_no_two_values(second: Any) -> None:
    model = net()
    saved = save(part_of(of_two_rates(model, torch.tensor(0.25), second), model))
    lr = torch.tensor(0.1)
    optimizer = of_two_rates(model, lr, lr)
    load(part_of(optimizer, model), saved)
    assert [float(group["lr"]) for group in optimizer.param_groups] == [0.25, float(second)]
    assert optimizer.param_groups[0]["lr"] is lr
    assert (optimizer.param_groups[1]["lr"] is lr) == (float(second) == 0.25)


def test_one_tensor_that_is_the_option_of_two_groups_stays_one() -> None:
    model = net()
    lr = torch.tensor(0.25)
    optimizer = of_two_rates(model, lr, lr)
    heat = torch.tensor([1.0, 2.0])
    for group, own in zip(optimizer.param_groups, (1.0, 2.0), strict=True):
        group |= {"heat": heat, "span": (heat, torch.tensor(own)), "own": torch.tensor(own)}
    saved = save(part_of(optimizer, model))
    again = net(1)
    fresh = of_two_rates(again, torch.tensor([0.1]), torch.tensor([0.2]))
    load(part_of(fresh, again), saved)
    one, two = fresh.param_groups
    assert one["lr"] is two["lr"]
    assert one["heat"] is two["heat"] is one["span"][0] is two["span"][0]
    assert one["betas"][0] is two["betas"][0]
    assert (one["own"], two["own"]) == (1.0, 2.0)
    assert_same(save(part_of(fresh, again)), saved)


def test_an_option_that_only_this_program_knows_keeps_its_value() -> None:
    model = net()
    saved = save(part_of(SGD(model.parameters(), lr=0.5), model))
    optimizer = SGD(model.parameters(), lr=0.1)
    optimizer.param_groups[0]["invented_later"] = 7
    load(part_of(optimizer, model), saved)
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert optimizer.param_groups[0]["invented_later"] == 7


def test_names_given_to_the_optimizer_are_no_option() -> None:
    model = nn.DataParallel(net())
    saved = save(part_of(AdamW(model.named_parameters()), model))
    plain = net()
    optimizer = AdamW(plain.named_parameters())
    load(part_of(optimizer, plain), saved)
    assert optimizer.param_groups[0]["param_names"][0] == "0.weight"


def test_an_option_that_cannot_be_stored_is_named() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    optimizer.param_groups[0]["hook"] = print
    with pytest.raises(UsageError, match=r"optimizer\.param_groups\.0\.weight\.hook"):
        part_of(optimizer, model).capture()


# ------------------------------------------------------------------ targets


def test_targets_have_the_stored_dtype_and_change_nothing() -> None:
    model = net().to(torch.bfloat16)
    optimizer = AdamW(model.parameters())
    specs = {
        "state.0.weight.exp_avg": TensorSpec("float32", (4, 3)),
        "state.0.weight.step": TensorSpec("float32", ()),
        "state.0.weight.row": TensorSpec("int8", (4,)),
    }
    stored = Stored(specs, save(part_of(optimizer, model)).objects, 0, 1, 1)
    targets = part_of(optimizer, model).targets(stored)
    made = {n: TensorSpec(str(t.dtype)[6:], tuple(t.shape)) for n, t in targets.tensors.items()}
    assert made == specs
    assert not optimizer.state


def test_live_moments_are_filled_in_place() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    step(model, optimizer)
    saved = save(part_of(optimizer, model))
    live = optimizer.state[next(model.parameters())]["exp_avg"]
    step(model, optimizer, times=1)
    load(part_of(optimizer, model), saved)
    assert optimizer.state[next(model.parameters())]["exp_avg"].data_ptr() == live.data_ptr()
    assert torch.equal(live, saved.tensors["state.0.weight.exp_avg"])


def test_other_parameters_and_groups_are_reported_before_anything_changes() -> None:
    model = net()
    optimizer = AdamW(model.parameters())
    step(model, optimizer)
    saved = save(part_of(optimizer, model))
    smaller = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
    other = AdamW([{"params": smaller[0].parameters()}, {"params": smaller[2].parameters()}])
    before = full_state(other)
    targets = part_of(other, smaller).targets(saved.stored())
    assert targets.missing == ["param_groups.2.weight"]
    assert targets.unexpected == [
        "param_groups.0.weight[2.bias]",
        "param_groups.0.weight[2.weight]",
        "state.2.bias.exp_avg",
        "state.2.bias.exp_avg_sq",
        "state.2.bias.step",
    ]
    assert full_state(other) == before


def test_foreign_objects_and_what_they_refer_to_are_unexpected() -> None:
    model = net()
    saved = save(part_of(AdamW(model.parameters()), model))
    tensors = {"state.gone.list.0": torch.zeros(2), "odd": torch.zeros(1)}
    put: dict[str, torch.Tensor] = {}
    objects = {
        **saved.objects,
        "state.gone.list": encode(
            [torch.zeros(2)], path="x", tensors=put, prefix="state.gone.list"
        ),
        "something": encode(1, path="x"),
    }
    part = part_of(AdamW(model.parameters()), model)
    targets = part.targets(Saved(tensors, objects).stored())
    assert targets.tensors == {}
    assert targets.unexpected == ["odd", "something", "state.gone.list", "state.gone.list.0"]


@pytest.mark.parametrize("value", [1, {"lr": 1}, {"params": 3}, {"params": [None]}])
def test_a_stored_group_that_is_none_is_damage(value: object) -> None:
    optimizer = part_of(AdamW(net().parameters()))
    stored = Saved({}, {"param_groups.x": encode(value, path="x")}).stored()
    with pytest.raises(IntegrityError, match=r"optimizer\.param_groups\.x is no parameter group"):
        optimizer.targets(stored)


def test_objects_that_name_absent_tensors_are_damage() -> None:
    put: dict[str, torch.Tensor] = {}
    shared = encode({"a": torch.zeros(1)}, path="x", tensors=put, prefix="shared_state")
    part = part_of(SGD(net().parameters()))
    with pytest.raises(IntegrityError, match=r"shared_state names tensors that are not stored"):
        part.targets(Saved({}, {"shared_state": shared}).stored())
    with pytest.raises(IntegrityError, match=r"shared_state is no dict"):
        part.restore(Saved({}, {"shared_state": encode(1, path="x")}).stored(), {})


# ------------------------------------------------------------------ whose parameters


def test_parameters_of_no_model_are_named_by_position() -> None:
    loose = nn.Parameter(torch.ones(2))
    model = net()
    optimizer = SGD([*model[0].parameters(), loose], lr=0.1, momentum=0.5)
    loose.grad = torch.ones(2)
    optimizer.step()
    saved = save(part_of(optimizer, model))
    assert list(saved.tensors) == ["state.group0.param2.momentum_buffer"]
    load(part_of(optimizer, model), saved)


def test_positions_give_way_to_real_names() -> None:
    model = nn.ModuleDict({"group0": nn.ParameterDict({"param1": nn.Parameter(torch.ones(1))})})
    loose = nn.Parameter(torch.ones(1))
    captured = part_of(SGD([*model.parameters(), loose]), model).capture()
    group = decode(captured.objects["param_groups.group0.param1"], tensors={})
    assert group["params"] == ["group0.param1", "group0.param1_"]


def test_several_models_prefix_the_names_only_if_one_optimizer_spans_them() -> None:
    one, two = nn.Linear(1, 1), nn.Linear(1, 1)
    alone = part_of(SGD(two.parameters()), one, two).capture()
    assert list(alone.objects) == ["param_groups.weight"]
    both = part_of(SGD([*one.parameters(), *two.parameters()]), one, two).capture()
    group = decode(both.objects["param_groups.model.weight"], tensors={})
    assert group["params"] == ["model.weight", "model.bias", "second.weight", "second.bias"]


def test_state_of_a_tensor_outside_the_groups_is_refused() -> None:
    optimizer = AdamW(net().parameters())
    optimizer.state[torch.zeros(3)] = {"step": torch.tensor(1.0)}
    with pytest.raises(UsageError, match=r"shape \(3,\) that is in none of its groups"):
        part_of(optimizer).capture()
