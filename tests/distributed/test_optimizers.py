"""Optimizers under FSDP2 and DDP, those that are made for several ranks, and groups by rank."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.algorithms.model_averaging.averagers import PeriodicModelAverager
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.testing.ranks import run_ranks
from tests.older_torch import needs_fsdp_on_cpu
from tests.stateful.optimizers import (
    bits_of,
    foreign_optimizers,
    net,
    resumed_as_if_not_stopped,
    third_party,
    torch_optimizers,
    train,
)
from tests.unit.state.test_optimizer_faces import FACES

SEVERAL = "torch.distributed.optim"

# Some of those that torch's sharded tensors take; of most others a step fails.
# Each a kind of its own; all of them are in the soak.
SHARDED = ("AdamW", "SGD momentum", "Muon", "po.ScheduleFreeAdamW", "free.Wrapper")
WRAPPERS = (
    *("own counter", "lookahead around a counter", "sharpness", "two, told as a list"),
    "container",
)


def ddp(seed: int) -> nn.Module:
    return DistributedDataParallel(net(seed))


def fsdp(seed: int) -> nn.Module:
    model: Any = net(seed)
    fully_shard(model[0])
    fully_shard(model)
    module: nn.Module = model
    return module


def go_on(root: str, names: tuple[str, ...]) -> None:
    """Train under FSDP2, save, load into fresh objects, go on: many optimizers, and wrappers."""
    makers = {**torch_optimizers(), **foreign_optimizers()}
    tried: dict[str, Any] = {name: makers[name] for name in names}
    tried |= {name: FACES[name] for name in WRAPPERS}
    tried["plain beside sharded"] = lambda m: Beside(m.parameters())
    for number, make in enumerate(tried.values()):
        resumed_as_if_not_stopped(Path(root) / str(number), make, fsdp)
    built_too_early()


@needs_fsdp_on_cpu
@pytest.mark.filterwarnings("ignore")
def test_under_fsdp2_training_goes_on_as_if_it_had_not_stopped(tmp_path: Path) -> None:
    run_ranks(2, go_on, str(tmp_path), SHARDED, timeout_seconds=250)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_that_takes_sharded_parameters(tmp_path: Path) -> None:
    run_ranks(2, go_on_with_all, str(tmp_path), timeout_seconds=1200)


def go_on_with_all(root: str) -> None:
    kept = 0
    for number, make in enumerate({**torch_optimizers(), **foreign_optimizers(), **FACES}.values()):
        model = fsdp(0)
        runs: list[Any] = [None] * dist.get_world_size()
        try:
            train(model, make(model), range(6))
        except Exception as error:
            dist.all_gather_object(runs, str(error))
        else:
            dist.all_gather_object(runs, None)
        if runs == [None] * len(runs):
            resumed_as_if_not_stopped(Path(root) / str(number), make, fsdp)
            kept += 1
    assert kept > 20


# ------------------------------------------------------------------ state of one rank alone


def zero(model: nn.Module) -> Any:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    groups: Any = [{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim == 1]}]
    return third_party(SEVERAL).ZeroRedundancyOptimizer(groups, optimizer_class=AdamW, lr=0.05)


def grouped(model: nn.Module) -> Any:
    decayed = [p for p in model.parameters() if p.ndim > 1]
    return AdamW([{"params": decayed}, {"params": [p for p in model.parameters() if p.ndim == 1]}])


def save_zero(root: str) -> list[torch.Tensor]:
    model = ddp(0)
    optimizer = zero(model)
    train(model, optimizer, range(3))
    optimizer.param_groups[0]["lr"] = 0.01  # as a scheduler does
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root)
    train(model, optimizer, range(3, 6))
    return bits_of(model)


def load_zero(root: str, make: Callable[[nn.Module], Any]) -> list[torch.Tensor]:
    model = ddp(1) if dist.is_initialized() else net(1)
    optimizer = make(model)
    dist_ckpt.load({"model": model, "optimizer": optimizer}, root)
    train(model, optimizer, range(3, 6))
    return bits_of(model)


def local_sgd(root: str) -> None:
    def build(seed: int) -> tuple[nn.Module, Any]:
        model = net(seed)
        averager = PeriodicModelAverager(period=2, warmup_steps=1)
        inner = SGD(model.parameters(), lr=0.01, momentum=0.9)
        return model, third_party(SEVERAL).PostLocalSGDOptimizer(inner, averager)

    model, optimizer = build(0)
    train(model, optimizer, range(3))
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root)
    fresh, other = build(1)
    dist_ckpt.load({"model": fresh, "optimizer": other}, root)
    assert other.averager.step == optimizer.averager.step == 3
    for each in ((model, optimizer), (fresh, other)):
        train(*each, range(3, 6))
    assert all(map(torch.equal, bits_of(fresh), bits_of(model)))


# ------------------------------------------------------------------ plain beside sharded


class Beside(Optimizer):
    """Keeps plain matrices for sharded parameters, and a norm, and multiplies only plain ones."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for p in self.param_groups[0]["params"]:
            grad = p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
            grad = grad.reshape(len(grad), -1)
            state = self.state[p]
            state["gram"] = state.get("gram", 0) + grad @ grad.T
            state["same"] = state.get("same", 0) + grad
            state["list"] = [state["gram"].T.clone().T]
            scale = 0.01 / (1 + state["list"][0].trace() + state["same"].norm())
            p.sub_(p.grad, alpha=scale.item())


# ------------------------------------------------------------------ groups that differ by rank


def stages(seed: int) -> tuple[nn.Module, Optimizer]:
    """Return a shared first layer, and a layer that no other rank has, in one group."""
    torch.manual_seed(seed)
    rank = dist.get_rank()
    layers = {"first": nn.Linear(3, 3), f"own{rank}": nn.Linear(3, 3)}
    model = nn.ModuleDict(layers)
    optimizer = AdamW(model.parameters(), lr=0.1)
    for number, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, number + 1.0)
    return model, optimizer


def members(root: str) -> None:
    model, optimizer = stages(1)
    optimizer.step()
    with dist_ckpt.Checkpointer(root, {"model": model, "optimizer": optimizer}) as ckpt:
        for step in (1, 2, 3):
            optimizer.param_groups[0]["lr"] = 0.1 * step
            ckpt.save(step)
    fresh, other = stages(2)
    other.param_groups[0]["lr"] = 9.0
    dist_ckpt.load({"model": fresh, "optimizer": other}, root)
    assert other.param_groups[0]["lr"] == 0.1 * 3
    for mine, theirs in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(optimizer.state[mine]["exp_avg"], other.state[theirs]["exp_avg"])


def order(root: str) -> None:
    model = net(0)
    parameters = list(model.parameters())
    optimizer = AdamW(parameters if dist.get_rank() == 0 else parameters[::-1], lr=0.25)
    train(model, optimizer, range(2))
    state = {"model": model, "optimizer": optimizer}
    dist_ckpt.save(state, root)
    optimizer.param_groups[0]["lr"] = 9.0
    dist_ckpt.load(state, root)
    assert optimizer.param_groups[0]["lr"] == 0.25


def options(root: str) -> None:
    model, optimizer = stages(1)
    optimizer.param_groups[0]["lr"] = 0.1 * (dist.get_rank() + 1)
    with pytest.raises(IncompatibleError, match=r"has other options on rank 0 than on rank 1"):
        dist_ckpt.save({"model": model, "optimizer": optimizer}, root)


def built_too_early() -> None:
    model: Any = net(0)
    optimizer = AdamW(model.parameters())
    fully_shard(model)
    with pytest.raises(UsageError, match=r"parameters that are in no part.*build the optimizer"):
        dist_ckpt.TrainState(model=model, optimizer=optimizer)


# ------------------------------------------------------------------ all of these


def replicated(root: str) -> list[list[torch.Tensor]]:
    for name, make in (
        ("adamw", torch_optimizers()["AdamW"]),
        ("sam", foreign_optimizers()["po.SAM"]),
    ):
        resumed_as_if_not_stopped(Path(root) / name, make, ddp)
    local_sgd(str(Path(root) / "local"))
    order(str(Path(root) / "order"))
    options(str(Path(root) / "options"))
    place = str(Path(root) / "zero")
    return [save_zero(place), load_zero(place, zero)]


@pytest.mark.filterwarnings("ignore")
def test_what_ranks_keep_of_replicated_parameters_comes_back(tmp_path: Path) -> None:
    whole, *others = run_ranks(2, replicated, str(tmp_path), timeout_seconds=250)[1]
    others += run_ranks(1, load_zero, str(tmp_path / "zero"), zero)
    others.append(load_zero(str(tmp_path / "zero"), grouped))
    for found in others:
        assert all(map(torch.equal, found, whole))


def test_groups_whose_members_differ_between_ranks(tmp_path: Path) -> None:
    run_ranks(3, members, str(tmp_path))
    model = nn.ModuleDict({n: nn.Linear(3, 3) for n in ("first", "own0", "own1", "own2")})
    optimizer = AdamW(model.parameters(), lr=9.0)
    dist_ckpt.load({"model": model, "optimizer": optimizer}, tmp_path)
    assert optimizer.param_groups[0]["lr"] == 0.1 * 3
    assert len(optimizer.state) == 8
