"""One checkpoint against another place: copied there, or compared with what is there."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Literal, TypeAlias

import numpy as np

from dist_ckpt.errors import AlreadyExists, ErrorKind, IntegrityError, NotFound, StorageError
from dist_ckpt.format.files import DIGEST_BYTES, DTYPES
from dist_ckpt.format.index import Index, TensorEntry
from dist_ckpt.format.names import INDEX, attempt_dir, file_key, manifest_key
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.repository.history import delete_attempt, put_epoch_note, read_epoch_note
from dist_ckpt.repository.tally import Tally
from dist_ckpt.storage.base import Store, Stream, Sweeper, has, holds, put_stream
from dist_ckpt.threads import in_parallel

_AT_ONCE = 4

Kind: TypeAlias = Literal["only here", "only there", "shape", "dtype", "values"]
"""How two checkpoints differ in a tensor; `values`: in some byte, or in how they are cut."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What a copy did.

    Attributes:
        step: of the checkpoint.
        files: how many files were copied.
        kept: how many were there from a copy that was cut off.
        nbytes: of the files that were copied.
    """

    step: int
    files: int
    kept: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Difference:
    """One tensor in which two checkpoints differ.

    Attributes:
        part: which part it is of.
        name: what it is called there.
        kind: how they differ.
        here: dtype and shape in the first one, "" where it is not.
        there: the same of the second one.
    """

    part: str
    name: str
    kind: Kind
    here: str
    there: str


@dataclass(frozen=True, slots=True)
class ValuesDiffer:
    """The Python values of one part, in which two checkpoints differ by their digests.

    Attributes:
        part: which part.
        rank: whose values they are; None for those that all ranks share.
    """

    part: str
    rank: int | None


def copy(source: Checkpoint, target: Store) -> Copied:
    """Copy `source` to the run at `target`; its manifest goes last.

    Every block is compared with its digest on its way. A file that is there already is compared,
    and only replaced when it is another one.

    Raises:
        AlreadyExists: another checkpoint of this step is committed there.
        IntegrityError: the source is damaged, or the copy was deleted while it was made; nothing
            is committed.
    """
    step, save_id = source.step, source.manifest.save_id
    committed = manifest_key(step)
    # Committed by a copy before this one, which may have been cut off before its end.
    if holds(target, committed, source.manifest_bytes):
        _end(source, target)
        return Copied(step, 0, len(source.files), 0)
    try:
        target.size(committed)
    except NotFound:
        pass
    else:
        raise AlreadyExists(
            f"step {step} is already committed in {target.url}, and is another checkpoint",
            kind=ErrorKind.STEP_EXISTS,
        )
    # The same checkpoint, read from its new place.
    there = source.at(target)
    copied: list[int] = []
    tally = Tally(target.url, f"copying step {step}", source.nbytes)

    def one(number: int) -> None:
        name, nbytes = source.files[number]
        # Compared by its digests, as an equal size is no proof that it is this file.
        if _is_there(there, number):
            tally.note(number, nbytes)
        else:
            # In the place of what a copy that was cut off may have left there.
            stream = Stream(nbytes, partial(source.read_pieces, number))
            key = file_key(step, save_id, name)
            put_stream(target, key, tally.counted(number, stream), mode="replace")
            copied.append(nbytes)

    in_parallel(one, range(len(source.files)), threads=_AT_ONCE)
    # The order of a commit: all that a manifest names is there before it.
    for name in source.beside:
        target.put(file_key(step, save_id, name), [source.read_beside(name)], mode="replace")
    target.put(file_key(step, save_id, INDEX), [source.index_bytes], mode="replace")
    _check_there(source, target)
    # Created and never replaced: of two copies, or a job that saves this step, one wins.
    target.put(committed, [source.manifest_bytes])
    try:
        # A job that owns the run there may have taken the copy for what a dead one left.
        _check_there(source, target)
    except IntegrityError:
        target.delete([committed])
        raise
    _end(source, target)
    return Copied(step, len(copied), len(source.files) - len(copied), sum(copied))


def give_up(source: Checkpoint, target: Store) -> None:
    """Remove what a copy of `source` that failed has left at `target`, as far as that is allowed.

    What is committed there by now, by another copy, stays.
    """
    with suppress(StorageError):
        if has(target, manifest_key(source.step)):
            return
        if isinstance(target, Sweeper):
            target.sweep(attempt_dir(source.step, source.save_id))
        delete_attempt(target, source.step, source.save_id)


def diff(here: Checkpoint, there: Checkpoint) -> list[Difference]:
    """Return the tensors in which two checkpoints differ, by the digests of the blocks they are in.

    A tensor without a difference is equal; one of `values` may yet be, where it shares a block with
    another one, or was cut into other boxes, or where one of the two is of format 1.
    """
    ours, theirs = _tensors(here.index), _tensors(there.index)
    found = []
    for part, name in sorted(ours.keys() | theirs.keys()):
        one, other = ours.get((part, name)), theirs.get((part, name))
        if one is None or other is None:
            kind: Kind = "only there" if one is None else "only here"
        elif one[0].dtype != other[0].dtype:
            kind = "dtype"
        elif one[0].shape != other[0].shape:
            kind = "shape"
        elif _digests(here.index, one[1]) != _digests(there.index, other[1]):
            kind = "values"
        else:
            continue
        found.append(Difference(part, name, kind, _shown(one), _shown(other)))
    return found


def diff_values(here: Checkpoint, there: Checkpoint) -> list[ValuesDiffer]:
    """Return whose Python values differ in two checkpoints, by their digests.

    They may be equal after all, where dicts were filled in another order.
    """
    ours, theirs = _values(here.index), _values(there.index)
    differing = (
        which for which in ours.keys() | theirs.keys() if ours.get(which) != theirs.get(which)
    )
    # What all ranks share before what they have of their own.
    return sorted(
        differing, key=lambda which: (which.part, -1 if which.rank is None else which.rank)
    )


def _values(index: Index) -> dict[ValuesDiffer, list[str]]:
    """Return the digests of the values of each part, and of each rank."""
    found: dict[ValuesDiffer, list[str]] = {}
    for entry in index.objects:
        found.setdefault(ValuesDiffer(entry.part, entry.rank), []).append(entry.digest)
    # Several ranks may have values of one part, and in the index they have no order.
    return {which: sorted(digests) for which, digests in found.items()}


_Numbered: TypeAlias = tuple[TensorEntry, int]


def _tensors(index: Index) -> dict[tuple[str, str], _Numbered]:
    return {(each.part, each.name): (each, number) for number, each in enumerate(index.tensors)}


def _shown(tensor: _Numbered | None) -> str:
    return "" if tensor is None else f"{tensor[0].dtype}{list(tensor[0].shape)}"


def _digests(index: Index, tensor: int) -> list[tuple[object, ...]]:
    """Return for each chunk of a tensor its box, and the digests of the blocks that it is in."""
    rows = index.chunks_of(tensor)
    itemsize = DTYPES[index.tensors[tensor].dtype][1]
    found: list[tuple[object, ...]] = []
    for row in range(len(rows.file)):
        offset = int(rows.offset[row])
        sizes = rows.sizes[row]
        stop = offset + int(sizes.prod()) * itemsize
        file = index.files[int(rows.file[row])]
        start, end = file.around(offset, stop)
        first, last = file.blocks_in(start, end)
        found.append(
            (
                tuple(rows.starts[row].tolist()),
                tuple(sizes.tolist()),
                # Elsewhere in blocks, or in blocks cut otherwise, equal bytes have other digests.
                offset - start,
                np.diff(file.edges[first : last + 1]).tobytes(),
                file.blocks[DIGEST_BYTES * first : DIGEST_BYTES * last],
            )
        )
    return sorted(found)


def _end(source: Checkpoint, target: Store) -> None:
    """Do what there is to do when the copy is committed: nobody needs a half of it any more."""
    _copy_note(source, target)
    if isinstance(target, Sweeper):
        # What a copy that was killed left half put, which is of no job that would collect it.
        target.sweep(attempt_dir(source.step, source.save_id))


def _copy_note(source: Checkpoint, target: Store) -> None:
    """Say of the copy, too, what became known after the save: policies decide by it."""
    note = read_epoch_note(source.store, source.step, source.save_id)
    if note is not None:
        # A copy before this one may have put it.
        with suppress(AlreadyExists):
            put_epoch_note(target, source.step, source.save_id, note)


def _is_there(there: Checkpoint, number: int) -> bool:
    """Whether the file of that number is at its new place already, whole."""
    try:
        there.check_size(number)
        for _ in there.read_pieces(number):
            pass
    except IntegrityError:
        return False
    return True


def _check_there(source: Checkpoint, target: Store) -> None:
    step, save_id = source.step, source.manifest.save_id
    names = {**dict(source.files), **{name: note.nbytes for name, note in source.beside.items()}}
    sizes = {file_key(step, save_id, name): nbytes for name, nbytes in names.items()}
    sizes[file_key(step, save_id, INDEX)] = len(source.index_bytes)
    folder = attempt_dir(step, save_id)
    there = {entry.key: entry.nbytes for entry in target.list_entries(folder)}
    for key, nbytes in sizes.items():
        if there.get(key) != nbytes:
            raise IntegrityError(
                f"{key} was not copied to {target.url}, or was deleted there meanwhile by the job "
                "that owns that run: copy again, to a run in which nobody trains",
                kind=ErrorKind.MISSING_FILE,
            )
