"""What small files can do: nothing to the process, and not much to its memory or time."""

from __future__ import annotations

import io
import json
import logging
import os
import pickle  # noqa: TID251 - only to write what must not be executed
import shutil
import struct
import subprocess
import sys
import warnings
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint import filesystem
from torch.distributed.checkpoint import metadata as stock
from torch.distributed.checkpoint.state_dict_saver import save as stock_save

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.errors import IncompatibleError, IntegrityError
from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made
from dist_ckpt.foreign.torch_files import DtypeName, TorchTensor
from dist_ckpt.foreign.torch_values import DeviceName
from tests.compat.bombs import archive, document_bombs, stock_bombs, write

ADMITTED = [
    *("Metadata", "MetadataIndex", "TensorStorageMetadata", "BytesStorageMetadata"),
    *("ChunkStorageMetadata", "TensorProperties", "StorageMeta", "_MEM_FORMAT_ENCODING"),
]
CLASSES: list[Any] = [
    *(getattr(stock, name) for name in ADMITTED),
    *(filesystem._StorageInfo, torch.Size, torch.dtype, torch.device, torch.Tensor),
    *(torch.nn.Parameter, torch.FloatStorage, OrderedDict, Counter, PurePosixPath, dict, set),
    *(Constructor, Kind, Made, DtypeName, DeviceName, TorchTensor, np.dtype, np.ndarray),
]
NAMES = [
    *(("torch.distributed.checkpoint.metadata", name) for name in ADMITTED),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    *(("torch", name) for name in ("Size", "float32", "FloatStorage", "device")),
    ("torch.serialization", "_get_layout"),
    *(("collections", name) for name in ("OrderedDict", "Counter")),
    *(("pathlib", name) for name in ("PosixPath", "PurePosixPath")),
    *(("__builtin__", name) for name in ("set", "frozenset", "complex", "bytearray", "bytes")),
    ("_codecs", "encode"),
    *(("torch._utils", name) for name in ("_rebuild_tensor_v2", "_rebuild_parameter")),
    *(("numpy", name) for name in ("dtype", "ndarray")),
    *(("numpy._core.multiarray", name) for name in ("_reconstruct", "scalar")),
    ("numpy._core.numeric", "_frombuffer"),
]


def attributes() -> list[dict[str, Any]]:
    return [dict(vars(each)) for each in CLASSES]


def globals_of(module: str, name: str) -> list[bytes]:
    """The opcodes that refer to a name, of old and of new protocols."""
    short = [b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name)]
    return [f"c{module}\n{name}\n".encode(), b"".join(short) + b"\x93"]


STATES = [
    b"}X\4\0\0\0evilK\1s",
    b"N}X\4\0\0\0evilK\1s\x86",
    b"}X\x0c\0\0\0__setstate__K\1s",
    b"(K\1K\2K\3K\4K\5t",
]


def attacks() -> list[bytes]:
    """Streams that try to set attributes of whatever they are handed."""
    found = []
    for module, name in NAMES:
        for reference in globals_of(module, name):
            for state in STATES:
                found.append(reference + state + b"b")
                found.append(reference + b"q\x63" + b")\x81" + b"0h\x63" + state + b"b")
            found.append(reference + b"X\4\0\0\0evilK\1s")
            found.append(reference + b"(X\4\0\0\0evilK\1u")
            found.append(reference + b"K\1a")
            found.append(reference + b"X\x08\0\0\0__init__\x93")
    return found


def save(state: dict[str, Any], root: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of saving alone
        stock_save(state, checkpoint_id=root)
    return root


def test_no_metadata_changes_a_class_of_the_process(tmp_path: Path) -> None:
    url = save({"w": torch.ones(3)}, tmp_path / "stock")
    before, whole = attributes(), (url / ".metadata").read_bytes()
    weights = {"w": torch.zeros(3)}
    for number, attack in enumerate(attacks()):
        # Before a whole one too: what is done while reading is done whatever comes of it.
        end = (b".", b"0" + whole[2:])[number % 2]
        (url / ".metadata").write_bytes(b"\x80\x04" + attack + end)
        with pytest.raises(IntegrityError):
            dist_ckpt.load_weights(weights, url)
    assert attributes() == before
    assert float(weights["w"].sum()) == 0


def test_no_torch_file_changes_a_class_of_the_process(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    whole = records.pop("data.pkl")
    before = attributes()
    for number, attack in enumerate(attacks()):
        place = tmp_path / "x.pt"
        end = (b".", b"0" + whole[2:])[number % 2]
        place.write_bytes(archive(b"\x80\x02" + attack + end, records))
        weights = {"w": torch.zeros(3)}
        try:
            dist_ckpt.load_weights(weights, place)
        except IntegrityError:
            continue
        # What a stream does to a name that nobody knows, or to an ordered dict beside its items, is
        # dropped: what counts is the whole one that follows.
        assert end != b"."
        assert float(weights["w"].sum()) == 3
    assert attributes() == before


def test_long_names_are_not_copied_again_and_again(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    with zipfile.ZipFile(tmp_path / "good.pt") as file:
        records = {name.partition("/")[2]: file.read(name) for name in file.namelist()}
    whole = records.pop("data.pkl")
    long = b"X" + struct.pack("<I", 1 << 20) + b"a" * (1 << 20) + b"q\x630"
    again = b"(" + b"h\x63h\x63\x93" * 100_000 + b"l0"
    (tmp_path / "x.pt").write_bytes(archive(b"\x80\x04" + long + again + whole[2:], records))
    with pytest.raises(IntegrityError, match="too long to be one"):
        dist_ckpt.load_weights({"w": torch.zeros(3)}, tmp_path / "x.pt")


def with_value(root: Path, pickled: bytes) -> Path:
    """A stock checkpoint whose value `own` is that pickle."""
    url = save(
        {"model": {"w": torch.ones(3)}, "own": 5, "tail": {"t": torch.full((3,), 7.0)}}, root
    )
    metadata = pickle.loads((url / ".metadata").read_bytes())  # noqa: S301 - made by this test
    (file,) = url.glob("*.distcp")
    data = archive(pickled)
    (place,) = (each for index, each in metadata.storage_data.items() if index.fqn == "own")
    place.offset, place.length = file.stat().st_size, len(data)
    with file.open("ab") as end:
        end.write(data)
    (url / ".metadata").write_bytes(pickle.dumps(metadata))
    return url


def test_no_value_of_a_stock_checkpoint_changes_a_class(tmp_path: Path) -> None:
    with_value(tmp_path / "first", b"N.")  # pickling notes something on the classes, once
    before = attributes()
    for number, attack in enumerate(attacks()[::9]):
        url = with_value(tmp_path / str(number), b"\x80\x02" + attack + b".")
        weights = {"w": torch.zeros(3)}
        dist_ckpt.load_weights(weights, url)
        assert float(weights["w"].sum()) == 3
    assert attributes() == before


class Own:
    """A class that only this program knows."""


class Evil:
    """Runs a program when it is unpickled."""

    def __init__(self, witness: Path) -> None:
        self.witness = witness

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.witness}",)


def test_a_value_that_cannot_be_read_leaves_all_others(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    witness = tmp_path / "witness"
    state = {
        "first": {"a": torch.full((3,), 1.0), "n": 1},
        "mixed": {"own": Own(), "b": torch.full((3,), 2.0), "n": 2, "evil": Evil(witness)},
        "last": {"c": torch.full((3,), 3.0), "pair": (torch.full((3,), 4.0), 5)},
        "optimizer": {"state": {0: {"m": torch.full((3,), 6.0)}}, "param_groups": [{"f": Own()}]},
    }
    url = save(state, tmp_path / "stock")
    with caplog.at_level(logging.WARNING, logger="dist_ckpt"):
        found = {"a": torch.zeros(3), "n": 0}
        last = {"c": torch.zeros(3), "pair": (torch.zeros(3), 0)}
        loaded = TrainState(rng=None, first=found, last=last)
        dist_ckpt.load(loaded, url, only=["first", "last"])
    told = [each.getMessage() for each in caplog.records if each.name == "dist_ckpt"]
    assert len(told) == 1
    assert "mixed.own" in told[0]
    assert "posix.system" in told[0]
    assert loaded["first"]["a"].tolist() == [1.0] * 3
    assert loaded["first"]["n"] == 1
    assert loaded["last"]["c"].tolist() == [3.0] * 3
    assert loaded["last"]["pair"][0].tolist() == [4.0] * 3
    with dist_ckpt.open_checkpoint(url) as opened:
        values = {name: float(opened[name][0]) for name in opened}
        assert sorted(values.values()) == [1.0, 2.0, 3.0, 6.0]
        assert opened.read_values("last")["value"]["pair"][1] == 5
        for part in ("mixed", "optimizer"):
            with pytest.raises(IncompatibleError, match=f"{part}.*cannot be read: .*Own"):
                opened.read_values(part)
    with pytest.raises(IncompatibleError, match=r"cannot be read: .*Own"):
        dist_ckpt.load(TrainState(rng=None, mixed={"b": torch.zeros(3)}), url, strict=False)
    assert not witness.exists()


DAMAGED_VALUES = {
    "no archive": b"",
    "a name of nobody": b"\x80\x02cnobody\nThing\n.",
    "a laugh": b"\x80\x02]" + b"".join(b"q%c](h%ch%ce" % (n, n, n) for n in range(60)) + b".",
    "a device": b"\x80\x02ctorch\ndevice\nX\4\0\0\0evil\x85R.",
    "a shape": b"\x80\x02ctorch\nSize\n(X\1\0\0\0xt\x85R.",
    "nested": b"\x80\x02" + 500 * b"]" + 499 * b"a" + b".",
    "a surrogate": b"\x80\x02X\3\0\0\0\xed\xa0\x80.",
    "a set of lists": b"\x80\x02c__builtin__\nset\n]]a\x85R.",
}


@pytest.mark.parametrize("what", DAMAGED_VALUES)
def test_a_damaged_value_is_told_to_whoever_wants_it(what: str, tmp_path: Path) -> None:
    url = with_value(tmp_path, DAMAGED_VALUES[what])
    weights = {"w": torch.zeros(3)}
    dist_ckpt.load_weights(weights, url)
    assert float(weights["w"].sum()) == 3
    with dist_ckpt.open_checkpoint(url) as opened:
        assert opened["tail/t"][:].tolist() == [7.0] * 3
        with pytest.raises(IncompatibleError, match="own"):
            opened.read_values("own")


def test_values_of_every_plain_kind_are_read(tmp_path: Path) -> None:
    value = {
        "size": torch.Size([1, 2]),
        "dtype": torch.float16,
        "device": torch.device("cpu"),
        "counter": Counter("aab"),
        "ordered": OrderedDict(a=1),
        "sets": [{1, 2}, frozenset({"a"})],
        "bytes": b"\xff\0",
        "tensors": (torch.arange(6).reshape(2, 3).t(), torch.ones(())),
        "empty": (torch.empty(0, 3),),
    }
    url = save({"w": torch.ones(2), "value": (value,)}, tmp_path)
    with dist_ckpt.open_checkpoint(url) as opened:
        (found,) = opened.read_values("value")["value"]
    for name in ("tensors", "empty"):
        for left, right in zip(found.pop(name), value.pop(name), strict=True):  # type: ignore[call-overload]
            assert left.dtype == right.dtype
            assert torch.equal(left, right)
    assert found == value
    assert {name: type(each) for name, each in found.items()} == {
        name: type(each) for name, each in value.items()
    }


def test_records_are_what_the_file_has(tmp_path: Path) -> None:
    torch.save({"w": torch.ones(3)}, tmp_path / "good.pt")
    data = (tmp_path / "good.pt").read_bytes()
    encrypted = bytearray(data)
    for at in range(len(data)):
        if data[at : at + 4] == b"PK\1\2":
            encrypted[at + 8] |= 1  # the flag, in the directory
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as file, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        file.writestr("x/data.pkl", b"\x80\x02}.")
        file.writestr("x/data.pkl", b"\x80\x02].")
    for number, bad in enumerate((bytes(encrypted), twice.getvalue())):
        place = tmp_path / f"bad-{number}.pt"
        place.write_bytes(bad)
        assert bad != data
        with pytest.raises(IntegrityError, match=r"torch\.save file"):
            dist_ckpt.load_weights({"w": torch.zeros(3)}, place)


def test_small_files_take_little_memory(tmp_path: Path) -> None:
    root = tmp_path / "bombs"
    root.mkdir()
    write(root)
    url = save({"w": torch.ones(3), "own": 5}, tmp_path / "stock")
    for name, apply in stock_bombs().items():
        folder = root / f"stock: {name}"
        shutil.copytree(url, folder)
        apply(folder)
    command = [sys.executable, "-m", "tests.compat.bombs", str(root)]
    done = subprocess.run(command, stdout=subprocess.PIPE, check=True, timeout=280)
    found = json.loads(done.stdout)
    assert len(found) == len(document_bombs()) + len([*root.iterdir()])
    fine = {"IntegrityError", "IncompatibleError", "NotFound"}
    assert {name: what for name, what in found.items() if what not in fine} == {
        "torch: a memo": "loaded",
    }


def test_lengths_in_headers_are_not_believed(tmp_path: Path) -> None:
    place = tmp_path / "x.safetensors"
    for claimed in (0, 1, 2**31, 2**63, 2**64 - 1):
        place.write_bytes(struct.pack("<Q", claimed) + b"{}" + bytes(8))
        with pytest.raises(IntegrityError):
            dist_ckpt.load_weights({"w": torch.zeros(3)}, place)
