"""State dicts of sharded models, and sharded modules that have a say in a load."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed._shard.metadata import ShardMetadata
from torch.distributed._shard.sharded_tensor import init_from_local_shards
from torch.distributed._shard.sharded_tensor.shard import Shard as ShardedShard
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import parametrizations
from torch.optim import AdamW

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.testing.ranks import run_ranks

WORLD = 2


def net(seed: int, *, shard: bool) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3, bias=False))
    if shard:
        for child in model:
            fully_shard(child)
        fully_shard(model)
    return model


def full(value: torch.Tensor) -> torch.Tensor:
    return (value.full_tensor() if isinstance(value, DTensor) else value).detach().clone()


def contents(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {name: full(value) for name, value in state.items()}


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    one, two = contents(first), contents(second)
    return all(torch.equal(value, two[name]) for name, value in one.items())


def through_dicts(root: str) -> None:
    model, other = net(1, shard=True), net(2, shard=True)
    dist_ckpt.save({"model": model.state_dict()}, root, step=1)
    local = other[0].weight.to_local()
    dist_ckpt.load({"model": other.state_dict()}, root, step=1)
    assert same(model.state_dict(), other.state_dict())
    assert other[0].weight.to_local().data_ptr() == local.data_ptr()
    again = net(3, shard=True)
    dist_ckpt.load({"model": get_model_state_dict(again)}, root, step=1)
    assert same(model.state_dict(), again.state_dict())
    ema = {name: value.clone() for name, value in model.state_dict().items()}
    dist_ckpt.save({"ema": ema, "epoch": 3}, root, step=2)
    plain = net(4, shard=False)
    dist_ckpt.load_weights(plain, root, part="ema")
    assert same(model.state_dict(), plain.state_dict())
    sharded = net(5, shard=True)
    dist_ckpt.load_weights(sharded, root, part="ema")
    assert same(model.state_dict(), sharded.state_dict())
    back: dict[str, Any] = {
        "ema": {name: torch.zeros_like(value) for name, value in ema.items()},
        "epoch": 0,
    }
    dist_ckpt.load(back, root)
    assert same(ema, back["ema"])
    assert back["epoch"] == 3


def test_state_dicts_of_sharded_models(tmp_path: Path) -> None:
    run_ranks(WORLD, through_dicts, str(tmp_path))


class Average:
    """A moving average, which has nothing before its first update."""

    def __init__(self) -> None:
        self.shadow: dict[str, torch.Tensor] = {}

    def update(self, model: nn.Module) -> None:
        self.shadow = {name: p.detach().clone() for name, p in model.named_parameters()}

    def state_dict(self) -> dict[str, Any]:
        return {"shadow": self.shadow} if self.shadow else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.shadow = state["shadow"]


def save_lazily(root: str) -> None:
    model, average = net(1, shard=True), Average()
    average.update(model)
    others = {key: value.detach().clone() for key, value in enumerate(model.parameters())}
    state = {"model": model, "average": average, "lazy": {"others": others}, "rng": None}
    dist_ckpt.save(state, root)


def load_lazily(root: str, *, shard: bool) -> dict[str, torch.Tensor]:
    model, average, lazy = net(2, shard=shard), Average(), dict[str, Any]()
    dist_ckpt.load({"model": model, "average": average, "lazy": lazy, "rng": None}, root)
    for (name, parameter), other in zip(
        model.named_parameters(), lazy["others"].values(), strict=True
    ):
        for loaded in (average.shadow[name], other):
            assert isinstance(loaded, DTensor) == shard
            assert getattr(loaded, "placements", 0) == getattr(parameter, "placements", 0)
            assert torch.equal(full(loaded), full(parameter))
    if shard:
        with pytest.raises(IncompatibleError, match=r"shadow.* was a DTensor when .* Fill it bef"):
            dist_ckpt.load({"average": Average(), "rng": None}, root, only=["average"])
    return contents(average.shadow)


def load_lazily_sharded(root: str) -> dict[str, torch.Tensor]:
    return load_lazily(root, shard=True)


def test_what_a_fresh_object_lacks_is_laid_out_as_the_model_is(tmp_path: Path) -> None:
    run_ranks(WORLD, save_lazily, str(tmp_path))
    expected = load_lazily(str(tmp_path), shard=False)
    found = run_ranks(WORLD + 1, load_lazily_sharded, str(tmp_path))
    assert all(same(expected, each) for each in found)


def in_other_orders(root: str) -> None:
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (WORLD,))

    def filled(value: float, kind: Any = dict) -> Any:
        whole = {"a": torch.full((4,), value), "b": torch.full((4,), value + 1)}
        cut = {key: distribute_tensor(each, mesh, [Shard(0)]) for key, each in whole.items()}
        items = [*cut.items(), ("n", 5), (3, {"x": 1, "y": torch.full((2,), value)})]
        return kind(items[::-1] if rank else items)

    dist_ckpt.save({"x": filled(1.0), "rng": None}, root, step=1)
    state: dict[str, Any] = {"x": filled(0.0), "rng": None}
    dist_ckpt.load(state, root)
    assert [float(state["x"][key].full_tensor()[0]) for key in "ab"] == [1, 2]
    assert float(state["x"][3]["y"][0]) == 1
    with pytest.raises(IncompatibleError, match="differs between rank 0 and rank 1"):
        dist_ckpt.save({"x": filled(1.0, OrderedDict), "rng": None}, root, step=2)
    shards = [ShardedShard(torch.ones(2), ShardMetadata([2 * rank], [2], f"rank:{rank}/cpu"))]
    spread = init_from_local_shards(shards, 2 * WORLD)
    with pytest.raises(UsageError, match=r"x\.deep\[0\], a ShardedTensor: give a DTensor"):
        dist_ckpt.save({"x": {"deep": [spread]}, "rng": None}, root, step=3)


def test_dicts_are_equal_in_any_order_and_sharded_tensors_refused(tmp_path: Path) -> None:
    run_ranks(WORLD, in_other_orders, str(tmp_path))


def hooked(seed: int, calls: list[str]) -> Any:
    model = net(seed, shard=True)

    def before(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
        calls.append("before")
        state[f"{prefix}weight"] = state[f"{prefix}weight"] * 2

    def after(module: nn.Module, keys: Any) -> None:
        calls.append("after")

    model[0].register_load_state_dict_pre_hook(before)
    model.register_load_state_dict_post_hook(after)
    return model


class Old(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight_g = nn.Parameter(torch.rand(5, 1) + 1)
        self.weight_v = nn.Parameter(torch.randn(5, 3))
        self.bias = nn.Parameter(torch.randn(5))


def told(root: str) -> None:
    model = net(1, shard=True)
    optimizer = AdamW(model.parameters())
    dist_ckpt.save({"model": model, "optimizer": optimizer}, root, step=1)
    calls: list[str] = []
    other = hooked(2, calls)
    dist_ckpt.load({"model": other, "optimizer": AdamW(other.parameters())}, root, step=1)
    assert calls == ["before", "after"]
    assert torch.equal(full(other[0].weight), full(model[0].weight) * 2)
    assert isinstance(other[0].weight, DTensor)
    assert torch.equal(full(other[2].weight), full(model[2].weight))
    torch.manual_seed(7)
    old = Old()
    dist_ckpt.save({"model": nn.Sequential(old)}, root, step=2)
    new = nn.Sequential(parametrizations.weight_norm(nn.Linear(3, 5)))
    fully_shard(new)
    dist_ckpt.load({"model": new}, root, step=2)
    parametrized: Any = new[0].parametrizations
    assert torch.equal(full(parametrized.weight.original1), old.weight_v)
    assert isinstance(parametrized.weight.original0, DTensor)


def test_sharded_modules_are_told_of_a_load(tmp_path: Path) -> None:
    run_ranks(WORLD, told, str(tmp_path))


class Refuser:
    """Refuses on one rank alone."""

    n = 1

    def state_dict(self) -> dict[str, int]:
        return {"n": self.n}

    def load_state_dict(self, state: dict[str, int]) -> None:
        if dist.get_rank() == 1:
            raise ValueError("not on this rank")


def refuse(root: str) -> None:
    torch.manual_seed(dist.get_rank())
    model = DistributedDataParallel(nn.Linear(2, 2))
    dist_ckpt.save({"model": model, "r": Refuser()}, root)
    with torch.no_grad():
        model.module.weight.fill_(9.0)
    with pytest.raises(IncompatibleError, match=r"not on this rank.* No tensor was changed"):
        dist_ckpt.load({"model": model, "r": Refuser()}, root)
    assert bool((model.module.weight == 9).all())


def test_a_refusal_of_one_rank_comes_before_a_weight_changes_on_any(tmp_path: Path) -> None:
    run_ranks(WORLD, refuse, str(tmp_path))
