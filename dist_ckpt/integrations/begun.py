"""A run that another program began, told by its parts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress

from dist_ckpt.errors import CheckpointError, IncompatibleError
from dist_ckpt.run import Run
from dist_ckpt.storage.resolve import Place


def begun_by_another(place: str, parts: list[str], *, own: str, trainer: str) -> str:
    """Return what is to be said of a checkpoint without the part `own`.

    Args:
        place: of the run.
        parts: that the checkpoint has.
        own: the part in which the trainer says where a training stands.
        trainer: what it is called.
    """
    return (
        f"{place} was begun by another program: its checkpoint has the parts {', '.join(parts)}, "
        f"and not {own!r}, in which a training by {trainer} says where it stands. "
        f"dist_ckpt.load_weights(model, {place!r}) takes the weights alone; a run of its own "
        "begins elsewhere"
    )


def refuse(said: str) -> None:
    """Raise what `begun_by_another` returned, on every rank that heard it; "" is nothing.

    Raises:
        IncompatibleError: it is something.
    """
    if said:
        raise IncompatibleError(said)


@contextmanager
def told_by_its_parts(
    place: Place, step: int | None = None, *, own: str, trainer: str
) -> Iterator[None]:
    """Have an error of what does not fit say so where the reason is that another program began.

    Args:
        place: of the run.
        step: that is restored; None for the newest one.
        own: see `begun_by_another`.
        trainer: see there.
    """
    try:
        yield
    except IncompatibleError as error:
        # Looked at only where the state did not fit: the usual way costs nothing.
        run = Run(place)
        with suppress(CheckpointError):  # what is told is the first error
            parts = list((run.newest() if step is None else run.manifest(step)).parts)
            if own not in parts:
                # A note, so that the class by which the error is handled stays.
                error.add_note(begun_by_another(run.url, parts, own=own, trainer=trainer))
        raise
