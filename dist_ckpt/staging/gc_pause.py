"""The collector of cyclic garbage, kept out of saves and loads."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def no_collection() -> Iterator[None]:
    """Put the collection of cyclic garbage off until the block ends, in the whole process.

    A first save or load makes thousands of small objects, and they set off the collection that all
    imports of a program are waiting for: 0.2 s, more than the copy of a gigabyte takes. Where two
    threads overlap here it may begin again too early, which costs time and nothing else.
    """
    if not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
