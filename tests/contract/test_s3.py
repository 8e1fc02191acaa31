"""A prefix of a bucket on a real S3 server keeps the contract, and holds as much as is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from dist_ckpt.errors import CoordinationError, ErrorKind
from dist_ckpt.repository import Repository
from dist_ckpt.storage import Store
from dist_ckpt.storage.s3 import S3Store
from dist_ckpt.testing import StoreContract
from tests.contract import checkpoints
from tests.services.s3 import S3Service

PART_BYTES = 5 << 20  # the least that S3 takes


@pytest.fixture
def store(s3_service: S3Service, s3_name: str) -> Iterator[Store]:
    with opened(s3_service, s3_name) as store:
        yield store


@contextmanager
def opened(service: S3Service, name: str) -> Iterator[Store]:
    bucket, _, prefix = service.url(name).removeprefix("s3://").partition("/")
    store = S3Store(bucket, prefix, storage_options={"default_block_size": PART_BYTES})
    try:
        yield store
    finally:
        store.close()


@pytest.fixture(scope="module")
def hosts(s3_service: S3Service) -> Iterator[tuple[Store, Store]]:
    # For all tests together: to connect takes longer than most of them.
    with opened(s3_service, "contract") as store, opened(s3_service, "contract") as other:
        yield store, other


class TestS3(StoreContract):
    """Two stores with connections of their own stand for two hosts."""

    @pytest.fixture
    def store(self, hosts: tuple[Store, Store]) -> Iterator[Store]:
        yield hosts[0]
        hosts[0].delete([entry.key for entry in hosts[0].list_entries()])

    @pytest.fixture
    def other(self, hosts: tuple[Store, Store]) -> Store:
        return hosts[1]


def test_many_smallest_parts_arrive_whole(
    store: Store, s3_service: S3Service, s3_name: str
) -> None:
    """Parts that begin and end inside the buffers that they are cut from."""
    buffers = [bytes([number]) * (PART_BYTES - 1000) for number in range(24)]
    store.put("large", buffers)
    nbytes = sum(map(len, buffers))
    assert store.size("large") == nbytes
    found = memoryview(bytearray(nbytes))
    assert store.read_into("large", 0, found) == nbytes
    start = 0
    for buffer in buffers:
        assert found[start : start + len(buffer)] == buffer
        start += len(buffer)
    key = f"{s3_service.prefix}{s3_name}/large"
    head = s3_service.client().head_object(Bucket=s3_service.bucket, Key=key)
    # How many parts there were is told by the tag of an object that was put together of parts.
    assert head["ETag"].strip('"').endswith(f"-{-(-nbytes // PART_BYTES)}")
    assert s3_service.uploads(s3_name) == []


def test_a_put_that_is_ended_leaves_no_parts(
    store: Store, s3_service: S3Service, s3_name: str
) -> None:
    """Parts cost money until their upload is aborted."""
    sent: list[int] = []

    def watch(nbytes: int) -> None:
        sent.append(nbytes)
        if len(sent) == 15:  # more than go at once, so some are stored by now
            raise CoordinationError("not wanted any more", kind=ErrorKind.CANCELLED)

    with pytest.raises(CoordinationError, match="not wanted"):
        store.put("large", [bytes(20 * PART_BYTES)], watch=watch)
    assert set(sent) == {PART_BYTES}
    assert s3_service.uploads(s3_name) == []
    assert list(store.list_entries()) == []


@pytest.mark.soak
def test_checkpoint_of_more_objects_than_a_page(
    store: Store, s3_service: S3Service, s3_name: str
) -> None:
    """More than a page of a listing holds, in one folder."""
    if s3_service.kind == "moto":
        pytest.skip("moto takes a minute for it")
    datas = [number.to_bytes(4, "big") * 8 for number in range(1050)]
    repository = Repository(store)
    checkpoints.save(repository, 7, datas, threads=8)
    assert repository.steps() == [7]
    folder = f"step-0000000007/{repository.open(7).manifest.save_id}/"
    assert len(store.list_children(folder)) == 1051
    assert len(list(store.list_entries(folder))) == 1051
    report = repository.verify(7)
    assert report.ok
    assert report.files == 1050
