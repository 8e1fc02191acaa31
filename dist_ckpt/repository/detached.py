"""One step directory away from its run: copied, renamed, or reached by a link."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, NotFound
from dist_ckpt.format.names import MANIFEST, step_dir
from dist_ckpt.storage.base import Entry, Store, read_all
from dist_ckpt.storage.readonly import ReadOnlyStore

# As large as a manifest may be.
_LIMIT_BYTES = 256 << 20


@decodable
class _Named(msgspec.Struct, frozen=True):
    """What a manifest says it is of, and what tells it from another program's."""

    step: int
    save_id: str


def named_step(store: Store, key: str = MANIFEST) -> int | None:
    """Return the step that the manifest under `key` says it is of; None where none of ours is."""
    try:
        data = read_all(store, key, limit_bytes=_LIMIT_BYTES)
        return msgspec.json.decode(data, type=_Named).step
    # RecursionError: how deep the JSON goes is chosen by whoever wrote the bytes.
    except (NotFound, msgspec.MsgspecError, RecursionError):
        return None


class DetachedStep(ReadOnlyStore):
    """A step directory seen as the run that it was of, of which nothing else is there.

    It belongs to no run, so nothing in it is ever changed.
    """

    def __init__(self, inner: Store, step: int) -> None:
        """Take the directory, and the step that its manifest says it is of."""
        super().__init__(inner)
        self.step = step
        self._prefix = f"{step_dir(step)}/"

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        """See `Store.read_into`."""
        return super().read_into(self._inside(key), offset, *buffers)

    def size(self, key: str) -> int:
        """See `Store.size`."""
        return super().size(self._inside(key))

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """See `Store.list_entries`."""
        for entry in super().list_entries(prefix.removeprefix(self._prefix)):
            yield replace(entry, key=self._prefix + entry.key)

    def list_children(self, prefix: str = "") -> list[str]:
        """See `Store.list_children`."""
        if not prefix:
            return [self._prefix]
        return super().list_children(prefix.removeprefix(self._prefix))

    def _inside(self, key: str) -> str:
        if not key.startswith(self._prefix):
            raise NotFound(f"no {key} in {self.url}, which is one step", kind=ErrorKind.NO_KEY)
        return key.removeprefix(self._prefix)
