"""The fault proxy spoils exactly what it is told to, and passes everything else on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import boto3
import pytest
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from tests.services.proxy import (
    FAULTS,
    INTERNAL,
    LOSE,
    RESET,
    SLOW_DOWN,
    STALL,
    TRUNCATE,
    Fault,
    FaultProxy,
)
from tests.services.s3 import S3Service

DATA = bytes(range(256)) * 8192  # 2 MiB


@pytest.fixture
def proxy(s3_service: S3Service) -> Iterator[FaultProxy]:
    with FaultProxy(s3_service.endpoint) as proxy:
        yield proxy


@pytest.fixture
def client(s3_service: S3Service, proxy: FaultProxy) -> Iterator[Any]:
    settings = Config(retries={"total_max_attempts": 1}, read_timeout=5)
    client = boto3.client("s3", endpoint_url=proxy.endpoint, config=settings)
    yield client
    client.close()


def test_passes_on_what_it_does_not_spoil(
    s3_service: S3Service, s3_name: str, proxy: FaultProxy, client: Any
) -> None:
    key = f"{s3_service.prefix}{s3_name}/key"
    client.put_object(Bucket=s3_service.bucket, Key=key, Body=DATA)
    assert client.get_object(Bucket=s3_service.bucket, Key=key)["Body"].read() == DATA
    assert client.head_object(Bucket=s3_service.bucket, Key=key)["ContentLength"] == len(DATA)
    assert s3_service.keys(s3_name) == ["key"]
    found = client.list_objects_v2(Bucket=s3_service.bucket, Prefix=key)
    assert [item["Key"] for item in found["Contents"]] == [key]
    assert [request.split(" ")[0] for request in proxy.requests] == ["PUT", "GET", "HEAD", "GET"]
    assert proxy.fired == 0


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_put_meets_the_fault(
    s3_service: S3Service, s3_name: str, proxy: FaultProxy, client: Any, fault: Fault
) -> None:
    key = f"{s3_service.prefix}{s3_name}/key"
    proxy.arm(fault, at=1)
    with pytest.raises((BotoCoreError, ClientError)) as caught:
        client.put_object(Bucket=s3_service.bucket, Key=key, Body=DATA)
    assert proxy.fired == 1
    if fault in (SLOW_DOWN, INTERNAL):
        assert caught.value.response["Error"]["Code"] == fault.code
    # Only the answer was spoiled by these: the server has done what it was asked.
    assert s3_service.keys(s3_name) == (["key"] if fault in (LOSE, TRUNCATE) else [])
    client.put_object(Bucket=s3_service.bucket, Key=key, Body=DATA)
    assert s3_service.keys(s3_name) == ["key"]


@pytest.mark.parametrize("fault", [RESET, LOSE, STALL, TRUNCATE], ids=str)
def test_get_meets_the_fault(
    s3_service: S3Service, s3_name: str, proxy: FaultProxy, client: Any, fault: Fault
) -> None:
    key = f"{s3_service.prefix}{s3_name}/key"
    client.put_object(Bucket=s3_service.bucket, Key=key, Body=DATA)
    proxy.arm(fault, at=1)
    with pytest.raises(BotoCoreError):
        client.get_object(Bucket=s3_service.bucket, Key=key)["Body"].read()
    assert client.get_object(Bucket=s3_service.bucket, Key=key)["Body"].read() == DATA


def test_fault_follows_equal_requests(
    s3_service: S3Service, s3_name: str, proxy: FaultProxy, client: Any
) -> None:
    key = f"{s3_service.prefix}{s3_name}/key"
    proxy.arm(SLOW_DOWN, at=1, then="equal")
    for _ in range(3):
        with pytest.raises(ClientError):
            client.put_object(Bucket=s3_service.bucket, Key=key, Body=b".")
    client.put_object(Bucket=s3_service.bucket, Key=f"{key}-2", Body=b".")
    assert proxy.fired == 3
    assert s3_service.keys(s3_name) == ["key-2"]


def test_server_is_gone_from_a_request_on(
    s3_service: S3Service, s3_name: str, proxy: FaultProxy, client: Any
) -> None:
    proxy.arm(RESET, at=2, then="all")
    for number in range(4):
        key = f"{s3_service.prefix}{s3_name}/{number}"
        if number == 0:
            client.put_object(Bucket=s3_service.bucket, Key=key, Body=b".")
        else:
            with pytest.raises(BotoCoreError):
                client.put_object(Bucket=s3_service.bucket, Key=key, Body=b".")
    assert proxy.fired == 3
    assert s3_service.keys(s3_name) == ["0"]
