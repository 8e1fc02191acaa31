"""Weights as other programs write them: safetensors, and torch.save, whole or in shards."""

from __future__ import annotations

import argparse
import enum
import io
import json
import os
import random
import struct
import warnings
from collections import OrderedDict, defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict_loader import load as stock_load
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import dist_ckpt
from dist_ckpt.errors import CheckpointError, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.storage.memory import MemoryStore
from tests.distributed.layouts import same_bits
from tests.services.s3 import S3Service

DTYPES = (torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2, torch.int64)
Writer = Callable[[Path], None]


class Weights(nn.Module):
    """One tensor of each dtype, an empty one and a scalar, below a prefix."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Module()
        for dtype in DTYPES:
            name = "as_" + str(dtype).removeprefix("torch.")
            raw = torch.arange(7 * 3 * dtype.itemsize, dtype=torch.uint8)
            self.inner.register_buffer(name, raw.view(dtype).reshape(7, 3))
        self.register_buffer("empty", torch.zeros(0, 4))
        self.register_buffer("scale", torch.tensor(0.1))


def halves() -> list[dict[str, torch.Tensor]]:
    items = list(Weights().state_dict().items())
    return [dict(items[:3]), dict(items[3:])]


def write_index(root: Path, pattern: str, index: str) -> None:
    files = [pattern.format(number) for number in (1, 2)]
    named = {name: file for file, half in zip(files, halves(), strict=True) for name in half}
    (root / index).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": named}))


def safetensors_one(root: Path) -> None:
    save_file(Weights().state_dict(), root / "model.safetensors", {"format": "pt"})


def safetensors_sharded(root: Path) -> None:
    pattern = "model-{:05}-of-00002.safetensors"
    for number, half in enumerate(halves(), 1):
        save_file(half, root / pattern.format(number))
    write_index(root, pattern, "model.safetensors.index.json")


def torch_flat(root: Path) -> None:
    torch.save(Weights().state_dict(), root / "weights.pt")


def torch_nested(root: Path) -> None:
    torch.save({"model": Weights().state_dict(), "epoch": 3}, root / "last.ckpt")


def torch_sharded(root: Path) -> None:
    pattern = "pytorch_model-{:05}-of-00002.bin"
    for number, half in enumerate(halves(), 1):
        torch.save(half, root / pattern.format(number))
    write_index(root, pattern, "pytorch_model.bin.index.json")


WRITERS = (safetensors_one, safetensors_sharded, torch_flat, torch_nested, torch_sharded)


def blank() -> nn.Module:
    """Return the module on the meta device."""
    return Weights().to(device="meta")


def check(model: nn.Module) -> None:
    expected = Weights().state_dict()
    found = model.state_dict()
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert same_bits(tensor, expected[name]), name


@pytest.mark.parametrize("write", WRITERS)
def test_a_directory_loads_onto_the_meta_device(write: Writer, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    model = blank()
    report = dist_ckpt.load_weights(model, tmp_path)
    check(model)
    assert report.parts == ("model",)
    assert (report.verified, report.step, report.missing) == (False, 0, ())


@pytest.mark.parametrize(
    ("write", "file"), [(safetensors_one, "model.safetensors"), (torch_nested, "last.ckpt")]
)
def test_a_single_file_can_be_named(write: Writer, file: str, tmp_path: Path) -> None:
    write(tmp_path)
    (tmp_path / "other.pt").write_bytes(b"not one")
    model = blank()
    dist_ckpt.load_weights(model, tmp_path / file)
    check(model)


def test_the_values_beside_the_weights_are_there(tmp_path: Path) -> None:
    torch_nested(tmp_path)
    with dist_ckpt.open_checkpoint(tmp_path / "last.ckpt") as opened:
        assert opened.parts == ("model", "epoch")
        assert opened.read_values("epoch") == {"value": 3}
        rows = opened["model/inner.as_bfloat16"][2:4]
    assert same_bits(rows, Weights().state_dict()["inner.as_bfloat16"][2:4])


def test_what_other_programs_keep_beside_the_weights_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "last.ckpt"
    plain = {"rate": 0.1, "betas": (0.9, 0.5), "tags": {"a", "b"}, "key": b"\xff\x00a"}
    plain["large"] = bytes(range(256)) * 1000
    other = {"device": torch.device("cuda", 1), "dtype": torch.float16, "c": 1 + 2j}
    weights = Weights().state_dict()
    torch.save({"state_dict": weights, "plain": plain, **other}, path)
    model = blank()
    dist_ckpt.load_weights(model, path, part="state_dict")
    check(model)
    with dist_ckpt.open_checkpoint(path) as opened:
        assert opened.read_values("plain") == {"value": plain}
        assert opened.read_values("c") == {"value": 1 + 2j}
        with pytest.raises(IncompatibleError, match=r"device.value cannot be read"):
            opened.read_values("device")


def test_a_store_in_memory_and_one_on_s3_do_as_well(
    tmp_path: Path, s3_service: S3Service, s3_name: str
) -> None:
    safetensors_sharded(tmp_path)
    store = MemoryStore("weight-files")
    client = s3_service.client()
    for path in tmp_path.iterdir():
        store.put(path.name, [path.read_bytes()])
        key = f"{s3_service.prefix}{s3_name}/{path.name}"
        client.put_object(Bucket=s3_service.bucket, Key=key, Body=path.read_bytes())
    for place in (store, s3_service.url(s3_name)):
        model = blank()
        dist_ckpt.load_weights(model, place)
        check(model)


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def refused(kind: type[CheckpointError], place: Path, *words: str) -> None:
    """Check that loading says these words, and changes nothing."""
    model = Weights()
    with pytest.raises(kind) as caught:
        dist_ckpt.load_weights(model, place)
    for word in words:
        assert word in str(caught.value)
    check(model)


def test_a_pickle_that_calls_something_is_not_executed(tmp_path: Path) -> None:
    witness = tmp_path / "witness"
    path = tmp_path / "evil.pt"
    torch.save({**Weights().state_dict(), "x": Evil(witness)}, path)
    model = blank()
    dist_ckpt.load_weights(model, path)
    check(model)
    with (
        dist_ckpt.open_checkpoint(path) as opened,
        pytest.raises(IncompatibleError, match=r"x: it refers to posix\.system"),
    ):
        opened.read_values("x")
    torch.save({"x": Evil(witness)}, path)
    refused(IntegrityError, path, "evil.pt", "posix.system")
    assert not witness.exists()


class InItself(dict[str, Any]):
    """A class of a program that is not this one."""

    def __init__(self) -> None:
        self["own"] = self.own = self


class Colour(enum.Enum):
    """Another one."""

    RED = 1


UNREADABLE: dict[str, Any] = {
    "argparse.Namespace": argparse.Namespace(rate=0.1),
    "pathlib": Path("x"),
    "Linear": torch.nn.Linear(2, 2),
    "InItself": InItself(),
    "Colour": {Colour.RED: torch.ones(2)},
    "OrderedDict.fromkeys": OrderedDict.fromkeys,
    "defaultdict": {"deep": [defaultdict(list, {1: [2]})]},
    "numpy.dtype 'O8'": np.array([None, {}]),
    "numpy.dtype 'V8'": np.zeros(2, dtype=[("a", "i4"), ("b", "f4")]),
    "numpy.dtype 'M8'": np.array(["2020-01-01"], dtype="M8[D]"),
    "numpy.ma": np.ma.masked_array([1, 2], [True, False]),
    "sparse": torch.eye(2).to_sparse(),
    "numpy scalar": np.longdouble(1),
}


@pytest.mark.parametrize("named", UNREADABLE)
def test_a_value_that_cannot_be_read_harms_nobody_else(
    named: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "last.pt"
    torch.save({"model": Weights().state_dict(), "odd": UNREADABLE[named], "epoch": 3}, path)
    name = "getattr" if named == "OrderedDict.fromkeys" else named
    model = blank()
    state: dict[str, Any] = {"model": model, "epoch": 0, "rng": None}
    dist_ckpt.load(state, path, only=["model", "epoch"])
    check(model)
    assert state["epoch"] == 3
    (told,) = [record.getMessage() for record in caplog.records if name in record.getMessage()]
    assert "odd: it refers to" in told
    state = {"model": blank(), "odd": 0, "epoch": 0, "rng": None}
    with pytest.raises(IncompatibleError, match=f"odd: it refers to .*{name}"):
        dist_ckpt.load(state, path)
    torch.save({"odd": UNREADABLE[named]}, path)
    refused(IntegrityError, path, name)


NUMPY: list[Any] = [
    *(np.float64(3), np.float32(2), np.float16(1), np.int64(-5), np.uint8(3), np.bool_(True)),
    *(np.complex64(1j), np.str_("é"), np.bytes_(b"x"), np.dtype("f4"), np.dtype(">U3")),
    *(np.arange(6.0).reshape(2, 3), np.arange(6.0).reshape(2, 3).T, np.array(5), np.zeros((0, 3))),
    *(np.arange(9)[::2], np.arange(3, dtype=">i4"), np.array([True, False]), np.ones(2, "c16")),
    *(np.array(["ab", "é"]), np.array([b"ab", b""]), np.arange(9, dtype="u8").reshape(3, 3, 1)),
    [{"numpy": np.random.get_state(), "python": random.getstate()}, (np.ones(2), [np.ones(1)])],
]


def flat(value: Any) -> Any:
    """`value`, with what tells arrays and scalars of numpy apart in the place of each."""
    if isinstance(value, np.ndarray | np.generic):
        return type(value), value.dtype.str, value.shape, value.tolist()
    if isinstance(value, list | tuple):
        return type(value), [*map(flat, value)]
    return {key: flat(item) for key, item in value.items()} if type(value) is dict else value


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_numpy_makes_is_read(protocol: int, tmp_path: Path) -> None:
    held = {**Weights().state_dict(), "list": [torch.ones(2), np.arange(2)]}
    saved = {"model": held, **{f"n{at}": value for at, value in enumerate(NUMPY)}}
    torch.save(saved, tmp_path / "last.pt", pickle_protocol=protocol)
    with dist_ckpt.open_checkpoint(tmp_path / "last.pt") as opened:
        found = {part: opened.read_values(part) for part in opened.parts}
    for at, value in enumerate(NUMPY):
        assert flat(found[f"n{at}"]["value"]) == flat(value)
    np.testing.assert_array_equal(found["model"]["value"]["list"][1], np.arange(2))


def test_generators_come_back_from_other_programs(tmp_path: Path) -> None:
    random.seed(3)
    np.random.seed(3)
    extra = io.BytesIO()
    torch.save({"array": np.ones(2)}, extra)
    kept = {"numpy": np.random.get_state(), "python": random.getstate()}
    saved = {"model": {"w": torch.ones(2), "_extra_state": extra}, "rng": kept}
    expected = np.random.rand(), random.random()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        stock_save(saved, checkpoint_id=tmp_path / "stock")
    torch.save(saved, tmp_path / "last.pt")

    def blank() -> dict[str, Any]:
        fresh = {
            "numpy": np.random.RandomState(0).get_state(),
            "python": random.Random().getstate(),
        }
        return {"model": {"w": torch.zeros(2), "_extra_state": io.BytesIO()}, "rng": fresh}

    for load in (
        lambda state: dist_ckpt.load(state, tmp_path / "stock"),
        lambda state: dist_ckpt.load(state, tmp_path / "last.pt"),
        lambda state: stock_load(state, storage_reader=dist_ckpt.dcp.Reader(tmp_path / "stock")),
        lambda state: stock_load(state, storage_reader=dist_ckpt.dcp.Reader(tmp_path / "last.pt")),
    ):
        state = blank()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            load(state)
        np.random.set_state(state["rng"]["numpy"])
        random.setstate(state["rng"]["python"])
        assert (np.random.rand(), random.random()) == expected
        assert state["model"]["_extra_state"].getvalue() == extra.getvalue()


def test_a_file_of_before_the_archives_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "old.pt"
    torch.save(Weights().state_dict(), path, _use_new_zipfile_serialization=False)
    refused(IncompatibleError, path, "old.pt", "before its version 1.6")


def test_files_of_other_kinds_are_refused_with_the_way_out(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        trace: Any = torch.jit.trace
        trace(nn.Linear(2, 1), torch.ones(2)).save(tmp_path / "script.pt")
    refused(IntegrityError, tmp_path / "script.pt", "torch.jit.load")
    torch.save(nn.Linear(2, 1), tmp_path / "whole.pt")
    refused(IntegrityError, tmp_path / "whole.pt", "weights_only=False", "state_dict()")
    (tmp_path / "other.pt").write_bytes(b"\x80\x04}\x94.")  # a pickled {}
    refused(IntegrityError, tmp_path / "other.pt", "of another kind (pickle, joblib, numpy)")


def test_big_endian_memory_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "big.pt"
    with monkeypatch.context() as patch:
        patch.setattr("sys.byteorder", "big")  # what torch notes in the file
        torch.save(Weights().state_dict(), path)
    refused(IncompatibleError, path, "big.pt", "big-endian")


def safetensors_of(path: Path, header: object, data: bytes = b"") -> Path:
    encoded = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + data)
    return path


def entry(shape: list[int], start: int, stop: int) -> dict[str, object]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


BOMBS: dict[str, dict[str, object]] = {
    "2^60 elements": {"a": entry([1 << 60], 0, 1 << 62)},
    "2^60 elements in 16 bytes": {"a": entry([1 << 30, 1 << 30], 0, 16)},
    "an overlap": {"a": entry([4], 0, 16), "b": entry([2], 8, 16)},
    "a negative offset": {"a": entry([4], -16, 0)},
    "a negative size": {"a": entry([-4], 0, 16)},
    "bytes past the end": {"a": entry([8], 0, 32)},
    "no dtype": {"a": {"dtype": "F33", "shape": [4], "data_offsets": [0, 16]}},
}


@pytest.mark.parametrize("bomb", BOMBS.values(), ids=BOMBS)
def test_a_lying_header_is_refused(bomb: dict[str, object], tmp_path: Path) -> None:
    path = safetensors_of(tmp_path / "bomb.safetensors", bomb, bytes(16))
    refused(CheckpointError, path, "bomb.safetensors")


@pytest.mark.parametrize("prefix", [b"", b"\1", b"\xff" * 8, struct.pack("<Q", 1 << 60)])
def test_no_header_at_all_is_refused(prefix: bytes, tmp_path: Path) -> None:
    path = tmp_path / "none.safetensors"
    path.write_bytes(prefix)
    refused(IntegrityError, path, "none.safetensors")


@pytest.mark.parametrize(
    "name", ["../secret.safetensors", "/etc/x.safetensors", "a/b", "..", "", "a\x7f", "a\\b"]
)
def test_an_index_names_only_files_beside_it(name: str, tmp_path: Path) -> None:
    folder = tmp_path / "hub"
    folder.mkdir()
    save_file(Weights().state_dict(), tmp_path / "secret.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(Weights().state_dict(), name)}))
    refused(IntegrityError, folder, repr(name), "not beside it")


def test_a_shard_that_is_lost_or_cut_is_named(tmp_path: Path) -> None:
    safetensors_sharded(tmp_path)
    second = tmp_path / "model-00002-of-00002.safetensors"
    second.write_bytes(second.read_bytes()[:-1])
    refused(IntegrityError, tmp_path, second.name)
    second.unlink()
    refused(IntegrityError, tmp_path, second.name, "not there")


def test_a_cut_archive_is_refused(tmp_path: Path) -> None:
    torch_flat(tmp_path)
    path = tmp_path / "weights.pt"
    path.write_bytes(path.read_bytes()[:-30])
    refused(IntegrityError, path, "weights.pt")


def test_what_no_weights_are_in_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("hello")
    refused(CheckpointError, tmp_path, "no step directories", "*.safetensors")
    refused(CheckpointError, tmp_path / "notes.txt")


def test_several_files_without_an_index_are_ambiguous(tmp_path: Path) -> None:
    for name in ("a.pt", "b.pt"):
        torch.save(Weights().state_dict(), tmp_path / name)
    refused(UsageError, tmp_path, "a.pt, b.pt", "name one file")
