"""Where bytes go: stores that know keys and bytes, and nothing of checkpoints."""

from __future__ import annotations

from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    PutMode,
    Store,
    Sweeper,
    check_key,
    check_prefix,
    read_all,
)
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.ranges import Piece, Segment, coalesce
from dist_ckpt.storage.resolve import resolve

__all__ = [
    "Buffer",
    "Capabilities",
    "Entry",
    "LocalStore",
    "MemoryStore",
    "Piece",
    "PutMode",
    "Segment",
    "Store",
    "Sweeper",
    "check_key",
    "check_prefix",
    "coalesce",
    "read_all",
    "resolve",
]
