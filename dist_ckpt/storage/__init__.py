"""Where bytes go: stores that know keys and bytes, and nothing of checkpoints."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    ExactDeleter,
    PutMode,
    Store,
    Sweeper,
    Watch,
    check_key,
    check_prefix,
    read_all,
)
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.storage.readonly import ReadOnlyStore, SingleWriterStore
from dist_ckpt.storage.resolve import resolve
from dist_ckpt.storage.retry import Backoff, RetryStore
from dist_ckpt.storage.wrapper import StoreWrapper

if TYPE_CHECKING:
    from dist_ckpt.storage.fsspec import FsspecStore
    from dist_ckpt.storage.s3 import S3Store

__all__ = [
    "Backoff",
    "Buffer",
    "Capabilities",
    "Entry",
    "ExactDeleter",
    "FsspecStore",
    "LimitStore",
    "LocalStore",
    "MemoryStore",
    "MeterStore",
    "PutMode",
    "ReadOnlyStore",
    "RetryStore",
    "S3Store",
    "SingleWriterStore",
    "Store",
    "StoreWrapper",
    "Sweeper",
    "Watch",
    "check_key",
    "check_prefix",
    "read_all",
    "resolve",
]


# Only for who goes there: the client library for S3 is most of what there is to import, and fsspec
# half of what a command waits for.
_LATE = {"FsspecStore": "fsspec", "S3Store": "s3"}


def __getattr__(name: str) -> object:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_LATE[name]}"), name)
    globals()[name] = value  # the next use does not come here
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
