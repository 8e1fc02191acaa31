"""Metrics as training loops have them at hand."""

from __future__ import annotations

import warnings

import torch

from dist_ckpt.saving.provenance import as_numbers


def test_a_loss_with_a_gradient_is_a_number_without_a_warning() -> None:
    loss = (torch.tensor([1.5, 2.5], requires_grad=True) ** 2).mean()
    # Torch warns once in a process otherwise.
    before = torch.is_warn_always_enabled()
    torch.set_warn_always(True)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert as_numbers({"loss": loss}) == {"loss": 4.25}
    finally:
        torch.set_warn_always(before)
