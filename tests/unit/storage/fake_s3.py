"""An S3 server without a network: what the requests of `S3Store` mean, and faults at will."""

from __future__ import annotations

import asyncio
import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import botocore.exceptions as boto

Answer = dict[str, Any]

BUCKET = "bucket"


def refusal(code: str, status: int, operation: str = "Request", **headers: str) -> boto.ClientError:
    """Return what botocore raises when a server answers with an error."""
    answer = {
        "Error": {"Code": code, "Message": f"the fake says {code}"},
        "ResponseMetadata": {"HTTPStatusCode": status, "HTTPHeaders": headers},
    }
    return boto.ClientError(answer, operation)  # type: ignore[arg-type,unused-ignore]


@dataclass
class Fault:
    """Raise `error` at the `nth` request that is called `name`; `after` it was done, or before."""

    name: str
    error: Exception
    nth: int = 1
    after: bool = False


@dataclass
class _Object:
    data: bytes
    metadata: dict[str, str]

    @property
    def etag(self) -> str:
        return f'"{hashlib.md5(self.data).hexdigest()}"'


class _Stream:
    """The body of an answer, as aiohttp gives it."""

    def __init__(self, chunks: list[bytes]) -> None:
        self.raw_stream = self
        self.content = self
        self.closed = False
        self._chunks = chunks

    async def readany(self) -> bytes:
        return self._chunks.pop(0) if self._chunks else b""

    def close(self) -> None:
        self.closed = True


@dataclass
class FakeS3:
    """Stands in for `Client.send`.

    Attributes:
        calls: the names of the requests that came.
        ignores_conditions: as some servers do.
        before_delete: called when the server is about to look at what it shall delete.
        cuts: how many bytes of each of the next bodies arrive; then all of them do.
        undeletable: keys that a request to delete several fails to delete.
    """

    objects: dict[str, _Object] = field(default_factory=dict)
    uploads: dict[str, dict[str, Any]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    calls: list[str] = field(default_factory=list)
    ignores_conditions: bool = False
    before_delete: Callable[[], object] | None = None
    cuts: list[int] = field(default_factory=list)
    undeletable: set[str] = field(default_factory=set)
    now: datetime = datetime(2030, 1, 1, tzinfo=UTC)

    async def send(self, name: str, parameters: Mapping[str, Any]) -> Answer:
        """Do what the request asks for."""
        self.calls.append(name)
        count = self.calls.count(name)
        fault = next((f for f in self.faults if f.name == name and f.nth in (0, count)), None)
        if fault is not None and not fault.after:
            raise fault.error
        if parameters["Bucket"] != BUCKET:
            code = "404" if name == "head_object" else "NoSuchBucket"
            raise refusal(code, 404, name)
        answer: Answer = await getattr(self, name)(dict(parameters))
        if fault is not None:
            raise fault.error
        answer["ResponseMetadata"] = {"HTTPHeaders": {"date": format_datetime(self.now)}}
        return answer

    def data(self, key: str) -> bytes:
        """Return the bytes under `key`."""
        return self.objects[key].data

    def _check_condition(self, asked: Answer) -> None:
        if not self.ignores_conditions and "IfNoneMatch" in asked and asked["Key"] in self.objects:
            raise refusal("PreconditionFailed", 412)

    async def put_object(self, asked: Answer) -> Answer:
        data = await _received(asked["Body"])
        self._check_condition(asked)
        self.objects[asked["Key"]] = _Object(data, asked["Metadata"])
        return {}

    async def head_object(self, asked: Answer) -> Answer:
        found = self.objects.get(asked["Key"])
        if found is None:
            raise refusal("404", 404, "HeadObject")
        return {"ContentLength": len(found.data), "Metadata": found.metadata, "ETag": found.etag}

    async def get_object(self, asked: Answer) -> Answer:
        found = self.objects.get(asked["Key"])
        if found is None:
            raise refusal("NoSuchKey", 404)
        first, last = map(int, asked["Range"].removeprefix("bytes=").split("-"))
        part = found.data[first : last + 1]
        if not part:
            raise refusal("InvalidRange", 416)
        sent = part[: self.cuts.pop(0)] if self.cuts else part
        return {
            "ContentRange": f"bytes {first}-{first + len(part) - 1}/{len(found.data)}",
            "ETag": found.etag,
            "Body": _Stream([sent[at : at + 100_000] for at in range(0, len(sent), 100_000)]),
        }

    async def delete_object(self, asked: Answer) -> Answer:
        if self.before_delete is not None:
            await asyncio.to_thread(self.before_delete)
        found = self.objects.get(asked["Key"])
        tag = None if found is None else found.etag
        if not self.ignores_conditions and asked.get("IfMatch", tag) != tag:
            raise refusal("PreconditionFailed", 412)
        self.objects.pop(asked["Key"], None)
        return {}

    async def delete_objects(self, asked: Answer) -> Answer:
        keys = [each["Key"] for each in asked["Delete"]["Objects"]]
        assert asked["Delete"]["Quiet"]
        assert len(keys) <= 1000
        errors = []
        for key in keys:
            if key in self.undeletable:
                errors.append({"Key": key, "Code": "InternalError", "Message": "not now"})
            else:
                self.objects.pop(key, None)
        return {"Errors": errors} if errors else {}

    async def list_objects_v2(self, asked: Answer) -> Answer:
        found = sorted(key for key in self.objects if key.startswith(asked["Prefix"]))
        begin = asked.get("ContinuationToken", "")
        page = [key for key in found if key > begin][:2]
        time = datetime(2020, 1, 1, tzinfo=UTC)
        answer: Answer = {
            "Contents": [{"Key": k, "Size": len(self.data(k)), "LastModified": time} for k in page]
        }
        if page and page[-1] != found[-1]:
            answer |= {"IsTruncated": True, "NextContinuationToken": page[-1]}
        return answer

    async def create_multipart_upload(self, asked: Answer) -> Answer:
        name = f"upload-{len(self.calls)}"
        self.uploads[name] = {**asked, "parts": {}, "begun": self.now}
        return {"UploadId": name}

    async def upload_part(self, asked: Answer) -> Answer:
        data = await _received(asked["Body"])
        self._upload(asked)["parts"][asked["PartNumber"]] = (data, self.now)
        return {"ETag": f'"{asked["PartNumber"]}"'}

    async def complete_multipart_upload(self, asked: Answer) -> Answer:
        upload = self._upload(asked)
        self._check_condition(asked)
        numbers = [part["PartNumber"] for part in asked["MultipartUpload"]["Parts"]]
        assert numbers == sorted(upload["parts"])
        data = b"".join(upload["parts"][number][0] for number in numbers)
        self.objects[asked["Key"]] = _Object(data, upload["Metadata"])
        del self.uploads[asked["UploadId"]]
        return {}

    async def abort_multipart_upload(self, asked: Answer) -> Answer:
        self._upload(asked)
        del self.uploads[asked["UploadId"]]
        return {}

    async def list_multipart_uploads(self, asked: Answer) -> Answer:
        return {
            "Uploads": [
                {"Key": upload["Key"], "UploadId": name, "Initiated": upload["begun"]}
                for name, upload in self.uploads.items()
                if upload["Key"].startswith(asked["Prefix"])
            ]
        }

    async def list_parts(self, asked: Answer) -> Answer:
        parts = self._upload(asked)["parts"]
        return {"Parts": [{"LastModified": time} for _, time in parts.values()]}

    def _upload(self, asked: Answer) -> dict[str, Any]:
        if asked["UploadId"] not in self.uploads:
            raise refusal("NoSuchUpload", 404)
        return self.uploads[asked["UploadId"]]

    def pass_time(self, seconds: float) -> None:
        """Move the clock of the server."""
        self.now += timedelta(seconds=seconds)


async def _received(body: Any) -> bytes:
    if isinstance(body, bytes):
        return body
    return b"".join([bytes(chunk) async for chunk in body])
