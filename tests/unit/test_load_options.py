"""What a load is told: patterns, renames, and refusals of what is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import UsageError, near
from dist_ckpt.options import LoadOptions

# No name begins with a separator.
NAMES = st.text("ab./*", min_size=1, max_size=8).filter(lambda name: name[0] not in "./")


@pytest.mark.parametrize(
    ("only", "skip", "name", "selected"),
    [
        ((), (), "model/a", True),
        (("model",), (), "model/a.b", True),
        (("model",), (), "model", True),
        (("model",), (), "modelling/a", False),
        (("model/a.*",), (), "model/a.b/c", True),
        (("model/a.*",), (), "model/b", False),
        (("*/weight",), (), "ema/weight", True),
        (("m*",), ("model/a*",), "model/a", False),
        (("m*",), ("model/a*",), "model/b", True),
        ((), ("optimizer", "rng"), "optimizer/x", False),
        ((), ("[a-n]*",), "model/x", False),
    ],
)
def test_patterns_are_of_parts_or_of_names(
    only: tuple[str, ...], skip: tuple[str, ...], name: str, selected: bool
) -> None:
    assert LoadOptions(only=only, skip=skip).selects(name) is selected


@given(st.lists(NAMES, max_size=3), st.lists(NAMES, max_size=3), st.text("ab", min_size=1), NAMES)
def test_a_part_of_which_a_name_is_selected_is_never_left_unread(
    only: list[str], skip: list[str], part: str, name: str
) -> None:
    options = LoadOptions(only=tuple(only), skip=tuple(skip))
    if options.selects(f"{part}/{name}"):
        assert options.selects_part(part)
        assert options.selects_stored(part)


def test_a_part_that_nothing_selects_is_not_read() -> None:
    options = LoadOptions(only=("model", "ema/net.*"), skip=("optimizer",))
    assert [
        part for part in ("model", "ema", "optimizer", "rng") if options.selects_part(part)
    ] == [
        "model",
        "ema",
    ]
    # Under another name it may be wanted after all; what a function does nobody knows.
    assert LoadOptions(only=("model",), rename={"old/net": "model"}).selects_stored("old")
    assert not LoadOptions(only=("model",), rename={"old/net": "model"}).selects_stored("other")
    assert LoadOptions(only=("model",), rename=str.lower).selects_stored("other")


@pytest.mark.parametrize(
    ("rename", "name", "new"),
    [
        ({"model/a": "model/b"}, "model/a", "model/b"),
        ({"model/a": "model/b"}, "model/a.weight", "model/b.weight"),
        ({"model/a": "model/b"}, "model/ab.weight", "model/ab.weight"),
        ({"model/a": "model/b", "model/a.x": "model/c"}, "model/a.x.w", "model/c.w"),
        ({"ema": "model"}, "ema/w.x", "model/w.x"),
        ({"model": "model/net"}, "model/w.x", "model/net.w.x"),
        ({"model/net": "model"}, "model/net.w.x", "model/w.x"),
        ({"model/net.": "model/"}, "model/net.w.x", "model/w.x"),
        ({"model/": "ema/module."}, "model/w", "ema/module.w"),
        (lambda name: name.replace("module.", ""), "model/module.w", "model/w"),
        (None, "model/w", "model/w"),
    ],
)
def test_renames_of_names_and_of_their_beginnings(rename: Any, name: str, new: str) -> None:
    assert LoadOptions(rename=rename).renamed(name) == new


@given(st.dictionaries(NAMES, NAMES, max_size=3), NAMES)
def test_the_key_that_counts_is_the_longest_beginning_up_to_a_separator(
    rename: dict[str, str], name: str
) -> None:
    fitting = [
        key
        for key in rename
        if name == key or (name.startswith(key) and (key[-1] in "./" or name[len(key)] in "./"))
    ]
    new = LoadOptions(rename=rename).renamed(name)
    if not fitting:
        assert new == name
    elif max(fitting, key=len) == name:
        assert new == rename[name]
    else:
        assert new.startswith(rename[max(fitting, key=len)])


def test_a_function_that_fails_is_named_with_the_name_it_failed_on() -> None:
    def fails(name: str) -> str:
        raise KeyError("nope")

    with pytest.raises(UsageError, match=r"rename\('model/w'\) failed: KeyError: 'nope'"):
        LoadOptions(rename=fails).renamed("model/w")
    returns_none: Any = lambda name: None  # noqa: E731
    with pytest.raises(UsageError, match="returned None"):
        LoadOptions(rename=returns_none).renamed("model/w")


@pytest.mark.parametrize(
    ("keywords", "problem"),
    [
        ({"strickt": True}, r"unknown option 'strickt' \(did you mean 'strict'\?\)"),
        ({"strict": 1}, "strict is True or False, not 1"),
        ({"only": 5}, "only is a pattern or a list"),
        ({"skip": ["a", 5]}, "skip is made of patterns.*not 5"),
        ({"skip": [""]}, "not ''"),
        ({"only": []}, "only is an empty list.*leave it away to load all"),
        ({"exchange": "maybe"}, "exchange is one of auto, always, never, not 'maybe'"),
        ({"in_flight_bytes": 10}, "at least 1048576, not 10"),
        ({"in_flight_bytes": True}, "not True"),
        ({"rename": 5}, "rename is a mapping or a function"),
        ({"rename": {"a": 5}}, "not 'a' to 5"),
        ({"rename": {"": "a"}}, "not '' to 'a'"),
        ({"device": "gpu"}, "device 'gpu' is none that torch knows"),
        ({"device": "meta"}, "no memory to load into"),
    ],
)
def test_what_is_no_option_is_refused_by_name(keywords: dict[str, Any], problem: str) -> None:
    with pytest.raises(UsageError, match=problem):
        LoadOptions.of(keywords)


def test_one_pattern_may_stand_alone() -> None:
    options = LoadOptions.of({"only": "model", "skip": iter(["a", "b"]), "device": "cpu"})
    assert (options.only, options.skip) == (("model",), ("a", "b"))
    assert options.device == torch.device("cpu")


def test_equal_options_have_equal_fingerprints() -> None:
    one = LoadOptions(rename={"a": "b", "c": "d"}, device=torch.device("cuda:0"))
    other = LoadOptions(rename={"c": "d", "a": "b"}, device=torch.device("cuda:1"))
    assert one.fingerprint() == other.fingerprint(), "each rank has a device of its own"
    for change in ({"strict": False}, {"only": ("a",)}, {"rename": {"a": "c"}}, {"verify": False}):
        assert LoadOptions(**change).fingerprint() != one.fingerprint()
    assert LoadOptions(rename=str.lower).fingerprint()["rename"] == "str.lower"


def test_names_that_are_like_one() -> None:
    assert near("model/wieght", ["model/weight", "other"]) == " (did you mean 'model/weight'?)"
    assert near("zzz", ["model/weight"]) == ""
