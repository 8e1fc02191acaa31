"""Random tensors in random pieces, read to random memory: every element must find its own place."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from dist_ckpt.format.files import FileEntry
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.loading.fetching import cut
from dist_ckpt.loading.filling import Files, Ranges, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.state.layout import dtype_name
from tests.unit.planning.boxes import held

DTYPES = (
    torch.uint8,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.complex64,
    torch.complex128,
)
# As many as one byte can tell apart.
MOST_ELEMENTS = 256
_SIZES = (1, 1, 2, 3, 3, 4, 5, 7, 9, 13)


def numbered(shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    """Return a tensor of at most 256 elements: each byte of each says which element it is of."""
    count, item = math.prod(shape), dtype.itemsize
    element = np.arange(count)[:, None]
    raw = ((element + 57 * np.arange(item)) % 256).astype(np.uint8)
    return torch.from_numpy(raw.reshape(-1)).view(dtype).reshape(tuple(shape))


def random_shape(rng: random.Random) -> tuple[int, ...]:
    """Return up to four odd sizes, some of them 1, hardly ever 0."""
    shape: list[int] = []
    for _ in range(rng.choice((0, 1, 2, 2, 2, 3, 3, 4))):
        size = 0 if rng.random() < 0.02 else rng.choice(_SIZES)
        if math.prod(shape) * size <= MOST_ELEMENTS:
            shape.append(size)
    return tuple(shape)


def random_cut(rng: random.Random, shape: Sequence[int]) -> list[Box]:
    """Cut a tensor by rows, by columns, into blocks, or not at all; the boxes tile it."""
    dims = list(range(len(shape)))
    edges = [[0, size] for size in shape]
    for dim in rng.sample(dims, min(rng.choice((0, 1, 1, 4)), len(dims))):
        size = shape[dim]
        if rng.random() < 0.5:  # as torch shards: equal pieces, and a smaller one
            rows = -(-size // rng.randint(1, 4)) or 1
            inner = list(range(rows, size, rows))
        else:
            inner = rng.sample(range(1, size), min(rng.randint(0, 3), size - 1)) if size else []
        edges[dim] = [0, *sorted(inner), size]
    spans = [list(itertools.pairwise(each)) for each in edges]
    return [
        Box(tuple(a for a, _ in each), tuple(b - a for a, b in each))
        for each in itertools.product(*spans)
    ]


def random_boxes(rng: random.Random, shape: Sequence[int]) -> list[Box]:
    """Return what several ranks may want: tiles, some of them twice, or boxes of any kind."""
    if rng.random() < 0.6:
        boxes = random_cut(rng, shape)
        return [*boxes, *rng.sample(boxes, rng.randint(0, 1))]
    boxes = []
    for _ in range(rng.randint(1, 4)):
        starts = [rng.randint(0, size) for size in shape]
        sizes = [rng.randint(0, size - a) for a, size in zip(starts, shape, strict=True)]
        boxes.append(Box(tuple(starts), tuple(sizes)))
    return boxes


def random_memory(
    rng: random.Random, sizes: Sequence[int], dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return a buffer of other bytes, and a view of `sizes` somewhere in it.

    The view is contiguous, in another order of dimensions, with gaps between its elements, or of
    strides that mean nothing where a size is 1.
    """
    ndim = len(sizes)
    order = list(range(ndim))
    steps = [1] * ndim
    kind = rng.choice(("plain", "plain", "order", "gaps", "both"))
    if kind in ("order", "both"):
        rng.shuffle(order)
    if kind in ("gaps", "both"):
        steps = [rng.choice((1, 1, 2, 3)) for _ in range(ndim)]
    strides, reach = [0] * ndim, 1
    for dim in reversed(order):
        strides[dim] = reach * steps[dim]
        reach *= max(sizes[dim], 1) * steps[dim]
        if sizes[dim] == 1 and rng.random() < 0.5:
            strides[dim] = rng.choice((0, 1, 2, 1000))
    first = rng.randint(0, 3)
    base = torch.full(((first + reach + 3) * dtype.itemsize,), 0xEE, dtype=torch.uint8).view(dtype)
    return base, base.as_strided(tuple(sizes), strides, first)


def pick(tensor: torch.Tensor, box: Box) -> torch.Tensor:
    """Return the elements of `tensor` in `box`: the plain way to say it."""
    return tensor[tuple(slice(a, a + n) for a, n in zip(box.offsets, box.sizes, strict=True))]


@dataclass(frozen=True)
class Target:
    """What one wanted box must become.

    Attributes:
        wanted: the box, with a view of `base` as its memory.
        base: the buffer.
        expected: the bytes of the whole buffer after the load.
    """

    wanted: Wanted
    base: torch.Tensor
    expected: torch.Tensor

    @property
    def is_right(self) -> bool:
        """Whether each byte of the buffer is what it must be, those around the view too."""
        return torch.equal(self.base.view(torch.uint8), self.expected)


@dataclass(frozen=True)
class Situation:
    """A checkpoint as bytes in memory, and what is wanted of it."""

    index: Index
    images: list[bytes]
    targets: list[Target]

    def planned(self, rng: random.Random) -> tuple[Files, ReadTargets, Ranges]:
        """Return the plan of a load, and its reads, cut anywhere."""
        unit = rng.choice((1, 3, 16, 64))
        files = Files([len(image) for image in self.images], unit_bytes=unit)
        wanted = [target.wanted for target in self.targets]
        filling = ReadTargets(self.index, wanted, files, max_gap_bytes=rng.choice((0, 1, 16, 1000)))
        most = unit * rng.choice((1, 2, 7, 50, 1000)) if rng.random() < 0.5 else 1 << 20
        return files, filling, cut(filling.needs, most_bytes=max(most, 8))

    def load(self, rng: random.Random) -> ReadTargets:
        """Read all that is needed, in any order, straight to its place or beside it."""
        files, filling, reads = self.planned(rng)
        pairs = reads.pairs()
        rng.shuffle(pairs)
        landing = rng.random() < 0.5
        for start, stop in pairs:
            file, offset = files.place(start)
            data = self.images[file][offset : offset + stop - start]
            memory = memoryview(bytearray(len(data)))
            if not landing:
                memory[:] = data
                filling.fill(start, memory)
                continue
            landings = filling.land(start, memory)
            for each in landings:
                at = each.address - start
                each.view[:] = data[at : at + len(each.view)]
            for each in landings:
                filling.settle(each)
        filling.check_filled()
        return filling


def situation(rng: random.Random, *, tensors: int) -> Situation:
    """Make up a checkpoint of so many tensors, and what is wanted of each."""
    entries: list[TensorEntry] = []
    rows: list[tuple[int, int, int, Box]] = []
    images = [bytearray() for _ in range(rng.randint(1, 3))]
    targets: list[Target] = []
    for number in range(tensors):
        dtype, shape = rng.choice(DTYPES), random_shape(rng)
        whole = numbered(shape, dtype)
        entries.append(TensorEntry("model", f"t{number}", dtype_name(dtype), shape))
        stored = [box for box in random_cut(rng, shape) if math.prod(box.sizes) or 0 in shape]
        rng.shuffle(stored)
        for box in stored:
            file = rng.randrange(len(images))
            images[file] += bytes(rng.choice((0, 0, 1, 5, 64)))
            rows.append((number, file, len(images[file]), box))
            images[file] += as_bytes(pick(whole, box))
        targets += [_target(rng, number, whole, box) for box in random_boxes(rng, shape)]
    rng.shuffle(targets)
    files = [FileEntry(f"model.r{n:05}.safetensors", len(i), "", b"") for n, i in enumerate(images)]
    return Situation(Index.build(files, entries, [], rows), [bytes(i) for i in images], targets)


def target_of(number: int, whole: torch.Tensor, box: Box, base: torch.Tensor) -> Target:
    """Return `box` of tensor `number` with `base` for its memory, which is contiguous."""
    base.view(torch.uint8).fill_(0xEE)
    filled = pick(whole, box).contiguous().reshape(-1)
    local = LocalBox(held(f"t{number}", whole.shape, box, dtype=dtype_name(whole.dtype)), base)
    flat = base.view(-1)
    return Target(Wanted(number, local, whole.dtype), flat, filled.view(torch.uint8))


def _target(rng: random.Random, number: int, whole: torch.Tensor, box: Box) -> Target:
    base, view = random_memory(rng, box.sizes, whole.dtype)
    filled = base.clone()
    filled.as_strided(view.shape, view.stride(), view.storage_offset()).copy_(pick(whole, box))
    local = LocalBox(held(f"t{number}", whole.shape, box, dtype=dtype_name(whole.dtype)), view)
    return Target(Wanted(number, local, whole.dtype), base, filled.view(torch.uint8))


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Return the elements as they are stored."""
    raw: NDArray[np.uint8] = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
    return raw.tobytes()
