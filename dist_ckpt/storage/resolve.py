"""From what a person writes to the store it means: the one place where stores are assembled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Any, TypeAlias
from urllib.parse import unquote

from dist_ckpt.errors import UsageError
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.limit import LimitStore
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.meter import MeterStore
from dist_ckpt.storage.readonly import ReadOnlyStore, SingleWriterStore

Place: TypeAlias = str | os.PathLike[str] | Store
"""Where a run is: a path, a URL, or a store."""

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
# A chain of fsspec, `simplecache::s3://bucket`, is no single place.
_NESTED = re.compile(r"[A-Za-z][A-Za-z0-9+.:-]*://")
# What a shell puts something else in the place of, before a program sees it.
_VARIABLE = re.compile(r"\$(\w+|\{\w+\})")
# From two letters on: a folder may well be called `c:`.
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)|:/")


def resolve(
    url: str | os.PathLike[str],
    *,
    storage_options: Mapping[str, Any] | None = None,
    single_writer: bool = False,
    read_only: bool = False,
    max_concurrent: int | None = None,
    max_bytes_per_second: float | None = None,
) -> Store:
    """Return the store that `url` names. Nothing is created and nothing is contacted.

    Args:
        url: a path (relative to the working directory; `~` is replaced, `$HOME` refused),
            `file:///path`, `memory://name`, `s3://bucket/run`, or any url of fsspec such as
            `gs://bucket/run`.
        storage_options: for the backend: see `S3Store` and the file systems of fsspec. Paths and
            memory take none.
        single_writer: the caller promises that one job at a time creates objects there, which
            lets a backend without atomic create commit: a mount without hard links too.
        read_only: refuse every change.
        max_concurrent: how many operations run at once; None: any number.
        max_bytes_per_second: of what is put and read together; None: no limit.

    Raises:
        UsageError: malformed, of an unknown scheme, or an option that does not go with it.
    """
    text = _checked(as_text(url))
    scheme, rest = _split(text)
    _check_mapping(storage_options)
    for name, switch in (("single_writer", single_writer), ("read_only", read_only)):
        if not isinstance(switch, bool):
            raise UsageError(f"{name} is True or False, not {switch!r}")
    store = _open(text, scheme, rest, options=storage_options, single_writer=single_writer)
    # From the inside to the outside.
    if single_writer and not store.capabilities.atomic_create:
        store = SingleWriterStore(store)
    if max_concurrent is not None or max_bytes_per_second is not None:
        store = LimitStore(
            store, max_concurrent=max_concurrent, max_bytes_per_second=max_bytes_per_second
        )
    if scheme not in ("", "file", "memory"):
        store = MeterStore(store)
    # Outermost, so that what is refused is neither paced nor counted.
    if read_only:
        store = ReadOnlyStore(store)
    return store


@contextmanager
def resolved(place: Place, *, storage_options: Mapping[str, Any] | None = None) -> Iterator[Store]:
    """Give the body the store that `place` means; see `resolve`.

    What is opened here is closed here. A store that was given belongs to the caller, and has
    options of its own.
    """
    if isinstance(place, Store):
        yield place
        return
    store = resolve(place, storage_options=storage_options)
    try:
        yield store
    finally:
        store.close()


def as_text(place: object) -> str:
    """Return what the path or the URL `place` is as text.

    Raises:
        UsageError: it is neither.
    """
    text = os.fspath(place) if isinstance(place, str | os.PathLike) else None
    if not isinstance(text, str):  # a path of bytes is none either
        raise UsageError(f"a place is a path, a URL or a Store, not {place!r}")
    return text


def options_for(
    place: object, storage_options: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """Return what of the options of a call with several places goes to `place`: all, or None.

    A path and memory take none, and a `Store` has its own: so what a bucket needs can be said of a
    call that copies between it and a disk.

    Raises:
        UsageError: the place is malformed.
    """
    if not isinstance(place, str | os.PathLike) or not isinstance(text := os.fspath(place), str):
        return None
    return None if _split(_checked(text))[0] in _PLAIN else storage_options


def check_options_taken(storage_options: Mapping[str, Any] | None, *places: object) -> None:
    """Check that the options of a call go to one of its places at least; see `options_for`.

    Raises:
        UsageError: they go to none, or are no mapping.
    """
    _check_mapping(storage_options)
    if storage_options and all(options_for(place, storage_options) is None for place in places):
        raise UsageError(
            f"no place of this call takes storage_options, but it has {sorted(storage_options)}: "
            "leave them out; paths and memory take none, and a Store has its own"
        )


def _check_mapping(storage_options: object) -> None:
    if storage_options is not None and not isinstance(storage_options, Mapping):
        raise UsageError(
            "storage_options are a mapping from names to values, "
            f"not {type(storage_options).__qualname__}"
        )


def _checked(text: str) -> str:
    if not text.strip():
        raise UsageError(f"bad url {text!r}: give a path or a url such as file:///data/run")
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise UsageError(f"bad url {text!r}: it holds a control character")
    return text


def _split(text: str) -> tuple[str, str]:
    """Return the scheme, "" for a path, and what follows it."""
    match = _URL.fullmatch(text)
    if match is not None:
        return match["scheme"].lower(), match["rest"]
    if _ONE_SLASH.match(text) or _NESTED.match(text):
        # Taken for a path, a mistyped s3:/bucket would fill the local disk unnoticed.
        raise UsageError(f"bad url {text!r}: write scheme://..., or ./{text} for a path")
    if variable := _VARIABLE.match(text):
        raise UsageError(
            f"bad url {text!r}: {variable[0]} is for a shell to replace, and none did: write what "
            f"it stands for, or ./{text} for a path"
        )
    return "", text


def _open(
    url: str, scheme: str, rest: str, *, options: Mapping[str, Any] | None, single_writer: bool
) -> Store:
    opened: Store
    if scheme in ("s3", "s3a"):
        # Imported where they are needed: a program that saves to a disk waits for neither.
        s3 = import_module("dist_ckpt.storage.s3")
        opened = s3.open_s3(url, rest, storage_options=options, conditional=not single_writer)
        return opened
    if scheme in _PLAIN:
        if options:
            raise UsageError(f"{url!r} takes no storage_options, but has {sorted(options)}")
        return _PLAIN[scheme](url, rest, single_writer)
    others = import_module("dist_ckpt.storage.fsspec")
    opened = others.open_fsspec(url, scheme, rest, storage_options=options)
    return opened


def _open_path(_: str, rest: str, single_writer: bool) -> Store:  # noqa: FBT001
    path = os.path.expanduser(rest)
    if path.startswith("~"):
        raise UsageError(
            f"bad url {rest!r}: no home folder of {rest.partition('/')[0]} is known here: write "
            f"its path, or ./{rest} for a path"
        )
    return LocalStore(path, single_writer=single_writer)


def _open_file(url: str, rest: str, single_writer: bool) -> Store:  # noqa: FBT001
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"bad url {url!r}: a file url has three slashes, file:///data/run")
    if "?" in path or "#" in path:
        raise UsageError(f"bad url {url!r}: write '?' as %3F and '#' as %23, or give a plain path")
    return LocalStore("/" + unquote(path), single_writer=single_writer)


def _open_memory(url: str, rest: str, _: bool) -> Store:  # noqa: FBT001
    name = rest.rstrip("/")
    if not name:
        raise UsageError(f"bad url {url!r}: a memory url names its space, memory://my-run")
    return MemoryStore(name)


_PLAIN: Mapping[str, Callable[[str, str, bool], Store]] = {
    "": _open_path,
    "file": _open_file,
    "memory": _open_memory,
}
