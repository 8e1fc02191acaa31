"""Finding runs below a place."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dist_ckpt.errors import CheckpointError, near
from dist_ckpt.format.names import parse_step_dir
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import resolve

_DEEP = 3


def runs_below(
    url: str | Store, *, storage_options: Mapping[str, Any] | None = None
) -> Iterator[str]:
    """Yield the urls of the runs at or below a place, up to three folders below it.

    Raises:
        StorageError: a listing failed.
    """
    store = url if isinstance(url, Store) else resolve(url, storage_options=storage_options)
    folders = [""]
    for depth in range(_DEEP + 1):
        below: list[str] = []
        for folder in folders:
            names = [name[:-1] for name in store.list_children(folder) if name.endswith("/")]
            if any(parse_step_dir(name) is not None for name in names):
                yield f"{store.url}/{folder}".rstrip("/")
            elif depth < _DEEP:
                below += [f"{folder}{name}/" for name in names]
        folders = below


def similar_beside(url: str, storage_options: Mapping[str, Any] | None) -> str:
    """Return the names beside `url` that are like its own, as the end of a message; "" for none.

    Where nobody may look there is nothing to say.
    """
    parent, _, name = url.rstrip("/").rpartition("/")
    try:
        store = resolve(parent, storage_options=storage_options)
        try:
            children = store.list_children()
        finally:
            store.close()
    except CheckpointError:
        return ""
    return near(name, [child[:-1] for child in children if child.endswith("/")])
