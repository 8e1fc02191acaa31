"""What a load reads from: a checkpoint of dist_ckpt, or one that another program wrote."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Literal, Protocol, runtime_checkable

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


Again = Literal["", "gone", "elsewhere"]
"""Why to look again for what is damaged: it was deleted, or replaced; or others have a copy."""


def reason(step: int, url: str, message: str) -> str:
    """Return why a checkpoint is of no use, for a message that names step and place itself."""
    return message.replace(f"step {step} in {url}: ", "", 1)


def listed(reasons: Mapping[int, str], url: str) -> str:
    """Return reasons by step, all of one run, as one text."""
    told = sorted(reasons.items())
    return "; ".join(f"step {step}: {reason(step, url, why)}" for step, why in told)
