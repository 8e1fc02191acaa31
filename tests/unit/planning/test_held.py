"""What a rank holds: every tensor described once, with its own memory behind it."""

from __future__ import annotations

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.format.files import DTYPES
from dist_ckpt.format.index import Box, TensorEntry
from dist_ckpt.planning.describe import Describer, local_boxes
from dist_ckpt.state.layout import dtype_name
from dist_ckpt.testing.ranks import run_ranks


def test_plain_tensors_are_held_whole_in_the_order_of_parts_and_names() -> None:
    tensors = {
        "model": {"w": torch.ones(3, 2), "a.b": torch.zeros((), dtype=torch.int64)},
        "ema": {"w": torch.ones(0, 4, dtype=torch.bfloat16)},
    }
    boxes = local_boxes(tensors)
    assert [(box.held.part, box.held.name, box.held.dtype, box.held.box) for box in boxes] == [
        ("model", "w", "float32", Box((0, 0), (3, 2))),
        ("model", "a.b", "int64", Box((), ())),
        ("ema", "w", "bfloat16", Box((0, 0), (0, 4))),
    ]
    assert boxes[0].held.tensor == TensorEntry("model", "w", "float32", (3, 2))
    # A save describes them alike.
    assert [box.held for box in Describer().describe(tensors)] == [box.held for box in boxes]


def test_the_memory_is_the_live_one() -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    (box,) = local_boxes({"model": {"w": parameter}})
    with torch.no_grad():
        parameter.fill_(7)
    assert box.memory.tolist() == [7, 7, 7]
    assert not box.memory.requires_grad
    box.memory.fill_(8)
    assert parameter.tolist() == [8, 8, 8]


def test_memory_that_was_freed_is_not_loaded_into() -> None:
    gone = torch.ones(4)
    gone.untyped_storage().resize_(0)
    with pytest.raises(UsageError, match=r"tensor 'w' of part 'model' has no memory"):
        local_boxes({"model": {"w": gone}})


def test_names_that_dcp_would_take_apart_stay_whole() -> None:
    named = {"a.b.c": torch.ones(1), "a": torch.ones(2), "a/b": torch.ones(3), "": torch.ones(4)}
    assert [box.held.name for box in local_boxes({"model": named})] == list(named)


def test_unequal_names_are_marked_in_their_part_only() -> None:
    tensors = {"model": {"w": torch.ones(1), "mean": torch.ones(1)}, "ema": {"mean": torch.ones(1)}}
    boxes = Describer().describe(tensors, unequal={"model": {"mean"}})
    marked = [(box.held.part, box.held.name) for box in boxes if box.held.unequal]
    assert marked == [("model", "mean")]


@pytest.mark.filterwarnings("ignore:ComplexHalf")
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_of_the_format_is_described(name: str) -> None:
    dtype = getattr(torch, name, None)
    if dtype is None:
        pytest.skip("this torch has no such dtype")
    (box,) = local_boxes({"model": {"w": torch.empty(4, dtype=dtype)}})
    assert box.held.dtype == name == dtype_name(dtype)


@pytest.mark.parametrize(
    ("tensor", "says"),
    [
        (torch.ones(2, 2).to_sparse(), "layout"),
        (torch.ones(2, device="meta"), "meta device"),
        (torch.empty(2, dtype=torch.bits8), "dtype torch.bits8"),
    ],
    ids=["sparse", "meta", "dtype"],
)
def test_what_cannot_be_stored_is_named(tensor: torch.Tensor, says: str) -> None:
    with pytest.raises(UsageError, match=r"tensor 'head.w' of part 'model'") as caught:
        local_boxes({"model": {"head.w": tensor}})
    assert says in str(caught.value)


def partial_sums() -> None:
    mesh = init_device_mesh("cpu", (1,))
    pending = DTensor.from_local(torch.ones(4), mesh, [Partial()], run_check=False)
    with pytest.raises(UsageError, match=r"'w' of part 'model' holds partial sums"):
        local_boxes({"model": {"w": pending}})
    with pytest.raises(UsageError, match="partial sums"):
        dist_ckpt.save({"model": {"w": pending}}, "memory://partial")


def test_pending_sums_are_no_values() -> None:
    run_ranks(1, partial_sums)
