"""What of a live tensor a box names."""

from __future__ import annotations

import torch

from dist_ckpt.format.boxes import Box


def view_box(tensor: torch.Tensor, box: Box, *, origin: tuple[int, ...]) -> torch.Tensor:
    """Return the view of `tensor` that `box` names, `origin` being where the tensor starts."""
    view = tensor.detach()
    for dim, (offset, size) in enumerate(zip(box.offsets, box.sizes, strict=True)):
        view = view.narrow(dim, offset - origin[dim], size)
    return view


def reach(tensor: torch.Tensor) -> int:
    """Return how many elements of memory a tensor with elements spans, gaps between them too."""
    if tensor.is_contiguous():
        return tensor.numel()
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in pairs)
