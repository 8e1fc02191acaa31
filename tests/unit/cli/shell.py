"""The commands as they are run, and what they are run on."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from dist_ckpt import Checkpointer, policy
from dist_ckpt.cli import main

LOSSES = {10: 3.0, 20: 1.0, 30: 2.0}


def fill(url: str, *, first: int = 10) -> str:
    """Save three checkpoints, ten steps from one to the next."""
    layers = torch.nn.Sequential(*(torch.nn.Linear(4, 4) for _ in range(3)))
    with Checkpointer(
        url, {"model": layers}, when=policy.never(), metadata={"notes": "a \x1b[31mred\x1b[0m one"}
    ) as ckpt:
        ckpt.restore()
        for step, loss in enumerate(LOSSES.values()):
            torch.nn.init.constant_(next(layers.parameters()), first + 10 * step)
            ckpt.save(first + 10 * step, metrics={"val/loss": loss}).wait()
    return url


class Shell:
    """Runs commands in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys

    def code(self, *arguments: str) -> tuple[int, str, str]:
        """Return the exit code, standard output and standard error."""
        with pytest.raises(SystemExit) as ended:
            main(list(arguments))
        out, err = self._capsys.readouterr()
        return int(ended.value.code or 0), out, err

    def screen(self, *arguments: str) -> str:
        code, out, err = self.code(*arguments)
        assert (code, err) == (0, "")
        return out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.screen(*arguments, "--json"))
