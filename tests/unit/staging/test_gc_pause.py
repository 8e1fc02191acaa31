"""The collector of garbage, and the saves and loads that put it off."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Mapping
from typing import Any

import pytest

import dist_ckpt
from dist_ckpt.loading.fitting import fit
from dist_ckpt.storage.memory import MemoryStore

_names = itertools.count()


class Crowd:
    """A part that makes many objects while it is captured, as thousands of tensors do."""

    def __init__(self, *, broken: bool = False) -> None:
        self.collections = 0
        self.enabled: list[bool] = []
        self._broken = broken

    def state_dict(self) -> dict[str, Any]:
        self.enabled.append(gc.isenabled())
        gc.callbacks.append(self._count)
        kept = [[number] for number in range(10_000)]
        gc.callbacks.remove(self._count)
        if self._broken:
            raise RuntimeError("broken on purpose")
        return {"kept": len(kept)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        assert gc.isenabled()  # what the state does with its values is its own

    def _count(self, phase: str, _: Mapping[str, int]) -> None:
        self.collections += phase == "start"


def checkpointer(part: Crowd) -> dist_ckpt.Checkpointer:
    return dist_ckpt.Checkpointer(MemoryStore(f"collecting-{next(_names)}"), {"part": part})


def test_objects_set_off_a_collection_anywhere_else() -> None:
    part = Crowd()
    part.state_dict()
    assert part.collections


def test_nothing_is_collected_while_the_training_waits() -> None:
    part = Crowd()
    with checkpointer(part) as ckpt:
        assert gc.isenabled()
        ckpt.save(1).wait()
        assert gc.isenabled()
    assert part.enabled == [False, False]  # of the look at the state, and of the save
    assert not part.collections


def test_who_collects_by_hand_goes_on_to() -> None:
    with checkpointer(Crowd()) as ckpt:
        gc.disable()
        try:
            ckpt.save(1).wait()
            assert not gc.isenabled()
        finally:
            gc.enable()


def test_nothing_is_collected_while_a_load_is_matched(monkeypatch: pytest.MonkeyPatch) -> None:
    enabled: list[bool] = []

    def noted(*given: Any, **keywords: Any) -> Any:
        enabled.append(gc.isenabled())
        return fit(*given, **keywords)

    monkeypatch.setattr("dist_ckpt.loading.loader.fit", noted)
    with checkpointer(Crowd()) as ckpt:
        ckpt.save(1).wait()
        assert ckpt.restore() == 1
    assert enabled == [False]
    assert gc.isenabled()


def test_a_save_that_fails_lets_it_begin_again() -> None:
    with checkpointer(Crowd(broken=True)) as ckpt:
        with pytest.raises(RuntimeError, match="broken on purpose"):
            ckpt.save(1)
        assert gc.isenabled()
