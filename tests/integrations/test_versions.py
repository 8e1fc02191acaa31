"""A framework of another release than those tried is named, once, and used all the same."""

from __future__ import annotations

from importlib.metadata import version

import pytest

import dist_ckpt
from dist_ckpt.integrations.versions import warn_if_untested

MAJOR, MINOR = version("pytest").split(".")[:2]
THIS = f"{MAJOR}.{MINOR}"


@pytest.mark.parametrize(
    ("first", "last"), [(THIS, THIS), (MAJOR, MAJOR), ("1.2", THIS), (THIS, "999.1")]
)
def test_a_release_that_was_tried_is_not_worth_a_word(
    first: str, last: str, caplog: pytest.LogCaptureFixture
) -> None:
    warn_if_untested("pytest", first=first, last=last)
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("first", "last", "tried"), [("1.0", "2.5", "1.0 to 2.5"), ("999.1", "999.1", "999.1 was")]
)
def test_another_release_is_named_once_beside_those_tried(
    first: str, last: str, tried: str, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(2):
        warn_if_untested("pytest", first=first, last=last)
    (message,) = caplog.messages
    assert f"pytest {version('pytest')} was not tried" in message
    assert f"dist_ckpt {dist_ckpt.__version__}" in message
    assert tried in message


def test_a_framework_that_was_never_installed_is_of_no_known_release(
    caplog: pytest.LogCaptureFixture,
) -> None:
    warn_if_untested("a-source-tree-on-the-path", first="1.0", last="1.0")
    assert "a-source-tree-on-the-path of an unknown release was not tried" in caplog.text
