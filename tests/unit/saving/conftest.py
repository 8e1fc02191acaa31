"""What tests of saving see of the Checkpointers that they make."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ckpt.ranks.job import Job


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch) -> list[Job]:
    """The jobs of the Checkpointers, in the order in which these are made."""
    made: list[Job] = []

    class Noted(Job):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr("dist_ckpt.ranks.job.Job", Noted)
    return made
