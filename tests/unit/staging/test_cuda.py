"""The order of what is asked of a CUDA device, noted by one that is not there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ckpt.errors import UsageError
from dist_ckpt.staging import arena
from dist_ckpt.staging.arena import Arena, CudaCopies, engine_for, pin_for

DEVICE = torch.device("cuda", 3)


class Device:
    """Stands for torch.cuda; copies are done at once, on the processor."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.current = "0"
        self.register_code = 0

    def note(self, call: str) -> None:
        self.calls.append(call)

    def end(self, name: str, done: Any) -> Any:
        self.note(f"end of {name}")
        return done

    def stream_of(self, name: str) -> Any:
        done = SimpleNamespace(synchronize=lambda: self.note("host waits for the copies"))
        return SimpleNamespace(
            wait_stream=lambda other: self.note(f"{name} waits for {other.name}"),
            wait_event=lambda event: self.note(f"{name} waits for the copies"),
            record_event=lambda: self.end(name, done),
            name=name,
        )

    def install(self, patch: pytest.MonkeyPatch) -> None:
        @contextmanager
        def stream(used: Any) -> Iterator[None]:
            self.note(f"on {used.name}:")
            yield

        @contextmanager
        def device(used: torch.device) -> Iterator[None]:
            before, self.current = self.current, str(used.index)
            yield
            self.current = before

        def register(address: int, nbytes: int, flags: int) -> int:
            self.note(f"pin {nbytes} bytes with device {self.current}")
            return self.register_code

        def unregister(address: int) -> int:
            self.note("unpin")
            return 0

        runtime = SimpleNamespace(cudaHostRegister=register, cudaHostUnregister=unregister)
        patch.setattr(torch.cuda, "Stream", lambda used: self.stream_of("side"))
        patch.setattr(torch.cuda, "current_stream", lambda used: self.stream_of("training"))
        patch.setattr(torch.cuda, "stream", stream)
        patch.setattr(torch.cuda, "device", device)
        patch.setattr(torch.cuda, "cudart", lambda: runtime)
        patch.setattr(
            torch.Tensor, "record_stream", lambda tensor, used: self.note(f"keep for {used.name}")
        )


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    made = Device()
    made.install(monkeypatch)
    return made


def test_copies_come_after_what_was_enqueued_and_before_what_steps(device: Device) -> None:
    engine = engine_for(DEVICE)
    assert isinstance(engine, CudaCopies)
    targets = [torch.zeros(3), torch.zeros(2)]
    copying = engine.prepare(targets, [torch.ones(3), torch.ones(2)], ["a", "b"])
    copying.before_change()
    assert device.calls == [], "nothing is begun"
    copying.begin()
    copying.before_change()
    copying.wait()
    assert device.calls == [
        "side waits for training",
        "on side:",
        "keep for side",
        "keep for side",
        "end of side",
        "training waits for the copies",  # and not the host
        "host waits for the copies",
        "on side:",  # what was summed up is compared there
    ]
    assert all(bool(target.all()) for target in targets)


def test_a_copy_that_cannot_be_enqueued_still_guards_those_that_were(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: Any, **kwargs: Any) -> None:
        raise RuntimeError("out of memory")

    monkeypatch.setattr(arena, "copy_all", broken)
    copying = CudaCopies(DEVICE).prepare([torch.zeros(3)], [torch.ones(3)], ["w"])
    with pytest.raises(RuntimeError, match="out of memory"):
        copying.begin()
    copying.before_change()
    assert device.calls[2:] == ["keep for side", "end of side", "training waits for the copies"]


@pytest.mark.parametrize("when", ["before its copy", "after its copy"])
def test_what_changes_beside_the_copies_fails_the_save_by_its_name(
    device: Device, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    sources = [torch.ones(3), torch.ones(2)]
    original = arena.copy_all

    def beside(*args: Any, **kwargs: Any) -> None:
        if when == "after its copy":
            original(*args, **kwargs)
        sources[1].data.clamp_(5, 6)
        if when == "before its copy":
            original(*args, **kwargs)

    monkeypatch.setattr(arena, "copy_all", beside)
    copying = CudaCopies(DEVICE).prepare([torch.zeros(3), torch.zeros(2)], sources, ["a", "b"])
    copying.begin()
    for _ in range(2):
        with pytest.raises(UsageError, match=r"^b was changed between the save and the next step"):
            copying.wait()


def test_memory_is_pinned_on_the_device_that_copies_and_not_on_the_first(device: Device) -> None:
    arena = Arena()
    arena.reset(8192, pin=pin_for(DEVICE))
    assert device.calls == ["pin 8192 bytes with device 3"]
    arena.release()
    assert device.calls[1:] == ["unpin"]


def test_memory_that_the_system_does_not_pin_is_reported_and_used(
    device: Device, caplog: pytest.LogCaptureFixture
) -> None:
    device.register_code = 304
    arena = Arena()
    arena.reset(8192, pin=pin_for(DEVICE))
    arena.release()
    assert "error 304" in caplog.text
    assert "unpin" not in device.calls
