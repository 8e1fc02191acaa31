"""Small files that claim much, each with the parser that it is aimed at.

Run as a program, with a folder, it opens each of them in limited memory and tells what came of it.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 - only to write what must not be executed
import resource
import struct
import sys
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.errors import describe
from dist_ckpt.state.decoding import decode

SPARE_BYTES = 768 << 20
"""How much address space a program has for all of them: no more than a few threads take."""

DIMENSIONS = 80_000
_PRIME = 2**61 - 1


def archive(
    pickled: bytes,
    records: Mapping[str, bytes] | None = None,
    *,
    compression: int = zipfile.ZIP_STORED,
) -> bytes:
    """Return a `torch.save` file with these contents."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        file.writestr("x/data.pkl", pickled)
        for name, data in (records or {}).items():
            file.writestr(f"x/{name}", data)
    return buffer.getvalue()


def tensor(size: str, stride: str, record: str = "0") -> bytes:
    """Return the opcodes of a tensor of float32; sizes as opcodes of a tuple."""
    memory = f"(X\7\0\0\0storagectorch\nFloatStorage\nX\1\0\0\0{record}X\3\0\0\0cpuM\0\1tQ".encode()
    return (
        b"ctorch._utils\n_rebuild_tensor_v2\n(" + memory + b"K\0"
        b"(" + size.encode("latin-1") + b"t(" + stride.encode("latin-1") + b"t"
        b"\x89ccollections\nOrderedDict\n)RtR"
    )


def long(number: int) -> bytes:
    """Return the opcode of a whole number."""
    raw = number.to_bytes(number.bit_length() // 8 + 1, "little", signed=True)
    return b"\x8b" + struct.pack("<I", len(raw)) + raw


def laughing() -> bytes:
    """Lists in lists, twice each: 2**60 of them to whoever walks over all."""
    stream = b"\x80\x02}X\1\0\0\0a]q\0"
    for number in range(60):
        stream += b"0](" + 2 * (b"h" + bytes([number])) + b"eq" + bytes([number + 1])
    return stream + b"s."


def aliased(count: int) -> bytes:
    names = b"".join(
        b"X\5\0\0\0" + f"{number:05}".encode() + tensor("M\0\4M\0\4", "M\0\4K\1")
        for number in range(count)
    )
    return archive(b"\x80\x02}(" + names + b"u.", {"data/0": bytes(4 << 20)})


def array(shape: bytes, code: str, data: bytes) -> bytes:
    """Return the opcodes of a numpy array; shape and data as opcodes."""
    dtype = (
        f"cnumpy\ndtype\n(X{chr(len(code))}\0\0\0{code}\x89\x88tR(K\3X\1\0\0\0<NNNK\0K\0K\0tb"
    ).encode("latin-1")
    fresh = b"cnumpy._core.multiarray\n_reconstruct\n(cnumpy\nndarray\nK\0\x85C\1btR"
    return fresh + b"(K\1(" + shape + b"t" + dtype + b"\x89" + data + b"tb"


def torch_bombs() -> dict[str, bytes]:
    plain = {"data/0": bytes(64)}
    one = b"\x80\x02}X\1\0\0\0a"
    ones = DIMENSIONS * "K\1"
    huge = (b"(" + 3 * long(2**62) + b"t").decode("latin-1")
    collide = b"".join(long(k * _PRIME) + b"N" for k in range(1, 60_000))
    zeros = b"B" + struct.pack("<I", 32 << 20) + bytes(32 << 20)
    return {
        "laughs": archive(laughing()),
        "aliased": aliased(5000),
        "dimensions": archive(one + tensor(ones, ones) + b"s.", plain),
        "overflow": archive(one + tensor(huge[1:-1], "K\0K\0K\0") + b"s.", plain),
        "empty overflow": archive(one + tensor(huge[1:-1] + "K\0", "K\0K\0K\0K\0") + b"s.", plain),
        "stride 0": archive(one + tensor(long(2**40).decode("latin-1"), "K\0") + b"s.", plain),
        "collide": archive(b"\x80\x02}(" + collide + b"u."),
        "nested": archive(one + 100_000 * b"]" + 100_000 * b"a" + b"s."),
        "compressed values": archive(one + zeros + b"s.", compression=zipfile.ZIP_DEFLATED),
        "compressed tensor": archive(
            one + tensor("J\0\0\0\1", "K\1") + b"s.",
            {"data/0": bytes(1 << 26)},
            compression=zipfile.ZIP_DEFLATED,
        ),
        "bytes of a number": archive(one + b"c__builtin__\nbytearray\n" + long(2**40) + b"\x85Rs."),
        "arrays of one memory": archive(
            one
            + b"]("
            + array(
                long(2 << 20), "u1", b"B" + struct.pack("<I", 2 << 20) + bytes(2 << 20) + b"q\x63"
            )
            + 2000 * array(long(2 << 20), "u1", b"h\x63")
            + b"es."
        ),
        "an array again and again": archive(
            one
            + b"]("
            + array(long(1 << 20), "u1", b"B" + struct.pack("<I", 1 << 20) + bytes(1 << 20))
            + b"q\x63"
            + 9000 * b"h\x63"
            + b"es."
        ),
        "an array of gigabytes": archive(one + array(long(2**33), "f8", b"C\0") + b"s."),
        "an empty array": archive(one + array(long(2**62) + b"K\0", "f8", b"C\0") + b"s."),
        "a text of gigabytes": archive(one + array(b"K\0", "U500000000", b"C\0") + b"s."),
        "dimensions of an array": archive(one + array(DIMENSIONS * b"K\1", "u1", b"C\1x") + b"s."),
        "an array in itself": archive(
            one + array(b"K\1", "O8", b"h\x63").replace(b"btR", b"btRq\x63") + b"s."
        ),
        "a claimed length": archive(one + b"\x8e" + struct.pack("<Q", 2**62) + b"s."),
        "a memo": archive(one + b"Nr\xff\xff\xff\x7fs."),
    }


def safetensors_bombs() -> dict[str, bytes]:
    def of(header: Any, claimed: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if claimed is None else claimed) + text + bytes(16)

    def one(shape: list[int], stop: int = 16) -> Any:
        return {"a": {"dtype": "F32", "shape": shape, "data_offsets": [0, stop]}}

    return {
        "dimensions": of(one(DIMENSIONS * [1])),
        "numbers": of(one(1000 * [10**4000])),
        "overflow": of(one([2**62, 2**62, 0], 0)),
        "nested": of(b'{"a":' + 200_000 * b"[" + 200_000 * b"]" + b"}"),
        "a claimed header": of({}, 2**62),
        "many names": of(
            {str(n): {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for n in range(99)}
        ),
    }


def document_bombs() -> dict[str, Any]:
    described: Any = "<f8"
    for _ in range(60):
        described = [["a", described]]
    pairs = [[k * _PRIME, 0] for k in range(1, 3)]
    wide = [{"!": "int", "v": hex(k * _PRIME)} for k in range(1, 60_000)]
    return {
        "nested dtype": {"!": "np.ndarray", "v": [described, [0], ""]},
        "wide dtype": {"!": "np.ndarray", "v": [[["a", "<f8", [10**9, 10**9]]], [0], ""]},
        "an element of gigabytes": {"!": "np.ndarray", "v": ["|V2147483647", [0], ""]},
        "a text of gigabytes": {"!": "np.ndarray", "v": ["<U500000000", [0], ""]},
        "dimensions of an array": {"!": "np.ndarray", "v": ["|u1", DIMENSIONS * [1], "AA=="]},
        "numbers of an array": {"!": "np.ndarray", "v": ["|u1", 2000 * [10**4000], ""]},
        "dimensions of a tensor": {"!": "tensor_data", "v": ["uint8", DIMENSIONS * [1], "AA=="]},
        "an empty tensor": {"!": "tensor_data", "v": ["uint8", [2**62, 2**62, 0], ""]},
        "numbers that collide": {"!": "set", "v": wide},
        "keys that collide": {"!": "dict", "v": [[key, 0] for key in wide] + pairs},
        "a frozenset that collides": {"!": "frozenset", "v": wide},
    }


def stock_bombs() -> dict[str, Callable[[Path], None]]:
    """Return what to do to the folder of a small stock checkpoint."""

    def changed(change: Callable[[Any], None]) -> Callable[[Path], None]:
        def apply(folder: Path) -> None:
            path = folder / ".metadata"
            metadata = pickle.loads(path.read_bytes())  # noqa: S301 - made by this test
            change(metadata)
            path.write_bytes(pickle.dumps(metadata))

        return apply

    def chunks(metadata: Any) -> None:
        kept = metadata.state_dict_metadata
        many = kept["w"].chunks * 3000
        for number in range(3000):
            kept[f"w{number}"] = type(kept["w"])(kept["w"].properties, kept["w"].size, many)

    def claim(metadata: Any) -> None:
        for info in metadata.storage_data.values():
            info.length = 2**60

    def repeat(metadata: Any) -> None:
        (index, info) = next(iter(metadata.storage_data.items()))
        for number in range(5000):
            metadata.storage_data[type(index)(f"w{number}", (0,))] = info

    def dimensions(metadata: Any) -> None:
        metadata.state_dict_metadata["w"].size = torch.Size(DIMENSIONS * [1])

    def path(metadata: Any) -> None:
        metadata.planner_data["w"] = tuple(str(n) for n in range(100_000))

    def hole(folder: Path) -> None:
        with (folder / ".metadata").open("wb") as file:
            file.truncate(1 << 30)

    return {
        "shared chunks": changed(chunks),
        "a claimed length": changed(claim),
        "one archive again and again": changed(repeat),
        "dimensions": changed(dimensions),
        "a long path": changed(path),
        "a hole": hole,
    }


def write(root: Path) -> None:
    """Write all that lie in files into folders below `root`."""
    for kind, suffix, bombs in (
        ("torch", "pt", torch_bombs()),
        ("safetensors", "safetensors", safetensors_bombs()),
    ):
        for name, data in bombs.items():
            folder = root / f"{kind}: {name}"
            folder.mkdir()
            (folder / f"x.{suffix}").write_bytes(data)
    folder = root / "torch: a hole"
    folder.mkdir()
    with (folder / "x.pt").open("wb") as file:
        file.truncate(1 << 40)
    folder = root / "safetensors: a hole"
    folder.mkdir()
    with (folder / "x.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", 99_000_000))
        file.truncate(1 << 40)
    for step, size in (("step-0000000001", 1 << 30), ("step-0000000002", 1 << 40)):
        folder = root / "ours: a manifest that is a hole" / step
        folder.mkdir(parents=True)
        with (folder / "manifest.json").open("wb") as file:
            file.truncate(size)


def limit_memory() -> None:
    """From here on, no more than `SPARE_BYTES` of address space are to be had."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + SPARE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def outcome(act: Callable[[], object]) -> str:
    try:
        act()
    except Exception as error:
        return (
            describe(error)
            if type(error).__module__ != "dist_ckpt.errors"
            else type(error).__name__
        )
    return "loaded"


def main(root: Path) -> None:
    torch.set_num_threads(1)
    found: dict[str, str] = {}
    documents = {name: json.dumps(each).encode() for name, each in document_bombs().items()}
    limit_memory()
    for name, data in documents.items():
        found[f"document: {name}"] = outcome(lambda data=data: decode(data, tensors={}))  # type: ignore[misc]
    for folder in sorted(root.iterdir()):

        def look(folder: Path = folder) -> None:
            with dist_ckpt.open_checkpoint(folder) as opened:
                for part in opened.parts:
                    opened.read_values(part)
            dist_ckpt.load(TrainState(rng=None, a=0, model={"w": 0}), folder, strict=False)

        found[folder.name] = outcome(look)
    print(json.dumps(found))  # noqa: T201 - how a program tells the test that started it


if __name__ == "__main__":
    main(Path(sys.argv[1]))
