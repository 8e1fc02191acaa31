"""An S3 server for tests: one that is given, else Ceph's gateway, else moto's imitation."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import boto3

from tests.services.ceph import (
    ACCESS_KEY,
    SECRET_KEY,
    CephCluster,
    ServiceFailed,
    answers,
    free_port,
    spawn,
    wait_for,
)

URL_VARIABLE = "DIST_CKPT_TEST_S3_URL"
MOTO_LACKS = (
    "wrong secrets, permissions, creators that race on several processes, listings of many pages, "
    "the age of unfinished uploads, CephFS as a shared mount"
)
BUCKET = "dist-ckpt-test"
_REGION = "us-east-1"
# Nothing of the person who runs the tests may leak into them.
_ISOLATED = {
    "AWS_CONFIG_FILE": os.devnull,
    "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    "AWS_EC2_METADATA_DISABLED": "true",
}


@dataclass(frozen=True)
class S3Service:
    """A running server with a bucket.

    Attributes:
        kind: what it is.
        bucket: where tests put things.
        prefix: below which in the bucket; "" or ending in `/`.
        environment: the variables through which AWS programs find it and may use it.
    """

    kind: Literal["given", "ceph", "moto"]
    bucket: str = BUCKET
    prefix: str = ""
    environment: Mapping[str, str] = field(default_factory=dict)

    @property
    def endpoint(self) -> str:
        """Where it answers; "" for AWS itself."""
        return {**os.environ, **self.environment}.get("AWS_ENDPOINT_URL", "")

    def url(self, name: str) -> str:
        """Return the URL of the place `name` for one test."""
        return f"s3://{self.bucket}/{self.prefix}{name}"

    def client(self) -> Any:
        """Return a boto3 client that sees the server as its owner does."""
        given = {**os.environ, **self.environment}
        return boto3.client(
            "s3",
            endpoint_url=self.endpoint or None,
            aws_access_key_id=given.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=given.get("AWS_SECRET_ACCESS_KEY"),
            region_name=given.get("AWS_DEFAULT_REGION", _REGION),
        )

    def keys(self, name: str) -> list[str]:
        """Return the keys of all objects of the place `name`, relative to it."""
        folder = f"{self.prefix}{name}/"
        pages = self.client().get_paginator("list_objects_v2")
        found = pages.paginate(Bucket=self.bucket, Prefix=folder)
        return [
            item["Key"].removeprefix(folder) for page in found for item in page.get("Contents", [])
        ]

    def uploads(self, name: str) -> list[str]:
        """Return the keys of the unfinished multipart uploads of the place `name`."""
        folder = f"{self.prefix}{name}/"
        found = self.client().list_multipart_uploads(Bucket=self.bucket, Prefix=folder)
        return [item["Key"].removeprefix(folder) for item in found.get("Uploads", [])]


def given_service() -> S3Service | None:
    """Return the server that the environment names, if it does."""
    url = os.environ.get(URL_VARIABLE)
    if not url:
        return None
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    # What an earlier session left in a bucket that stays must not meet the tests of this one.
    prefix = f"{prefix.strip('/')}/{uuid.uuid4().hex}/".removeprefix("/")
    return S3Service("given", bucket, prefix)


def ceph_service(cluster: CephCluster) -> S3Service:
    """Return the gateway of a started `cluster`, with a bucket made."""
    return _with_bucket("ceph", cluster.endpoint)


@contextmanager
def moto_service() -> Iterator[S3Service]:
    """Run moto's server.

    Raises:
        ServiceFailed: it did not start.
    """
    port = free_port()
    program = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = spawn(program, subprocess.DEVNULL)
    try:
        endpoint = f"http://127.0.0.1:{port}"
        wait_for(server, lambda: answers(endpoint))
        yield _with_bucket("moto", endpoint)
    finally:
        server.kill()
        server.wait()


@contextmanager
def s3_service() -> Iterator[S3Service]:
    """Give the best server that this machine has, and say so on stderr when it is moto.

    Raises:
        ServiceFailed: none can be started.
    """
    given = given_service()
    if given is not None:
        yield given
        return
    cluster, reason = start_ceph()
    if cluster is None:
        sys.stderr.write(moto_line(reason) + "\n")
        with moto_service() as service:
            yield service
        return
    try:
        yield ceph_service(cluster)
    finally:
        cluster.stop()


def start_ceph() -> tuple[CephCluster | None, str]:
    """Return a started cluster, or None and why there is none."""
    missing = CephCluster.missing()
    if missing:
        return None, f"{missing[0]} is not installed"
    reason = ""
    # Twice: between looking for a free port and listening on it somebody else may take it.
    for _ in range(2):
        cluster = CephCluster()
        try:
            cluster.start()
        except ServiceFailed as error:
            reason = str(error)
        else:
            return cluster, ""
    return None, reason


def moto_line(reason: str) -> str:
    """Return the line that says what the fallback does not cover."""
    return f"S3 tests use moto, because {reason}; not covered then: {MOTO_LACKS}"


def _with_bucket(kind: Literal["ceph", "moto"], endpoint: str) -> S3Service:
    environment = {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_DEFAULT_REGION": _REGION,
        **_ISOLATED,
    }
    service = S3Service(kind, environment=environment)
    service.client().create_bucket(Bucket=service.bucket)
    return service
