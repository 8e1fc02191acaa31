"""Fetching: how many reads are under way, and what goes on beside them."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch

from dist_ckpt.errors import IntegrityError
from dist_ckpt.format.files import BLOCK_BYTES
from dist_ckpt.format.index import Box
from dist_ckpt.loading import fetching
from dist_ckpt.loading.fetching import MAX_GAP_BYTES, Fetcher
from dist_ckpt.loading.filling import Files, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.repository import Checkpoint
from tests.unit.planning.boxes import held
from tests.unit.planning.saved import checkpoint, local

COUNT = BLOCK_BYTES  # elements of four bytes: the tensor has a little over four blocks of its file
WAIT_SECONDS = 600


class Watched:
    """A checkpoint whose first comparison takes until the next read has begun."""

    def __init__(self, opened: Checkpoint) -> None:
        self.opened = opened
        self.store, self.index = opened.store, opened.index
        self.most = self.under_way = self.begun = 0
        self.went_on = self.compared = False
        self._lock = threading.Lock()
        self._second = threading.Event()

    def read_into(self, file: int, start: int, *buffers: memoryview) -> None:
        with self._lock:
            self.begun += 1
            self.under_way += 1
            self.most = max(self.most, self.under_way)
            if self.begun == 2:
                self._second.set()
        self.opened.read_into(file, start, *buffers)
        with self._lock:
            self.under_way -= 1

    def compare(self, file: int, start: int, *buffers: memoryview) -> None:
        if not self.compared:
            self.compared = True
            self.went_on = self._second.wait(WAIT_SECONDS)
        self.opened.compare(file, start, *buffers)


def fetch(source: Any, target: torch.Tensor) -> None:
    box = Box((0,), (COUNT,))
    files = Files.of(source.index, apart_bytes=MAX_GAP_BYTES, verify=True)
    wanted = [Wanted(0, LocalBox(held("w", (COUNT,), box), target), torch.float32)]
    filling = ReadTargets(source.index, wanted, files, max_gap_bytes=BLOCK_BYTES)
    fetcher = Fetcher(source, files, filling, verify=True, in_flight_bytes=1 << 30)
    fetcher.fetch(filling.needs)


@pytest.fixture
def stored() -> tuple[torch.Tensor, Checkpoint]:
    tensor = torch.rand(COUNT)
    return tensor, checkpoint([[local("w", tensor, Box((0,), (COUNT,)))]])


def test_a_read_goes_on_while_another_is_compared(
    stored: tuple[torch.Tensor, Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    tensor, opened = stored
    monkeypatch.setattr(fetching, "SMALL_READS", 1)
    monkeypatch.setattr(fetching, "REMOTE", fetching.Pace(BLOCK_BYTES, reads=1, under_way=2))
    source, target = Watched(opened), torch.zeros(COUNT)
    fetch(source, target)
    assert torch.equal(target, tensor)
    assert source.went_on
    assert source.most == 1


@pytest.mark.parametrize("landing", [True, False])
def test_damage_is_named_wherever_the_bytes_were_read_to(
    stored: tuple[torch.Tensor, Checkpoint], landing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight in the memory of the tensor, or on their way to it."""
    _, opened = stored
    key = next(entry.key for entry in opened.store.list_entries() if "safetensors" in entry.key)
    data = bytearray(opened.store.size(key))
    opened.store.read_into(key, 0, memoryview(data))
    data[2 * BLOCK_BYTES + 5] ^= 1
    opened.store.put(key, [data], mode="replace")
    if not landing:
        monkeypatch.setattr("dist_ckpt.loading.filling.STRAIGHT_BYTES", 1 << 60)
    with pytest.raises(IntegrityError, match=r"differs from its digest.*It holds bytes of \w+/w"):
        fetch(opened, torch.zeros(COUNT))
