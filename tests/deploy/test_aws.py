"""The policies for AWS are enough and not more: held against the requests that are really made."""

from __future__ import annotations

import json
import re
from contextlib import closing
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.cli import main
from dist_ckpt.storage import Store, resolve
from dist_ckpt.storage.base import Sweeper
from tests.arch.source import ROOT
from tests.e2e import guides
from tests.services.proxy import FaultProxy
from tests.services.s3 import S3Service

FOLDER = ROOT / "deploy" / "aws"
BUCKET = "my-bucket"
PART_BYTES = 5 << 20

# What a request needs, by its method and the words behind the question mark that tell it; first
# those about a bucket, then those about an object.
_OF_BUCKET = {
    ("GET", "list-type"): "s3:ListBucket",
    ("GET", "uploads"): "s3:ListBucketMultipartUploads",
    ("HEAD", ""): "s3:ListBucket",
    ("POST", "delete"): "s3:DeleteObject",
}
_OF_OBJECT = {
    ("GET", ""): "s3:GetObject",
    ("HEAD", ""): "s3:GetObject",
    ("PUT", ""): "s3:PutObject",
    ("PUT", "uploadId"): "s3:PutObject",
    ("POST", "uploads"): "s3:PutObject",
    ("POST", "uploadId"): "s3:PutObject",
    ("GET", "uploadId"): "s3:ListMultipartUploadParts",
    ("DELETE", ""): "s3:DeleteObject",
    ("DELETE", "uploadId"): "s3:AbortMultipartUpload",
}
_TELLING = ("list-type", "uploads", "uploadId", "delete")


def document(name: str) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((FOLDER / name).read_text())
    return value


def granted(name: str) -> set[tuple[str, str]]:
    """Return the actions of a policy, each with what it may be done to."""
    return {
        (action, statement["Resource"])
        for statement in document(name)["Statement"]
        for action in statement["Action"]
    }


def needed(request: str) -> tuple[str, str]:
    """Return the action that a request is, and the resource, in the words of a policy.

    Raises:
        KeyError: it is a request whose action is not known here.
    """
    method, target = request.split(" ")
    parts = urlsplit(target)
    asked = parse_qs(parts.query, keep_blank_values=True)
    bucket, _, key = unquote(parts.path).removeprefix("/").partition("/")
    telling = next((word for word in _TELLING if word in asked), "")
    if key:
        return _OF_OBJECT[method, telling], f"arn:aws:s3:::{bucket}/{key}"
    return _OF_BUCKET[method, telling], f"arn:aws:s3:::{bucket}"


def train(store: str | Store, steps: int) -> None:
    """Save `steps` steps, one file of them in several parts, and keep the last two."""
    state = {"model": {"weights": torch.ones(PART_BYTES // 4 + 1000), "bias": torch.ones(3)}}
    with dist_ckpt.Checkpointer(store, state, every_steps=1, keep=keep.latest(2)) as ckpt:
        for step in range(ckpt.restore() + 1, steps + 1):
            ckpt.step(step)


def call(*words: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(list(words))
    assert ended.value.code == 0, words


def look(url: str, tmp_path: Path) -> None:
    """Do what needs no right to change anything."""
    for words in (["ls", url], ["show", url], ["tensors", url], ["verify", url, "--all"]):
        call(*words)
    call("cp", url, str(tmp_path / "copy"))
    state = {"model": {"weights": torch.zeros(PART_BYTES // 4 + 1000), "bias": torch.zeros(3)}}
    dist_ckpt.load(state, url)


def asked_for(wire: FaultProxy, s3_service: S3Service, s3_name: str) -> set[tuple[str, str]]:
    """Return what the requests so far needed, below the bucket and the folder of the policies."""
    place = f"arn:aws:s3:::{s3_service.bucket}/{s3_service.prefix}{s3_name}/"
    found = set()
    for action, resource in map(needed, wire.requests):
        if resource.startswith(place):
            resource = f"arn:aws:s3:::{BUCKET}/{resource.removeprefix(place)}"
        else:
            assert resource == f"arn:aws:s3:::{s3_service.bucket}", "nothing beside its own place"
            resource = f"arn:aws:s3:::{BUCKET}"
        # Several objects are deleted by one request to the bucket, which needs the right for each.
        if action == "s3:DeleteObject" and resource == f"arn:aws:s3:::{BUCKET}":
            resource += "/runs/17/deleted"
        found.add((action, resource))
    return found


def test_the_policies_are_what_is_needed_and_not_more(
    s3_service: S3Service, s3_name: str, wire: FaultProxy, tmp_path: Path
) -> None:
    url = s3_service.url(f"{s3_name}/runs/17")
    options = {"default_block_size": PART_BYTES, "abandoned_seconds": 0}
    with closing(resolve(url, storage_options=options)) as store:
        train(store, 3)
        left = f"{s3_service.prefix}{s3_name}/runs/17/step-0000000009/c000009-0000000000000000/left"
        s3_service.client().create_multipart_upload(Bucket=s3_service.bucket, Key=left)
        assert isinstance(store, Sweeper)
        assert store.sweep() == 1
    call("sweep", url)
    to_change = asked_for(wire, s3_service, s3_name)
    wire.arm(None)
    look(url, tmp_path)
    to_look = asked_for(wire, s3_service, s3_name)
    for name, asked in (("policy.json", to_change | to_look), ("policy-read-only.json", to_look)):
        used = {
            (action, allowed)
            for action, resource in asked
            for known, allowed in granted(name)
            if action == known and fnmatchcase(resource, allowed)
        }
        assert {action for action, _ in asked} == {action for action, _ in used}, "it is enough"
        assert used == granted(name), "and nothing in it is not needed"


def test_the_files_are_what_the_guide_shows() -> None:
    shown = [json.loads(text) for text in guides.blocks(guides.guide("storage"), "json")]
    assert shown == [document("policy.json"), document("lifecycle.json")]


def test_the_rule_ends_uploads_and_expires_nothing() -> None:
    (rule,) = document("lifecycle.json")["Rules"]
    ends = {name for name in rule if re.search("Expir|Transition|Abort", name)}
    assert ends == {"AbortIncompleteMultipartUpload"}
    # Later than `sweep` itself, which knows whether a job is at work.
    assert rule["AbortIncompleteMultipartUpload"]["DaysAfterInitiation"] >= 2
