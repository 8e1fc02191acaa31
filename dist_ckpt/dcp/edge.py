"""Where torch.distributed.checkpoint ends and dist_ckpt begins: places, steps, names, errors."""

from __future__ import annotations

import builtins
import copy
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce
from typing import Any, TypeAlias

from torch import distributed as dist

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    StorageError,
    UsageError,
    describe,
    from_wire,
    to_wire,
    without_secrets,
)
from dist_ckpt.foreign.dcp_runs import REST
from dist_ckpt.foreign.dcp_tree import TREE
from dist_ckpt.format.names import check_step, is_part
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import Place, resolve

CheckpointId: TypeAlias = str | os.PathLike[str] | int
"""What callers of `dcp.save` and `dcp.load` give to say which checkpoint they mean."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)
# Bounds for what programs put together: causes may lead in a circle, arguments hold themselves.
_MOST_CAUSES = 8
_DEEPEST = 8


_STEP = re.compile(r"(?:(?:global[-_]?)?step[-_=]?)?0*([0-9]{1,20})", re.ASCII)


def open_store(place: Place) -> Store:
    """Return the store at `place`.

    Raises:
        UsageError: the place is malformed.
    """
    return place if isinstance(place, Store) else resolve(place)


def step_of(checkpoint_id: CheckpointId, run: Store | None = None) -> int | None:
    """Return the step that a `checkpoint_id` names, None where it names the run itself.

    A step is a number, that number as text, or "step" and a number: 9, "9", "step-9", "step_9",
    "global_step9", "step-0000000009". Below the run it may stand as the end of a path.

    Args:
        checkpoint_id: what `dcp.save` and `dcp.load` were given.
        run: of the Writer or the Reader; None to take any.

    Raises:
        UsageError: it is something else, or a path that leads out of the run.
    """
    text = os.fspath(checkpoint_id) if isinstance(checkpoint_id, os.PathLike) else checkpoint_id
    text = str(text).rstrip("/") or str(text)
    above, slash, name = text.rpartition("/")
    found = _STEP.fullmatch(name)
    # A step by itself is one, also where a folder of this name is the run.
    if run is not None and (slash or found is None) and _is_place(text, run):
        return None
    if found is None:
        raise UsageError(_no_step(text, name))
    if slash and run is not None and not _is_place(above or "/", run):
        raise UsageError(
            f"checkpoint_id {text!r} lies in {above or '/'!r}, and the Writer or Reader has the "
            f"run {without_secrets(run.url)!r}: give checkpoint_id={int(found[1])} for the step of "
            "that run, or make a Writer or Reader for the other one"
        )
    return check_step(int(found[1]))


def names_step(checkpoint_id: CheckpointId) -> bool:
    """Tell whether `step_of` finds a step in `checkpoint_id`, were it of the right run."""
    try:
        step_of(checkpoint_id)
    except UsageError:
        return False
    return True


def _is_place(text: str, run: Store) -> bool:
    """Tell whether `text` is where `run` is, however that is written."""
    if text.rstrip("/") == run.url.rstrip("/"):
        return True
    path = os.path.expanduser(text.removeprefix("file://"))
    # The same folder may be given relative to somewhere, or by a link.
    return run.url.startswith("/") and os.path.realpath(path) == os.path.realpath(run.url)


def _no_step(text: str, name: str) -> str:
    number = re.fullmatch(r"[A-Za-z].*?([0-9]{1,10})", name, re.ASCII)
    if number is not None:
        # An epoch and a step may have the same number: which of them counts is not guessed.
        way = f"where {int(number[1])} is what steps are counted by, give {int(number[1])}"
    else:
        way = 'give the run to the Writer or Reader, and checkpoint_id=1000, "1000" or "step-1000"'
    return f"checkpoint_id {text!r} is no step, and in a run it chooses the step: {way}"


def part_and_name(fqn: str, paths: Mapping[str, object]) -> tuple[str, str]:
    """Return the part and the name under which the entry `fqn` of a state dict is stored.

    An entry below a key that can be a part's name is of that part: "model.layer.weight", from
    `{"model": model.state_dict()}`, is "layer.weight" of part "model". Everything else keeps its
    name, in the part `REST`. Names that differ stay different, so this can be undone.

    Args:
        fqn: its flattened name, path components joined by dots.
        paths: the path of each flattened name; one that is not there was not flattened.
    """
    path = paths.get(fqn)
    # Planners of users keep there whatever they like: what does not lead to the name is no path.
    if not isinstance(path, tuple | list) or ".".join(map(str, path)) != fqn:
        path = (fqn,)
    first, rest = path[0], fqn[len(str(path[0])) + 1 :]
    # What lies below the key "state" keeps that in its name, or {"state": {"x": ...}} and
    # {"x": ...} would be one.
    if (
        len(path) > 1
        and rest
        and isinstance(first, str)
        and is_part(first)
        and first not in (REST, TREE)
    ):
        return first, rest
    return REST, fqn


class DiskError(StorageError, OSError):
    """What an operating system refused: a full disk, for example.

    Besides what a `StorageError` says it has the class and the `errno` that stock would raise.
    """

    def __init__(self, message: str, *, kind: ErrorKind, errno: int | None) -> None:
        super().__init__(message, kind=kind)
        self.errno = errno

    def __reduce__(self) -> tuple[Any, ...]:
        # By a function: pickle would call the class with its text alone, and it wants keywords.
        return _rebuilt, (type(self).__name__, self.message, str(self.kind), self.errno)


class DiskPermissionError(DiskError, PermissionError):
    """A `DiskError` of a missing right."""


def _rebuilt(name: str, message: str, kind: str, errno: int | None) -> DiskError:
    kinds = {each.__name__: each for each in (DiskError, DiskPermissionError)}
    return kinds[name](message, kind=ErrorKind(kind), errno=errno)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let only errors out that every rank can rebuild, of the class that handlers know.

    torch.distributed.checkpoint sends an exception to rank 0 as a pickle. Many of other programs
    can be pickled but not unpickled, and then the other ranks would wait for rank 0 for ever.

    Ours become the plain classes of `dist_ckpt.errors`. What the planner, a type or a state of the
    user raised stays what it is, as with stock storage; where that cannot be rebuilt elsewhere it
    becomes an error of the class of Python that it is one of.
    """
    try:
        yield
    except CheckpointError as error:
        raise _ours(error) from error
    except Exception as error:
        if not (dist.is_available() and dist.is_initialized()) or _can_be_rebuilt(error):
            raise
        raise _like(error) from error


def _ours(error: CheckpointError) -> CheckpointError:
    plain = from_wire(to_wire(error))
    refused = _refusal(error) if isinstance(error, StorageError) else None
    if refused is None:
        return plain
    kind = DiskPermissionError if isinstance(refused, PermissionError) else DiskError
    return kind(plain.message, kind=plain.kind, errno=refused.errno)


def _like(error: Exception) -> Exception:
    """Return an error that says what `error` does, of the nearest class that takes a text."""
    for kind in type(error).__mro__:
        if kind is Exception:
            break
        if getattr(builtins, kind.__name__, None) is kind:
            try:
                made: Exception = kind(describe(error))
            except TypeError:
                continue  # one that says where in a text it went wrong
            return made
    # Of no class that says whose fault it was: torch tells that, by rank.
    return CheckpointError(describe(error), kind=ErrorKind.PEER_FAILED)


def _refusal(error: BaseException) -> OSError | None:
    """Return the error of the operating system, with a number, that `error` comes from."""
    cause = error.__cause__
    for _ in range(_MOST_CAUSES):
        if cause is None:
            break
        if isinstance(cause, OSError) and cause.errno is not None:
            return cause
        cause = cause.__cause__
    return None


def _can_be_rebuilt(error: Exception) -> bool:
    """Whether a pickle of `error` can be made and read on any rank, where the same program runs."""
    try:
        maker, *rest = tuple(error.__reduce_ex__(4))
        # The error itself is what a rank learns: of a notebook's or a function's own class it could
        # not even find the name.
        if not (_is_found(type(error)) and _is_found(maker) and _is_plain(rest, depth=_DEEPEST)):
            return False
        again = copy.copy(error)
        return type(again) is type(error) and str(again) == str(error)
    except Exception:  # all of this runs code of the error's class
        return False


def _is_found(named: Any) -> bool:
    module = sys.modules.get(named.__module__)
    return reduce(getattr, named.__qualname__.split("."), module) is named


def _is_plain(value: object, *, depth: int) -> bool:
    if type(value) in _PLAIN:
        return True
    if depth == 0:
        return False
    if type(value) in (tuple, list):
        return all(_is_plain(each, depth=depth - 1) for each in value)  # type: ignore[attr-defined]
    if type(value) is dict:
        return all(_is_plain(list(pair), depth=depth - 1) for pair in value.items())
    return False
