"""The tensors of one part that Python values refer to, read when a value is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cached_property

import torch

from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.state.layout import dtype_of


class TensorsAside(Mapping[str, torch.Tensor]):
    """The tensors of a part by name, each read whole and verified when it is looked up.

    Args:
        checkpoint: where they are.
        part: which part.
    """

    def __init__(self, checkpoint: Checkpoint, part: str) -> None:
        self._checkpoint = checkpoint
        self._part = part

    @cached_property
    def _numbers(self) -> dict[str, int]:
        tensors = enumerate(self._checkpoint.tensors)
        return {each.name: number for number, each in tensors if each.part == self._part}

    def __getitem__(self, name: str) -> torch.Tensor:
        """Return the tensor called `name`, in memory of its own.

        Raises:
            IntegrityError: its bytes are damaged or missing.
            KeyError: there is none.
        """
        number = self._numbers[name]
        entry = self._checkpoint.tensors[number]
        whole = torch.empty(entry.shape, dtype=dtype_of(entry.dtype))
        chunks = self._checkpoint.index.chunks_of(number)
        places = zip(chunks.file, chunks.offset, chunks.starts, chunks.sizes, strict=True)
        for file, offset, starts, sizes in places:
            box = whole
            for dim, (start, size) in enumerate(zip(starts.tolist(), sizes.tolist(), strict=True)):
                box = box.narrow(dim, start, size)
            # `torch.frombuffer` refuses a buffer of no bytes.
            if box.nbytes:
                stored = self._read(int(file), int(offset), box.nbytes)
                box.copy_(torch.frombuffer(stored, dtype=whole.dtype).view(box.shape))
        return whole

    def __iter__(self) -> Iterator[str]:
        return iter(self._numbers)

    def __len__(self) -> int:
        return len(self._numbers)

    def _read(self, file: int, start: int, nbytes: int) -> memoryview:
        # Whole blocks, as a digest is of all of one.
        begin, end = self._checkpoint.file(file).around(start, start + nbytes)
        blocks = self._checkpoint.read_blocks(file, begin, end)
        return blocks[start - begin : start - begin + nbytes]
