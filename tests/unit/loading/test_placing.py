"""A reshard puts every element to its own place, whatever was stored and whatever is wanted."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import torch

from dist_ckpt.errors import IntegrityError
from dist_ckpt.format.files import FileEntry
from dist_ckpt.format.index import Box, Index, TensorEntry
from dist_ckpt.loading import filling
from dist_ckpt.loading.fetching import cut
from dist_ckpt.loading.filling import Files, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox
from tests.unit.loading.placing import (
    Situation,
    Target,
    as_bytes,
    numbered,
    pick,
    situation,
    target_of,
)
from tests.unit.planning.boxes import held

TENSORS = 50

# What a reshard from rows to columns looked like when it went wrong: the first elements of a piece
# and the gaps between them take just the bytes of the whole wanted box.
CONFUSED = {
    "[3, 4] of two ranks": ((3, 4), [Box((0, 0), (2, 4)), Box((2, 0), (1, 4))], (0, 2), (3, 2)),
    "[5, 8] of two": ((5, 8), [Box((0, 0), (3, 8)), Box((3, 0), (2, 8))], (0, 4), (5, 4)),
    "[3, 4, 5], a middle dimension cut": (
        (3, 4, 5),
        [Box((0, 0, 0), (2, 4, 5)), Box((2, 0, 0), (1, 4, 5))],
        (0, 1, 0),
        (3, 2, 5),
    ),
}


def of_one_tensor(stored: Sequence[Box], targets: Sequence[Target]) -> Situation:
    """Return a checkpoint of one int32 tensor, its chunks one after another in one file."""
    shape = targets[0].wanted.local.held.shape
    whole, image, rows = numbered(shape, torch.int32), b"", []
    for box in stored:
        rows.append((0, 0, len(image), box))
        image += as_bytes(pick(whole, box))
    file = FileEntry("model.r00000.safetensors", len(image), "", b"")
    index = Index.build([file], [TensorEntry("model", "t0", "int32", shape)], [], rows)
    return Situation(index, [image], list(targets))


@pytest.mark.parametrize("name", CONFUSED)
def test_gaps_are_not_taken_for_elements(name: str) -> None:
    shape, stored, offsets, sizes = CONFUSED[name]
    for straight_bytes in (1, 1 << 20):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(filling, "STRAIGHT_BYTES", straight_bytes)
            whole = numbered(shape, torch.int32)
            target = target_of(0, whole, Box(offsets, sizes), torch.empty(sizes, dtype=torch.int32))
            for seed in range(8):
                of_one_tensor(stored, [target]).load(random.Random(seed))
                assert target.is_right


def test_a_single_element_may_have_any_stride() -> None:
    base = torch.zeros(8, dtype=torch.int32)
    for view in (base[::7][:1], base.as_strided((1, 1), (0, 0), 3), base[3], base[2:3]):
        whole = torch.full(view.shape, 7, dtype=torch.int32)
        box = Box((0,) * view.ndim, tuple(view.shape))
        rows = [(0, 0, 0, box)]
        entry = TensorEntry("model", "t0", "int32", tuple(view.shape))
        index = Index.build([FileEntry("f", 4, "", b"")], [entry], [], rows)
        held_box = held("t0", view.shape, box, dtype="int32")
        wanted = Wanted(0, LocalBox(held_box, view), torch.int32)
        planned = ReadTargets(index, [wanted], Files([4], unit_bytes=1), max_gap_bytes=0)
        planned.fill(*planned.needs.pairs()[0][:1], memoryview(bytearray(as_bytes(whole))))
        planned.check_filled()
        assert int(view.reshape(())) == 7


def cases(rng: random.Random, count: int) -> int:
    """Try as many wanted boxes as that, and some more; return how many."""
    done = 0
    with pytest.MonkeyPatch.context() as patch:
        while done < count:
            patch.setattr(filling, "STRAIGHT_BYTES", rng.choice((1, 8, 64)))
            found = situation(rng, tensors=TENSORS)
            found.load(rng)
            wrong = [t.wanted.local.held for t in found.targets if not t.is_right]
            assert wrong == []
            done += len(found.targets)
    return done


@pytest.mark.parametrize("seed", range(4))
def test_values_that_name_their_place_are_found_there(seed: int) -> None:
    cases(random.Random(seed), 1500)


@pytest.mark.soak
@pytest.mark.parametrize("seed", range(10))
def test_a_million_of_them(seed: int) -> None:
    cases(random.Random(1000 + seed), 100_000)


@pytest.mark.parametrize("unit", [3, 64])
def test_memory_that_torch_reads_otherwise_is_filled_by_torch(unit: int) -> None:
    """A conjugate is no copy: its memory has the other sign."""
    whole = torch.arange(6).to(torch.complex64) * (1 + 2j)
    base = torch.zeros(6, dtype=torch.complex64)
    for view in (base.conj(), base.conj().imag):
        stored = whole if view.is_complex() else whole.imag.contiguous()
        box, dtype = Box((0,), (6,)), stored.dtype
        entry = TensorEntry("model", "t0", str(dtype).removeprefix("torch."), (6,))
        image = as_bytes(stored)
        file = FileEntry("model.r00000.safetensors", len(image), "", b"")
        index = Index.build([file], [entry], [], [(0, 0, 0, box)])
        wanted = Wanted(0, LocalBox(held("t0", (6,), box, dtype=entry.dtype), view), dtype)
        planned = ReadTargets(
            index, [wanted], Files([len(image)], unit_bytes=unit), max_gap_bytes=0
        )
        for start, stop in cut(planned.needs, most_bytes=7 * unit).pairs():
            planned.fill(start, memoryview(bytearray(image[start:stop])))
        planned.check_filled()
        assert torch.equal(view, stored)


def test_each_byte_is_missed_that_does_not_come_and_each_that_comes_twice() -> None:
    rng = random.Random(7)
    found = situation(rng, tensors=6)
    files, planned, reads = found.planned(rng)
    everything = []
    for start, stop in reads.pairs():
        file, offset = files.place(start)
        image = found.images[file][offset : offset + stop - start]
        everything.append((start, memoryview(bytearray(image))))
    for start, data in everything[:-1]:
        planned.fill(start, data)
    with pytest.raises(IntegrityError, match=r"model/t\d.* bytes are left"):
        planned.check_filled()
    planned.fill(*everything[-1])
    planned.check_filled()
    planned.fill(*everything[0])
    with pytest.raises(IntegrityError, match=r"-\d+ bytes are left"):
        planned.check_filled()


def test_chunks_that_do_not_hold_all_that_is_wanted_are_refused_before_a_read() -> None:
    """An index that was decoded has none of these; one that a reader made by hand might."""
    whole = numbered((4, 4), torch.int32)
    target = target_of(0, whole, Box((0, 0), (4, 4)), torch.empty(4, 4, dtype=torch.int32))
    for stored in ([Box((0, 0), (3, 4))], [Box((0, 0), (4, 4)), Box((0, 0), (1, 4))]):
        broken = of_one_tensor(stored, [target])
        with pytest.raises(IntegrityError, match=r"model/t0, .* of 64 bytes are in its chunks"):
            broken.planned(random.Random(0))
