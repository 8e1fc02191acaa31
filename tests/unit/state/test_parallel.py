"""DDP and FSDP2: the same names and values as a plain module, and DTensors as they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from dist_ckpt.errors import UsageError
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.optimizer import OptimizerPart
from dist_ckpt.state.sampler import ElasticSampler
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.state.values import ValuePart
from dist_ckpt.testing.ranks import ranks
from tests.older_torch import needs_fsdp_on_cpu
from tests.unit.state.roundtrip import Saved, assert_same, full, load, save


class Net(nn.Module):
    """Uneven over two ranks, with a submodule called `module`."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.module = nn.Linear(3, 5)
        self.out = nn.Linear(5, 1, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.out(self.module(x).tanh())
        return out


NAMES = ["module.weight", "module.bias", "out.weight"]


def plain(seed: int) -> nn.Module:
    return Net(seed)


def ddp(seed: int) -> nn.Module:
    return DistributedDataParallel(Net(seed))


def fsdp(seed: int) -> nn.Module:
    net = Net(seed)
    fully_shard(net.module)
    fully_shard(net)
    return net


LAYOUTS = (plain, ddp, fsdp)


def train(model: nn.Module, optimizer: Optimizer, *, times: int = 2) -> None:
    for i in range(times):
        optimizer.zero_grad()
        # Every rank sees the same data, so a plain module on each is trained alike.
        model(torch.full((2, 3), 0.5 + i)).sum().backward()
        optimizer.step()


def trained(layout: Any, seed: int, **options: Any) -> tuple[ModelPart, OptimizerPart]:
    model = layout(seed)
    optimizer = AdamW(model.parameters(), lr=0.1, **options)
    train(model, optimizer)
    part = ModelPart(model)
    return part, OptimizerPart(optimizer, models=[part])


@needs_fsdp_on_cpu
@ranks(2)
def test_every_layout_has_the_names_and_loads_into_every_other() -> None:
    for source in LAYOUTS:
        model, optimizer = trained(source, 1)
        assert list(model.capture().tensors) == NAMES
        saved_model, saved_optimizer = save(model), save(optimizer)
        assert list(saved_optimizer.objects) == ["param_groups.module.weight"]
        for target in LAYOUTS:
            fresh = target(2)
            into = ModelPart(fresh)
            adam = AdamW(fresh.parameters(), lr=0.5)
            part = OptimizerPart(adam, models=[into])
            load(into, saved_model)
            load(part, saved_optimizer)
            assert_same(save(into), saved_model)
            assert_same(save(part), saved_optimizer)
            train(fresh, adam)


@needs_fsdp_on_cpu
@ranks(2)
def test_fsdp_parameters_and_moments_are_dtensors_of_one_layout() -> None:
    model, optimizer = trained(fsdp, 1)
    saved = save(optimizer)
    fresh = fsdp(2)
    into = OptimizerPart(AdamW(fresh.parameters()), models=[ModelPart(fresh)])
    targets = into.targets(saved.stored()).tensors
    parameters = ModelPart(fresh).capture().tensors
    for name in NAMES:
        parameter = parameters[name]
        moment = targets[f"state.{name}.exp_avg"]
        assert isinstance(parameter, DTensor)
        assert isinstance(moment, DTensor)
        assert moment.placements == parameter.placements
        assert moment.device_mesh == parameter.device_mesh
        assert moment.to_local().shape == parameter.to_local().shape
        step = targets[f"state.{name}.step"]
        assert not isinstance(step, DTensor)
        assert step.shape == ()
    assert all(isinstance(t, DTensor) for t in model.capture().tensors.values())


@needs_fsdp_on_cpu
@ranks(2)
def test_names_hold_while_fsdp_has_its_parameters_gathered() -> None:
    model = fsdp(1)
    optimizer = AdamW(model.parameters())
    with torch.no_grad():
        model(torch.ones(1, 3))  # without a backward pass the root stays gathered
    part = ModelPart(model)
    captured = OptimizerPart(optimizer, models=[part]).capture()
    assert list(captured.objects) == ["param_groups.module.weight"]
    assert all(isinstance(t, DTensor) for t in part.capture().tensors.values())


class ByRow(Optimizer):
    """Scales the gradient by what each of its rows and columns has summed up to."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for parameter in self.param_groups[0]["params"]:
            state, grad = self.state[parameter], parameter.grad
            for key, dim in (("row", -1), ("column", 0)):
                total = grad.abs().sum(dim, keepdim=True)
                state[key] = state.get(key, 0) + total
                grad = grad / (state[key] + 1)
            with torch.no_grad():
                parameter.sub_(grad, alpha=0.1)


@needs_fsdp_on_cpu
@ranks(2)
def test_state_of_another_shape_beside_dtensors_can_be_used() -> None:
    model = fsdp(1)
    optimizer = ByRow([model.get_parameter("module.weight")])
    train(model, optimizer)
    saved = save(OptimizerPart(optimizer, models=[ModelPart(model)]))
    fresh = fsdp(2)
    other = ByRow([fresh.get_parameter("module.weight")])
    part = OptimizerPart(other, models=[ModelPart(fresh)])
    targets = load(part, saved).tensors
    for key, placement in (("row", Shard(0)), ("column", Replicate())):
        target = targets[f"state.module.weight.{key}"]
        assert isinstance(target, DTensor)
        assert target.placements == (placement,)
    assert_same(save(part), saved)
    train(fresh, other)


@ranks(2)
def test_dtensors_in_a_value_keep_their_layout() -> None:
    average = {name: t.detach().clone() for name, t in fsdp(1).named_parameters()}
    saved = save(ValuePart(average, name="ema"))
    other = {name: t.detach().clone() for name, t in fsdp(2).named_parameters()}
    load(ValuePart(other, name="ema"), saved)
    for name, tensor in other.items():
        assert isinstance(tensor, DTensor)
        assert torch.equal(full(tensor), full(average[name]))
    assert_same(save(ValuePart(other, name="ema")), saved)


@ranks(2)
def test_dtensors_cannot_be_per_rank() -> None:
    part = ValuePart({"w": next(fsdp(1).parameters())}, name="mine", per_rank=True)
    with pytest.raises(UsageError, match=r"cannot store mine\.w.* spread over ranks"):
        part.capture()


@ranks(2)
def test_the_sampler_takes_its_place_from_the_process_group() -> None:
    sampler = ElasticSampler(8, global_batch=4, shuffle=False)
    rank = dist.get_rank()
    assert list(sampler) == [[2 * rank, 2 * rank + 1], [4 + 2 * rank, 5 + 2 * rank]]


@ranks(2)
def test_shared_state_is_the_same_on_every_rank_and_per_rank_state_is_not() -> None:
    model = ddp(1)
    torch.manual_seed(dist.get_rank())
    state = TrainState(model=model, optimizer=AdamW(model.parameters()), epoch=3)
    mine = {name: dict(part.capture().objects) for name, part in state.parts.items()}
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, mine)
    for name, part in state.parts.items():
        same = everyone[0][name] == everyone[1][name]
        assert same != part.capture().per_rank


@ranks(4)
def test_two_dimensional_layouts_load_from_plain() -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model, optimizer = trained(plain, 1)
    saved: tuple[Saved, Saved] = save(model), save(optimizer)
    net = Net(2)
    fully_shard(net, mesh=mesh)
    part = ModelPart(net)
    adam = OptimizerPart(AdamW(net.parameters()), models=[part])
    load(part, saved[0])
    load(adam, saved[1])
    assert_same(save(part), saved[0])
    assert_same(save(adam), saved[1])
