"""Files are written as they get ready; what goes wrong in the middle leaves no checkpoint."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.dcp.writer import BoxCopy
from dist_ckpt.engine import file_writer
from dist_ckpt.engine.stager import Stager
from dist_ckpt.errors import CoordinationError
from dist_ckpt.format.digest import block_digests
from dist_ckpt.repository import Repository
from dist_ckpt.storage.base import Buffer
from dist_ckpt.storage.memory import MemoryStore

_LIMIT_SECONDS = 60.0
_names = itertools.count()


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-inbox-{next(_names)}")


def state() -> dict[str, Any]:
    return {"first": {"w": torch.ones(1000)}, "second": {"w": torch.zeros(1000)}}


def before_the_second_copy(patch: pytest.MonkeyPatch, do: Any) -> None:
    """Call `do` on the training thread when one file is complete and the next is not."""
    copy = Stager._copy
    calls = itertools.count()

    def interposed(self: Stager, copies: Sequence[BoxCopy], local: Any) -> None:
        if next(calls) == 1:
            do()
        copy(self, copies, local)

    patch.setattr(Stager, "_copy", interposed)


def test_a_file_is_durable_before_the_next_is_staged(monkeypatch: pytest.MonkeyPatch) -> None:
    written = threading.Event()

    def listen(event: events.Event) -> None:
        if isinstance(event, events.FileWritten) and "first." in event.key:
            written.set()

    leave = events.subscribe(listen)
    found: list[bool] = []
    before_the_second_copy(monkeypatch, lambda: found.append(written.wait(_LIMIT_SECONDS)))
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
    leave()
    assert found == [True]
    assert Repository(store).verify(1).ok


class Broken(RuntimeError):
    """What a copy may raise."""


def test_nothing_is_digested_while_the_training_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    digested: list[int] = []

    def noted(buffer: Any) -> bytes:
        digested.append(len(buffer))
        return block_digests(buffer)

    monkeypatch.setattr(file_writer, "block_digests", noted)
    written = threading.Semaphore(0)

    def listen(event: events.Event) -> None:
        if isinstance(event, events.FileWritten):
            written.release()

    leave = events.subscribe(listen)
    found: list[int] = []

    def look() -> None:
        # The values and the first part: both are durable, and no digest was taken yet.
        assert all(written.acquire(timeout=_LIMIT_SECONDS) for _ in range(2))
        found.append(len(digested))

    before_the_second_copy(monkeypatch, look)
    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
    leave()
    assert found == [0]
    assert len(digested) == 3
    assert Repository(store).verify(1).ok


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
    store = Scribbler(f"unit-inbox-{next(_names)}")
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        ckpt.save(1).wait()
    assert store.refused == 3
    assert Repository(store).verify(1).ok


def test_a_copy_that_fails_after_a_file_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise Broken("a device is gone")

    store = new_store()
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        with monkeypatch.context() as patch:
            before_the_second_copy(patch, fail)
            with pytest.raises(CoordinationError, match="Broken: a device is gone"):
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
            before_the_second_copy(patch, interrupt)
            with pytest.raises(KeyboardInterrupt):
                ckpt.save(1)
        # Reported like any failure, so that no rank waits for this one; told at the next call.
        with pytest.raises(CoordinationError, match="rank 0: KeyboardInterrupt"):
            ckpt.wait()
        ckpt.save(2).wait()
    assert Repository(store).steps() == [2]
