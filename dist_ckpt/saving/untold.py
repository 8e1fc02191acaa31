"""Failures of saves that nobody was told of yet: the end of the process tells them."""

from __future__ import annotations

import itertools
import os

_numbers = itertools.count()
# Single operations on a dict, which threads cannot see half done: no lock that a fork could leave
# locked for ever. Texts and no errors: an error keeps the frames alive that it passed.
_texts: dict[int, str] = {}

# What became of its parent's saves is nothing that a child has to tell.
os.register_at_fork(after_in_child=_texts.clear)


def number() -> int:
    """Return a number for a save, to be known by here."""
    return next(_numbers)


def keep(save: int, text: str) -> None:
    """Remember that a save failed, as `text` says, until somebody is told."""
    _texts[save] = text


def drop(save: int) -> None:
    """Forget the failure: somebody was told."""
    _texts.pop(save, None)


def take() -> list[str]:
    """Return what nobody was told, the oldest first, and forget it."""
    found = sorted(_texts.items())
    for save, _ in found:
        drop(save)
    return [text for _, text in found]
