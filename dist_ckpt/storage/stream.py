"""Objects that are made while they are stored, so that memory never holds all of one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from dist_ckpt.storage.base import PutMode, Store


@dataclass(frozen=True, slots=True)
class Stream:
    """The bytes of one object, made piece by piece.

    Iterating begins anew each time, since a put may have to. It yields flat views of bytes, of
    which there are `nbytes` in all; none is empty, and none changes afterwards.

    Attributes:
        nbytes: of the whole.
        pieces: begins to make them, from the first one on.
    """

    nbytes: int
    pieces: Callable[[], Iterator[memoryview]]

    @classmethod
    def of(cls, views: Sequence[memoryview]) -> Stream:
        """Return the stream of what is there already."""
        return cls(sum(view.nbytes for view in views), lambda: iter(views))

    def __iter__(self) -> Iterator[memoryview]:
        return self.pieces()


@runtime_checkable
class Streamer(Protocol):
    """What a store also offers that can begin to store an object before all of it is there."""

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """Store what `stream` makes under `key`, whole or not at all, as `Store.put` does."""
        ...


def put_stream(store: Store, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
    """Store what `stream` makes under `key`, whole or not at all.

    A store that is no `Streamer` gets all of it at once, and so memory has to hold it.

    Raises:
        CheckpointError: those of `Store.put`, and whatever the stream raises; nothing is stored.
    """
    if isinstance(store, Streamer):
        store.put_stream(key, stream, mode=mode)
    else:
        store.put(key, list(stream), mode=mode)
