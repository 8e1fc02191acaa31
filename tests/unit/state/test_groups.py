"""Matching of parameter groups by their parameters."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.state.optimizer_content import group_name, is_group_name, match_groups


def test_a_group_is_called_by_its_first_parameter() -> None:
    assert group_name(3, ["layer.weight", "layer.bias"]) == "param_groups.layer.weight"
    assert group_name(3, []) == "param_groups[3]"
    assert is_group_name("param_groups.x")
    assert is_group_name("param_groups[0]")
    assert not is_group_name("state.param_groups")


def test_the_order_of_groups_and_of_parameters_does_not_matter() -> None:
    live = {"param_groups.b": ["b", "a"], "param_groups.c": ["c"]}
    stored = {"param_groups.c": ["c"], "param_groups.a": ["a", "b"]}
    match = match_groups(live, stored)
    assert match.stored_of == {
        "param_groups.b": "param_groups.a",
        "param_groups.c": "param_groups.c",
    }
    assert (match.missing, match.unexpected) == ([], [])


def test_a_split_group_is_reported_by_its_parameters() -> None:
    live = {"param_groups.a": ["a"], "param_groups.b": ["b"]}
    match = match_groups(live, {"param_groups.a": ["a", "b"]})
    assert match.stored_of == {"param_groups.a": "param_groups.a"}
    assert match.missing == ["param_groups.b"]
    assert match.unexpected == ["param_groups.a[b]"]


def test_a_stage_takes_its_piece_of_a_group_and_leaves_the_rest_to_the_others() -> None:
    match = match_groups({"param_groups.b": ["b"]}, {"param_groups.a": ["a", "b", "c"]})
    assert match.stored_of == {"param_groups.b": "param_groups.a"}
    assert match.missing == []
    assert match.unexpected == ["param_groups.a[a]", "param_groups.a[c]"]


def test_groups_of_several_stages_become_one_if_their_options_are_equal() -> None:
    live = {"param_groups.a": ["a", "b"]}
    stored = {"param_groups.a": ["a"], "param_groups.b": ["b"]}
    match = match_groups(live, stored, alike=lambda first, second: True)
    assert match.stored_of == {"param_groups.a": "param_groups.a"}
    assert (match.missing, match.unexpected) == ([], [])
    apart = match_groups(live, stored)
    assert apart.stored_of == {}
    assert (apart.missing, apart.unexpected) == (["param_groups.a[b]"], ["param_groups.b"])


def test_a_changed_group_is_reported_both_ways() -> None:
    match = match_groups({"param_groups.a": ["a", "new"]}, {"param_groups.a": ["a", "old"]})
    assert match.missing == ["param_groups.a[new]"]
    assert match.unexpected == ["param_groups.a[old]"]


def test_empty_groups_are_matched_by_position() -> None:
    live: dict[str, list[str]] = {"param_groups[0]": [], "param_groups[2]": []}
    stored: dict[str, list[str]] = {"param_groups[0]": [], "param_groups[1]": []}
    match = match_groups(live, stored)
    assert match.stored_of == {"param_groups[0]": "param_groups[0]"}
    assert match.missing == ["param_groups[2]"]
    assert match.unexpected == ["param_groups[1]"]


partitions = st.lists(st.integers(0, 3), min_size=1, max_size=6).map(
    lambda of: {
        group_name(i, names): names
        for i, names in enumerate(
            [f"p{k}" for k, g in enumerate(of) if g == group] for group in range(max(of) + 1)
        )
    }
)


@given(partitions, partitions, st.booleans())
def test_each_matched_group_was_saved_with_its_options_and_the_rest_is_reported(
    live: dict[str, list[str]], stored: dict[str, list[str]], alike: bool
) -> None:
    live, stored = ({n: params for n, params in each.items() if params} for each in (live, stored))
    match = match_groups(live, stored, alike=lambda first, second: alike)
    owner = {parameter: name for name, params in stored.items() for parameter in params}
    for name, other in match.stored_of.items():
        owners = {owner[parameter] for parameter in live[name]}
        assert other in owners
        assert alike or len(owners) == 1
    assert len(set(match.stored_of.values())) == len(match.stored_of)
    same = {p for params in live.values() for p in params} == owner.keys()
    fits = same and len(match.stored_of) == len(live)
    assert fits == (not match.missing and not match.unexpected)
