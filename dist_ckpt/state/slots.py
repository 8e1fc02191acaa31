"""Where the plain value of a part lies: in the part itself, or in a dict of the caller's."""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from dist_ckpt.errors import UsageError

Reshard = Callable[[Sequence[Any], int, int], Any]
"""Called with the saved values by rank, this rank, and the world size; returns this rank's."""


@dataclass(frozen=True)
class PerRank:
    """Marks a value as each rank's own: kept apart by rank, never taken for replicas.

    `value` is anything with a state dict, or a plain value. Tensors in it are stored with the
    value, so it should be small. At the world size that saved it each rank gets its own back. At
    another one `reshard` is asked, or the method `reshard` of `value` if it has one; without
    either the load fails and names the part.

    Attributes:
        value: what to keep.
        reshard: called as `reshard(saved, rank, world_size)` with what each rank saved, in the
            order of ranks; returns what this rank, now one of `world_size`, goes on with.
    """

    value: object
    reshard: Reshard | None = None

    def __post_init__(self) -> None:
        # Told here: it is asked at another world size alone, after a restart.
        if self.reshard is not None and not callable(self.reshard):
            raise UsageError(
                "reshard= takes a function of (saved, rank, world_size) or None, "
                f"not {self.reshard!r}"
            )


class Slot(Protocol):
    """A place for one value."""

    @property
    def fixed(self) -> bool:
        """Whether no other value can be put there."""
        ...

    def get(self) -> Any:
        """Return the value that is there now."""
        ...

    def put(self, value: object) -> None:
        """Put another one there."""
        ...


class OwnSlot:
    """The value is the part's own."""

    fixed = False

    def __init__(self, value: object) -> None:
        self._value = value

    def get(self) -> Any:
        """Return the value."""
        return self._value

    def put(self, value: object) -> None:
        """Keep another one."""
        self._value = value


class CallersSlot:
    """The value is what the caller's dict has under a key, now and at every save.

    Whoever writes `state["epoch"] += 1` means the next checkpoint, and whoever reads
    `state["epoch"]` after a load wants the loaded one.
    """

    def __init__(self, home: Mapping[str, Any], key: str) -> None:
        self._home = home
        self._key = key
        self.fixed = not isinstance(home, MutableMapping)

    def get(self) -> Any:
        """Return the value.

        Raises:
            UsageError: the dict has no such key any more.
        """
        if self._key not in self._home:
            raise UsageError(
                f"part {self._key!r} is gone from the dict that is the state: build a new state"
            )
        value = self._home[self._key]
        return value.value if isinstance(value, PerRank) else value

    def put(self, value: object) -> None:
        """Put another one into the dict.

        Raises:
            UsageError: it is a mapping that cannot change.
        """
        # Changed in place: a mapping that takes nothing has nothing to take either.
        if value is self.get():
            return
        if not isinstance(self._home, MutableMapping):
            raise UsageError(
                f"part {self._key!r} is a plain value in a {type(self._home).__qualname__}, which "
                "cannot take another one: give a dict or a TrainState"
            )
        marked = self._home[self._key]
        # As it was marked: the next save keeps it per rank, too.
        again = replace(marked, value=value) if isinstance(marked, PerRank) else value
        self._home[self._key] = again
