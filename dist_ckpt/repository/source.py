"""What a load reads from: a checkpoint of dist_ckpt, or one that another program wrote."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Literal, Protocol, TypeVar, runtime_checkable

from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    describe,
)
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.storage.base import Store


@runtime_checkable
class Source(Protocol):
    """An opened checkpoint: what it holds, and reads of its bytes.

    Matching, planning, exchange and the report know nothing else, so whatever has an index of
    byte ranges goes through all of them. Reading is safe from several threads.
    """

    @property
    def store(self) -> Store:
        """Where its files are."""
        ...

    @property
    def where(self) -> str:
        """How messages name this checkpoint."""
        ...

    @property
    def step(self) -> int:
        """The training step; 0 where the checkpoint does not say."""
        ...

    @property
    def save_id(self) -> str:
        """The attempt that wrote it; the name of the format where another program did."""
        ...

    @property
    def saved_world_size(self) -> int:
        """How many ranks saved it; 0 where the checkpoint does not say."""
        ...

    @property
    def manifest(self) -> Manifest | None:
        """What was committed; None for a checkpoint that dist_ckpt did not write."""
        ...

    @property
    def tensors(self) -> tuple[TensorEntry, ...]:
        """Every tensor, in the order of the index."""
        ...

    @property
    def nbytes(self) -> int:
        """How many bytes its files have."""
        ...

    @property
    def index(self) -> Index:
        """Which box of which tensor lies where; files have no digests where `verified` is False."""
        ...

    def index_of(self, wanted: Iterable[tuple[int, Box]]) -> Index:
        """Return what of the index there must be to read boxes, each of a tensor by its number.

        It has all tensors and all files, so that what is said by their numbers is the same as by
        `index`; of chunks and digests it has at least those of the boxes.

        Raises:
            IntegrityError: what describes them is damaged or missing.
        """
        ...

    @property
    def parts(self) -> tuple[str, ...]:
        """The parts there are, also those without a tensor."""
        ...

    @property
    def verified(self) -> bool:
        """Whether there are digests, so that every byte read can be compared with its own."""
        ...

    def check_sizes(self) -> None:
        """Compare the size of every file with what the index says, reading no data.

        Raises:
            IntegrityError: a file is missing, shorter or longer.
        """
        ...

    def still_there(self) -> bool:
        """Whether it was neither deleted nor replaced since it was opened, as far as is known."""
        ...

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        """Fill `buffers`, one after another, from `start` of file number `file`; not verified.

        Raises:
            IntegrityError: the file is missing or truncated.
        """
        ...

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        """Compare bytes of file number `file` with their digests, if there are digests.

        Args:
            file: position in `index.files`.
            start: where in the file they were read: a block begins there.
            buffers: the bytes; a block ends with them.

        Raises:
            IntegrityError: a block differs from its digest.
        """
        ...

    def read_objects(self, part: str, *, rank: int) -> dict[str, bytes]:
        """Return the encoded Python values of `part` by name, verified.

        Those that all ranks share, and those of `rank`.

        Raises:
            IntegrityError: they are missing, damaged or malformed.
        """
        ...


def read_file(store: Store, key: str, start: int, buffers: Sequence[memoryview]) -> int:
    """Fill `buffers` with the bytes of `key` from `start` on; return how many there were.

    Raises:
        CheckpointError: as the store said it.
        StorageError: the store raised what it should have mapped; the cause is that.
    """
    try:
        return store.read_into(key, start, *buffers)
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # of a store of the program's own: for one handler all the same
        raise StorageError(f"cannot read {key} in {store.url}: {describe(error)}") from error


# A checkpoint may be deleted, or saved anew, under whoever reads it.


_LOOKS = 3

Again = Literal["", "gone", "elsewhere"]
"""Why to look again for what is damaged: it was deleted, or replaced; or others have a copy."""

CheckpointT = TypeVar("CheckpointT")


class DeletedMeanwhile(NotFound):
    """A checkpoint was deleted, or saved anew, while it was read: look again."""


def deleted_meanwhile(store: Store, step: int) -> DeletedMeanwhile:
    """Return the error that says so of `step`."""
    return DeletedMeanwhile(
        f"the checkpoint of step {step} in {store.url} was deleted or replaced while it was read, "
        "by the retention of the job that owns the run or by hand: read another one, or the "
        "newest anew",
        kind=ErrorKind.NO_CHECKPOINT,
    )


def reread(look: Callable[[], CheckpointT]) -> CheckpointT:
    """Return `look()`, and look again where the checkpoint was deleted or saved anew meanwhile.

    Raises:
        NotFound: it is gone.
    """
    for _ in range(_LOOKS - 1):
        with suppress(DeletedMeanwhile):
            return look()
    return look()


def reason(step: int, url: str, message: str) -> str:
    """Return why a checkpoint is of no use, for a message that names step and place itself."""
    return message.replace(f"step {step} in {url}: ", "", 1)


def listed(reasons: Mapping[int, str], url: str) -> str:
    """Return reasons by step, all of one run, as one text."""
    told = sorted(reasons.items())
    return "; ".join(f"step {step}: {reason(step, url, why)}" for step, why in told)


@contextmanager
def unless_deleted(source: Source) -> Iterator[None]:
    """Turn damage that the body finds into `NotFound` where `source` was deleted or replaced.

    Retention beside a reader takes the files away under it; that is no damage.
    """
    try:
        yield
    except IntegrityError as error:
        if not source.still_there():
            raise deleted_meanwhile(source.store, source.step) from error
        raise


# The sizes of very many files are looked at by all ranks of a load, each of them at some.


MANY_FILES = 1000
"""How many files of a checkpoint rank 0 looks at alone, at most."""


class _Sized(Source, Protocol):
    """A checkpoint whose files have committed sizes; `Checkpoint` has them all."""

    @property
    def files(self) -> Sequence[tuple[str, int]]: ...

    def check_parts(self, selects_part: Callable[[str], bool]) -> None: ...

    def check_some(self, files: Sequence[int]) -> None: ...


_SizedT = TypeVar("_SizedT", bound=_Sized)


def shares_sizes(checkpoint: _Sized, selects_part: Callable[[str], bool], ranks: int) -> bool:
    """Tell whether all ranks of a load look at sizes, each of them at some.

    There are so many files that the others would wait for the listing of rank 0; and all are
    wanted, so that nobody has to read what describes them to find out which.
    """
    many = ranks > 1 and len(checkpoint.files) > MANY_FILES
    return many and all(map(selects_part, checkpoint.parts))


def checked(checkpoint: _SizedT, selects: Callable[[str], bool], ranks: int) -> _SizedT:
    """Return `checkpoint`, its sizes compared unless ranks share that; see `shares_sizes`.

    Raises:
        NotFound: it was deleted meanwhile.
        IntegrityError: a file is missing, shorter or longer.
    """
    # Sizes are cheap to ask for: a truncated file is found before any tensor is touched.
    if not shares_sizes(checkpoint, selects, ranks):
        with unless_deleted(checkpoint):
            checkpoint.check_parts(selects)
    return checkpoint


def check_share(checkpoint: _Sized, selects: Callable[[str], bool], rank: int, ranks: int) -> None:
    """Compare the sizes of the files that `rank` looks at, where all ranks do; see `shares_sizes`.

    Raises:
        IntegrityError: a file is missing, shorter or longer.
    """
    if shares_sizes(checkpoint, selects, ranks):
        checkpoint.check_some(range(rank, len(checkpoint.files), ranks))
