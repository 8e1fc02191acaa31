"""A store that does what another does, with something around each operation."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import ClassVar, Literal, Protocol, TypeVar, get_args, runtime_checkable

from dist_ckpt.storage.base import (
    Buffer,
    Capabilities,
    Entry,
    MayGo,
    PutMode,
    Store,
    Stream,
    Sweeper,
    Watch,
    check_keys,
    delete_exactly,
    everything,
    put_stream,
)

_T = TypeVar("_T")

Operation = Literal["put", "read_into", "size", "list_entries", "list_children", "delete"]
"""The kinds of storage operation."""

OPERATIONS: frozenset[Operation] = frozenset(get_args(Operation))
CHANGES: frozenset[Operation] = frozenset({"put", "delete"})
"""The operations after which something else is stored than before."""


@runtime_checkable
class Retrying(Protocol):
    """What a store also offers that repeats requests which failed."""

    @property
    def retries(self) -> int:
        """How many requests were repetitions, since the store was made."""
        ...


class StoreWrapper(ABC):
    """A store that does what `inner` does, each operation through `around`.

    Attributes:
        delete_batch: how many keys one `delete` operation takes at most.
    """

    # As many as one request of S3 takes (DeleteObjects), so that a batch is one request there.
    delete_batch: ClassVar[int] = 1000

    def __init__(self, inner: Store) -> None:
        self.inner = inner

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.inner!r})"

    @property
    def url(self) -> str:
        """That of the inner store."""
        return self.inner.url

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner store."""
        return self.inner.capabilities

    @property
    def retries(self) -> int:
        """How often the inner store repeated a request; 0 where it does not count."""
        return self.inner.retries if isinstance(self.inner, Retrying) else 0

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        """See `Store.put`."""
        self.around("put", key, lambda: self.inner.put(key, buffers, mode=mode, watch=watch))

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> None:
        """See `Streamer.put_stream`; an operation like any other put."""
        self.around("put", key, lambda: put_stream(self.inner, key, stream, mode=mode))

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """See `Store.read_into`."""
        return self.around("read_into", key, lambda: self.inner.read_into(key, offset, *buffers))

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return self.around("size", key, lambda: self.inner.size(key))

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list_entries`; the operation is the call, not the iteration."""
        return self.around("list_entries", prefix, lambda: self.inner.list_entries(prefix))

    def list_children(self, prefix: str = "") -> list[str]:
        """See `Store.list_children`."""
        return self.around("list_children", prefix, lambda: self.inner.list_children(prefix))

    def delete(self, keys: Iterable[str]) -> None:
        """See `Store.delete`; one operation for each `delete_batch` keys, named by the first."""
        pending = check_keys(keys)
        # Cut into lists: an operation may be run again, an iterator only once.
        while batch := list(islice(pending, self.delete_batch)):
            self.around("delete", batch[0], partial(self.inner.delete, batch))

    def delete_exactly(self, key: str, data: bytes) -> bool:
        """See `ExactDeleter.delete_exactly`; an operation like any other deletion."""
        return self.around("delete", key, lambda: delete_exactly(self.inner, key, data))

    def sweep(self, prefix: str = "", *, may_go: MayGo = everything) -> int:
        """See `Sweeper.sweep`; 0 where the inner store is none. Not counted as an operation."""
        inner = self.inner
        return inner.sweep(prefix, may_go=may_go) if isinstance(inner, Sweeper) else 0

    def close(self) -> None:
        """Close the inner store."""
        self.inner.close()

    @abstractmethod
    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """Run the operation, and whatever this store is for."""
