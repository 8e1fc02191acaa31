"""Objects that are made while they go to a real S3 server, and what the doors do there."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import AlreadyExists, IntegrityError
from dist_ckpt.storage.base import Stream, put_stream, read_all
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.storage.s3 import S3Store
from tests.services.s3 import S3Service

PART_BYTES = 5 << 20
PIECES = [bytes([number]) * size for number, size in enumerate((3, 9 << 20, 1, 8 << 20, 7))]
WHOLE = b"".join(PIECES)


@pytest.fixture
def store(s3_service: S3Service, s3_name: str) -> Iterator[S3Store]:
    bucket, _, prefix = s3_service.url(s3_name).removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix, storage_options={"default_block_size": PART_BYTES})
    yield store
    store.close()


def test_what_is_made_is_uploaded_in_parts(store: S3Store) -> None:
    stream = Stream(len(WHOLE), lambda: map(memoryview, PIECES))
    put_stream(store, "a/b", stream)
    assert read_all(store, "a/b") == WHOLE
    with pytest.raises(AlreadyExists):
        put_stream(store, "a/b", stream)
    put_stream(store, "a/b", Stream.of([memoryview(b"small")]), mode="replace")
    assert read_all(store, "a/b") == b"small"


@pytest.mark.parametrize("error", [IntegrityError("the source is damaged"), None])
def test_what_cannot_be_made_leaves_nothing(
    error: Exception | None, store: S3Store, s3_service: S3Service, s3_name: str
) -> None:
    def pieces() -> Iterator[memoryview]:
        yield memoryview(PIECES[1])
        if error is not None:
            raise error  # without one it ends too early

    with pytest.raises(type(error) if error is not None else Exception):
        put_stream(store, "a", Stream(len(WHOLE), pieces))
    assert list(store.list_entries()) == []
    listed = s3_service.client().list_multipart_uploads(
        Bucket=s3_service.bucket, Prefix=f"{s3_service.prefix}{s3_name}"
    )
    assert listed.get("Uploads", []) == []


def test_weights_go_from_one_place_to_another_and_back(s3_service: S3Service, s3_name: str) -> None:
    url = s3_service.url(s3_name)
    wanted = {"w": torch.randn(300, 20_000), "b": torch.randn(7)}
    dist_ckpt.save({"model": wanted}, f"{url}/run", step=3)
    dist_ckpt.export(f"{url}/run", f"{url}/hf", format="hf", max_shard="100KB")
    dist_ckpt.export(f"{url}/run", f"{url}/w.pt", format="torch")
    dist_ckpt.import_(f"{url}/w.pt", f"{url}/again", step=3)
    for place in ("hf", "w.pt", "again"):
        with dist_ckpt.open_checkpoint(f"{url}/{place}") as opened:
            for name, tensor in wanted.items():
                assert torch.equal(opened[f"model/{name}"].read(), tensor)
    with pytest.raises(AlreadyExists):
        dist_ckpt.export(f"{url}/run", f"{url}/hf", format="hf", dtype="bf16")
    opened_store = resolve(url)
    assert "unfinished-export.json" not in opened_store.list_children("hf/")
    opened_store.close()
