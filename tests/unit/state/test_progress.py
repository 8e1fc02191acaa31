"""The typed counters of a run."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.state.progress import Progress
from dist_ckpt.state.train_state import TrainState
from tests.unit.state.roundtrip import load, save


def test_counts_come_back_into_the_very_object() -> None:
    progress = Progress()
    part = TrainState(rng=None, progress=progress).parts["progress"]
    progress.add(steps=3, samples=96, tokens=96 * 1024)
    progress.add(steps=1, epochs=1, samples=32)
    saved = save(part)
    progress.add(steps=10)
    load(part, saved)
    assert progress == Progress(step=4, epoch=1, samples=128, tokens=96 * 1024)


@pytest.mark.parametrize("state", [{"step": -1}, {"step": 1.5}, {"steps": 3}, {"epoch": True}])
def test_what_is_no_count_changes_nothing(state: dict[str, object]) -> None:
    progress = Progress(step=7)
    with pytest.raises(IncompatibleError, match="no count of a Progress"):
        progress.load_state_dict({"tokens": 5} | state)
    assert progress == Progress(step=7)


@pytest.mark.parametrize("state", [None, 3, [("step", 1)]])
def test_what_is_no_dict_of_counts_is_refused(state: Any) -> None:
    with pytest.raises(IncompatibleError, match="no counts of a Progress"):
        Progress().load_state_dict(state)


@pytest.mark.parametrize("count", [-1, 1.5, "1", True])
def test_nothing_is_counted_that_no_load_would_take(count: Any) -> None:
    progress = Progress(step=7)
    with pytest.raises(UsageError, match="tokens of a Progress counts in integers from 0"):
        progress.add(steps=1, tokens=count)
    assert progress == Progress(step=7)
    with pytest.raises(UsageError, match="epoch of a Progress"):
        Progress(epoch=count).state_dict()
