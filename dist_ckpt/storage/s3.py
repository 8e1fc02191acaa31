"""A prefix of an S3 bucket as a store, on the client of s3fs.

Objects of at most one part are created by one conditional request, which the server decides, so of
any number of racing creators one wins. Larger ones are uploaded in parts, straight from the
caller's buffers; what commits a checkpoint is never that large.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    NotFound,
    StorageError,
    UsageError,
    without_secrets,
)
from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    MayGo,
    PutMode,
    Scatter,
    Stream,
    Watch,
    check_key,
    check_keys,
    check_mode,
    check_prefix,
    everything,
    fill_views,
    flat_views,
    holds,
    is_key,
)
from dist_ckpt.storage.multipart import MAX_OBJECT_BYTES, MAX_PART_BYTES, MIB, part_bytes
from dist_ckpt.storage.s3_client import Answer, Client
from dist_ckpt.storage.s3_errors import (
    EXISTS,
    FOREIGN,
    NO_SUCH_OBJECT,
    NO_SUCH_UPLOAD,
    NOT_IMPLEMENTED,
    Verdict,
    code_of,
    is_forbidden,
    judge,
    to_error,
)
from dist_ckpt.storage.s3_transfer import Download, StreamUpload, Upload

_T = TypeVar("_T")

# Wider than today's rules for new buckets: old ones have capitals, `_`, and up to 255 characters.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,254}")
_PART_BYTES = 16 * MIB
# "A day without a sign", by which commit-v1, section 6, takes a writer for dead.
_ABANDONED_SECONDS = 24 * 3600.0
# The most that one DeleteObjects takes.
_DELETED_AT_ONCE = 1000


class S3Store:
    """The objects of `bucket` whose names start with `prefix`. The bucket is never created.

    Nothing is contacted before the first call. A process that was forked or spawned makes its own
    connections.

    Args:
        bucket: its name.
        prefix: a folder in it, "" for the whole bucket.
        storage_options: any options of `s3fs.S3FileSystem` (`key`, `secret`, `token`, `profile`,
            `anon`, `endpoint_url`, `client_kwargs`, `config_kwargs`, `s3_additional_kwargs`, ...).
            `default_block_size` is the size of parts in bytes (16 MiB), `max_concurrency` the most
            requests at once (10). Besides, `abandoned_seconds`: how long after its last part an
            upload is taken for that of a killed writer by `sweep` (a day).
        conditional: whether the server refuses a conditional put whose condition does not hold,
            as AWS, Ceph and MinIO do. The first create of a process puts that to the test. False
            for one that does not, which then has no atomic create.

    Raises:
        UsageError: `bucket` or `prefix` is malformed.
    """

    def __init__(
        self,
        bucket: str,
        prefix: str = "",
        *,
        storage_options: Mapping[str, Any] | None = None,
        conditional: bool = True,
    ) -> None:
        if not _BUCKET.fullmatch(bucket):
            # Not shown: a mistyped url may hold a secret there.
            raise UsageError(
                "bad bucket name: letters, digits, '.', '_' and '-' only, as in s3://bucket/run; "
                "credentials go to storage_options or the AWS environment variables"
            )
        self._bucket = bucket
        self._root = f"{check_key(prefix)}/" if prefix else ""
        options = dict(storage_options or {})
        self._abandoned_seconds = float(options.pop("abandoned_seconds", _ABANDONED_SECONDS))
        self._part_bytes = int(options.get("default_block_size") or _PART_BYTES)
        self._client = Client(options)
        self._conditional = conditional
        # Both are learned from the server, and hold for every process that asks it.
        self._bucket_exists = False
        self._refuses = False

    def __repr__(self) -> str:
        return f"S3Store({without_secrets(self.url)!r})"

    @property
    def url(self) -> str:
        """`s3://`, the bucket and the prefix."""
        return f"s3://{self._bucket}/{self._root}".rstrip("/")

    @property
    def capabilities(self) -> Capabilities:
        """Atomic for objects of one part, consistent and durable, as S3 promises."""
        return Capabilities(
            atomic_create=self._conditional,
            strong_list=True,
            durable=True,
            max_part_bytes=MAX_PART_BYTES,
            max_object_bytes=MAX_OBJECT_BYTES,
            flat=True,
        )

    @property
    def retries(self) -> int:
        """How many requests of this process were repetitions of failed ones."""
        return self._client.retries

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """Upload `buffers` from where they are. See `Store.put`.

        An object of several parts is created after a look whether it exists: of several writers
        that create one such key at the same time, more than one may be told that it did.
        """
        target = self._target(key)
        check_mode(mode)
        views = flat_views(buffers)
        size = part_bytes(sum(view.nbytes for view in views), preferred=self._part_bytes)
        with self._mapped(f"put {key}"):
            upload = Upload(
                self._client,
                target,
                views,
                create=mode == "create",
                conditional=self._conditional,
                watch=watch,
            )
            stored = self._run(partial(self._put, upload, target, size))
        if not stored:
            raise AlreadyExists(f"{key} already exists in {self.url}")

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Upload the parts as they are made. See `Streamer.put_stream`."""
        size = part_bytes(stream.nbytes, preferred=self._part_bytes)
        if stream.nbytes <= size:
            self.put(key, list(stream), mode=mode)
            return
        how = {"create": check_mode(mode) == "create", "conditional": self._conditional}
        with self._mapped(f"put {key}"):
            upload = StreamUpload(self._client, self._target(key), stream, **how)
            if not self._run(partial(upload.put_parts, size)):
                raise AlreadyExists(f"{key} already exists in {self.url}")

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """Fill `buffers` by several requests at once. See `Store.read_into`.

        All bytes are of one version of the object, or it fails.
        """
        target = self._target(key)
        into = Scatter(fill_views(offset, buffers))
        if not into.nbytes:
            # There is nothing to fetch, and a missing key is an error all the same.
            self.size(key)
            return 0
        with self._mapped(f"read {key}", key):
            return self._run(Download(self._client, target, offset, into).run)

    def size(self, key: str) -> int:
        """Return the size of `key` in bytes. See `Store.size`."""
        target = self._target(key)
        with self._mapped(f"look at {key}", key):
            answer = self._run(lambda: self._client.call("head_object", **target))
            return int(answer["ContentLength"])

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects below `prefix`, page by page. See `Store.list_entries`."""
        check_prefix(prefix)
        return self._walk(prefix)

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the names one level below `prefix`. See `Store.list_children`."""
        check_prefix(prefix)
        start = len(self._root + prefix)
        names: list[str] = []
        for page in self._pages("list_objects_v2", prefix, Delimiter="/"):
            names += [found["Key"][start:] for found in page.get("Contents", [])]
            names += [found["Prefix"][start:] for found in page.get("CommonPrefixes", [])]
        # Objects and folders come in two lists, page by page; the order is that of all names.
        return sorted(name for name in names if is_key(name.removesuffix("/")))

    def delete(self, keys: Iterable[str]) -> None:
        """Remove `keys`, several at once. See `Store.delete`."""
        targets = ((key, self._target(key)) for key in check_keys(keys))
        while batch := [pair for _, pair in zip(range(_DELETED_AT_ONCE), targets, strict=False)]:
            more = f" and {len(batch) - 1} more" if len(batch) > 1 else ""
            with self._mapped(f"delete {batch[0][0]}{more}"):
                keys = [target["Key"] for _, target in batch]
                self._run(partial(self._client.delete, self._bucket, keys))

    def delete_exactly(self, key: str, data: bytes) -> bool:
        """Remove `key` if it holds `data`. See `ExactDeleter.delete_exactly`.

        The server compares once more (`If-Match`); one that does not know that of a deletion
        removes what was compared a moment before.
        """
        target = self._target(key)
        with self._mapped(f"delete {key}"):
            try:
                # Before the bytes are read: what is put after them has another tag.
                tag = self._run(partial(self._client.call, "head_object", **target))["ETag"]
                if not holds(self, key, data):
                    return False
                condition = {"IfMatch": tag} if self._conditional else {}
                self._run(partial(self._delete_if, target, condition))
            except FOREIGN as error:
                if code_of(error) not in EXISTS | NO_SUCH_OBJECT:
                    raise
                return False
        return True

    def sweep(self, prefix: str = "", *, may_go: MayGo = everything) -> int:
        """Abort the uploads below `prefix` that had no part for long. See `Sweeper.sweep`."""
        check_prefix(prefix)
        aborted = 0
        for page in self._pages("list_multipart_uploads", prefix):
            now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
            for found in page.get("Uploads", []):
                key = found["Key"][len(self._root) :]
                if not (is_key(key) and may_go(key)):
                    continue
                with self._mapped(f"sweep {found['Key']}"):
                    aborted += self._run(partial(self._abort_abandoned, found, now.timestamp()))
        return aborted

    def close(self) -> None:
        """Close the connections of this process."""
        self._client.close()

    def _target(self, key: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._root + check_key(key)}

    def _run(self, work: Callable[[], Coroutine[Any, Any, _T]]) -> _T:
        result = self._client.run(work)
        # Whatever answered knew the bucket, so a missing key needs no second question.
        self._bucket_exists = True
        return result

    async def _put(self, upload: Upload, target: dict[str, str], size: int) -> bool:
        if upload.nbytes > size:
            return await upload.put_parts(size)
        stored = await upload.put_whole()
        if stored and upload.conditional and not self._refuses:
            await self._check_refusal(upload, target)
        return stored

    async def _check_refusal(self, upload: Upload, target: dict[str, str]) -> None:
        """Put what was just created again: a server that ignores the condition would obey."""
        try:
            # Once more, since somebody may have deleted it in between.
            self._refuses = await upload.probe() or await upload.probe()
        except FOREIGN as error:
            if judge(error) is Verdict.FINAL:
                raise
            return  # an outage: what was created stays, and the next create asks again
        if not self._refuses:
            # An error of a put promises that nothing was stored.
            await self._client.call("delete_object", **target)
            raise StorageError(
                f"the server of {self.url} ignores the condition If-None-Match, so two jobs could "
                "commit the same step: choose another place, or promise single_writer=True"
            )

    async def _delete_if(self, target: dict[str, str], condition: dict[str, str]) -> None:
        try:
            await self._client.call("delete_object", **target, **condition)
        except FOREIGN as error:
            if code_of(error) not in NOT_IMPLEMENTED or not condition:
                raise
            await self._client.call("delete_object", **target)

    async def _abort_abandoned(self, found: Answer, now: float) -> int:
        upload = {"Bucket": self._bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
        try:
            newest = found["Initiated"]
            more: Answer = {"IsTruncated": True, "NextPartNumberMarker": 0}
            while more.get("IsTruncated"):
                marker = more["NextPartNumberMarker"]
                more = await self._client.call("list_parts", **upload, PartNumberMarker=marker)
                newest = max([newest, *(part["LastModified"] for part in more.get("Parts", []))])
            # Both times are the server's own, so no clock of a host is trusted; that of its
            # answer is cut to whole seconds.
            if now + 1 - newest.timestamp() < self._abandoned_seconds:
                return 0
            await self._client.call("abort_multipart_upload", **upload)
        except FOREIGN as error:
            if code_of(error) in NO_SUCH_UPLOAD:
                return 0  # completed or aborted since
            raise
        return 1

    def _walk(self, prefix: str) -> Iterator[Entry]:
        start = len(self._root)
        for page in self._pages("list_objects_v2", prefix):
            for found in page.get("Contents", []):
                key = found["Key"][start:]
                # What somebody else put there, such as the marker of a folder, is no key.
                if is_key(key):
                    yield Entry(key, found["Size"], found["LastModified"].timestamp())

    def _pages(self, name: str, prefix: str, **parameters: Any) -> Iterator[Answer]:
        wanted = {"Bucket": self._bucket, "Prefix": self._root + prefix, **parameters}
        more = True
        while more:
            with self._mapped(f"list {prefix or 'all'}"):
                page = self._run(partial(self._client.call, name, **wanted))
            yield page
            # A page may be empty and not the last: only the server says that there is no more.
            more = page.get("IsTruncated", False)
            for answer, question in _CONTINUATIONS[name].items():
                if page.get(answer):
                    wanted[question] = page[answer]

    @contextmanager
    def _mapped(self, doing: str, reading: str | None = None) -> Iterator[None]:
        """Turn every foreign error of the body into one of this package: the one edge."""
        try:
            yield
        except CheckpointError:
            raise
        except FOREIGN as error:
            code = code_of(error)
            if reading is not None and code in NO_SUCH_OBJECT:
                # An answer to HEAD has no body, so a missing bucket looks like a missing key.
                if not self._bucket_exists:
                    self._look_at_bucket()
                raise NotFound(f"no object {reading} in {self.url}") from error
            if code in NOT_IMPLEMENTED:
                raise UsageError(
                    f"cannot {doing} in {self.url}: the server does not know this kind of request "
                    f"({error}); give single_writer=True where it has no conditional put"
                ) from error
            if reading is not None and is_forbidden(error):
                # Who may not list is told 403 of a missing key too: the listing tells which it is.
                self._look_at_bucket()
            raise to_error(error, doing, self.url) from error

    def _look_at_bucket(self) -> None:
        """Raise what is wrong with the bucket or the rights: a look at a key does not tell."""
        next(self._pages("list_objects_v2", "", MaxKeys=1))


_CONTINUATIONS: Mapping[str, Mapping[str, str]] = {
    "list_objects_v2": {"NextContinuationToken": "ContinuationToken"},
    "list_multipart_uploads": {
        "NextKeyMarker": "KeyMarker",
        "NextUploadIdMarker": "UploadIdMarker",
    },
}


def open_s3(
    url: str,
    rest: str,
    *,
    storage_options: Mapping[str, Any] | None = None,
    conditional: bool = True,
) -> S3Store:
    """Return the store that an `s3://` url names.

    Args:
        url: as it was written, for messages.
        rest: what follows `s3://`.
        storage_options: see `S3Store`.
        conditional: see `S3Store`.

    Raises:
        UsageError: it names no bucket, or its prefix is no key.
    """
    bucket, _, prefix = rest.partition("/")
    if not bucket:
        raise UsageError(f"bad url {url!r}: an s3 url names its bucket, s3://bucket/run")
    return S3Store(
        bucket, prefix.rstrip("/"), storage_options=storage_options, conditional=conditional
    )
