"""Options are checked when they are made, not at the first save."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.options import MIN_MEMORY_BYTES, SaveOptions


def test_the_defaults_are_the_documented_ones() -> None:
    assert dataclasses.asdict(SaveOptions()) == {
        "staging": "blocking",
        "when_busy": "wait",
        "memory_limit_bytes": None,
        "check_replicas": None,
        "command": False,
    }


def test_an_unknown_keyword_is_refused_with_those_there_are() -> None:
    options: Any = {"memory_limit": 1 << 30}
    with pytest.raises(
        UsageError, match=r"unknown option 'memory_limit' \(did you mean 'memory_limit_bytes'"
    ):
        dist_ckpt.Checkpointer("unused", {"n": 1}, **options)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("staging", "async"),
        ("staging", None),
        ("when_busy", "queue"),
        ("memory_limit_bytes", MIN_MEMORY_BYTES - 1),
        ("memory_limit_bytes", 0),
        ("memory_limit_bytes", 1e9),
        ("memory_limit_bytes", True),
        ("check_replicas", "first"),
        ("check_replicas", 1),
    ],
)
def test_a_bad_value_is_refused_by_name(option: str, value: Any) -> None:
    with pytest.raises(UsageError, match=option):
        SaveOptions(**{option: value})


def test_a_limit_leaves_room_for_the_header_of_the_file() -> None:
    assert SaveOptions().max_piece_bytes is None
    piece = SaveOptions(memory_limit_bytes=MIN_MEMORY_BYTES).max_piece_bytes
    assert piece is not None
    assert 0 < piece < MIN_MEMORY_BYTES
