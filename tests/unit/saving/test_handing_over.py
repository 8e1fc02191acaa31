"""From the training thread to the writer; what goes wrong in between leaves no checkpoint."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.repository import Repository
from dist_ckpt.staging.arena import HostCopies
from dist_ckpt.storage.base import Buffer
from dist_ckpt.storage.memory import MemoryStore

_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-handing-{next(_names)}")


def state() -> dict[str, Any]:
    return {"first": {"w": torch.ones(1000)}, "second": {"w": torch.zeros(1000)}}


def before_the_copy(patch: pytest.MonkeyPatch, do: Callable[[], object]) -> None:
    """Call `do` on the training thread when nothing is staged yet but the values."""
    copy = HostCopies.copy

    def interposed(self: HostCopies, *pairs: Sequence[torch.Tensor]) -> None:
        do()
        copy(self, *pairs)

    patch.setattr(HostCopies, "copy", interposed)


def test_the_training_thread_is_let_go_before_anything_is_written() -> None:
    """What is written meanwhile would take memory bandwidth from the copies it waits for."""
    threads: list[str] = []

    class Noting(MemoryStore):
        def put(self, key: str, buffers: Sequence[Buffer], **how: Any) -> None:
            if key.endswith(".safetensors"):
                assert staged.is_set()
                threads.append(threading.current_thread().name)
            super().put(key, buffers, **how)

    staged = threading.Event()
    leave = events.subscribe(
        lambda event: staged.set() if isinstance(event, events.SaveStaged) else None
    )
    store = Noting(f"unit-handing-{next(_names)}")
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
    leave()
    assert len(threads) == 3
    assert threading.current_thread().name not in threads


class Broken(RuntimeError):
    """What a copy may raise."""


class Scribbler(MemoryStore):
    """A store that would change what it is given to store, if it could."""

    refused = 0

    def put(self, key: str, buffers: Sequence[Buffer], **how: Any) -> None:
        for buffer in buffers if ".safetensors" in key else ():
            with pytest.raises(TypeError, match="read-only"):
                memoryview(buffer)[-1:] = b"!"
            self.refused += 1
        super().put(key, buffers, **how)


def test_a_store_cannot_change_what_is_being_digested() -> None:
    store = Scribbler(f"unit-handing-{next(_names)}")
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
    assert store.refused == 3
    assert Repository(store).verify(1).ok


def test_a_copy_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Broken("a device is gone")

    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        with monkeypatch.context() as patch:
            before_the_copy(patch, fail)
            with pytest.raises(Broken, match="a device is gone"):
                ckpt.save(1).wait()
        assert Repository(store).steps() == []
        ckpt.save(2).wait()
    assert Repository(store).steps() == [2]


def test_an_interrupt_while_staging_ends_the_save_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        with monkeypatch.context() as patch:
            before_the_copy(patch, interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(1)
        # Reported like any failure, so that no rank waits for this one; here it was told already.
        ckpt.wait()
        ckpt.save(2).wait()
    assert Repository(store).steps() == [2]
