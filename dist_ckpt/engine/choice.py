"""Which checkpoint to load: rank 0 decides, and sends what it read to the others."""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound
from dist_ckpt.repository import Repository


class Choice(msgspec.Struct, frozen=True):
    """A checkpoint, as rank 0 read it.

    Attributes:
        step: the checkpoint, None when the run has none.
        manifest: its manifest, encoded.
        index: its index, encoded.
        refused: newer checkpoints that were passed over, each with the reason.
    """

    step: int | None
    manifest: bytes = b""
    index: bytes = b""
    refused: dict[int, str] = {}


def choose(
    repository: Repository,
    step: int | None,
    refused: Mapping[int, str],
    *,
    fall_back: bool,
    empty_is_new: bool,
) -> Choice:
    """Open `step`, or the newest checkpoint that is not in `refused`.

    Args:
        repository: the run.
        step: which one, None for the newest.
        refused: steps already found to be damaged, with the reasons.
        fall_back: whether a damaged one is passed over for the next older one.
        empty_is_new: whether a run without checkpoints is a choice (of none) and no error.

    Raises:
        NotFound: no such step, or nothing to load.
        IntegrityError: the checkpoint is damaged and may not be passed over, or all are damaged.
        IncompatibleError: it was written by a newer format; that is no damage to pass over.
    """
    if step is not None:
        return _open(repository, step, {})
    reasons = dict(refused)
    steps = repository.steps()
    for candidate in reversed(steps):
        if candidate in reasons:
            continue
        try:
            return _open(repository, candidate, reasons)
        except IntegrityError as error:
            if not fall_back:
                raise
            reasons[candidate] = error.message
        except NotFound as error:
            # Deleted between the listing and now, by retention or by hand.
            reasons[candidate] = error.message
    if reasons:
        listed = "; ".join(f"step {old}: {why}" for old, why in sorted(reasons.items()))
        raise IntegrityError(
            f"no checkpoint in {repository.store.url} can be restored, and starting anew would "
            f"lose them ({listed}). Repair or remove them, or begin a run elsewhere",
            kind=ErrorKind.MALFORMED,
        )
    if empty_is_new:
        return Choice(None)
    repository.open_latest()  # there is none: raises the error that says what is there instead
    raise NotFound(f"no checkpoint in {repository.store.url}", kind=ErrorKind.NO_CHECKPOINT)


def _open(repository: Repository, step: int, refused: dict[int, str]) -> Choice:
    checkpoint = repository.open(step)
    # Sizes are cheap to ask for: a truncated file is found before any tensor is touched.
    checkpoint.check_sizes()
    return Choice(step, checkpoint.manifest_bytes, checkpoint.index_bytes, refused)
