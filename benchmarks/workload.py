"""What is saved and what trains meanwhile: the state of a GPT-2-small, and a small GPT."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor, nn

from examples.train_gpt import BLOCK_TOKENS, GPT, VOCABULARY

_LAYERS, _WIDTH, _TOKENS, _POSITIONS = 12, 768, 50257, 1024
_BATCH = 8
_TINY = 0.1


class Weights(nn.Module):
    """Parameters of the number and shapes of GPT-2-small's, which nobody runs.

    Args:
        scale: 1.0 for the 124 million parameters of the original, less for as many tensors of
            about that fraction of its size.
    """

    def __init__(self, scale: float) -> None:
        super().__init__()
        root = scale**0.5
        width = 12 * max(2, round(_WIDTH / 12 * root))
        self.tokens = nn.Embedding(max(64, round(_TOKENS * root)), width)
        self.positions = nn.Embedding(max(64, round(_POSITIONS * root)), width)
        self.layers = nn.ModuleList(
            nn.TransformerEncoderLayer(width, 12, 4 * width) for _ in range(_LAYERS)
        )
        self.norm = nn.LayerNorm(width)


class State:
    """A model and its AdamW after a first step, so that it has both moments.

    Attributes:
        model: see `Weights`.
        optimizer: of its parameters.
    """

    def __init__(self, scale: float) -> None:
        torch.manual_seed(0)
        self.model = Weights(scale)
        self.optimizer = torch.optim.AdamW(self.model.parameters())
        for parameter in self.model.parameters():
            parameter.grad = torch.rand_like(parameter)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def state_dict(self) -> dict[str, Any]:
        """Return what stock and others are given."""
        return {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}

    def touch(self) -> None:
        """Read and write all of it, as a step of training does; the values stay as they are."""
        torch._foreach_mul_(self.tensors(), 1.0)

    def tensors(self) -> list[Tensor]:
        """Return every tensor of it, once."""
        moments = [each for entry in self.optimizer.state.values() for each in entry.values()]
        return [each.detach() for each in self.model.parameters()] + moments

    @property
    def nbytes(self) -> int:
        """How many bytes the tensors have together."""
        return sum(each.nbytes for each in self.tensors())


class Loop:
    """A training loop on the CPU, to be disturbed.

    Args:
        scale: that of the state; below 0.1 the model is tiny too.
    """

    def __init__(self, scale: float) -> None:
        torch.manual_seed(1)
        width, layers = (256, 4) if scale >= _TINY else (32, 1)
        self._model = GPT(width=width, layers=layers, heads=4)
        self._optimizer = torch.optim.AdamW(self._model.parameters())
        self._tokens = torch.randint(VOCABULARY, (_BATCH, BLOCK_TOKENS + 1))

    def steps(self, count: int) -> list[float]:
        """Take `count` steps; return the seconds of each."""
        seconds = []
        for _ in range(count):
            begun = time.perf_counter()
            logits = self._model(self._tokens[:, :-1])
            wanted = self._tokens[:, 1:].flatten()
            loss = nn.functional.cross_entropy(logits.flatten(0, 1), wanted)
            self._optimizer.zero_grad()
            torch.autograd.backward(loss)
            self._optimizer.step()
            seconds.append(time.perf_counter() - begun)
        return seconds
