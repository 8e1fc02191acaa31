"""What of a checkpoint is to be loaded, and under which names."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import StorageError, UsageError
from dist_ckpt.loading.fitting import StoredParts, gather
from dist_ckpt.options import LoadOptions
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Store
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

LIVE = ("model", "notes", "other", "rng")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> LocalStore:
    root = tmp_path_factory.mktemp("holdings") / "run"
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2), "ab": torch.nn.Linear(2, 2)})
    dist_ckpt.save({"model": model, "notes": {"t": torch.ones(2)}, "empty": torch.nn.ReLU()}, root)
    return LocalStore(root)


def hold(run: Store, *, live: tuple[str, ...] = LIVE, **options: Any) -> StoredParts:
    source = Repository(run).open_latest()
    return gather(source, LoadOptions.of(options), live=live, rank=0, world_size=1)


def tensors(held: StoredParts) -> set[str]:
    found = {f"{part}/{name}" for part, each in held.parts.items() for name in each.tensors}
    assert found == {f"{part}/{name}" for part, name in held.numbers}
    return found


def test_everything_without_options(run: LocalStore) -> None:
    held = hold(run)
    assert tensors(held) == {
        *(f"model/{layer}.{name}" for layer in ("a", "ab") for name in ("weight", "bias")),
        "notes/value.t",
    }
    assert held.parts["empty"].tensors == {}
    assert list(held.parts["notes"].objects) == ["value"]
    assert {"empty", "notes/value", "model/a.bias", "rng/torch"} <= held.names


def test_numbers_are_those_of_the_index(run: LocalStore) -> None:
    index = Repository(run).open_latest().index
    held = hold(run, rename={"model/a": "model/x"}, skip="rng")
    for (part, name), number in held.numbers.items():
        entry = index.tensors[number]
        assert f"{entry.part}/{entry.name}" == f"{part}/{name}".replace("/x.", "/a.")
    assert ("model", "x.bias") in held.numbers
    assert ("model", "ab.bias") in held.numbers, "a beginning ends at a separator"


def test_the_tensors_in_a_value_go_where_it_goes(run: LocalStore) -> None:
    assert tensors(hold(run, only=["notes/value"])) == {"notes/value.t"}
    assert tensors(hold(run, skip=["notes/value", "model"])) == set()
    held = hold(run, rename={"notes/value": "other/thing"}, skip="model")
    assert list(held.parts["other"].objects) == ["thing"]
    assert tensors(held) == {"other/value.t"}, "the value names it"


def test_values_of_parts_that_nobody_wants_are_not_read(run: LocalStore) -> None:
    rules = [Rule("read_into", Fail(OSError("read")), key="*/extra*", nth=None)]
    store = FaultyStore(run, rules)
    assert len(tensors(hold(store, only="model"))) == 4
    assert len(tensors(hold(store, live=("model",)))) == 5
    with pytest.raises(StorageError, match="OSError: read"):
        hold(store)


def test_a_key_of_rename_that_begins_nothing_is_idle(run: LocalStore) -> None:
    rename = {"model/a": "model/x", "model/b": "model/y", "notes/value": "notes/value"}
    assert hold(run, rename=rename).idle == {"model/b"}
    assert hold(run, rename=str.lower).idle == frozenset()


def test_selects_tells_a_part_what_to_leave_alone(run: LocalStore) -> None:
    selects = hold(run, skip=["model/a.*"]).parts["model"].selects
    assert [selects(name) for name in ("a.weight", "ab.weight", "new")] == [False, True, True]


def test_what_is_no_name(run: LocalStore) -> None:
    for name in ("x", "/x", "x/"):
        with pytest.raises(UsageError, match="a name is a part"):
            hold(run, rename=lambda _, new=name: new)
    with pytest.raises(UsageError, match="of both"):
        hold(run, rename=lambda _: "model/x")
