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
