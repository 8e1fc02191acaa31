"""Opening a checkpoint: from what a person points at to names, slices and values; without a model.

Everything here is one process alone, and reads no more than what is asked for.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import EllipsisType, TracebackType
from typing import Any, Literal, Never, Self, SupportsIndex, TypeAlias

import torch

from dist_ckpt.errors import NotFound, UsageError, near, without_secrets
from dist_ckpt.foreign.dcp_runs import NAMING, in_parts
from dist_ckpt.foreign.detect import FILE_SUFFIXES, looked_for, open_foreign
from dist_ckpt.foreign.source import ForeignSource
from dist_ckpt.format.index import Held, TensorEntry
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.format.names import as_integer, check_step, manifest_key, parse_step_dir, plain_step
from dist_ckpt.loading.fetching import ReadOptions, read_alone
from dist_ckpt.loading.filling import Wanted
from dist_ckpt.options import check_known
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.repository import Repository
from dist_ckpt.repository.checkpoint import unless_deleted
from dist_ckpt.repository.detached import DetachedStep, named_step
from dist_ckpt.repository.listed import similar_beside
from dist_ckpt.repository.ranking import Criterion, Mode
from dist_ckpt.repository.source import Source
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.layout import dtype_of
from dist_ckpt.storage.base import Store, has
from dist_ckpt.storage.resolve import Place, as_text, check_options_taken, resolve


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

    @property
    def own(self) -> Store | None:
        """The store, where it was opened by the look; None for one that belongs to the caller."""
        return None if self.text is None else self.store

    def close(self) -> None:
        """Close what the look opened."""
        if self.own is not None:
            self.own.close()


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
    place = as_text(place)
    # Of the root of a disk the slash is all there is.
    text = place.rstrip("/") or place
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
        return find_detached(located(opened(place), step, place)) or located(
            opened(above), own, above
        )
    # Folders may be called so, too: only what is an object there is a file.
    if name.endswith(FILE_SUFFIXES) and has(opened(above), name):
        return located(opened(above), step, above, name)
    store = opened(place)
    if os.path.isfile(store.url):  # of a disk that is the path
        raise UsageError(
            f"{text} is a file and no folder, and no checkpoint that is one file: the names of "
            f"those end in {', '.join(FILE_SUFFIXES)}"
        )
    return located(store, step, place)


def find_detached(location: Location) -> Location | None:
    """Return where the step directory is that `location` points at, were it copied or linked.

    Asked only where no checkpoint of a run was found.

    Raises:
        UsageError: it is another step than the one asked for.
    """
    # Copied, renamed or linked it is a checkpoint by itself, of the step that its manifest says
    # (commit-v1, section 5).
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


def which_of(
    step: SupportsIndex | Literal["best"] | None,
    metric: str | None,
    mode: Mode,
    criteria: Sequence[Criterion] = (),
) -> int | Criterion | None:
    """Return which checkpoint is meant by the arguments of a call that only reads.

    Args:
        step: its number, "best", or None for the newest.
        metric: by what it is the best.
        mode: whether small or large values of that are good.
        criteria: what else says what the best is, where `metric` does not.

    Raises:
        UsageError: nobody says what the best is, or what is said is of no use.
    """
    if isinstance(step, str) and step != "best":
        raise UsageError(f"bad step {step!r}: a step is a number or 'best'")
    if step != "best":
        # Not ignored: who gives these wants the best, and would be given the newest.
        if metric is not None or mode != "min":
            raise UsageError("metric= and mode= say what the best is: give step='best' with them")
        return None if step is None else plain_step(step)
    if metric is not None:
        return Criterion(metric, mode)
    if not criteria:
        raise UsageError("by which metric is it the best? Give metric='val/loss', say")
    return criteria[0]


# A checkpoint as a mapping.


Subscript: TypeAlias = int | slice | EllipsisType | tuple[int | slice | EllipsisType, ...]
"""What selects a box of a tensor: integers, slices with positive steps, an ellipsis."""


BoxTarget: TypeAlias = tuple[str, tuple[int, ...], torch.Tensor]
"""The name of a tensor, where in it a box starts, and the memory that the box is to fill."""


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """What is known of a stored tensor before a byte of it is read.

    Attributes:
        part: which part it is of.
        name: what it is called there.
        dtype: its dtype.
        shape: its global shape, in elements.
    """

    part: str
    name: str
    dtype: torch.dtype
    shape: torch.Size

    @property
    def nbytes(self) -> int:
        """How many bytes its elements take."""
        return self.shape.numel() * self.dtype.itemsize


class StoredTensor:
    """One tensor of an opened checkpoint. Subscripts read that box of it, and nothing else.

    Attributes:
        number: its place among the tensors of the checkpoint.
        info: what is known of it.
    """

    def __init__(self, source: Source, number: int, options: ReadOptions) -> None:
        self._source = source
        self.number = number
        self._options = options
        self.info = _info(source.tensors[number])

    @property
    def shape(self) -> torch.Size:
        """The global shape."""
        return self.info.shape

    @property
    def dtype(self) -> torch.dtype:
        """The stored dtype."""
        return self.info.dtype

    def read(self) -> torch.Tensor:
        """Return the whole tensor, on the CPU, verified.

        Raises:
            IntegrityError: its bytes are damaged or missing.
        """
        return self[...]

    def __getitem__(self, subscript: Subscript) -> torch.Tensor:
        """Return the selected elements, as `read()[subscript]` would; only their ranges are read.

        Raises:
            IntegrityError: their bytes are damaged or missing.
            NotFound: the checkpoint was deleted since it was opened.
            UsageError: the subscript is none of integers, slices and an ellipsis.
            IndexError: it lies outside.
        """
        selected = _select(subscript, self.shape)
        offsets = tuple(each.start for each in selected)
        sizes = tuple(each.stop - each.start for each in selected)
        memory = torch.empty(sizes, dtype=self.dtype)
        _read_boxes(self._source, [(self.number, offsets, memory)], self._options)
        # Every integer and step is applied to the box that holds what they select.
        return memory[tuple(each.within for each in selected)]

    def __repr__(self) -> str:
        info = self.info
        return f"<stored {info.part}/{info.name}: {info.dtype}{list(info.shape)}>"


class _NoTensor(NotFound, KeyError):
    """No such name: as a `KeyError` it lets `get` and the rest of a mapping work."""


class OpenedCheckpoint(Mapping[str, StoredTensor]):
    """A checkpoint as a mapping from `part/name` to its tensors, none of which is read yet.

    ```python
    import dist_ckpt
    import torch

    dist_ckpt.save({"model": torch.nn.Linear(4, 8)}, "runs/17")
    with dist_ckpt.open_checkpoint("runs/17") as ckpt:
        for name, info in ckpt.info.items():
            print(name, info.dtype, list(info.shape))
        rows = ckpt["model/weight"][2:4, :]
    ```

    Attributes:
        step: the training step; 0 where the checkpoint has none.
        manifest: what was committed; None where another program wrote the checkpoint.
        parts: the parts there are, also those without a tensor.
        info: by name, what is known of each tensor.
        verified: whether what is read is compared with digests.
        files: the names of the files that another program wrote it in; none of ours.
    """

    def __init__(self, source: Source, *, store: Store | None, verify: bool = True) -> None:
        """Take an opened source.

        Args:
            source: what to look into.
            store: closed by `close`; None where it belongs to the caller.
            verify: whether what is read is compared with its digests, where there are any.
        """
        self._source = source
        self._store = store
        self._options = ReadOptions(verify=verify)
        self._numbers = {f"{t.part}/{t.name}": i for i, t in enumerate(source.tensors)}
        self.step: int = source.step
        self.manifest: Manifest | None = source.manifest
        self.parts: tuple[str, ...] = tuple(source.parts)
        self.verified: bool = verify and source.verified
        self.files: tuple[str, ...] = source.keys if isinstance(source, ForeignSource) else ()
        self.info: Mapping[str, TensorInfo] = {
            name: _info(source.tensors[number]) for name, number in self._numbers.items()
        }

    @property
    def where(self) -> str:
        """How messages name it."""
        return self._source.where

    @property
    def names(self) -> tuple[str, ...]:
        """The names of all tensors, `part/name`."""
        return tuple(self._numbers)

    def read_boxes(self, boxes: Iterable[BoxTarget]) -> None:
        """Fill memory with boxes of tensors, all of them in one reading.

        Args:
            boxes: for each the name of the tensor, where in it the box starts, and memory of the
                stored dtype and of the shape of the box.

        Raises:
            IntegrityError: bytes are damaged or missing; the memory may be half filled.
            NotFound: there is no such tensor, or the checkpoint was deleted since it was opened.
            UsageError: a box lies outside of its tensor, or its memory is of another dtype.
        """
        numbered = []
        for name, offsets, memory in boxes:
            stored = self[name]
            _check_box(stored.info, offsets, memory)
            numbered.append((stored.number, offsets, memory))
        _read_boxes(self._source, numbered, self._options)

    def ties(self, part: str) -> list[tuple[str, ...]]:
        """Return the names in `part` that are stored once for several, each group in order.

        Raises:
            NotFound: there is no such part.
        """
        self._check_part(part)
        index = self._source.index
        places: dict[tuple[object, ...], list[str]] = {}
        for number, entry in enumerate(index.tensors):
            # Two of no elements may lie at one offset, and have nothing in common.
            if entry.part == part and 0 not in entry.shape:
                rows = index.chunks_of(number)
                columns = (rows.file, rows.offset, rows.starts, rows.sizes)
                # So tied tensors are stored: the same boxes at the same bytes (format-v1, 5).
                place = (entry.dtype, entry.shape, *(column.tobytes() for column in columns))
                places.setdefault(place, []).append(entry.name)
        return [tuple(names) for names in places.values() if len(names) > 1]

    def differs_by_rank(self, part: str) -> bool:
        """Whether each rank has Python values of its own in a part.

        Raises:
            NotFound: there is no such part.
        """
        self._check_part(part)
        found = (entry.rank for entry in self._source.index.objects if entry.part == part)
        return any(rank is not None for rank in found)

    def read_encoded(self, part: str) -> dict[str, bytes]:
        """Return the Python values of a part that all ranks share, encoded, by name.

        Raises:
            NotFound: there is no such part.
        """
        self._check_part(part)
        with unless_deleted(self._source):
            return self._source.read_objects(part, rank=0)

    def read_values(self, part: str, *, rank: SupportsIndex = 0) -> dict[str, Any]:
        """Return the Python values of a part by name, with the tensors inside them.

        Args:
            part: which part.
            rank: whose values, where each rank has its own.

        Raises:
            NotFound: there is no such part, or the checkpoint was deleted since it was opened.
            UsageError: there was no such rank.
            IntegrityError: they are damaged.
            IncompatibleError: a type in them is not registered in this program.
        """
        self._check_part(part)
        number = self._rank_of(rank)
        with unless_deleted(self._source):
            found = self._source.read_objects(part, rank=number)
        # Only what the values refer to: the other tensors of the part may be of any size.
        inside = {name for data in found.values() for name in references(data, path=part)}
        stored = {name: self[f"{part}/{name}"].read() for name in sorted(inside)}
        return {
            name: decode(data, tensors=stored, path=f"{part}.{name}")
            for name, data in found.items()
        }

    def _check_part(self, part: str) -> None:
        if part not in self.parts:
            hint = near(part, self.parts)
            raise NotFound(f"{self._source.where} has no part {part!r}{hint}")

    def _rank_of(self, rank: object) -> int:
        number = as_integer(rank)
        # Where another program wrote it, all ranks share what there is.
        count = self.manifest.world_size if self.manifest is not None else None
        if number is None or number < 0 or (count is not None and number >= count):
            saved = "" if count is None else f": {self.where} was saved by {count}"
            raise UsageError(f"rank= is one of the ranks that saved, not {rank!r}{saved}")
        return number

    def __getitem__(self, name: str) -> StoredTensor:
        """Return the tensor called `name`, `part/name`; nothing is read.

        Raises:
            NotFound: there is none, a `KeyError` too; offers names like it.
        """
        number = self._numbers.get(name) if isinstance(name, str) else None
        if number is None:
            hint = near(name, self._numbers)
            raise _NoTensor(f"{self._source.where} has no tensor {name!r}{hint}")
        return StoredTensor(self._source, number, self._options)

    def __contains__(self, name: object) -> bool:
        # That of `Mapping` would look for names like it, and make an error of them, each time.
        return isinstance(name, str) and name in self._numbers

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Release the store; nothing more is to be read. A second call does nothing."""
        if self._store is not None:
            store, self._store = self._store, None
            store.close()

    def __repr__(self) -> str:
        where = without_secrets(self._source.where)
        return f"<checkpoint {where}: {len(self)} tensors of {', '.join(self.parts)}>"


def open_checkpoint(
    url: Place,
    *,
    step: SupportsIndex | Literal["best"] | None = None,
    metric: str | None = None,
    mode: Mode = "min",
    verify: bool = True,
    storage_options: Mapping[str, Any] | None = None,
    **unknown: Never,
) -> OpenedCheckpoint:
    """Look into a checkpoint: only its description is read here. One process, no other rank.

    Nothing is written: a training that uses the run goes on undisturbed. What is still being saved,
    by this very process too, is no checkpoint yet: wait for it first.

    Args:
        url: a run, of which the newest checkpoint is opened; one of its step directories; or what
            `torch.distributed.checkpoint`, safetensors or `torch.save` wrote, a directory or a
            file. A path, a URL, or a `Store`.
        step: which checkpoint of the run: its number, "best", or None for the newest.
        metric: by what it is the best.
        mode: "min" when smaller is better, "max" when larger is.
        verify: whether what is read later is compared with its digests.
        storage_options: for the backend, see `dist_ckpt.storage.resolve`; a `Store` has its own.
        **unknown: refused, with the nearest name that is known.

    Raises:
        NotFound: there is no checkpoint.
        IntegrityError: its description is damaged.
        UsageError: the place is malformed, or there is no such argument.
    """
    known = ("step", "metric", "mode", "verify", "storage_options")
    if unknown:
        check_known(unknown, known, verb="look into a checkpoint")
    if not isinstance(verify, bool):
        raise UsageError(f"verify is True or False, not {verify!r}")
    which = which_of(step, metric, mode)
    best = which if isinstance(which, Criterion) else None
    exact = None if which is None or isinstance(which, Criterion) else check_step(which)
    check_options_taken(storage_options, url)
    location = locate(url, exact, storage_options)
    try:
        source = open_source(location, best)
        if source.manifest is not None and NAMING in source.manifest.versions:
            # As a load sees it, and not under the names of stock (docs/design/007).
            source = in_parts(source)
    except BaseException:
        # Nobody else could: what would close it is never handed out.
        location.close()
        raise
    return OpenedCheckpoint(source, store=location.own, verify=verify)


def _check_box(info: TensorInfo, offsets: tuple[int, ...], memory: torch.Tensor) -> None:
    # Here, or what is outside would be told as damage of the checkpoint.
    inside = len(offsets) == len(info.shape) == memory.ndim and all(
        0 <= start <= start + size <= whole
        for start, size, whole in zip(offsets, memory.shape, info.shape, strict=True)
    )
    if not inside or memory.dtype != info.dtype:
        raise UsageError(
            f"{info.part}/{info.name} is {info.dtype}{list(info.shape)}, and has no box "
            f"{memory.dtype}{list(memory.shape)} at {list(offsets)}"
        )


def _read_boxes(
    source: Source,
    boxes: Iterable[tuple[int, tuple[int, ...], torch.Tensor]],
    options: ReadOptions,
) -> None:
    wanted = []
    for number, offsets, memory in boxes:
        entry = source.tensors[number]
        held = Held(entry.part, entry.name, entry.dtype, entry.shape, offsets, tuple(memory.shape))
        wanted.append(Wanted(number, LocalBox(held, memory), dtype_of(entry.dtype)))
    # Retention goes on beside whoever looks, and what it takes away is no damage.
    with unless_deleted(source):
        read_alone(source, wanted, options, label=f"read of {source.where}")


@dataclass(frozen=True, slots=True)
class _Selected:
    """What one dimension's subscript selects: `start:stop`, and `within` that."""

    start: int
    stop: int
    within: int | slice


def _select(subscript: Subscript, shape: torch.Size) -> list[_Selected]:
    items = list(subscript) if isinstance(subscript, tuple) else [subscript]
    # By identity: an array is compared element by element, and has no one answer.
    ellipses = [place for place, item in enumerate(items) if item is ...]
    if len(ellipses) > 1:
        raise UsageError("a subscript has one ellipsis at most")
    if not ellipses:
        items.append(...)
    at = ellipses[0] if ellipses else len(items) - 1
    missing = len(shape) - (len(items) - 1)
    if missing < 0:
        raise IndexError(f"{len(items) - 1} subscripts for {len(shape)} dimensions")
    items[at : at + 1] = [slice(None)] * missing
    return [_select_one(item, size) for item, size in zip(items, shape, strict=True)]


def _select_one(item: object, size: int) -> _Selected:
    # `True` is an integer to Python and a mask to torch, and a tensor may be one or an index list.
    number = None if isinstance(item, torch.Tensor) else as_integer(item)
    if number is not None:
        if not -size <= number < size:
            raise IndexError(f"index {number} of a dimension of size {size}")
        start = number % size
        return _Selected(start, start + 1, 0)
    if isinstance(item, slice):
        try:
            start, stop, step = item.indices(size)
        except (TypeError, ValueError) as error:  # of texts or floats, or a step of 0
            raise UsageError(f"{item!r} selects nothing of a stored tensor: {error}") from error
        if step < 1:
            raise UsageError("a slice of a stored tensor has a positive step: flip what was read")
        # `x[5:2]` selects nothing, and a box has no negative size.
        # A step beyond the end selects the first, and torch multiplies it by a stride.
        return _Selected(start, max(start, stop), slice(None, None, min(step, max(size, 1))))
    raise UsageError(
        f"a stored tensor takes integers, slices and an ellipsis, not a {type(item).__qualname__}: "
        "read() it first"
    )


def _info(entry: TensorEntry) -> TensorInfo:
    return TensorInfo(entry.part, entry.name, dtype_of(entry.dtype), torch.Size(entry.shape))
