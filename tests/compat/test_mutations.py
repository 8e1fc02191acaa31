"""Mutated files of every format: loaded or refused as damaged, and nothing else ever happens."""

from __future__ import annotations

import copy
import itertools
import json
import random
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import dist_ckpt
from dist_ckpt import EarlyStopping, ElasticSampler, TrainState
from dist_ckpt.errors import IncompatibleError, IntegrityError
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.memory import MemoryStore
from tests.compat.hostile import Sealed, mutated, mutated_json

STEP = 3
QUICK, SOAK = 40, 2500
NUMPY = [np.arange(6, dtype=">i2").reshape(2, 3).T, np.array(["a"]), np.float32(1)]
_places = itertools.count()


class Training:
    """One of everything that a run keeps."""

    def __init__(self) -> None:
        torch.manual_seed(3)
        self.model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.1)
        self.scheduler = torch.optim.lr_scheduler.StepLR(self.optimizer, 2)
        self.sampler = ElasticSampler(40, global_batch=4)
        self.notes = {
            "list": [1, 2.5, None, True],
            "array": np.arange(6, dtype="<f4").reshape(2, 3),
            "bytes": b"\x00\xff",
            "nan": float("nan"),
            "keys": {1: "a", (2, 3): "b"},
            "set": {1, 2},
            "tensor": torch.arange(3),
            "shape": torch.Size([2, 3]),
        }

    def train(self) -> None:
        self.model(torch.randn(5, 3)).sum().backward()
        self.optimizer.step()
        self.scheduler.step()

    def state(self) -> TrainState:
        return TrainState(
            model=self.model,
            optimizer=self.optimizer,
            scheduler=self.scheduler,
            sampler=self.sampler,
            stopping=EarlyStopping("loss", patience=3),
            scaler=torch.amp.GradScaler("cpu", enabled=True),
            notes=copy.deepcopy(self.notes),
            count=7,
        )

    def plain(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "notes": {"a": [1, (2, 3)], "b": b"x", "t": torch.ones(2), "n": NUMPY},
            "count": 7,
        }


def ours() -> dict[str, bytes]:
    store = MemoryStore(f"mutations-{next(_places)}")
    training = Training()
    training.train()
    dist_ckpt.save(training.state(), store, step=STEP)
    return {entry.key: read_all(store, entry.key) for entry in store.list_entries()}


def stock(root: Path) -> dict[str, bytes]:
    training = Training()
    training.train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        stock_save(training.plain(), checkpoint_id=root)
    return {path.name: path.read_bytes() for path in root.iterdir()}


def torch_file(root: Path) -> dict[str, bytes]:
    training = Training()
    training.train()
    torch.save(training.plain(), root / "last.pt")
    return {"last.pt": (root / "last.pt").read_bytes()}


def safetensors_files(root: Path) -> dict[str, bytes]:
    names = "a.safetensors", "b.safetensors"
    items = list(Training().model.state_dict().items())
    halves = [dict(items[:3]), dict(items[3:])]
    files = {name: safetensors_bytes(half) for name, half in zip(names, halves, strict=True)}
    weight_map = {key: name for name, half in zip(names, halves, strict=True) for key in half}
    index = json.dumps({"weight_map": weight_map}).encode()
    return {**files, "model.safetensors.index.json": index}


@pytest.fixture
def place() -> Iterator[MemoryStore]:
    store = MemoryStore(f"mutations-{next(_places)}")
    yield store
    store.delete([entry.key for entry in store.list_entries()])


def load(store: MemoryStore, files: Mapping[str, bytes], weights_only: bool = False) -> str:
    """Load `files` in both ways, and tell what came of it."""
    for key, data in files.items():
        store.put(key, [data], mode="replace")
    training = Training()
    try:
        if weights_only:
            dist_ckpt.load_weights(training.model, store, strict=False)
        else:
            dist_ckpt.load(training.state(), store, strict=False)
        with dist_ckpt.open_checkpoint(store) as opened:
            for name in opened:
                opened[name][...]
            for part in opened.parts:
                opened.read_values(part)
    except (IntegrityError, IncompatibleError) as error:
        return type(error).__name__
    return "loaded"


def outcomes(
    store: MemoryStore, whole: Mapping[str, bytes], keys: list[str], count: int, seed: int
) -> list[str]:
    rng = random.Random(seed)
    found = []
    for number in range(count):
        key = keys[number % len(keys)]
        files = {**whole, key: mutated(whole[key], rng)}
        try:
            found.append(load(store, files, weights_only=number % 2 == 0))
        except Exception as error:
            error.add_note(f"mutation {number} of {key}, seed {seed}")
            raise
    return found


COUNTS = [pytest.param(QUICK, id="quick"), pytest.param(SOAK, marks=pytest.mark.soak, id="soak")]


@pytest.mark.parametrize("count", COUNTS)
@pytest.mark.parametrize("write", [stock, torch_file, safetensors_files])
def test_mutated_files_of_other_programs(
    write: Any, count: int, tmp_path: Path, place: MemoryStore
) -> None:
    whole = write(tmp_path)
    assert load(place, whole, weights_only=True) == "loaded"
    found = outcomes(place, whole, sorted(whole), count, seed=count)
    assert "IntegrityError" in found


@pytest.mark.parametrize("count", COUNTS)
def test_mutated_files_of_ours(count: int, place: MemoryStore) -> None:
    whole = ours()
    keys = sorted(key for key in whole if not key.startswith("claims/"))
    assert load(place, whole) == "loaded"
    # Every byte is under some digest; what is loaded was changed back by chance.
    assert set(outcomes(place, whole, keys, count, seed=count)) <= {"IntegrityError", "loaded"}


@pytest.mark.parametrize("count", COUNTS)
def test_values_changed_by_somebody_who_can_compute_digests(count: int, place: MemoryStore) -> None:
    sealed = Sealed(ours(), STEP)
    rng = random.Random(count)
    documents = sealed.documents()
    for number in range(count):
        part = [*documents][number % len(documents)]
        values = {name: json.loads(data) for name, data in documents[part].items()}
        encoded = {
            key: json.dumps({n: json.loads(d) for n, d in each.items()}).encode()
            for key, each in documents.items()
        }
        if number % 4:
            encoded[part] = json.dumps(mutated_json(values, rng)).encode()
        else:
            encoded[part] = mutated(encoded[part], rng)
        try:
            load(place, sealed.with_documents(encoded))
        except Exception as error:
            error.add_note(f"mutation {number} of {part}: {encoded[part]!r}")
            raise


@pytest.mark.parametrize("count", COUNTS)
def test_descriptions_changed_by_somebody_who_can_compute_digests(
    count: int, place: MemoryStore
) -> None:
    sealed = Sealed(ours(), STEP)
    rng = random.Random(count)
    for number in range(count):
        if number % 2:
            fields = mutated_json(sealed.manifest_fields(), rng)
            if not isinstance(fields, dict):
                continue
            files = sealed.with_manifest(fields)
        else:
            files = sealed.with_index(mutated(sealed.index_bytes(), rng))
        try:
            load(place, files)
        except Exception as error:
            error.add_note(f"mutation {number}")
            raise
