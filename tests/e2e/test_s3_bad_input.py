"""What people get wrong about S3 ends in one error that says what it was, at once."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import CheckpointError, ErrorKind, StorageError
from dist_ckpt.storage import Store, resolve
from tests.services.proxy import Fault, FaultProxy
from tests.services.s3 import S3Service

PART_BYTES = 5 << 20
STATE = {"model": {"weights": torch.ones(1000)}}


@pytest.fixture
def opened() -> Iterator[Callable[..., Store]]:
    """Opens stores that are closed at the end."""
    stores = []

    def open_(url: str, **options: Any) -> Store:
        stores.append(resolve(url, storage_options=options))
        return stores[-1]

    yield open_
    for store in stores:
        store.close()


@pytest.fixture
def proxy(s3_service: S3Service) -> Iterator[FaultProxy]:
    with FaultProxy(s3_service.endpoint) as proxy:
        yield proxy


def refusals(store: Store) -> list[CheckpointError]:
    """Return the error of a save, of a load and of a restore."""
    errors = []
    for work in (
        lambda: dist_ckpt.save(STATE, store, step=1),
        lambda: dist_ckpt.load(STATE, store),
        lambda: dist_ckpt.Checkpointer(store, STATE).restore(),
    ):
        with pytest.raises(CheckpointError) as caught:
            work()
        errors.append(caught.value)
    return errors


def test_wrong_secret(s3_service: S3Service, s3_name: str, opened: Callable[..., Store]) -> None:
    if s3_service.kind == "moto":
        pytest.skip("moto takes any secret")
    store = opened(s3_service.url(s3_name), key="AKIDTEST", secret="not-the-secret-of-this-key")
    for error in refusals(store):
        assert isinstance(error, StorageError)
        assert error.kind is ErrorKind.PERMISSION
        assert "secret" in str(error)
        assert "not-the-secret-of-this-key" not in str(error)
    assert s3_service.keys(s3_name) == []


def test_unknown_bucket(s3_service: S3Service, opened: Callable[..., Store]) -> None:
    for error in refusals(opened("s3://there-is-no-such-bucket/run")):
        assert isinstance(error, StorageError), "an outage is no new run"
        assert "create the bucket" in str(error)
    client = s3_service.client()
    names = [bucket["Name"] for bucket in client.list_buckets()["Buckets"]]
    assert "there-is-no-such-bucket" not in names


@pytest.mark.parametrize(
    ("allowed", "refused"),
    [
        (["s3:GetObject", "s3:PutObject"], "s3:ListBucket"),
        (["s3:GetObject", "s3:ListBucket"], "s3:PutObject"),
    ],
    ids=["no-list", "no-put"],
)
def test_missing_permission(
    s3_service: S3Service, opened: Callable[..., Store], allowed: list[str], refused: str
) -> None:
    if s3_service.kind != "ceph":
        pytest.skip(f"{s3_service.kind}: no bucket of one's own, or no permissions are checked")
    client, bucket = s3_service.client(), f"without-{refused[3:].lower()}"
    client.create_bucket(Bucket=bucket)
    everywhere = [f"arn:aws:s3:::{bucket}", f"arn:aws:s3:::{bucket}/*"]
    statement = {"Effect": "Allow", "Principal": "*", "Action": allowed, "Resource": everywhere}
    policy = {"Version": "2012-10-17", "Statement": [statement]}
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    store = opened(f"s3://{bucket}/run", anon=True)
    with pytest.raises(StorageError, match=refused) as caught:
        dist_ckpt.save(STATE, store, step=1)
    assert caught.value.kind is ErrorKind.PERMISSION
    assert client.list_objects_v2(Bucket=bucket)["KeyCount"] == 0


def test_bucket_in_another_region(
    s3_service: S3Service, s3_name: str, opened: Callable[..., Store], proxy: FaultProxy
) -> None:
    store = opened(s3_service.url(s3_name), endpoint_url=proxy.endpoint)
    proxy.arm(Fault("answer", 301, "PermanentRedirect"))
    for error in refusals(store):
        assert isinstance(error, StorageError)
        assert "AWS_DEFAULT_REGION" in str(error)


@pytest.mark.parametrize(
    ("fault", "kind", "text"),
    [
        (Fault("answer", 403, "AccessDenied"), ErrorKind.PERMISSION, "s3:PutObject"),
        (Fault("answer", 403, "QuotaExceeded"), ErrorKind.STORAGE_FULL, "make room"),
        (Fault("answer", 301, "PermanentRedirect"), ErrorKind.STORAGE, "another region"),
    ],
    ids=str,
)
def test_refusal_is_not_retried(
    s3_service: S3Service,
    s3_name: str,
    opened: Callable[..., Store],
    proxy: FaultProxy,
    fault: Fault,
    kind: ErrorKind,
    text: str,
) -> None:
    store = opened(
        s3_service.url(s3_name), endpoint_url=proxy.endpoint, default_block_size=PART_BYTES
    )
    proxy.arm(fault, match="PUT ")
    with pytest.raises(StorageError, match=text) as caught:
        store.put("key", [b"."])
    assert caught.value.kind is kind
    assert proxy.fired == 1
    proxy.arm(fault, match="partNumber=2")
    with pytest.raises(StorageError, match=text):
        store.put("large", [bytes(PART_BYTES), b"."])
    assert proxy.fired == 1
    assert s3_service.keys(s3_name) == []
    assert s3_service.uploads(s3_name) == []
