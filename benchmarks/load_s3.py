"""A load from S3 against concurrent ranged reads of the same objects.

Everybody reads on connections that are there already, as those of a training job are; what it costs
to make them anew for a load is a row of its own.
"""

from __future__ import annotations

from typing import Any

import obstore
import torch
from obstore.store import S3Store as ObstoreS3
from torch import nn
from torch.distributed.checkpoint._fsspec_filesystem import FsspecReader, FsspecWriter
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dist_ckpt
from benchmarks.measure import Case, Samples, interleave, no_warnings
from dist_ckpt import TrainState
from dist_ckpt.storage import Store, resolve
from dist_ckpt.threads import in_parallel
from tests.services.s3 import S3Service

OURS = "dist_ckpt"
ANEW = "dist_ckpt, connecting anew"
LIMITS = ("obstore, ranges of 16 MiB", "boto3, 8 threads of 16 MiB")
STOCK = "stock FsspecReader"

_RANGE_BYTES = 16 << 20
_TENSORS = 32


def measure(service: S3Service, nbytes: int, *, repeats: int) -> dict[str, Samples]:
    """Load `nbytes` from `service` in turn with each way; nothing of it is left there."""
    bench = _Bench(service, nbytes)
    try:
        return interleave(bench.cases(), repeats=repeats)
    finally:
        bench.close()


class _Bench:
    def __init__(self, service: S3Service, nbytes: int) -> None:
        torch.manual_seed(0)
        each = nbytes // 4 // _TENSORS
        written = nn.ParameterList(torch.rand(each) for _ in range(_TENSORS))
        self._written = written.state_dict()
        self._model = nn.ParameterList(torch.zeros(each) for _ in range(_TENSORS))
        self._bucket = service.bucket
        self._place = service.url("load")
        self._stock = service.url("load-stock")
        # As the clients of the limits: made once, and connected when the measuring begins.
        self._store = resolve(self._place)
        self._client = service.client()
        self._obstore = ObstoreS3(
            self._bucket,
            endpoint=service.endpoint or None,
            client_options={"allow_http": True},
            virtual_hosted_style_request=False,
        )
        dist_ckpt.save(TrainState(model=written, rng=None), self._place)
        with no_warnings():
            dcp_save(
                {"model": self._written}, storage_writer=FsspecWriter(self._stock), no_dist=True
            )
        self._ranges = self._list(service)

    def cases(self) -> list[Case]:
        """Return the ways to have all bytes of the checkpoint in memory."""
        checked = {"before": self._clear, "after": self._check}
        return [
            Case(OURS, lambda: self._load(self._store), **checked),
            Case(ANEW, lambda: self._load(self._place), **checked),
            Case(LIMITS[0], self._read_obstore),
            Case(LIMITS[1], self._read_boto3),
            Case(STOCK, self._load_stock, **checked),
        ]

    def close(self) -> None:
        """Remove what was written."""
        for store in (self._store, resolve(self._stock)):
            store.delete(entry.key for entry in store.list_entries())
            store.close()

    def _list(self, service: S3Service) -> dict[str, list[tuple[int, int]]]:
        """Return the ranges of each object that a load reads."""
        return {
            f"{service.prefix}load/{entry.key}": [
                (start, min(start + _RANGE_BYTES, entry.nbytes))
                for start in range(0, entry.nbytes, _RANGE_BYTES)
            ]
            for entry in self._store.list_entries()
            if entry.key.endswith(".safetensors")
        }

    def _clear(self) -> None:
        for tensor in self._model.state_dict().values():
            tensor.zero_()

    def _check(self) -> None:
        for name, tensor in self._model.state_dict().items():
            if not torch.equal(tensor, self._written[name]):
                raise AssertionError(f"{name} is not what was saved")

    def _load(self, place: str | Store) -> None:
        dist_ckpt.load_weights(self._model, place)

    def _load_stock(self) -> None:
        state: dict[str, Any] = {"model": self._model.state_dict()}
        with no_warnings():
            dcp_load(state, storage_reader=FsspecReader(self._stock), no_dist=True)

    def _read_obstore(self) -> None:
        for key, ranges in self._ranges.items():
            starts, stops = zip(*ranges, strict=True)
            obstore.get_ranges(self._obstore, key, starts=starts, ends=stops)

    def _read_boto3(self) -> None:
        def read(part: tuple[str, int, int]) -> None:
            key, start, stop = part
            span = f"bytes={start}-{stop - 1}"
            found = self._client.get_object(Bucket=self._bucket, Key=key, Range=span)
            if len(found["Body"].read()) != stop - start:
                raise AssertionError("a short read")

        parts = [(key, *each) for key, ranges in self._ranges.items() for each in ranges]
        in_parallel(read, parts, threads=8)
