"""An opened checkpoint: what contradicts itself is refused, and no byte is given out unverified."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, NotFound
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import BLOCK_BYTES
from dist_ckpt.format.manifest import FilesTotal, Manifest, ManifestFile
from dist_ckpt.format.names import manifest_key
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import FaultyStore, Flip, Rule, Truncate
from tests.unit.repository.runs import DOCUMENT, EXTRA, MODEL, new_store, save, shard

LARGE = bytes(range(256)) * (2 * BLOCK_BYTES // 256) + b"tail"


def checkpoint(content: bytes = b"weights") -> tuple[MemoryStore, Checkpoint]:
    store = new_store()
    save(store, 1, content=content)
    return store, Checkpoint.read(store, 1)


def key_of(opened: Checkpoint, name: str) -> str:
    return f"step-0000000001/{opened.manifest.save_id}/{name}"


@given(st.data())
def test_blocks_are_the_bytes_that_were_put(data: st.DataObject) -> None:
    _, opened = checkpoint(LARGE)
    whole = shard(LARGE)
    blocks = -(-len(whole) // BLOCK_BYTES)
    first = data.draw(st.integers(0, blocks - 1))
    last = data.draw(st.integers(first + 1, blocks))
    start, stop = first * BLOCK_BYTES, min(last * BLOCK_BYTES, len(whole))
    assert bytes(opened.read_blocks(0, start, stop)) == whole[start:stop]


@pytest.mark.parametrize("block", [0, 1, 2])
def test_a_flipped_bit_is_found_in_its_block_and_no_other(block: int) -> None:
    store, opened = checkpoint(LARGE)
    key = key_of(opened, MODEL)
    whole = bytearray(read_all(store, key))
    whole[min(block * BLOCK_BYTES + 4242, len(whole) - 1)] ^= 1
    store.put(key, [whole], mode="replace")
    for number in range(3):
        start, stop = number * BLOCK_BYTES, min((number + 1) * BLOCK_BYTES, len(whole))
        if number != block:
            opened.read_blocks(0, start, stop)
            continue
        with pytest.raises(IntegrityError, match=f"{MODEL}, block {block} ") as caught:
            opened.read_blocks(0, start, stop)
        assert caught.value.kind == ErrorKind.DIGEST
    with pytest.raises(IntegrityError, match=f"block {block} "):
        opened.read_blocks(0, 0, len(whole))


def test_what_a_read_damages_is_found_too() -> None:
    store, opened = checkpoint()
    nbytes = opened.index.files[0].nbytes
    opened.store = FaultyStore(store, [Rule("read_into", Flip(at=-1), nth=1)])
    with pytest.raises(IntegrityError, match="differs from its digest"):
        opened.read_blocks(0, 0, nbytes)
    opened.store = FaultyStore(store, [Rule("read_into", Truncate(nbytes=100), nth=1)])
    with pytest.raises(IntegrityError, match="ends at byte 100, ") as caught:
        opened.read_blocks(0, 0, nbytes)
    assert caught.value.kind == ErrorKind.TRUNCATED


def test_values_are_read_and_compared() -> None:
    store, opened = checkpoint()
    (entry,) = opened.index.objects
    assert opened.read_object(entry) == DOCUMENT
    other = msgspec.structs.replace(entry, digest="0" * 16)
    with pytest.raises(IntegrityError, match="part 'notes' differ"):
        opened.read_object(other)
    store, opened = checkpoint()
    store.delete([key_of(opened, EXTRA)])
    with pytest.raises(IntegrityError, match="is missing") as caught:
        opened.read_object(entry)
    assert caught.value.kind == ErrorKind.MISSING_FILE


def test_values_that_lie_in_one_block_are_read_once() -> None:
    store, opened = checkpoint()
    # A second read finds the file changed; none comes to it.
    opened.store = FaultyStore(store, [Rule("read_into", Flip(at=0), nth=2)])
    for entry in [*opened.index.objects, *opened.index.objects]:
        assert opened.read_object(entry) == DOCUMENT


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda data: data[:-1], ErrorKind.TRUNCATED),
        (lambda data: data + b"\0", ErrorKind.TRUNCATED),
        (lambda data: None, ErrorKind.MISSING_FILE),
    ],
    ids=["shorter", "longer", "missing"],
)
def test_sizes_are_compared_without_reading(
    change: Callable[[bytes], bytes | None], kind: ErrorKind
) -> None:
    store, opened = checkpoint()
    opened.check_sizes()
    key = key_of(opened, MODEL)
    data = change(read_all(store, key))
    if data is None:
        store.delete([key])
    else:
        store.put(key, [data], mode="replace")
    with pytest.raises(IntegrityError, match=MODEL) as caught:
        opened.check_sizes()
    assert caught.value.kind == kind


def rewrite(store: Store, change: Callable[[Manifest], Manifest]) -> None:
    manifest = manifest_format.decode(read_all(store, manifest_key(1)), step=1)
    store.put(manifest_key(1), [manifest_format.encode(change(manifest))], mode="replace")


def without_a_file(manifest: Manifest) -> Manifest:
    files = FilesTotal(manifest.files.count - 1, manifest.files.nbytes)
    return msgspec.structs.replace(manifest, files=files)


def with_more_bytes(manifest: Manifest) -> Manifest:
    files = FilesTotal(manifest.files.count, manifest.files.nbytes + 1)
    return msgspec.structs.replace(manifest, files=files)


def without_a_part(manifest: Manifest) -> Manifest:
    return msgspec.structs.replace(manifest, parts=["model"])


def with_another_index(manifest: Manifest) -> Manifest:
    index = manifest.index
    return msgspec.structs.replace(manifest, index=ManifestFile(index.key, index.nbytes, "0" * 16))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (without_a_file, "disagree about"),
        (with_more_bytes, "disagree about"),
        (without_a_part, "parts that the manifest does not list: notes"),
        (with_another_index, "differs from its digest"),
    ],
)
def test_descriptions_that_contradict_one_another(change: Callable[[Any], Any], says: str) -> None:
    store, _ = checkpoint()
    rewrite(store, change)
    with pytest.raises(IntegrityError, match=says):
        Checkpoint.read(store, 1)


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda data: data[:-1], "holds"),
        (lambda data: bytes([data[0], data[1] ^ 1]) + data[2:], "differs from its digest"),
        (lambda data: None, "is missing"),
    ],
    ids=["shorter", "flipped", "missing"],
)
def test_a_damaged_index(damage: Callable[[bytes], bytes | None], says: str) -> None:
    store, opened = checkpoint()
    key = key_of(opened, "index.msgpack")
    data = damage(read_all(store, key))
    if data is None:
        store.delete([key])
    else:
        store.put(key, [data], mode="replace")
    with pytest.raises(IntegrityError, match=says):
        Checkpoint.read(store, 1)


def test_no_manifest_and_a_newer_one() -> None:
    store, _ = checkpoint()
    with pytest.raises(NotFound, match="no checkpoint of step 2"):
        Checkpoint.read(store, 2)
    store.put(manifest_key(1), [b'{"format": 3}'], mode="replace")
    with pytest.raises(IncompatibleError):
        Checkpoint.read(store, 1)
