"""Which checkpoint to load: rank 0 decides, and sends what it read to the others."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound
from dist_ckpt.format.index import Index
from dist_ckpt.repository import Checkpoint, Repository
from dist_ckpt.repository.checkpoint import read_manifest, reread, unless_deleted
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.parallel import in_parallel

_THREADS = 16


@dataclass(frozen=True)
class Choice:
    """A checkpoint, as rank 0 opened it.

    Attributes:
        checkpoint: opened, None when the run has none.
        refused: newer checkpoints that were passed over, each with the reason.
        manifests: of those that were found damaged here, as they were read.
    """

    checkpoint: Checkpoint | None
    refused: dict[int, str] = field(default_factory=dict)
    manifests: dict[int, bytes] = field(default_factory=dict)

    @property
    def step(self) -> int | None:
        """Its step, None when the run has none."""
        return None if self.checkpoint is None else self.checkpoint.step


def _every(_: str) -> bool:
    return True


def choose(
    repository: Repository,
    step: int | None,
    refused: Mapping[int, str],
    *,
    fall_back: bool,
    selects_part: Callable[[str], bool] = _every,
) -> Choice:
    """Open `step`, or the newest checkpoint that is not in `refused`.

    Args:
        repository: the run.
        step: which one, None for the newest.
        refused: steps already found to be damaged, with the reasons.
        fall_back: whether a damaged one is passed over for the next older one.
        selects_part: tells of a stored part whether anything of it is to be loaded; a lost file of
            the others is no reason to refuse.

    Raises:
        NotFound: no such step.
        IntegrityError: the checkpoint is damaged and may not be passed over, or all are damaged.
        IncompatibleError: it was written by a newer format; that is no damage to pass over.
    """
    if step is not None:
        return Choice(reread(lambda: _checked(repository.open(step), selects_part)))
    reasons = dict(refused)
    manifests: dict[int, bytes] = {}
    # One by one: a run on an object store would be asked about each of its steps otherwise.
    for candidate in repository.newest_now():
        if candidate in reasons:
            continue
        look = partial(_look, repository.store, candidate, selects_part, manifests)
        try:
            checkpoint = reread(look)
        except IntegrityError as error:
            if not fall_back:
                raise
            reasons[candidate] = error.message
        except NotFound:
            # Never committed, or deleted since the listing, by retention or by hand. That is no
            # damage: what came meanwhile is looked for before anything older is taken.
            manifests.pop(candidate, None)
        else:
            del manifests[candidate]
            return Choice(checkpoint, reasons, manifests)
    if reasons:
        listed = "; ".join(f"step {old}: {why}" for old, why in sorted(reasons.items()))
        raise IntegrityError(
            f"no checkpoint in {repository.store.url} can be restored, and a training that began "
            f"anew there would in time take their place ({listed}). Nothing was changed: bring "
            "back a copy of what is damaged, or begin a run elsewhere",
            kind=ErrorKind.MALFORMED,
        )
    return Choice(None)


def _look(
    store: Store, step: int, selects_part: Callable[[str], bool], manifests: dict[int, bytes]
) -> Checkpoint:
    """Open `step`, and keep its manifest as it was read, whatever comes of it."""
    manifests[step] = read_manifest(store, step)
    return _checked(Checkpoint.open(store, manifests[step], step=step), selects_part)


def _checked(checkpoint: Checkpoint, selects_part: Callable[[str], bool]) -> Checkpoint:
    # Sizes are cheap to ask for: a truncated file is found before any tensor is touched.
    files = _files_of(checkpoint.index, selects_part)
    with unless_deleted(checkpoint):
        in_parallel(checkpoint.check_size, files, threads=min(_THREADS, len(files)))
    return checkpoint


def _files_of(index: Index, selects_part: Callable[[str], bool]) -> list[int]:
    """Return the numbers of the files in which the selected parts lie, ascending."""
    chosen = {part: selects_part(part) for part in {tensor.part for tensor in index.tensors}}
    selected = np.array([chosen[tensor.part] for tensor in index.tensors], bool)
    files = set(np.unique(index.chunks.file[selected[index.chunks.tensor]]).tolist())
    files |= {entry.file for entry in index.objects if selects_part(entry.part)}
    return sorted(files)
