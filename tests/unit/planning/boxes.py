"""Tensors cut at random, and who holds the pieces."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import strategies as st

from dist_ckpt.format.index import Box, Held


@st.composite
def grids(draw: st.DrawFn, shape: Sequence[int]) -> list[Box]:
    """Cut `shape` by random planes into boxes that tile it."""
    edges = []
    for size in shape:
        cuts = draw(st.sets(st.integers(1, max(size - 1, 1)), max_size=3)) if size > 1 else set()
        edges.append([0, *sorted(cuts), size])
    spans = [list(itertools.pairwise(each)) for each in edges]
    return [
        Box(tuple(a for a, _ in each), tuple(b - a for a, b in each))
        for each in itertools.product(*spans)
    ]


def held(name: str, shape: Sequence[int], box: Box, *, dtype: str = "float32") -> Held:
    """Return the description of one box."""
    return Held("model", name, dtype, tuple(shape), box.offsets, box.sizes)


def whole(name: str, shape: Sequence[int], *, dtype: str = "float32") -> Held:
    """Return the description of a tensor that is held whole."""
    return held(name, shape, Box((0,) * len(shape), tuple(shape)), dtype=dtype)
