"""An S3 server: what its other clients reach, and what of it a store reaches."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import obstore
import s3fs
from boto3.s3.transfer import TransferConfig
from obstore.store import S3Store as ObstoreS3

from benchmarks.measure import Case, interleave, say, table, verdict
from dist_ckpt.storage import resolve
from tests.services.s3 import S3Service, s3_service

TARGET = 1.1

_PART_BYTES = 16 << 20
_STORE = "dist_ckpt"
_PEERS = ["boto3, 8 threads of 16 MiB", "s3fs", "obstore"]


def run(data: memoryview, *, repeats: int) -> bool:
    """Measure upload and ranged download of `data`; return whether the targets are met.

    The server is the one of the tests: a given one, or one that is started and stopped here.
    """
    with s3_service() as service, environment_of(service):
        say(f"S3 server: {service.kind}, {service.endpoint}")
        bench = _Bench(service, data)
        try:
            uploads = table(
                "Upload to S3",
                interleave(bench.uploads(), repeats=repeats),
                nbytes=data.nbytes,
                limits=_PEERS,
            )
            met = verdict("upload against the best peer", uploads[_STORE], target=TARGET)
            downloads = table(
                "Ranged download from S3",
                interleave(bench.downloads(), repeats=repeats),
                nbytes=data.nbytes,
                limits=_PEERS,
            )
            return met & verdict("download against the best peer", downloads[_STORE], target=TARGET)
        finally:
            bench.close()


class _Bench:
    def __init__(self, service: S3Service, data: memoryview) -> None:
        self._bucket = service.bucket
        self._folder = f"{service.prefix}bench"
        self._data = data
        # The peers take no other buffer; what it costs to make one is not held against them.
        self._bytes = bytes(data)
        self._target = memoryview(bytearray(data.nbytes))
        self._store = resolve(service.url("bench"))
        self._boto3 = service.client()
        self._s3fs: Any = s3fs.S3FileSystem(
            endpoint_url=service.endpoint or None, use_listings_cache=False
        )
        self._obstore = ObstoreS3(
            self._bucket,
            prefix=self._folder,
            endpoint=service.endpoint or None,
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )

    def close(self) -> None:
        """Remove what was uploaded."""
        self._store.delete(entry.key for entry in self._store.list_entries())
        self._store.close()

    def uploads(self) -> list[Case]:
        """Return the ways to upload the same bytes, each to its own key."""
        return [
            Case(_STORE, self._put, before=lambda: self._store.delete([_STORE])),
            Case(_PEERS[0], self._upload_boto3),
            Case(_PEERS[1], lambda: self._s3fs.pipe_file(self._path, self._bytes)),
            Case(_PEERS[2], lambda: obstore.put(self._obstore, "obstore", self._bytes)),
        ]

    def downloads(self) -> list[Case]:
        """Return the ways to have all bytes of one object in memory, by ranges."""
        return [
            Case(_STORE, self._read, after=self._check),
            Case(_PEERS[0], self._download_boto3),
            Case(_PEERS[1], self._download_s3fs),
            Case(_PEERS[2], self._download_obstore),
        ]

    @property
    def _path(self) -> str:
        return f"{self._bucket}/{self._folder}/s3fs"

    @property
    def _starts(self) -> list[int]:
        return list(range(0, self._data.nbytes, _PART_BYTES))

    @property
    def _stops(self) -> list[int]:
        return [min(start + _PART_BYTES, self._data.nbytes) for start in self._starts]

    def _put(self) -> None:
        self._store.put(_STORE, [self._data])

    def _upload_boto3(self) -> None:
        self._boto3.upload_fileobj(
            io.BytesIO(self._bytes), self._bucket, f"{self._folder}/boto3", Config=_config()
        )

    def _read(self) -> None:
        count = self._store.read_into(_STORE, 0, self._target)
        if count != self._data.nbytes:
            raise AssertionError("what was downloaded is not whole")

    def _check(self) -> None:
        if self._target != self._data:
            raise AssertionError("what was downloaded is not what was uploaded")
        self._target[:] = bytes(self._target.nbytes)

    def _download_boto3(self) -> None:
        self._boto3.download_fileobj(
            self._bucket, f"{self._folder}/boto3", io.BytesIO(), Config=_config()
        )

    def _download_s3fs(self) -> None:
        paths = [self._path] * len(self._starts)
        self._s3fs.cat_ranges(paths, self._starts, self._stops)

    def _download_obstore(self) -> None:
        obstore.get_ranges(self._obstore, "obstore", starts=self._starts, ends=self._stops)


def _config() -> TransferConfig:
    return TransferConfig(
        max_concurrency=8, multipart_chunksize=_PART_BYTES, multipart_threshold=_PART_BYTES
    )


@contextmanager
def environment_of(service: S3Service) -> Iterator[None]:
    """Let every client find `service` as it would find any: by the variables of AWS."""
    before = dict(os.environ)
    os.environ.update(service.environment)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
