"""What capturing says of tensors: which wait for a step, which are several, which are one."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.planning.describe import Describer
from dist_ckpt.repository import Repository
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.model import ModelPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.memory import MemoryStore
from tests.unit.planning.test_layouts import rank_of

_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-capture-{next(_names)}")


class Scaled(torch.Tensor):
    """A weight as quantizing libraries have it: small integers and a scale behind one face."""

    codes: torch.Tensor
    scale: torch.Tensor

    @staticmethod
    def __new__(cls, codes: torch.Tensor, scale: torch.Tensor) -> Scaled:
        made: Scaled = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=scale.dtype, device=codes.device
        )
        made.codes, made.scale = codes, scale
        return made

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["codes", "scale"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, _: None, __: object, ___: object) -> Scaled:
        return Scaled(inner["codes"], inner["scale"])

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # its stub is no class method
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in (torch.ops.aten.detach.default, torch.ops.aten.view.default):
            one, *rest = args
            return Scaled(func(one.codes, *rest), one.scale)
        if func is torch.ops.aten.is_pinned.default:
            return False
        raise NotImplementedError(f"{func} of a Scaled")


def quantized(fill: int) -> nn.Module:
    module = nn.Linear(3, 2)
    codes = torch.full((2, 3), fill, dtype=torch.int8)
    weight = Scaled(codes, torch.tensor([float(fill)]))
    module.weight = nn.Parameter(weight, requires_grad=False)
    return module


def test_a_wrapper_is_stored_as_what_it_is_made_of_and_restored_in_place() -> None:
    store = new_store()
    dist_ckpt.save({"model": quantized(7)}, store, step=1)
    index = Repository(store).open(1).index
    assert {(tensor.name, tensor.dtype) for tensor in index.tensors} >= {
        ("weight.codes", "int8"),
        ("weight.scale", "float32"),
        ("bias", "float32"),
    }
    live = quantized(0)
    weight = live.weight
    assert isinstance(weight, Scaled)
    codes = weight.codes
    dist_ckpt.load({"model": live}, store)
    assert live.weight is weight
    assert weight.codes is codes
    assert codes.tolist() == [[7] * 3] * 2
    assert weight.scale.tolist() == [7.0]


def test_a_wrapper_in_a_plain_value_is_filled_where_it_lies_and_built_where_there_is_none() -> None:
    store = new_store()
    dist_ckpt.save({"stats": {"w": Scaled(torch.ones(2), torch.ones(1))}}, store)
    live = Scaled(torch.zeros(2), torch.zeros(1))
    codes, stats = live.codes, {"w": live}
    dist_ckpt.load({"stats": stats}, store)
    assert stats["w"] is live
    assert live.codes is codes
    assert (codes.tolist(), live.scale.tolist()) == ([1.0, 1.0], [1.0])
    fresh: dict[str, Any] = {}
    dist_ckpt.load({"stats": fresh}, store)
    assert type(fresh["w"]) is Scaled
    assert (fresh["w"].codes.tolist(), fresh["w"].scale.tolist()) == ([1.0, 1.0], [1.0])


def test_a_shard_that_is_a_wrapper_is_refused_by_name() -> None:
    with rank_of(0, (2,)):
        local = Scaled(torch.ones(2, 3, dtype=torch.int8), torch.ones(1))
        mesh = init_device_mesh("cpu", (2,))
        sharded = DTensor.from_local(local, mesh, [Shard(0)], run_check=False)
        with pytest.raises(UsageError, match=r"'w' of part 'm': .* a Scaled, which is no dense"):
            Describer().describe({"m": {"w": sharded}})


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embed.weight


def test_tied_weights_are_stored_once_and_loaded_under_both_names() -> None:
    store = new_store()
    saved = Tied()
    dist_ckpt.save({"model": saved}, store, step=1)
    checkpoint = Repository(store).open(1)
    names = [tensor.name for tensor in checkpoint.index.tensors if tensor.part == "model"]
    assert sorted(names) == ["embed.weight", "head.weight"]
    rows = [checkpoint.index.chunks_of(names.index(name)) for name in names]
    assert rows[0].offset.tolist() == rows[1].offset.tolist()
    (file,) = [each for each in checkpoint.index.files if each.name.startswith("model.")]
    assert file.nbytes == 4096 + 50 * 8 * 4
    for live in (Tied(), untied()):
        dist_ckpt.load({"model": live}, store)
        assert torch.equal(live.embed.weight, saved.embed.weight)
        assert torch.equal(live.head.weight, saved.embed.weight)


def untied() -> Tied:
    module = Tied()
    module.head.weight = nn.Parameter(torch.zeros(50, 8))
    return module


def test_a_tensor_met_twice_in_a_value_is_one_tensor_again() -> None:
    shared = torch.arange(3.0)
    value = {"a": shared, "b": [shared, shared.clone()]}
    tensors: dict[str, torch.Tensor] = {}
    data = encode(value, path="v", tensors=tensors, prefix="value")
    assert len(tensors) == 2
    back = decode(data, tensors=tensors)
    assert back["a"] is back["b"][0]
    assert back["b"][1] is not back["a"]


def test_what_only_a_step_changes_is_marked() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    frozen = model[0].bias
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p is not frozen], lr=0.1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    optimizer.param_groups[0]["lr"] = torch.tensor(0.1)
    state = TrainState(model=model, optimizer=optimizer, notes={"w": model[0].weight}, rng=None)
    captured = {name: part.capture() for name, part in state.parts.items()}
    assert captured["model"].stepped == {"0.weight", "1.weight", "1.bias"}
    marked = captured["optimizer"].stepped
    assert {name for name in captured["optimizer"].tensors if name not in marked} == {
        "param_groups.0.weight.lr"
    }
    assert any(name.endswith("exp_avg") for name in marked)
    # A value is the user's: who holds it may change it whenever they like.
    assert captured["notes"].stepped == frozenset()


def test_without_an_optimizer_in_the_state_nothing_waits_for_one() -> None:
    model = nn.Linear(2, 2)
    torch.optim.SGD(model.parameters(), lr=0.1)
    assert ModelPart(model).capture().stepped == frozenset()


def test_names_follow_a_module_that_is_wrapped_later() -> None:
    model = nn.Sequential(nn.Linear(2, 2))
    part = ModelPart(model)
    assert set(part.capture().tensors) == {"0.weight", "0.bias"}
    model[0] = torch.compile(model[0], backend="eager")  # type: ignore[assignment]
    assert set(part.capture().tensors) == {"0.weight", "0.bias"}
    model.append(nn.Linear(2, 1, bias=False))
    assert set(part.capture().tensors) == {"0.weight", "0.bias", "1.weight"}
    model[0] = nn.ModuleDict({"_orig_mod": nn.Linear(2, 2, bias=False)})
    assert set(part.capture().tensors) == {"0._orig_mod.weight", "1.weight"}


def test_storage_layouts_of_all_kinds_come_back() -> None:
    store = new_store()
    base = torch.arange(24.0)
    values = {
        "expanded": base[:3].expand(4, 3),
        "strided": base[::5],
        "turned": base.view(4, 6).t(),
        "part": base[7:9],
        "channels": base.view(1, 2, 3, 4).to(memory_format=torch.channels_last),
        "float8": base.to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3),
        "empty": torch.empty(0, 3),
    }
    dist_ckpt.save({"v": values}, store)
    back = TrainState(v={name: torch.zeros(1) for name in values})
    dist_ckpt.load(back, store)
    for name, value in values.items():
        assert back["v"][name].dtype == value.dtype
        assert torch.equal(back["v"][name].float(), value.float()), name
