"""Files that somebody made to do harm: how tests mutate them, and seal them again."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import msgspec

from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import FileEntry, ShardEntry, bytes_digest, digest_blocks, layout
from dist_ckpt.format.index import Index
from dist_ckpt.format.manifest import FilesTotal, ManifestFile, decode_document
from dist_ckpt.format.segments import decode_root, decode_segment, join_segments
from dist_ckpt.format.whole import encode_whole

NUMBERS = (0, 1, 2**7, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63 - 1, 2**63, 2**64 - 1)
VALUES: tuple[Any, ...] = (
    *(None, True, -1, 0, 1, 2**31, 2**62, 2**63, 10**30, 1.5, -0.0, "", "x", "\x00", "value"),
    *([], {}, [[]], [0] * 9, {"": 0}, {"a": {"a": {}}}, [None, 1, "x"]),
    {"!": "tensor", "v": "value.nothing"},
    {"!": "unreadable", "v": "because"},
    {"!": "tuple", "v": 5},
    {"!": "set", "v": [[1]]},
    {"!": "dict", "v": [[1, 2], [1, 3]]},
    {"!": "float", "v": "7ff8000000000000"},
    {"!": "bytes", "v": "AA=="},
    {"!": "np.ndarray", "v": ["<f8", [0], ""]},
    {"!": "np.generic", "v": ["<i8", [], "AAAAAAAAAAA="]},
    {"!": "tensor_data", "v": ["float32", [1], "AACAPw=="]},
    {"!": "tensor_data", "v": ["uint8", [0], ""]},
    {"!": "torch.Size", "v": [-1]},
    {"!": "@nobody", "v": 1},
)


def mutated(data: bytes, rng: random.Random) -> bytes:
    """Return `data` with one to three changes of the kinds that parsers stumble over."""
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        data = rng.choice(_MUTATIONS)(bytearray(data), rng)
    return data


def _flip(data: bytearray, rng: random.Random) -> bytes:
    if data:
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    return bytes(data)


def _set(data: bytearray, rng: random.Random) -> bytes:
    if data:
        data[rng.randrange(len(data))] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
    return bytes(data)


def _number(data: bytearray, rng: random.Random) -> bytes:
    form = rng.choice(("<H", "<I", "<Q", ">H", ">I", ">Q"))
    at = rng.randrange(len(data) + 1)
    raw = struct.pack(form, rng.choice(NUMBERS) % (1 << 8 * struct.calcsize(form)))
    return bytes(data[:at]) + raw + bytes(data[at + len(raw) :])


def _cut(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return bytes(data[:at]) + bytes(data[at + rng.randrange(1, 40) :])


def _end(data: bytearray, rng: random.Random) -> bytes:
    return bytes(data[: rng.randrange(len(data) + 1)])


def _insert(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    return bytes(data[:at]) + rng.randbytes(rng.randrange(1, 9)) + bytes(data[at:])


def _repeat(data: bytearray, rng: random.Random) -> bytes:
    at = rng.randrange(len(data) + 1)
    size = rng.randrange(1, 64)
    to = rng.randrange(len(data) + 1)
    return bytes(data[:to]) + bytes(data[at : at + size]) + bytes(data[to:])


def _opcode(data: bytearray, rng: random.Random) -> bytes:
    if data:
        at = rng.randrange(len(data))
        data[at] = rng.choice(
            b"0123FGIJKLMNPQRSTUVXabcdeghijlopqrstu}])(.\x81\x82\x85\x8f\x91\x92\x93"
        )
    return bytes(data)


def _digits(data: bytearray, rng: random.Random) -> bytes:
    places = [at for at, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return _flip(data, rng)
    at = rng.choice(places)
    number = rng.choice((str(rng.choice(NUMBERS)), "-1", "1e999", "9" * 400, "null", '"x"'))
    return bytes(data[:at]) + number.encode() + bytes(data[at + 1 :])


_MUTATIONS: tuple[Callable[[bytearray, random.Random], bytes], ...] = (
    *(_flip, _set, _number, _cut, _end, _insert, _repeat, _opcode, _digits),
)


def mutated_json(node: Any, rng: random.Random) -> Any:
    """Return the parsed JSON `node` with another value at one place, or without it."""
    places = [*_places(node)]
    if not places:
        return rng.choice(VALUES)
    holder, key = rng.choice(places)
    how = rng.randrange(6)
    if how == 0:
        del holder[key]
    elif how == 1:
        other, at = rng.choice(places)
        holder[key] = json.loads(json.dumps(other[at])) if _has(other, at) else None
    elif how == 2 and isinstance(holder, dict):
        holder[rng.choice(("value", "!", "", "lr", "params", "state"))] = holder.pop(key)
    elif how == 3 and isinstance(holder, list):
        holder.insert(key, rng.choice(VALUES))
    else:
        holder[key] = json.loads(json.dumps(rng.choice(VALUES)))
    return node


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(node: Any) -> list[tuple[Any, Any]]:
    found: list[tuple[Any, Any]] = []
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, item in [*items]:
        found.append((node, key))
        if isinstance(item, dict | list):
            found += _places(item)
    return found


class Sealed:
    """The files of one checkpoint of dist_ckpt of one rank, by name, with fitting digests."""

    def __init__(self, files: Mapping[str, bytes], step: int) -> None:
        self._files = dict(files)
        self._step = step
        (self._manifest_key,) = (key for key in files if key.endswith("/manifest.json"))
        (self._index_key,) = (key for key in files if key.endswith("/index.msgpack"))
        self._folder = self._index_key.rpartition("/")[0]
        self.manifest = manifest_format.decode(files[self._manifest_key], step=step)
        root = decode_root(files[self._index_key])
        (segment,) = (decode_segment(each.inside, root, 0) for each in root.segments)
        self.index = join_segments(root, {0: segment})

    def documents(self) -> dict[tuple[str, int | None], dict[str, bytes]]:
        """Return the encoded values by part and rank, then name."""
        found = {}
        for entry in self.index.objects:
            data = self._data(entry.file)[entry.offset : entry.offset + entry.nbytes]
            found[entry.part, entry.rank] = decode_document(data, where="test")
        return found

    def with_documents(self, documents: Mapping[tuple[str, int | None], bytes]) -> dict[str, bytes]:
        """Return the files with other documents, and the digests that go with them."""
        (number,) = {entry.file for entry in self.index.objects}
        names = [f"{part}.{rank}" for part, rank in documents]
        sizes = [len(data) for data in documents.values()]
        entries = [ShardEntry(n, "uint8", (size,)) for n, size in zip(names, sizes, strict=True)]
        plan = layout(entries, {})
        image = bytearray(plan.nbytes)
        image[: len(plan.header)] = plan.header
        objects = []
        for old, offset in zip(self.index.objects, plan.offsets, strict=True):
            data = documents[old.part, old.rank]
            image[offset : offset + len(data)] = data
            objects.append(
                msgspec.structs.replace(
                    old, offset=offset, nbytes=len(data), digest=bytes_digest(data)
                )
            )
        name = self.index.files[number].name
        blocks = digest_blocks(plan.blocks, bytes(image))
        files = list(self.index.files)
        files[number] = FileEntry.of(name, len(image), blocks, plan.blocks)
        index = replace(self.index, files=tuple(files), objects=tuple(objects))
        return self.with_index(encode_whole(index), {name: bytes(image)}, index)

    def with_index(
        self, data: bytes, others: Mapping[str, bytes] | None = None, index: Index | None = None
    ) -> dict[str, bytes]:
        """Return the files with another index, as if it had been committed."""
        files = {**self._files, self._index_key: data}
        files |= {f"{self._folder}/{name}": each for name, each in (others or {}).items()}
        listed = (index or self.index).files
        manifest = msgspec.structs.replace(
            self.manifest,
            files=FilesTotal.of(file.nbytes for file in listed),
            index=ManifestFile(self.manifest.index.key, len(data), bytes_digest(data)),
        )
        return {**files, self._manifest_key: manifest_format.encode(manifest)}

    def with_manifest(self, fields: Any) -> dict[str, bytes]:
        """Return the files with another manifest, whose digest fits."""
        head = msgspec.json.format(json.dumps(fields).encode(), indent=2).removesuffix(b"\n}")
        data = head + f',\n  "digest": "{bytes_digest(head)}"\n}}\n'.encode()
        return {**self._files, self._manifest_key: data}

    def manifest_fields(self) -> Any:
        """Return the JSON of the manifest, without its digest."""
        fields = json.loads(self._files[self._manifest_key])
        del fields["digest"]
        return fields

    def index_bytes(self) -> bytes:
        """Return the bytes of the index."""
        return self._files[self._index_key]

    def _data(self, number: int) -> bytes:
        return self._files[f"{self._folder}/{self.index.files[number].name}"]
