"""Synthetic jobs: what each rank of a large training would say that it holds.

The shapes are those of Llama 2 (7B and 70B) and of a mixture of experts of about 1T parameters as
DeepSeek-V3 is built (61 layers, 256 experts of 7,168 x 2,048), with the two moments and the counter
that AdamW keeps for each parameter. Boxes are cut as `fully_shard` cuts: by the first dimension, in
chunks of the same size but for the last ones.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from numpy.typing import NDArray

from dist_ckpt.format.files import bytes_digest
from dist_ckpt.planning.columns import Numbers, Row, Table
from dist_ckpt.ranks.rounds import pack
from dist_ckpt.saving.messages import Description

Shape = tuple[int, ...]

EXPERT_RANKS = 64
HSDP_REPLICAS = 8


@dataclass(frozen=True, slots=True)
class Job:
    """A training.

    Attributes:
        name: as the tables call it.
        model: which model.
        layout: `fsdp`, `hsdp`, `ddp` or `moe`.
    """

    name: str
    model: str
    layout: str

    def messages(self, world_size: int) -> tuple[list[bytes], int]:
        """Return the description of each rank, and how many bytes of them are tables."""
        told: dict[str, int] = {}
        messages = []
        for rank in range(world_size):
            table, digest, numbers = self._rank(rank, world_size)
            sent = b"" if digest in told else table
            told.setdefault(digest, len(table))
            messages.append(pack(Description(digest, sent, numbers, {"progress": {"": "0"}}, {})))
        return messages, sum(told.values())

    def boxes(self, world_size: int) -> int:
        """Return how many boxes all ranks hold together."""
        return len(_table(self.model, 0).rows) * world_size

    def _place(self, rank: int, world_size: int) -> tuple[int, int, int]:
        """Return the group of experts, the shards, and which of them a rank has."""
        if self.layout == "moe":
            return rank % EXPERT_RANKS, world_size, rank
        shards = {
            "fsdp": world_size,
            "hsdp": max(1, world_size // HSDP_REPLICAS),
            "ddp": 1,
        }[self.layout]
        return 0, shards, rank % shards

    def _rank(self, rank: int, world_size: int) -> tuple[bytes, str, bytes]:
        experts, shards, shard = self._place(rank, world_size)
        expert_shards = max(1, world_size // EXPERT_RANKS)
        expert_cut = (expert_shards, rank // EXPERT_RANKS % expert_shards)
        return *_encoded(self.model, experts), _numbers(
            self.model, experts, (shards, shard), expert_cut
        )


JOBS = [
    Job("7B, FSDP2", "7B", "fsdp"),
    Job("70B, FSDP2", "70B", "fsdp"),
    Job(f"70B, HSDP {HSDP_REPLICAS} x N", "70B", "hsdp"),
    Job("7B, DDP", "7B", "ddp"),
    Job(f"1T, experts over {EXPERT_RANKS}, FSDP2", "1T", "moe"),
]


@cache
def _table(model: str, experts: int) -> Table:
    parameters = list(_parameters(model, experts))
    rows = [Row("model", name, "bfloat16", shape, False, "") for name, shape in parameters]
    for name, shape in parameters:
        moments = [
            Row("optimizer", f"{name}.{moment}", "float32", shape, False, "")
            for moment in ("exp_avg", "exp_avg_sq")
        ]
        rows += [*moments, Row("optimizer", f"{name}.step", "float32", (), False, "")]
    return Table(tuple(rows))


@cache
def _encoded(model: str, experts: int) -> tuple[bytes, str]:
    data = _table(model, experts).encode()
    return data, bytes_digest(data)


def _parameters(model: str, experts: int) -> Iterator[tuple[str, Shape]]:
    if model == "1T":
        yield from _mixture(experts)
    else:
        yield from _llama(*{"7B": (4096, 32, 11008, 4096), "70B": (8192, 80, 28672, 1024)}[model])


def _llama(hidden: int, layers: int, inner: int, keys: int) -> Iterator[tuple[str, Shape]]:
    yield "model.embed_tokens.weight", (32000, hidden)
    for layer in range(layers):
        at = f"model.layers.{layer}"
        yield f"{at}.self_attn.q_proj.weight", (hidden, hidden)
        yield f"{at}.self_attn.k_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.v_proj.weight", (keys, hidden)
        yield f"{at}.self_attn.o_proj.weight", (hidden, hidden)
        yield f"{at}.mlp.gate_proj.weight", (inner, hidden)
        yield f"{at}.mlp.up_proj.weight", (inner, hidden)
        yield f"{at}.mlp.down_proj.weight", (hidden, inner)
        yield f"{at}.input_layernorm.weight", (hidden,)
        yield f"{at}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    yield "lm_head.weight", (32000, hidden)


def _mixture(experts: int) -> Iterator[tuple[str, Shape]]:
    hidden, inner, each = 7168, 2048, 256 // EXPERT_RANKS
    yield "model.embed_tokens.weight", (129280, hidden)
    for layer in range(61):
        at = f"model.layers.{layer}"
        yield f"{at}.attn.q.weight", (24576, hidden)
        yield f"{at}.attn.kv.weight", (512, hidden)
        yield f"{at}.attn.o.weight", (hidden, 16384)
        yield f"{at}.norm.weight", (hidden,)
        yield f"{at}.router.weight", (256, hidden)
        for expert in range(experts * each, (experts + 1) * each):
            yield f"{at}.expert.{expert}.gate.weight", (inner, hidden)
            yield f"{at}.expert.{expert}.up.weight", (inner, hidden)
            yield f"{at}.expert.{expert}.down.weight", (hidden, inner)
    yield "lm_head.weight", (129280, hidden)


@dataclass(frozen=True, slots=True)
class _Rows:
    """What a rank with these tensors says, but for where its boxes begin and end.

    Attributes:
        numbers: of a rank that has them whole.
        starts: int64[n], where in `numbers` the first offset of each tensor with dimensions is.
        sizes: int64[n], where its first size is.
        lengths: int64[n], which is that size.
        experts: bool[n], whether it is an expert's.
    """

    numbers: Numbers
    starts: Numbers
    sizes: Numbers
    lengths: Numbers
    experts: NDArray[np.bool_]


@cache
def _rows(model: str, experts: int) -> _Rows:
    table = _table(model, experts)
    cut = [(at, row) for at, row in zip(table.columns, table.rows, strict=False) if row.shape]
    starts = np.array([at for at, _ in cut], np.int64)
    numbers = [each for _, row in cut for each in (*(0 for _ in row.shape), *row.shape)]
    return _Rows(
        np.array(numbers, np.int64),
        starts,
        starts + np.array([len(row.shape) for _, row in cut], np.int64),
        np.array([row.shape[0] for _, row in cut], np.int64),
        np.array([".expert" in row.name for _, row in cut]),
    )


@lru_cache(maxsize=1 << 14)
def _numbers(model: str, experts: int, cut: tuple[int, int], expert_cut: tuple[int, int]) -> bytes:
    """Return the numbers of a rank, packed; a cut is how many shards there are, and which."""
    rows = _rows(model, experts)
    shards, shard = (np.where(rows.experts, *pair) for pair in zip(expert_cut, cut, strict=True))
    each = -(-rows.lengths // shards)
    numbers = rows.numbers.copy()
    numbers[rows.starts] = start = np.minimum(shard * each, rows.lengths)
    numbers[rows.sizes] = np.minimum(start + each, rows.lengths) - start
    return _table(model, experts).pack(numbers)
