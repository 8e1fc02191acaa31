"""Stores that are promised more, or allowed less, than the one inside."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import NoReturn, TypeVar

from dist_ckpt.errors import ErrorKind, StorageError
from dist_ckpt.storage.base import Buffer, Capabilities, MayGo, PutMode, Stream, Watch, everything
from dist_ckpt.storage.wrapper import Operation, StoreWrapper

_T = TypeVar("_T")


class _PassThrough(StoreWrapper):
    """Adds nothing around an operation."""

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        return run()


class ReadOnlyStore(_PassThrough):
    """A store that changes nothing: every put, delete and sweep is refused."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> NoReturn:
        """Refuse.

        Raises:
            StorageError: always.
        """
        self._refuse(f"put {key}")

    def put_stream(self, key: str, stream: Stream, *, mode: PutMode = "create") -> NoReturn:
        """Refuse.

        Raises:
            StorageError: always.
        """
        self._refuse(f"put {key}")

    def delete(self, keys: Iterable[str]) -> NoReturn:
        """Refuse.

        Raises:
            StorageError: always.
        """
        self._refuse("delete anything")

    def delete_exactly(self, key: str, data: bytes) -> NoReturn:
        """Refuse.

        Raises:
            StorageError: always.
        """
        self._refuse(f"delete {key}")

    def sweep(self, prefix: str = "", *, may_go: MayGo = everything) -> NoReturn:
        """Refuse.

        Raises:
            StorageError: always.
        """
        self._refuse("sweep")

    def _refuse(self, doing: str) -> NoReturn:
        raise StorageError(
            f"cannot {doing} in {self.url}: it was opened read-only; open it without read_only",
            kind=ErrorKind.PERMISSION,
        )


class SingleWriterStore(_PassThrough):
    """A store of which the caller promises that only one process at a time creates objects in it.

    Under that promise, looking first and writing then is as good as an atomic create.
    """

    @property
    def capabilities(self) -> Capabilities:
        """Those of the inner store, with `atomic_create`: it is the caller who guarantees it."""
        return replace(self.inner.capabilities, atomic_create=True)
