"""Descriptions save after save: only what changed is planned, and no memory is ever stale."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.default_planner import create_default_local_save_plan
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from dist_ckpt.errors import UsageError
from dist_ckpt.planning import describe as describe_module
from dist_ckpt.planning.describe import Describer, LocalBox
from tests.older_torch import needs_own_source
from tests.unit.planning.test_layouts import rank_of

Named = dict[str, torch.Tensor]


def describe(tensors: Mapping[str, Mapping[str, torch.Tensor]], **marks: Any) -> list[LocalBox]:
    return Describer().describe(tensors, **marks)


@pytest.fixture
def planned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the tensors that were planned."""
    names: list[str] = []
    real = describe_module.plan_boxes

    def noted(part: str, name: str, tensor: torch.Tensor) -> Any:
        names.append(name)
        return real(part, name, tensor)

    monkeypatch.setattr(describe_module, "plan_boxes", noted)
    return names


@pytest.mark.parametrize("shape", [(), (3,), (0, 4), (2, 3, 4)], ids=str)
def test_a_plain_tensor_is_described_as_dcp_does(shape: tuple[int, ...]) -> None:
    tensor = torch.zeros(shape, dtype=torch.bfloat16)
    (item,) = create_default_local_save_plan({"w": tensor}, is_coordinator=False).items
    (box,) = describe({"m": {"w": tensor}})
    assert item.tensor_data is not None
    chunk = item.tensor_data.chunk
    assert box.held.shape == tuple(item.tensor_data.size) == shape
    assert (box.held.offsets, box.held.sizes) == (tuple(chunk.offsets), tuple(chunk.sizes))


def ties(tensors: Mapping[str, torch.Tensor], **marks: Any) -> dict[str, str]:
    return {box.held.name: box.held.tie for box in describe({"m": tensors}, **marks)}


def test_a_structure_that_stays_is_planned_once(planned: list[str]) -> None:
    describer = Describer()
    tensors = {"m": {"a": torch.ones(3), "b": torch.nn.Parameter(torch.ones(2, 2))}}
    first = describer.describe(tensors)
    second = describer.describe(tensors)
    assert planned == ["a", "b"]
    assert [box.held for box in first] == [box.held for box in second]
    # The very objects: that is how an unchanged state is told without looking at every field.
    assert all(one.held is two.held for one, two in zip(first, second, strict=True))


CHANGES: dict[str, Callable[[Named], None]] = {
    "added": lambda named: named.update(b=torch.ones(1)),
    "reshaped": lambda named: named.update(a=torch.ones(3, 1)),
    "of another dtype": lambda named: named.update(a=torch.ones(3, dtype=torch.float64)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_planned_anew_and_nothing_else(change: str, planned: list[str]) -> None:
    describer = Describer()
    named: Named = {"a": torch.ones(3), "z": torch.ones(4)}
    before = describer.digest([box.held for box in describer.describe({"m": named})])
    planned.clear()
    CHANGES[change](named)
    boxes = describer.describe({"m": named})
    assert len(planned) == 1
    assert planned != ["z"]
    assert [box.held for box in boxes] == [box.held for box in describe({"m": named})]
    assert describer.digest([box.held for box in boxes]) != before


def test_what_was_gone_for_a_while_is_described_again() -> None:
    describer = Describer()
    full = {"m": {"a": torch.ones(3), "b": torch.ones(2)}}
    digests = [
        describer.digest([box.held for box in describer.describe(tensors)])
        for tensors in (full, {"m": {"a": torch.ones(3)}}, full)
    ]
    assert digests[0] == digests[2] != digests[1]


def test_memory_is_that_of_the_moment() -> None:
    describer = Describer()
    parameter = torch.nn.Parameter(torch.zeros(3))
    tensors = {"m": {"w": parameter}}
    describer.describe(tensors)
    parameter.data = torch.full((3,), 5.0)
    (box,) = describer.describe(tensors)
    assert box.memory.tolist() == [5, 5, 5]
    assert box.memory.data_ptr() == parameter.data_ptr()


@needs_own_source
def test_a_tensor_that_is_placed_otherwise_is_planned_anew(planned: list[str]) -> None:
    describer = Describer()
    with rank_of(1, (2, 2)):
        mesh = init_device_mesh("cpu", (2, 2))
        source = torch.arange(16.0).reshape(4, 4)
        found = []
        for placements in ([Shard(0), Replicate()], [Shard(0), Replicate()], [Shard(0), Shard(1)]):
            tensor = distribute_tensor(source, mesh, placements, src_data_rank=None)
            (box,) = describer.describe({"m": {"w": tensor}})
            found.append((box.held.offsets, box.held.sizes))
            offsets, sizes = box.held.offsets, box.held.sizes
            expected = source[offsets[0] :, offsets[1] :][: sizes[0], : sizes[1]]
            assert torch.equal(box.memory, expected)
    assert found == [((0, 0), (2, 4)), ((0, 0), (2, 4)), ((0, 2), (2, 2))]
    assert planned == ["w", "w"]


def test_marks_follow_the_call_and_cost_no_planning(planned: list[str]) -> None:
    describer = Describer()
    tensors = {"m": {"w": torch.ones(2)}}
    (plain,) = describer.describe(tensors)
    (marked,) = describer.describe(tensors, unequal={"m": {"w"}}, stepped={"m": {"w"}})
    assert (plain.held.unequal, plain.stepped) == (False, False)
    assert (marked.held.unequal, marked.stepped) == (True, True)
    assert planned == ["w"]


def test_one_memory_under_several_names_is_a_tie() -> None:
    w = torch.nn.Parameter(torch.ones(4, 4))
    assert ties({"a": w, "b": w, "c": w.detach(), "d": torch.ones(4, 4)}) == {
        "a": "",
        "b": "a",
        "c": "a",
        "d": "",
    }


@pytest.mark.parametrize(
    "other",
    [
        lambda w: w[:2],
        lambda w: w.t(),
        lambda w: w.view(16),
        lambda w: w.view(torch.int32),
        lambda w: w.clone(),
    ],
    ids=["part", "turned", "reshaped", "other dtype", "copy"],
)
def test_memory_that_is_seen_otherwise_is_no_tie(
    other: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    w = torch.ones(4, 4)
    assert set(ties({"a": w, "b": other(w)}).values()) == {""}


def test_ties_stay_within_a_part_and_within_equal_marks() -> None:
    w = torch.ones(4)
    assert [box.held.tie for box in describe({"m": {"a": w}, "ema": {"a": w}})] == ["", ""]
    assert set(ties({"a": w, "b": w}, unequal={"m": {"b"}}).values()) == {""}
    assert set(ties({"a": torch.ones(0), "b": torch.ones(0)}).values()) == {""}


def test_a_tie_that_is_loosed_is_a_new_structure() -> None:
    describer = Describer()
    w = torch.ones(4)
    tied = [box.held for box in describer.describe({"m": {"a": w, "b": w}})]
    loose = [box.held for box in describer.describe({"m": {"a": w, "b": w.clone()}})]
    assert [held.tie for held in tied] == ["", "a"]
    assert [held.tie for held in loose] == ["", ""]
    assert describer.digest(tied) != describer.digest(loose)


def freed() -> torch.Tensor:
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(0)
    return tensor


def cut_short() -> torch.Tensor:
    tensor = torch.ones(10, 10).t()
    tensor.untyped_storage().resize_(396)
    return tensor


@pytest.mark.parametrize("gone", [freed, cut_short])
def test_a_tensor_without_memory_is_named_and_not_read(gone: Callable[[], torch.Tensor]) -> None:
    describer = Describer()
    whole = {"m": {"w": torch.ones(gone().shape)}}
    for known in (False, True):
        if known:
            describer.describe(whole)
        with pytest.raises(UsageError, match=r"tensor 'w' of part 'm' has no memory"):
            describer.describe({"m": {"w": gone()}})


@pytest.mark.parametrize(
    "tensor",
    [torch.ones(3).expand(4, 3), torch.ones(10)[::2], torch.ones(5, 4).t(), torch.ones(())],
    ids=["expanded", "strided", "turned", "scalar"],
)
def test_every_layout_in_memory_is_backed(tensor: torch.Tensor) -> None:
    (box,) = describe({"m": {"w": tensor}})
    assert torch.equal(box.memory, tensor)


def turned(w: torch.Tensor) -> None:
    w.t_()


def of_another_dtype(w: torch.Tensor) -> None:
    w.data = w.data.view(torch.int32)


def elsewhere(w: torch.Tensor) -> None:
    w.data = w.data.clone()


@pytest.mark.parametrize("change", [turned, of_another_dtype, elsewhere])
def test_a_tensor_that_changes_in_place_is_described_as_it_is(
    change: Callable[[torch.Tensor], None],
) -> None:
    describer = Describer()
    w = torch.rand(4, 2)
    named = {"m": {"a": w, "b": w.view(4, 2)}}
    describer.describe(named)
    change(w)
    found = describer.describe(named)
    assert [box.held for box in found] == [box.held for box in describe(named)]
    assert torch.equal(found[0].memory, w)
    assert found[0].memory.data_ptr() == w.data_ptr()


def test_a_storage_that_is_cut_short_in_place_is_not_read() -> None:
    describer = Describer()
    w = torch.ones(100)
    describer.describe({"m": {"w": w}})
    w.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match=r"tensor 'w' of part 'm' has no memory"):
        describer.describe({"m": {"w": w}})


def test_a_tensor_that_the_state_dropped_is_not_kept() -> None:
    describer = Describer()
    w = torch.ones(3)
    gone = weakref.ref(w)
    describer.describe({"m": {"w": w}})
    del w
    assert gone() is None
