"""Verification: one line for each file that is not what was committed."""

from __future__ import annotations

import pytest

from dist_ckpt.errors import StorageError
from dist_ckpt.format.files import BLOCK_BYTES, FileEntry, block_digests
from dist_ckpt.format.index import Index
from dist_ckpt.format.names import manifest_key
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.unit.repository.runs import EXTRA, MODEL, manifest_of, new_store, put_files, save

LARGE = b"0123456789abcdef" * (17 * BLOCK_BYTES // 16) + b"x"


def saved(content: bytes) -> tuple[MemoryStore, str]:
    store = new_store()
    save(store, 1, content=content)
    return store, f"step-0000000001/{Repository(store).open(1).manifest.save_id}/"


def test_every_byte_of_every_file_is_read() -> None:
    store, folder = saved(LARGE)
    report = Repository(store).verify(1)
    assert report.ok
    assert report.problems == ()
    assert report.files == 2
    assert report.nbytes == store.size(folder + MODEL) + store.size(folder + EXTRA)


def test_each_damaged_file_has_one_line_that_names_it() -> None:
    store, folder = saved(b"weights")
    store.put(folder + MODEL, [read_all(store, folder + MODEL) + b"\0"], mode="replace")
    store.put(folder + EXTRA, [read_all(store, folder + EXTRA)[:-1]], mode="replace")
    report = Repository(store).verify(1)
    assert not report.ok
    assert len(report.problems) == 2
    assert MODEL in report.problems[0]
    assert EXTRA in report.problems[1]
    store.delete([folder + MODEL])
    assert "is missing" in Repository(store).verify(1).problems[0]


def test_a_flip_anywhere_is_found() -> None:
    store, folder = saved(LARGE)
    whole = bytearray(read_all(store, folder + MODEL))
    for at in (0, 100, len(whole) // 2, len(whole) - 1):
        whole[at] ^= 4
        store.put(folder + MODEL, [whole], mode="replace")
        report = Repository(store).verify(1)
        assert len(report.problems) == 1, at
        assert MODEL in report.problems[0]
        whole[at] ^= 4


def test_a_file_that_is_no_safetensors_is_named_though_its_digest_is_right() -> None:
    store = new_store()
    repository = Repository(store)
    attempt = repository.begin(1, repository.claim())
    whole = put_files(attempt, b"weights")
    junk = b"\xff" * whole.files[0].nbytes
    key = f"step-0000000001/{attempt.save_id}/{MODEL}"
    store.put(key, [junk], mode="replace")
    files = (FileEntry.of(MODEL, len(junk), block_digests(junk)), whole.files[1])
    index = Index(files, whole.tensors, whole.objects, whole.chunks)
    attempt.commit(encode_whole(index), manifest_of(attempt, index))
    (problem,) = repository.verify(1).problems
    assert problem.startswith(MODEL)


def test_a_damaged_description_is_a_finding_and_an_outage_is_none() -> None:
    store, _ = saved(b"weights")
    down = FaultyStore(store, [Rule("read_into", Fail(StorageError("down")), nth=3)])
    with pytest.raises(StorageError, match="down"):
        Repository(down).verify(1)
    store.put(manifest_key(1), [b"{"], mode="replace")
    report = Repository(store).verify(1)
    assert not report.ok
    assert report.files == 0
