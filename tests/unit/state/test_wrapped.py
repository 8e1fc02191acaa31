"""Tensors that are several behind one face, of the library that most programs have them from."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt.errors import CheckpointError, IncompatibleError
from dist_ckpt.state import layout
from dist_ckpt.state.spread import inner_tensors
from dist_ckpt.storage.memory import MemoryStore
from tests import quantized as ao

# The libraries take their time to be imported; `test_wrapped_small` has what needs none of them.
pytestmark = pytest.mark.soak

_names = itertools.count()
OPTIMIZERS = ("AdamW8bit", "AdamW4bit", "AdamWFp8")


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-wrapped-{next(_names)}")


@pytest.fixture(autouse=True)
def uncompiled() -> Iterator[None]:
    """These optimizers compile each step, which takes longer than all the rest."""
    torch.compiler.set_stance("force_eager")
    yield
    torch.compiler.set_stance("default")


def bits(value: Any) -> dict[str, bytes]:
    return {
        name: bytes(inner.detach().contiguous().reshape(-1).view(torch.uint8).numpy())
        for name, inner in inner_tensors(value, "").items()
    }


def model_bits(model: nn.Module) -> dict[str, dict[str, bytes]]:
    return {name: bits(value) for name, value in model.state_dict(keep_vars=True).items()}


def trained(cls: Any, seed: int, steps: int = 1) -> tuple[nn.Module, Any]:
    torch.manual_seed(seed)
    model = nn.Linear(64, 64)
    optimizer = cls(model.parameters(), lr=0.125)
    for _ in range(steps):
        step(model, optimizer)
    return model, optimizer


def step(model: nn.Module, optimizer: Any) -> None:
    model(torch.ones(2, 64)).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("steps", [0, 1], ids=["fresh", "used"])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_quantized_moments_come_back_and_go_on_bit_for_bit(name: str, steps: int) -> None:
    store, cls = new_store(), getattr(ao, name)
    model, optimizer = trained(cls, seed=1, steps=2)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, store)
    live, other = trained(cls, seed=2, steps=steps)
    if not steps:
        layout.known_classes.clear()  # as in a process that has not seen any
    dist_ckpt.load({"model": live, "optimizer": other}, store)
    step(model, optimizer)
    step(live, other)
    assert model_bits(live) == model_bits(model)
    for mine, theirs in zip(live.parameters(), model.parameters(), strict=True):
        for key, value in optimizer.state[theirs].items():
            assert type(other.state[mine][key]) is type(value)
            assert bits(other.state[mine][key]) == bits(value)


def test_moments_of_another_kind_are_refused_before_anything_changes() -> None:
    store = new_store()
    model, optimizer = trained(ao.AdamW8bit, seed=1)
    dist_ckpt.save({"model": model, "optimizer": optimizer}, store)
    live, other = trained(ao.AdamW4bit, seed=2)
    before = model_bits(live)
    with pytest.raises(CheckpointError, match=r"OptimState8bit|AdamW8bit"):
        dist_ckpt.load({"model": live, "optimizer": other}, store)
    blocks = ao.AdamW8bit(live.parameters(), block_size=128)
    step(live, blocks)
    before = model_bits(live)
    with pytest.raises(IncompatibleError, match=r"exp_avg\.scale: stored float32\[16\], wanted"):
        dist_ckpt.load({"model": live, "optimizer": blocks}, store)
    assert model_bits(live) == before


def int8_training(model: nn.Module) -> None:
    ao.quantize_(model, ao.int8_weight_only_quantized_training())


def int8_weights(model: nn.Module) -> None:
    ao.quantize_(model, ao.Int8WeightOnlyConfig())


def float8_weights(model: nn.Module) -> None:
    ao.quantize_(model, ao.Float8WeightOnlyConfig())


def nf4_weights(model: nn.Module) -> None:
    model[0].weight = nn.Parameter(ao.to_nf4(model[0].weight, 64, 4), requires_grad=False)  # type: ignore[index]


@pytest.mark.parametrize("quantize", [int8_training, int8_weights, float8_weights, nf4_weights])
def test_quantized_weights_are_filled_where_they_lie(quantize: Any) -> None:
    store, models = new_store(), []
    for seed in (1, 2):
        torch.manual_seed(seed)
        models.append(nn.Sequential(nn.Linear(64, 64)))
        quantize(models[-1])
    saved, live = models
    dist_ckpt.save({"model": saved}, store)
    weight = live[0].weight
    assert model_bits(live) != model_bits(saved)
    dist_ckpt.load({"model": live}, store)
    assert live[0].weight is weight
    assert model_bits(live) == model_bits(saved)


def test_a_quantized_tensor_in_a_plain_value_is_built_anew() -> None:
    store, saved = new_store(), ao.to_nf4(torch.arange(4096.0).reshape(64, 64), 64, 4)
    dist_ckpt.save({"ema": {"w": [saved]}}, store)
    live: dict[str, Any] = {}
    dist_ckpt.load({"ema": live}, store)
    assert type(live["w"][0]) is ao.NF4Tensor
    assert bits(live["w"][0]) == bits(saved)
    assert torch.equal(live["w"][0].get_original_weight(), saved.get_original_weight())


def forget(cls: type) -> None:
    """As in a process that has not seen the class yet."""
    del layout.known_classes[layout.label_of(cls)]


def test_a_class_that_this_program_has_not_is_an_error_that_names_it() -> None:
    class Own(ao.NF4Tensor):  # type: ignore[misc]
        pass

    store, made = new_store(), ao.to_nf4(torch.ones(64, 64), 64, 4)
    made.__class__ = Own
    dist_ckpt.save({"ema": {"w": made}}, store)
    forget(Own)
    with pytest.raises(IncompatibleError, match=r"the state of this program has no .*\.Own"):
        dist_ckpt.load({"ema": {}}, store)


def float8_model(seed: int, scale: torch.Tensor | None = None) -> Any:
    torch.manual_seed(seed)
    model: Any = nn.Linear(8, 8)
    inner = model.weight.detach()
    weight = ao.WeightWithDynamicFloat8CastTensor(
        inner, ao.LinearMMConfig(), torch.float8_e4m3fn, scale
    )
    model.weight = nn.Parameter(weight)
    return model


def test_float8_training_and_plain_weights_load_into_each_other() -> None:
    store, back = new_store(), new_store()
    saved = float8_model(1)
    dist_ckpt.save({"model": saved}, store)
    plain = nn.Linear(8, 8)
    dist_ckpt.load({"model": plain}, store)
    assert torch.equal(plain.weight, saved.weight._tensor)
    dist_ckpt.save({"model": plain}, back)
    live = float8_model(2)
    dist_ckpt.load({"model": live}, back)
    assert torch.equal(live.weight._tensor, plain.weight)


def test_what_stands_beside_a_weight_of_high_precision_is_nothing_to_a_plain_one() -> None:
    store = new_store()
    saved = float8_model(1)
    saved.weight._precomputed_scale = torch.tensor(2.5)
    dist_ckpt.save({"model": saved}, store)
    plain = nn.Linear(8, 8)
    dist_ckpt.load({"model": plain}, store)
    assert torch.equal(plain.weight, saved.weight._tensor)
    live = float8_model(2)
    live.weight._precomputed_scale = torch.tensor(1.0)
    dist_ckpt.load({"model": live}, store)
    assert live.weight._precomputed_scale.item() == 2.5


def test_a_dict_of_wrapped_tensors_takes_weights() -> None:
    store = new_store()
    saved, other = (nn.Sequential(nn.Linear(64, 64)) for _ in range(2))
    for model in (saved, other):
        int8_weights(model)
    dist_ckpt.save({"model": saved}, store)
    live = {name: value.detach() for name, value in other.state_dict().items()}
    weight = live["0.weight"]
    dist_ckpt.load_weights(live, store)
    assert live["0.weight"] is weight
    assert {name: bits(value) for name, value in live.items()} == model_bits(saved)
    plain = {"0.weight": torch.zeros(64, 64), "0.bias": torch.zeros(64)}
    with pytest.raises(IncompatibleError, match=r"unexpected in the checkpoint: model/0\.weight\."):
        dist_ckpt.load_weights(plain, store)
    back = new_store()
    dist_ckpt.save({"model": float8_model(1)}, back)
    plain = {"weight": torch.zeros(8, 8), "bias": torch.zeros(8)}
    dist_ckpt.load_weights(plain, back)
    assert torch.equal(plain["weight"], float8_model(1).weight._tensor)
