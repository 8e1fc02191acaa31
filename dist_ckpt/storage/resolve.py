"""From what a person writes to the store it means: the one place where stores are assembled."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from urllib.parse import unquote

from dist_ckpt.errors import UsageError
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.storage.memory import MemoryStore

_URL = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*)://(?P<rest>.*)", re.DOTALL)
_ONE_SLASH = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/(?!/)|:/")


def resolve(url: str | os.PathLike[str]) -> Store:
    """Return the store that `url` names. Nothing is created and nothing is contacted.

    Args:
        url: a path (relative to the working directory, `~` allowed), `file:///path`, or
            `memory://name`.

    Raises:
        UsageError: malformed, or of an unknown scheme.
    """
    text = os.fspath(url)
    if not text.strip():
        raise UsageError(f"bad url {text!r}: give a path or a url such as file:///data/run")
    if any(ord(char) < 32 or ord(char) == 127 for char in text):
        raise UsageError(f"bad url {text!r}: it holds a control character")
    match = _URL.fullmatch(text)
    if match is None:
        if _ONE_SLASH.match(text):
            # Taken for a path, a mistyped s3:/bucket would fill the local disk unnoticed.
            raise UsageError(f"bad url {text!r}: write scheme://..., or ./{text} for a path")
        return LocalStore(os.path.expanduser(text))
    scheme = match["scheme"].lower()
    opener = _OPENERS.get(scheme)
    if opener is None:
        known = ", ".join(sorted(f"{name}://" for name in _OPENERS))
        raise UsageError(f"bad url {text!r}: unknown scheme {scheme!r}; known are paths, {known}")
    return opener(text, match["rest"])


def _open_file(url: str, rest: str) -> Store:
    host, slash, path = rest.partition("/")
    if host not in ("", "localhost") or not slash:
        raise UsageError(f"bad url {url!r}: a file url has three slashes, file:///data/run")
    if "?" in path or "#" in path:
        raise UsageError(f"bad url {url!r}: write '?' as %3F and '#' as %23, or give a plain path")
    return LocalStore("/" + unquote(path))


def _open_memory(url: str, rest: str) -> Store:
    name = rest.rstrip("/")
    if not name:
        raise UsageError(f"bad url {url!r}: a memory url names its space, memory://my-run")
    return MemoryStore(name)


_OPENERS: Mapping[str, Callable[[str, str], Store]] = {
    "file": _open_file,
    "memory": _open_memory,
}
