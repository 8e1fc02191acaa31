"""Names of stock state dicts as parts and names: nothing falls together, and all comes back."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import dist_ckpt
from dist_ckpt.dcp.catalog import catalog
from dist_ckpt.dcp.edge import part_and_name, plain_errors, step_of
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    IntegrityError,
    StorageError,
    UsageError,
)
from dist_ckpt.foreign.dcp_runs import path_of
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.names import is_part
from dist_ckpt.repository import Repository
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.storage import LocalStore

KEYS = st.sampled_from(["state", "model", "extra", "a.b", "", "x", "0"]) | st.text(max_size=3)
PATHS = st.lists(KEYS | st.integers(0, 3), min_size=1, max_size=4).map(tuple)


@given(st.lists(PATHS, max_size=12))
def test_names_that_differ_stay_different_and_come_back(found: list[tuple[str | int, ...]]) -> None:
    paths = {".".join(map(str, path)): path for path in found}
    stored = {fqn: part_and_name(fqn, paths) for fqn in paths}
    assert len(set(stored.values())) == len(paths)
    for fqn, (part, name) in stored.items():
        assert is_part(part)
        assert ".".join(path_of(part, name)) == fqn


def test_steps() -> None:
    assert [step_of(each) for each in ("0", "12", "step-0000000012", 12)] == [0, 12, 12, 12]
    for wrong in ("", "-1", "1.0", "run/12.5", "١٢", "10000000000"):
        with pytest.raises(UsageError):
            step_of(wrong)


class OfBackend(StorageError):
    """Made by a backend, and gone when it is rebuilt elsewhere."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(f"{one} and {two}", kind=ErrorKind.STORAGE_FULL)


def test_errors_cross_ranks_whatever_they_were() -> None:
    for error, kind in {
        OfBackend(1, 2): ErrorKind.STORAGE_FULL,
        IntegrityError("flipped"): ErrorKind.DIGEST,
    }.items():
        with pytest.raises(CheckpointError, match=str(error.args[0])) as caught, plain_errors():
            raise error
        assert caught.value.__cause__ is error
        sent = copy.copy(caught.value)
        assert not isinstance(sent, CoordinationError)
        assert (type(sent), str(sent), sent.kind) == (type(caught.value), str(caught.value), kind)


class WithoutTensors:
    """A checkpoint whose description leaves out the tensors that its values refer to."""

    tensors: tuple[TensorEntry, ...] = ()

    def __init__(self, source: Checkpoint) -> None:
        self._source = source

    def __getattr__(self, name: str) -> Any:
        return getattr(self._source, name)


def test_a_value_that_refers_to_nothing_is_malformed(tmp_path: Path) -> None:
    dist_ckpt.save({"loop": {"n": 1, "ema": {"w": torch.ones(3)}}}, tmp_path, step=1)
    source = WithoutTensors(Repository(LocalStore(tmp_path)).open(1))
    with pytest.raises(IntegrityError, match=r"loop.* has the tensor loop/.* not stored"):
        catalog(cast("Any", source))
