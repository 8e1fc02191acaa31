"""When to save."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.policy import every


@given(st.integers(1, 1000), st.integers(0, 10**9))
def test_multiples_are_due(steps: int, step: int) -> None:
    assert every(steps)(step) is (step % steps == 0)


@given(st.integers(0, 10**9))
def test_none_is_never(step: int) -> None:
    assert every(None)(step) is False


@pytest.mark.parametrize("steps", [0, -5, True, 2.0, "10"])
def test_what_is_no_number_of_steps(steps: object) -> None:
    with pytest.raises(UsageError, match="positive integer"):
        every(steps)  # type: ignore[arg-type]
