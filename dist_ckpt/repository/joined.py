"""What joins policies, of what to keep and of when to save: `|`, and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from dist_ckpt.errors import UsageError


def _refusing(operator: str) -> Callable[[Any, object], NoReturn]:
    def refuse(self: Any, other: object) -> NoReturn:
        raise UsageError(
            f"{operator} joins no policies, here {self} and {other}: they add up by |, and what "
            "any of them wants is done"
        )

    return refuse


class JoinedByOr:
    """Base of policies: each other operator with which two could be joined says what to write."""

    __slots__ = ()

    __and__ = __rand__ = _refusing("&")
    __add__ = __radd__ = _refusing("+")
    __xor__ = __rxor__ = _refusing("^")
    __sub__ = __rsub__ = _refusing("-")
    __mul__ = __rmul__ = _refusing("*")

    def __invert__(self) -> NoReturn:
        raise UsageError(f"there is no opposite of {self}: policies say what is wanted, and add up")
