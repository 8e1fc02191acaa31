"""No damage to a checkpoint is loaded: single bits, cut files, lost files, files of another one."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.errors import CheckpointError, IntegrityError, NotFound
from dist_ckpt.format.files import header_nbytes
from dist_ckpt.repository import Repository
from dist_ckpt.storage.memory import MemoryStore
from tests.distributed.layouts import same_bits

FLIPS = 500
KINDS = (
    "manifest.json",
    "index.msgpack",
    "model.r00000.safetensors",
    "optimizer.r00000.safetensors",
    "extra.r00000.safetensors",
)
STEPS = (1, 2)


def training(seed: int) -> TrainState:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(13, 17), nn.LayerNorm(17), nn.Linear(17, 3, bias=False))
    model.register_buffer("rounded", torch.randn(5, 3).bfloat16())
    model.register_buffer("count", torch.tensor(seed))
    optimizer = torch.optim.AdamW(model.parameters(), lr=seed / 7)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    return TrainState(rng=None, model=model, optimizer=optimizer, notes={"seed": seed})


def tensors(state: TrainState) -> list[torch.Tensor]:
    found = list(state["model"].state_dict().values())
    for parameter in state["model"].parameters():
        kept = state["optimizer"].state[parameter]
        found += [kept[key] for key in sorted(kept)]
    return found


def is_same(found: TrainState, expected: TrainState) -> bool:
    rates = [state["optimizer"].param_groups[0]["lr"] for state in (found, expected)]
    pairs = zip(tensors(found), tensors(expected), strict=True)
    return (
        rates[0] == rates[1]
        and found["notes"] == expected["notes"]
        and all(same_bits(left, right) for left, right in pairs)
    )


@pytest.fixture
def files() -> Iterator[dict[str, bytes]]:
    """The files of two checkpoints of the same shapes, without the claims."""
    store = MemoryStore("damage")
    for step in STEPS:
        dist_ckpt.save(training(seed=step), store, step=step)
    found = {}
    for entry in store.list_entries():
        if not entry.key.startswith("claims/"):
            found[entry.key] = read(store, entry.key, entry.nbytes)
    yield found
    store.delete([entry.key for entry in store.list_entries()])


def read(store: MemoryStore, key: str, nbytes: int) -> bytes:
    data = bytearray(nbytes)
    assert store.read_into(key, 0, memoryview(data)) == nbytes
    return bytes(data)


def put(key: str, data: bytes) -> None:
    MemoryStore("damage").put(key, [data], mode="replace")


def outcome(expected: TrainState) -> str:
    """Load the first checkpoint, and tell what came of it."""
    state = training(seed=9)
    try:
        dist_ckpt.load(state, MemoryStore("damage"), step=STEPS[0])
    except CheckpointError:
        return "detected"
    return "harmless" if is_same(state, expected) else "loaded wrong"


def test_a_flipped_bit_is_never_loaded(files: dict[str, bytes]) -> None:
    rng = random.Random(20)
    expected = training(seed=STEPS[0])
    mine = sorted(key for key in files if key.startswith("step-0000000001/"))
    assert outcome(expected) == "harmless"
    assert sorted(key.rpartition("/")[2] for key in mine) == sorted(KINDS)
    found: dict[str, list[str]] = {"detected": [], "harmless": [], "loaded wrong": []}
    for number in range(FLIPS):
        key = mine[number % len(mine)]
        bit = rng.randrange(8 * len(files[key]))
        damaged = bytearray(files[key])
        damaged[bit // 8] ^= 1 << bit % 8
        put(key, bytes(damaged))
        came = outcome(expected)
        if came == "harmless":
            # No load looks at the header of a shard file, which is under a digest as all is.
            assert key.endswith(".safetensors")
            assert bit // 8 < header_nbytes(files[key], len(files[key]))
            assert not Repository(MemoryStore("damage")).verify(STEPS[0]).ok
        found[came].append(f"{key}, bit {bit}")
        put(key, files[key])
    assert found["loaded wrong"] == []
    assert len(found["detected"]) > FLIPS // 4


@pytest.mark.parametrize("kind", KINDS)
def test_a_cut_lost_or_exchanged_file_is_detected(files: dict[str, bytes], kind: str) -> None:
    (mine, other) = sorted(key for key in files if key.endswith(kind))
    expected = training(seed=STEPS[0])
    for count in (0, 1, len(files[mine]) // 2, len(files[mine]) - 1):
        put(mine, files[mine][:count])
        assert outcome(expected) == "detected", f"{kind} cut to {count} bytes"
    put(mine, files[other])
    assert outcome(expected) == "detected", f"{kind} of another step"
    MemoryStore("damage").delete([mine])
    with pytest.raises(NotFound if kind == KINDS[0] else IntegrityError):
        dist_ckpt.load(training(seed=9), MemoryStore("damage"), step=STEPS[0])
