"""Where torch.distributed.checkpoint ends and dist_ckpt begins: places, steps, names, errors."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeAlias

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    UsageError,
    describe,
    from_wire,
    to_wire,
    without_secrets,
)
from dist_ckpt.format.names import check_step, is_part
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import resolve

Place = str | Path | Store
"""Where a run is: a path, a URL, or a store."""

CheckpointId: TypeAlias = str | os.PathLike[str] | int
"""What callers of `dcp.save` and `dcp.load` give to say which checkpoint they mean."""

REST = "state"
"""The part of all that lies in no part of its own."""

TREE = "planner_data"
"""What no part is called either: the file that keeps the tree is. See `dist_ckpt.dcp.tree`."""

NAMING = "dcp_names"
"""The entry of a manifest's versions that says by which release of these rules names were made."""

NAMING_VERSION = "1"


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


def path_of(part: str, name: str) -> tuple[str, ...]:
    """Return the path in a state dict of what `part_and_name` stored so; joined it is its name."""
    return (name,) if part == REST else (part, name)


@contextmanager
def plain_errors() -> Iterator[None]:
    """Let only errors of this package out, as the plain classes that every rank can rebuild.

    torch.distributed.checkpoint sends an exception to rank 0 as a pickle. Many foreign ones can
    be pickled but not unpickled, and then the other ranks would wait for rank 0 for ever.
    """
    try:
        yield
    except MemoryError:
        raise  # every rank can rebuild that one, and would handle it
    except CheckpointError as error:
        raise from_wire(to_wire(error)) from error
    except Exception as error:
        # Of no class that says whose fault it was: torch tells that, by rank.
        raise CheckpointError(describe(error), kind=ErrorKind.PEER_FAILED) from error
