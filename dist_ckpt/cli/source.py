"""What a copy reads from, known apart from what it writes to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from dist_ckpt.errors import StorageError
from dist_ckpt.storage import Store, StoreWrapper
from dist_ckpt.storage.wrapper import Operation

_T = TypeVar("_T")


class SourceFailed(StorageError):
    """What is copied could not be read, which says nothing of the others, or of the other place."""


class SourceStore(StoreWrapper):
    """A store that knows whether an operation of its own failed."""

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self._failed = False

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        try:
            return run()
        except StorageError:
            self._failed = True
            raise

    @contextmanager
    def telling(self) -> Iterator[None]:
        """Tell the errors of this store from those of others.

        Raises:
            SourceFailed: the body failed, and this store did.
        """
        self._failed = False
        try:
            yield
        # A save of parts says it in words of its own.
        except StorageError as error:
            if self._failed:
                raise SourceFailed(error.message, kind=error.kind) from error
            raise
