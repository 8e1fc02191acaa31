"""What a Writer takes along to another process: `AsyncCheckpointerType.PROCESS` saves in one.

That process imports what the state is made of, and does not run the program: what the program has
registered, and which claim it saves under, it has to be told.
"""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.reduction import ForkingPickler
from typing import Any
from weakref import WeakValueDictionary

from dist_ckpt.errors import ErrorKind, UsageError
from dist_ckpt.state.registry import REGISTRY, register

_Functions = tuple[Callable[[Any], object] | None, Callable[[Any], Any] | None]


@dataclass(frozen=True, slots=True)
class RegisteredTypes:
    """The types of `register_type`, as another process can be given them.

    Attributes:
        entries: class, stored name and the functions that were given.
        left: the names of those that cannot be sent.
    """

    entries: list[tuple[type, str, _Functions]]
    left: list[str]

    @classmethod
    def here(cls) -> RegisteredTypes:
        """Return those of this process."""
        found = cls([], [])
        for each in REGISTRY.entries():
            entry = (each.type, each.name, each.given)
            try:
                # What the pipe to the other process will do: a lambda, say, has no name there.
                ForkingPickler.dumps(entry)
            except Exception:  # whatever the functions are made of: they matter only where used
                found.left.append(each.name)
            else:
                found.entries.append(entry)
        return found

    def register(self) -> None:
        """Register what this process does not know yet."""
        for kind, name, (encode, decode) in self.entries:
            if REGISTRY.by_type(kind) is None and REGISTRY.by_name(name) is None:
                register(kind, name=name, encode=encode, decode=decode)

    def explain(self, error: UsageError) -> UsageError:
        """Return `error` of a value that has no encoding, with what may be the reason here."""
        left = [name for name in self.left if REGISTRY.by_name(name) is None]
        if error.kind is not ErrorKind.UNENCODABLE or not left:
            return error
        return UsageError(
            f"{error.message}; this is the process of AsyncCheckpointerType.PROCESS, which could "
            f"not be given what is registered as {', '.join(map(repr, left))}: make encode= and "
            "decode= functions of a module, or save in a thread",
            kind=error.kind,
        )


@dataclass(slots=True, weakref_slot=True, eq=False)
class Ownership:
    """Under which claim the saves of one Writer commit; its copies in a process share it.

    Attributes:
        writer: which Writer it is of.
        claim: None before its first save.
        tidied: whether what dead attempts of earlier claims left was removed.
    """

    writer: str = field(default_factory=lambda: secrets.token_hex(8))
    claim: int | None = None
    tidied: bool = False

    def __post_init__(self) -> None:
        _known[self.writer] = self

    def shared(self) -> Ownership:
        """Return the one that the Writer and its copies in this process have in common.

        Each save in another process is of a new copy: were each to claim the run anew, they would
        take it from one another.
        """
        with lock:
            one = _known.get(self.writer)
            if one is None:
                one = _known[self.writer] = self
                _of_copies.append(one)
            # The program may have saved itself meanwhile: the highest claim owns the run.
            one.claim = max((each for each in (one.claim, self.claim) if each), default=None)
            one.tidied |= self.tidied
            return one


lock = threading.Lock()
"""Held while a claim is made, so that of several saves at once one makes it."""

_known: WeakValueDictionary[str, Ownership] = WeakValueDictionary()
# Of Writers that came from elsewhere: between two saves there is no copy that would keep them.
_of_copies: list[Ownership] = []
