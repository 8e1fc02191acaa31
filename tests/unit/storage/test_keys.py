"""What can be a key, and what is said of what cannot."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import check_key
from dist_ckpt.storage.base import TEMPORARY_PREFIX

PARTS = ("", ".", "..", "...", "a", ".a", "a.", "tmp-", ".tmp", TEMPORARY_PREFIX, "a.tmp-", "a b")
CHARACTERS = "a./\\\n\x00\x1f\x7f\x85é\ud800\udfff😀-tmp\u2028"


def is_valid(key: str) -> bool:
    """As the docstring of `check_key` has it, one rule after the other."""
    parts = key.split("/")
    return (
        not any(part in ("", ".", "..") or part.startswith(TEMPORARY_PREFIX) for part in parts)
        and "\\" not in key
        and not any(ord(each) < 32 or ord(each) == 127 for each in key)
        and key.encode(errors="ignore").decode() == key
    )


@given(
    st.one_of(
        st.lists(st.sampled_from(PARTS), max_size=4).map("/".join),
        st.lists(st.sampled_from(CHARACTERS), max_size=8).map("".join),
        st.text(max_size=8),
    )
)
@example("a\n")
@example("a/..\n")
@example("..a/.b")
def test_a_key_is_taken_or_refused_with_a_reason(key: str) -> None:
    if is_valid(key):
        assert check_key(key) == key
        return
    with pytest.raises(UsageError, match="bad key"):
        check_key(key)
