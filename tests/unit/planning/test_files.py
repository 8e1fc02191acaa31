"""The image of a rank's files: each box once, at the place that the coordinator knows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.files import header_nbytes, parse_header
from dist_ckpt.format.index import Box, Held
from dist_ckpt.format.names import parse_shard_name
from dist_ckpt.planning.files import (
    MANY_PARTS,
    SMALL_BYTES,
    check_reported_sizes,
    extra_name,
    files_nbytes,
    plan_extra,
    plan_files,
)
from dist_ckpt.planning.owners import Owned, decide
from tests.unit.planning.boxes import whole
from tests.unit.planning.saved import content, local, same_bits, stage

MODEL = "model.r00003.safetensors"


def header_names(image: memoryview) -> list[str]:
    nbytes = header_nbytes(bytes(image[:8]), len(image))
    return [entry.name for entry in parse_header(bytes(image[:nbytes]), len(image)).entries]


def test_a_whole_tensor_has_its_name_and_a_box_its_offsets() -> None:
    whole, row = content((3, 2), torch.float32), content((4, 5), torch.int16)
    boxes = [
        local("w", whole, Box((0, 0), (3, 2))),
        local("half", row, Box((2, 0), (2, 5))),
        local("empty", content((0, 4), torch.float32), Box((0, 0), (0, 4))),
        local("scalar", content((), torch.float64), Box((), ())),
    ]
    held = [box.held for box in boxes]
    other = [local("half", row, Box((0, 0), (2, 5))).held]
    owned = decide([other, [], [], held])[3]
    plans = plan_files(3, held, owned)
    (file,) = stage(3, boxes, owned)
    assert file.name == MODEL
    assert set(header_names(file.image)) == {"w", "half#2,0", "empty", "scalar"}
    offsets = dict(zip((held[o.held].name for o in owned), plans[0].layout.offsets, strict=True))
    assert bytes(file.image[offsets["w"] :][:24]) == whole.numpy().tobytes()
    assert bytes(file.image[offsets["half"] :][:20]) == row[2:].numpy().tobytes()
    assert all(offset >= 4096 for offset in offsets.values())


def test_every_part_has_a_file_of_its_own_and_the_values_have_extra() -> None:
    w = content((2,), torch.float32)
    model = local("w", w, Box((0,), (2,)))
    documents = {"notes": b'{"a":1}', "rng": b"[2]"}
    owned = decide([[], [], [], [model.held]])[3]
    plans = plan_files(3, [model.held], owned)
    files = stage(3, [model], owned, documents)
    images = {file.name: file.image for file in files}
    assert set(images) == {MODEL, extra_name(3)}
    layout = plan_extra({part: len(data) for part, data in documents.items()})
    for (part, data), offset in zip(documents.items(), layout.offsets, strict=True):
        assert bytes(images[extra_name(3)][offset : offset + len(data)]) == data, part
    sizes = {part: len(data) for part, data in documents.items()}
    reported = {file.name: len(file.image) for file in files}
    check_reported_sizes(3, plans, sizes, reported)


def test_a_rank_with_nothing_to_write_writes_no_file() -> None:
    assert plan_files(0, [], []) == []
    assert stage(0, [], []) == []


@given(
    st.lists(st.integers(0, 40_000), max_size=30),
    st.integers(20_000, 200_000),
    st.sampled_from(["w", "ä" * 300, '"\\\n' * 50]),
)
def test_files_of_a_bounded_size_hold_every_box_once(
    lengths: list[int], max_bytes: int, name: str
) -> None:
    held = [whole(f"{name}{i}", (length,)) for i, length in enumerate(lengths)]
    owned = decide([held])[0]
    plans = plan_files(0, held, owned, max_file_bytes=max_bytes)
    assert [box for plan in plans for box in plan.owned] == owned
    numbers = [parse_shard_name(plan.name) for plan in plans]
    assert numbers == [("model", 0, number) for number in range(len(plans))]
    for plan in plans:
        assert files_nbytes([plan]) <= max_bytes or len(plan.owned) == 1
    if sum(lengths) * 4 + 100_000 < max_bytes:
        assert len(plans) <= 1


def test_staging_is_a_copy() -> None:
    whole = content((1000,), torch.float32)
    boxes = [local("w", whole, Box((0,), (1000,)))]
    owned = decide([[boxes[0].held]])[0]
    plans = plan_files(0, [boxes[0].held], owned)
    (file,) = stage(0, boxes, owned)
    boxes[0].memory.zero_()
    stored = torch.frombuffer(
        file.image, dtype=torch.float32, count=1000, offset=plans[0].layout.offsets[0]
    )
    assert same_bits(stored, whole)


@pytest.mark.parametrize(
    "reported",
    [{}, {MODEL: 1}, {MODEL: 4104, "other.r00003.safetensors": 1}],
    ids=["missing", "another size", "too many"],
)
def test_reports_that_differ_from_the_plan_name_the_rank(reported: dict[str, int]) -> None:
    box = local("w", content((2,), torch.float32), Box((0,), (2,)))
    plans = plan_files(3, [box.held], decide([[], [], [], [box.held]])[3])
    with pytest.raises(IntegrityError, match="rank 3 wrote other files than were planned") as error:
        check_reported_sizes(3, plans, {}, reported)
    assert list(error.value.ranks) == [3]
    assert error.value.kind == ErrorKind.COVERAGE


def test_small_ones_of_many_parts_share_files() -> None:
    few, large, many = 3, SMALL_BYTES // 4 + 1, 2 * MANY_PARTS

    def held(part: str, rows: int) -> Held:
        return Held(part, "w", "float32", (rows,), (0,), (rows,))

    boxes = [held(f"p{i}", few) for i in range(many)]
    boxes.insert(5, held("large", large))
    owned = [Owned(i, box.offsets, box.sizes) for i, box in enumerate(boxes)]
    shared, own = plan_files(1, boxes, owned)
    assert (shared.name, own.name) == ("p0.r00001.safetensors", "large.r00001.safetensors")
    header = parse_header(shared.layout.header, shared.layout.nbytes)
    assert {entry.name for entry in header.entries} == {f"p{i}.w" for i in range(many)}
    assert [each.held for each in own.owned] == [5]
    # Of few parts each has its own, and one file never gets larger than it may.
    assert len(plan_files(1, boxes, owned[: MANY_PARTS - 1])) == MANY_PARTS - 1
    cut = plan_files(1, boxes, owned, max_file_bytes=8192)
    assert len({plan.name for plan in cut}) == len(cut) == 3
    assert sorted(each.held for plan in cut for each in plan.owned) == list(range(many + 1))
