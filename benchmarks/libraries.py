"""Which of the libraries to compare with can be measured here; `make bench-...` installs them."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module

_LIBRARIES = ("torchsnapshot", "torch_checkpointing")


def available(names: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return those of `names` that can be imported, and for the others why not."""
    absent: dict[str, str] = {}
    for name in names:
        if name in _LIBRARIES:
            try:
                import_module(name)
            except Exception as error:  # a library of another time may fail in any way
                absent[name] = f"{type(error).__name__}: {error}"
    return [name for name in names if name not in absent], absent
