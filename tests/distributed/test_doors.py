"""A GPT-2 that four ranks of FSDP2 saved goes out whole, under the names that transformers has."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import dist_ckpt
from dist_ckpt.testing.ranks import run_ranks
from tests.unit.doors.models import check_equal

WIDTH, LAYERS, WORDS, PLACES = 16, 2, 40, 12
CONFIG = {
    "model_type": "gpt2",
    "architectures": ["GPT2LMHeadModel"],
    "n_embd": WIDTH,
    "n_head": 2,
    "n_layer": LAYERS,
    "vocab_size": WORDS,
    "n_positions": PLACES,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


class Conv1D(nn.Module):
    """A linear layer as GPT-2 has it, the other way round."""

    def __init__(self, wide: int, far: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(far, wide))
        self.bias = nn.Parameter(torch.randn(wide))


def norm() -> nn.Module:
    made = nn.LayerNorm(WIDTH)
    nn.init.normal_(made.weight)
    return made


class Block(nn.ModuleDict):
    """One layer; only what has a `forward` can be sharded by itself."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden


class GPT2(nn.Module):
    """The names and shapes of `GPT2LMHeadModel`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(WORDS, WIDTH),
                "wpe": nn.Embedding(PLACES, WIDTH),
                "h": nn.ModuleList(self.block() for _ in range(LAYERS)),
                "ln_f": norm(),
            }
        )
        self.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        self.lm_head.weight = self.transformer["wte"].weight  # type: ignore[assignment]

    @staticmethod
    def block() -> nn.Module:
        attention = {"c_attn": Conv1D(3 * WIDTH, WIDTH), "c_proj": Conv1D(WIDTH, WIDTH)}
        mlp = {"c_fc": Conv1D(4 * WIDTH, WIDTH), "c_proj": Conv1D(WIDTH, 4 * WIDTH)}
        return Block(
            {
                "ln_1": norm(),
                "attn": nn.ModuleDict(attention),
                "ln_2": norm(),
                "mlp": nn.ModuleDict(mlp),
            }
        )


def save(root: str) -> None:
    model: Any = GPT2()
    mesh = init_device_mesh("cpu", (4,))
    for block in model.transformer["h"]:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    dist_ckpt.save({"model": model, "rng": None}, root, step=7)


def saved(folder: Path) -> tuple[Path, Path]:
    """Return a run that four ranks saved, and a folder with a configuration."""
    run_ranks(4, save, str(folder / "run"))
    config = folder / "config"
    config.mkdir()
    (config / "config.json").write_text(json.dumps(CONFIG))
    return folder / "run", config


def test_a_sharded_gpt2_is_one_of_transformers(tmp_path: Path) -> None:
    run, config = saved(tmp_path)
    wanted = GPT2().state_dict()
    out = tmp_path / "out"
    report = dist_ckpt.export(run, out, format="hf", like=config, max_shard="8KB", step=7)
    assert report.aliases == {"lm_head.weight": "transformer.wte.weight"}
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    found = {name: each for path in shards for name, each in load_file(path).items()}
    check_equal(found, {name: wanted[name] for name in wanted if name != "lm_head.weight"})
    assert json.loads((out / "config.json").read_text()) == CONFIG


@pytest.mark.soak
@pytest.mark.parametrize(
    ("options", "dtype"),
    [
        ({"max_shard": "8KB"}, torch.float32),
        ({}, torch.float32),
        ({"dtype": "bf16"}, torch.bfloat16),
    ],
    ids=["shards", "one file", "bfloat16"],
)
def test_transformers_reads_it(options: dict[str, Any], dtype: torch.dtype, tmp_path: Path) -> None:
    transformers: Any = pytest.importorskip("transformers")
    run, config = saved(tmp_path)
    dist_ckpt.export(run, tmp_path / "out", format="hf", like=config, **options)
    loaded, told = transformers.GPT2LMHeadModel.from_pretrained(
        tmp_path / "out", dtype="auto", output_loading_info=True
    )
    assert {name: list(names) for name, names in told.items() if names} == {}, "none is missing"
    wanted = {name: each.to(dtype) for name, each in GPT2().state_dict().items()}
    check_equal({name: loaded.state_dict()[name] for name in wanted}, wanted)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    words = torch.arange(PLACES)[None]
    assert loaded(words).logits.isfinite().all()
