"""The storage guide is right: its Python runs, its policy is enough, its rule is accepted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from dist_ckpt.storage.base import Sweeper
from tests.e2e import guides
from tests.services.s3 import S3Service

GUIDE = guides.guide("storage")
PART_BYTES = 5 << 20


def document(word: str) -> dict[str, Any]:
    (found,) = (text for text in guides.blocks(GUIDE, "json") if word in text)
    value: dict[str, Any] = json.loads(found)
    return value


def test_python_runs(s3_service: S3Service, s3_name: str, tmp_path: Path) -> None:
    code = guides.program(GUIDE)
    assert code.count("s3://my-bucket") >= 4
    code = code.replace("s3://my-bucket", s3_service.url(s3_name))
    guides.run(code.replace("/shared", str(tmp_path)), tmp_path)
    assert Repository(resolve(tmp_path / "runs" / "17")).steps() == [1]
    assert Repository(resolve(s3_service.url(f"{s3_name}/runs/17"))).steps() == [1, 2]
    assert Repository(resolve(s3_service.url(f"{s3_name}/runs/18"))).steps() == [1]


@pytest.fixture
def bucket(s3_service: S3Service) -> str:
    """A bucket of its own, whose policies disturb nobody."""
    if s3_service.kind != "ceph":
        pytest.skip(f"{s3_service.kind}: no bucket of one's own, or no permissions are checked")
    s3_service.client().create_bucket(Bucket="guide")
    return "guide"


def test_policy_is_enough(s3_service: S3Service, bucket: str) -> None:
    """Granted to everybody, it lets somebody without credentials do all that a run needs."""
    policy = document("Statement")
    for statement in policy["Statement"]:
        statement["Principal"] = "*"
        statement["Resource"] = statement["Resource"].replace("my-bucket", bucket)
    client = s3_service.client()
    client.put_bucket_policy(Bucket=bucket, Policy=json.dumps(policy))
    options = {"anon": True, "default_block_size": PART_BYTES, "abandoned_seconds": 0}
    store = resolve(f"s3://{bucket}/runs/17", storage_options=options)
    state = {"model": {"weights": torch.ones(PART_BYTES // 4 + 1000)}}
    with dist_ckpt.Checkpointer(store, state, keep=keep.latest(1)) as ckpt:
        assert ckpt.restore() == 0
        ckpt.save(1)
        ckpt.save(2)
    assert dist_ckpt.load(state, store).step == 2
    assert Repository(store).steps() == [2]
    key = "runs/17/step-0000000003/left"
    client.create_multipart_upload(Bucket=bucket, Key=key)
    assert isinstance(store, Sweeper)
    assert store.sweep() == 1
    elsewhere = resolve(f"s3://{bucket}/other", storage_options=options)
    with pytest.raises(StorageError, match="PutObject") as caught:
        elsewhere.put("key", [b"."])
    assert caught.value.kind is ErrorKind.PERMISSION
    for each in (store, elsewhere):
        each.close()


def test_lifecycle_rule_is_accepted(s3_service: S3Service, s3_name: str) -> None:
    if s3_service.kind == "given":
        pytest.skip("the rules of somebody's bucket are not touched")
    rule = document("Rules")
    client = s3_service.client()
    client.put_bucket_lifecycle_configuration(Bucket=s3_service.bucket, LifecycleConfiguration=rule)
    found = client.get_bucket_lifecycle_configuration(Bucket=s3_service.bucket)
    assert found["Rules"][0]["AbortIncompleteMultipartUpload"] == {"DaysAfterInitiation": 2}
    client.delete_bucket_lifecycle(Bucket=s3_service.bucket)
