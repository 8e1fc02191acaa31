"""Modules of bitsandbytes, whose weights keep beside them what they were quantized with."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt.errors import IncompatibleError
from dist_ckpt.storage.memory import MemoryStore
from tests import quantized as ao

pytestmark = pytest.mark.soak

_names = itertools.count()


def model(seed: int, kind: str, *, quantize: bool = True) -> Any:
    torch.manual_seed(seed)
    if kind == "8bit":
        made: Any = nn.Sequential(ao.Linear8bitLt(128, 64, has_fp16_weights=False))
    else:
        quant, _, twice = kind.partition(" ")
        made = nn.Sequential(
            ao.Linear4bit(
                128,
                64,
                quant_type=quant,
                compress_statistics=bool(twice),
                compute_dtype=torch.float32,
            )
        )
    return made.to("cpu") if quantize else made


def content(module: nn.Module) -> dict[str, list[int]]:
    return {
        name: value.detach().reshape(-1).view(torch.uint8).tolist()
        for name, value in module.state_dict().items()
    }


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["nf4 twice", "nf4", "fp4 twice", "fp4", "8bit"])
def test_a_quantized_module_comes_back_and_computes_the_same(kind: str) -> None:
    store = MemoryStore(f"unit-bitsandbytes-{next(_names)}")
    saved, live = model(1, kind), model(2, kind)
    dist_ckpt.save({"model": saved}, store)
    dist_ckpt.load({"model": live}, store)
    assert content(live) == content(saved)
    inputs = torch.randn(2, 128)
    assert torch.equal(live(inputs), saved(inputs))
    bare = model(2, kind, quantize=False)
    before = content(bare)
    with pytest.raises(IncompatibleError, match="unexpected in the checkpoint"):
        dist_ckpt.load({"model": bare}, store)
    assert content(bare) == before
    if kind == "nf4 twice":
        other = model(2, "fp4")
        before = content(other)
        with pytest.raises(IncompatibleError, match=r"missing in the checkpoint: .*fp4"):
            dist_ckpt.load({"model": other}, store)
        assert content(other) == before
