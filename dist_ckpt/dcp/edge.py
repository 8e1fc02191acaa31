"""Where torch.distributed.checkpoint ends and dist_ckpt begins: places, steps, names, errors."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    UsageError,
    describe,
    from_wire,
    to_wire,
)
from dist_ckpt.foreign.dcp_runs import REST
from dist_ckpt.format.names import check_step, is_part, parse_step_dir
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.resolve import resolve

Place = str | Path | Store
"""Where a run is: a path, a URL, or a store."""


def open_store(place: Place) -> Store:
    """Return the store at `place`.

    Raises:
        UsageError: the place is malformed.
    """
    return place if isinstance(place, Store) else resolve(place)


def step_of(checkpoint_id: str | os.PathLike[str] | int) -> int:
    """Return the step that a `checkpoint_id` names: a number, or the directory of a step.

    Raises:
        UsageError: it is something else, a path for example.
    """
    text = str(checkpoint_id)
    found = parse_step_dir(text)
    if found is None and text.isascii() and text.isdecimal():
        found = int(text)
    if found is None:
        raise UsageError(
            f"checkpoint_id {text!r} is no step: the run is given to the Writer or Reader, and "
            'checkpoint_id chooses the step in it, as "1000" or "step-0000001000"'
        )
    return check_step(found)


def names_step(checkpoint_id: str | os.PathLike[str]) -> bool:
    """Tell whether `step_of` finds a step in `checkpoint_id`."""
    try:
        step_of(checkpoint_id)
    except UsageError:
        return False
    return True


def part_and_name(fqn: str, paths: Mapping[str, Sequence[object]]) -> tuple[str, str]:
    """Return the part and the name under which the entry `fqn` of a state dict is stored.

    An entry below a key that can be a part's name is of that part: "model.layer.weight", from
    `{"model": model.state_dict()}`, is "layer.weight" of part "model". Everything else keeps its
    name, in the part `REST`. Names that differ stay different, so this can be undone.

    Args:
        fqn: its flattened name, path components joined by dots.
        paths: the path of each flattened name; one that is not there was not flattened.
    """
    path = paths.get(fqn, (fqn,))
    first, rest = path[0], fqn[len(str(path[0])) + 1 :]
    # What lies below the key "state" keeps that in its name, or {"state": {"x": ...}} and
    # {"x": ...} would be one.
    if len(path) > 1 and rest and isinstance(first, str) and is_part(first) and first != REST:
        return first, rest
    return REST, fqn


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
