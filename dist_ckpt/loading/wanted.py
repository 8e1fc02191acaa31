"""What one rank wants of the stored tensors: the hinge between matching names and reading bytes."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_ckpt.planning.describe import LocalBox


@dataclass(frozen=True, slots=True)
class Wanted:
    """A box of one stored tensor, and the memory of this rank that its values go to.

    The names in `local.held` are those of the state: a rename may have parted them from the stored
    ones, so a reader goes by `tensor` alone.

    Attributes:
        tensor: the number of the stored tensor in `Index.tensors`.
        local: the box in elements of the global tensor, and the memory for it, of its shape.
        dtype: that of the stored tensor. Where the memory has another one, the values are cast:
            `memory.copy_(values of the stored dtype)`.
    """

    tensor: int
    local: LocalBox
    dtype: torch.dtype
