"""Classes of msgspec that any thread may decode."""

from __future__ import annotations

from typing import TypeVar

import msgspec

StructT = TypeVar("StructT", bound=type[msgspec.Struct])


def decodable(cls: StructT) -> StructT:
    """Have msgspec learn the fields of a class now, while its module is being imported.

    By itself it does so when the class is decoded first, and two threads that do this at once end
    the process: one of them takes what the other one, busy in Python code that resolves its
    annotations, has only half of (msgspec 0.22.0: SIGSEGV). An import is made by one thread.
    """
    msgspec.msgpack.Decoder(cls)
    return cls
