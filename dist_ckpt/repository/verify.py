"""Reading every byte of a checkpoint and comparing it with its digests."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TypeAlias

from dist_ckpt.errors import ErrorKind, IntegrityError, UsageError
from dist_ckpt.format.files import header_nbytes, parse_header
from dist_ckpt.format.names import INDEX, as_integer
from dist_ckpt.repository.checkpoint import PIECE_BYTES, Checkpoint
from dist_ckpt.repository.on_hosts import files_elsewhere

Sample: TypeAlias = tuple[int, int]
"""Which share of the bytes to look at, and how many shares there are: (2, 10) is the second tenth.
(0, 1) is none of them."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """What a verification found.

    Attributes:
        step: the checkpoint.
        files: how many data files it has.
        nbytes: how many bytes of them were read and compared.
        problems: one line for each file that is not what was committed; empty when all is well.
        elsewhere: for hosts that have a folder of their own, how many files of the checkpoint are
            there alone: nothing was looked at of them.
    """

    step: int
    files: int
    nbytes: int
    problems: tuple[str, ...]
    elsewhere: Mapping[str, int] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every byte that should be there is the one that was committed."""
        return not self.problems


def verify(checkpoint: Checkpoint, *, sample: Sample | None = None) -> VerifyReport:
    """Read all files of `checkpoint` in bounded memory and compare every block.

    Args:
        checkpoint: which.
        sample: what to read of each file, in pieces of 16 MiB; all for None. Sizes are compared in
            any case.

    Raises:
        StorageError: the backend failed, which says nothing about the checkpoint.
        UsageError: there is no such share.
    """
    _check_sample(sample)
    problems: list[str] = []
    nbytes = seen = 0
    away, listed = _elsewhere(checkpoint), checkpoint.listed(checkpoint.files)
    for number, (name, _) in enumerate(checkpoint.files):
        if name in away:
            continue
        try:
            # Reading stops where the file should end: only its size tells that it goes on.
            checkpoint.check_size(number, listed)
            for start, stop in checkpoint.file(number).spans(PIECE_BYTES):
                seen += 1
                # Counted through all files, so that small ones get their turn too.
                if sample is not None and (seen - 1) % sample[1] != sample[0] - 1:
                    continue
                data = checkpoint.read_blocks(number, start, stop)
                nbytes += stop - start
                if start == 0:
                    _check_header(checkpoint, number, data)
        except IntegrityError as error:
            named = name in error.message
            problems.append(error.message if named else f"{name}: {error.message}")
    files = len(checkpoint.files) - len(away)
    return VerifyReport(checkpoint.step, files, nbytes, tuple(problems), Counter(away.values()))


def _check_sample(sample: object) -> None:
    if sample is None:
        return
    # Of a share that does not exist nothing would be read, and all of it would count as whole.
    if isinstance(sample, tuple) and len(sample) == 2:
        which, of = map(as_integer, sample)
        if which is not None and of is not None and (1 <= which <= of or (which, of) == (0, 1)):
            return
    raise UsageError(
        f"sample= takes (which, of how many), such as (2, 10) for the second tenth, not {sample!r}"
    )


def _elsewhere(checkpoint: Checkpoint) -> dict[str, str]:
    """Return the files that are missing as other hosts have them, each with its host."""
    if not checkpoint.manifest.hosts:
        return {}
    folder = checkpoint.key(INDEX).removesuffix(INDEX)
    there = {entry.key.removeprefix(folder) for entry in checkpoint.store.list_entries(folder)}
    return files_elsewhere(checkpoint.manifest, (name for name, _ in checkpoint.files), there)


def _check_header(checkpoint: Checkpoint, number: int, first: memoryview) -> None:
    """Check that file `number` opens as safetensors and has its chunks where the index says.

    Args:
        checkpoint: what the file belongs to.
        number: which of its files.
        first: the beginning of the file, which most often has the whole header.
    """
    entry = checkpoint.file(number)
    nbytes = header_nbytes(bytes(first[:8]), entry.nbytes)
    if nbytes > len(first):
        first = checkpoint.read_blocks(number, *entry.around(0, nbytes))
    header = parse_header(bytes(first[:nbytes]), entry.nbytes)
    described = set(checkpoint.offsets(number).tolist())
    # Within and not equal: documents are in the header too, and are no chunks.
    if not described <= {stored.offset for stored in header.entries}:
        raise IntegrityError(
            f"{checkpoint.where}: the header of {entry.name} and the index disagree about where "
            "its chunks lie",
            kind=ErrorKind.MALFORMED,
        )
