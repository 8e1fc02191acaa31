"""What stands for the names and instances of a pickle: values of ours, which do nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Constructor:
    """Stands for a callable, and says what is called in its place.

    Attributes:
        call: a pure function of plain values, which raises what it likes for other ones.
        hashes: whether it hashes the items of its argument.
    """

    call: Callable[..., Any]
    hashes: bool = False


@dataclass(frozen=True, slots=True)
class Kind:
    """Stands for a class whose instances are kept as what would have made them."""

    name: str


@dataclass(slots=True, eq=False)
class Made:
    """Stands for an instance of a class.

    Attributes:
        kind: the class.
        arguments: what it was made with.
        state: what was to be put into it; None for nothing.
    """

    kind: Kind
    arguments: tuple[Any, ...]
    state: Any = None

    def fields(self) -> dict[str, Any]:
        """Return its attributes.

        Raises:
            ValueError: its state is no mapping of names.
        """
        if self.state is None:
            return {}
        # By exact type: the state is whatever the stream has put there.
        if type(self.state) is not dict or not all(type(key) is str for key in self.state):
            raise ValueError(f"the state of a {self.kind.name} is no mapping of names")
        return self.state


@dataclass(frozen=True, slots=True, eq=False)
class Unknown:
    """Stands for a name that nobody knows here, and for all that it would have made.

    What it is called with, or what is put into it, is dropped unseen: it may be in itself, and
    nothing can be said of it but the name.

    Attributes:
        name: as the stream has it.
    """

    name: str


Names = Callable[[str, str], object]
"""From module and name to what stands for it: a `Constructor`, a `Kind`, an `Unknown`, or a
plain value.

It raises ValueError for a name that has no business there.
"""
