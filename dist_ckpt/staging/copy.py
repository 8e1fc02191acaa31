"""Copies between live tensors and buffers, one box at a time."""

from __future__ import annotations

import torch

from dist_ckpt.format.boxes import Box


def copy_box(
    target: torch.Tensor, source: torch.Tensor, box: Box, *, origin: tuple[int, ...]
) -> None:
    """Copy `box` out of `source` into the whole of `target`.

    Args:
        target: a tensor of the sizes of `box`, anywhere.
        source: the local tensor whose first element has the global position `origin`.
        box: global offsets and sizes.
        origin: global offsets of `source`.
    """
    with torch.no_grad():
        # Not non_blocking: the copy is over when this returns, from a GPU too.
        target.copy_(view_box(source, box, origin=origin))


def view_box(tensor: torch.Tensor, box: Box, *, origin: tuple[int, ...]) -> torch.Tensor:
    """Return the view of `tensor` that `box` names, `origin` being where the tensor starts."""
    view = tensor.detach()
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        view = view.narrow(dim, offset - origin[dim], size)
    return view
