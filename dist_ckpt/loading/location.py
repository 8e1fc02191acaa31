"""From what a person points at to the run, or the checkpoint, that it is."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import partial
from os import PathLike
from typing import Any

from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound, UsageError, without_secrets
from dist_ckpt.foreign.detect import FILE_SUFFIXES, looked_for, open_foreign
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import manifest_key, parse_step_dir
from dist_ckpt.ranks.job import Place
from dist_ckpt.repository import Repository
from dist_ckpt.repository.checkpoint import Checkpoint, read_manifest
from dist_ckpt.repository.detached import DetachedStep, named_step
from dist_ckpt.repository.listed import similar_beside
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.repository.source import Source
from dist_ckpt.storage.base import Store, has
from dist_ckpt.storage.resolve import resolve


@dataclass(frozen=True, slots=True)
class Location:
    """Where to look for checkpoints.

    Attributes:
        store: the run, or the directory of a foreign checkpoint.
        step: the only checkpoint of the run that is meant; None for any.
        text: from what `store` was resolved, None for a store that was given.
        file: the file in `store` that was pointed at, for a checkpoint that is one file.
        detached: whether `store` is one step directory, seen as a run; see `DetachedStep`.
        options: of the storage, with which `store` was resolved.
    """

    store: Store
    step: int | None
    text: str | None = None
    file: str | None = None
    detached: bool = False
    options: Mapping[str, Any] | None = None


def place_name(place: Place, storage_options: Mapping[str, Any] | None = None) -> str:
    """Return what messages call `place`, the same on ranks that mean the same; asks nobody.

    Raises:
        UsageError: the place is malformed.
    """
    if isinstance(place, Store):
        return without_secrets(place.url)
    return without_secrets(resolve(place, storage_options=storage_options).url)


def locate(
    place: Place, step: int | None, storage_options: Mapping[str, Any] | None = None
) -> Location:
    """Find what `place` is: a run, a step directory inside one, or a file of another program.

    Args:
        place: a path, a URL, or a store.
        step: which checkpoint the caller asks for besides, None for none in particular.
        storage_options: for the backend; a store has its own.

    Raises:
        UsageError: the place is malformed, or is the directory of another step than `step`.
        StorageError: it could not be looked at.
    """
    if isinstance(place, Store):
        return Location(place, step)
    # Checked before it becomes text: that of None would be a folder.
    if not isinstance(place, str | PathLike):
        raise UsageError(f"a place is a path, a URL or a Store, not {place!r}")
    text = str(place).rstrip("/") or str(place)
    head, _, name = text.rpartition("/")
    above = head or ("/" if text.startswith("/") else ".")
    own = parse_step_dir(name)
    opened = partial(resolve, storage_options=storage_options)
    located = partial(Location, options=storage_options)
    # Only if it was committed there: a run may have been given the name of a step directory.
    if own is not None and has(opened(above), manifest_key(own)):
        if named_step(opened(above), manifest_key(own)) in (None, own):
            _check_step(text, own, step)
            return located(opened(above), own, above)
        # Renamed: what the manifest says counts.
        return find_detached(located(opened(place), step, str(place))) or located(
            opened(above), own, above
        )
    if name.endswith(FILE_SUFFIXES) and has(opened(above), name):
        return located(opened(above), step, above, name)
    store = opened(place)
    if os.path.isfile(store.url):  # of a disk that is the path
        raise UsageError(
            f"{text} is a file and no folder, and no checkpoint that is one file: the names of "
            f"those end in {', '.join(FILE_SUFFIXES)}"
        )
    return located(store, step, str(place))


def find_detached(location: Location) -> Location | None:
    """Return where the step directory is that `location` points at, were it copied or linked.

    Asked only where no checkpoint of a run was found.

    Raises:
        UsageError: it is another step than the one asked for.
    """
    step = None if location.file is not None else named_step(location.store)
    if step is None:
        return None
    _check_step(location.store.url, step, location.step)
    return Location(DetachedStep(location.store, step), step, location.text, detached=True)


def _check_step(text: str, own: int, asked: int | None) -> None:
    if asked not in (None, own):
        raise UsageError(f"{text} is the checkpoint of step {own}, not of step {asked}")


def check_is_run(location: Location) -> None:
    """Check that `location` may be a run, of which one checkpoint can be the best.

    Raises:
        UsageError: it is one checkpoint.
    """
    if location.step is not None or location.file is not None:
        raise UsageError(
            f"step='best' chooses among the checkpoints of a run, and {location.text} is one "
            "checkpoint: give the run"
        )


def open_source(location: Location, best: Criterion | None = None) -> Source:
    """Open the checkpoint at `location`, whoever wrote it; of a run the newest, unless told.

    Args:
        location: where.
        best: by what to choose among those of a run.

    Raises:
        NotFound: there is none.
        IntegrityError: its description is damaged.
        IncompatibleError: it was written by a newer format.
    """
    run = _run_of(location)
    if best is not None:
        check_is_run(location)
        return run.open(run.best(best))
    if location.file is not None:
        return find_foreign(location)
    if location.step is not None and find_detached(location) is None:
        return run.open(location.step)
    try:
        # Whatever else lies in a run, its checkpoints come first.
        return run.open_latest()
    except NotFound:
        detached = find_detached(location)
    return find_foreign(location) if detached is None else Repository(detached.store).open_latest()


def find_foreign(location: Location, *, whole: Collection[str] = ()) -> ForeignSource:
    """Open what another program wrote at `location`, where no checkpoint of ours is.

    Args:
        location: where.
        whole: see `dist_ckpt.foreign.names.sort_into_parts`.

    Raises:
        NotFound: there is none either.
        IntegrityError: it is malformed or incomplete.
        IncompatibleError: it holds something that cannot be read.
    """
    found = open_foreign(location.store, location.file, whole=whole)
    if found is None:
        raise _run_of(location).no_checkpoint(looked_for())
    return found


def _run_of(location: Location) -> Repository:
    # Nearly always a place without a run is a mistyped one.
    similar = partial(similar_beside, location.store.url, location.options)
    return Repository(location.store, similar=similar)


def open_told(store: Store, step: int, digest: str) -> Checkpoint:
    """Open the checkpoint that rank 0 named, by its own look at it.

    Raises:
        IntegrityError: it is damaged, or not found here, or not the one that rank 0 opened.
    """
    where = f"step {step} in {store.url}"
    try:
        manifest_bytes = read_manifest(store, step)
        if bytes_digest(manifest_bytes) != digest:
            raise IntegrityError(
                f"{where}: its manifest is not the one that rank 0 read: was it saved anew "
                "meanwhile, or is another host's folder there?",
                kind=ErrorKind.MISSING_FILE,
            )
        return Checkpoint.open(store, manifest_bytes, step=step)
    except NotFound as error:
        # As damage: so all ranks look again together, and take what there is by then.
        raise IntegrityError(
            f"{where}: rank 0 opened it, and it is not found here: was it deleted meanwhile, or do "
            "the hosts not share the place?",
            kind=ErrorKind.MISSING_FILE,
        ) from error
