"""Copies into host memory: whatever the sources look like, and beside what else happens."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from dist_ckpt.staging.arena import HostCopies, InFlight, hold_steps, release_steps
from dist_ckpt.testing.ranks import run_ranks


class Gate:
    """Copies that take as long as a test wants."""

    def __init__(self, error: Exception | None = None) -> None:
        self.open = threading.Event()
        self.reached = threading.Event()
        self.error = error

    def copy(self, *args: object, **kwargs: object) -> None:
        self.reached.set()
        self.open.wait()
        if self.error is not None:
            raise self.error


@pytest.fixture
def gated(monkeypatch: pytest.MonkeyPatch) -> Callable[..., InFlight]:
    """Return what begins copies that a gate holds back."""
    original = torch._foreach_copy_

    def begin(gate: Gate, *pair: torch.Tensor) -> InFlight:
        def copy(targets: list[torch.Tensor], sources: list[torch.Tensor], **kwargs: bool) -> None:
            gate.copy()
            original(targets, sources, **kwargs)

        monkeypatch.setattr(torch, "_foreach_copy_", copy)
        target, source = pair or (torch.zeros(3), torch.ones(3))
        copying = HostCopies().prepare([target], [source], ["w"])
        copying.begin()
        gate.reached.wait()
        return copying

    return begin


SOURCES: dict[str, Callable[[], torch.Tensor]] = {
    "strided": lambda: torch.arange(40.0).reshape(5, 8)[::2, 1::3],
    "transposed": lambda: torch.arange(40.0).reshape(5, 8).t(),
    "expanded": lambda: torch.arange(5.0)[:, None].expand(5, 8),
    "channels last": lambda: torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "scalar": lambda: torch.tensor(2.5),
    "conjugate": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj(),
    "parameter": lambda: torch.nn.Parameter(torch.rand(7)),
    "bfloat16": lambda: torch.rand(9).bfloat16(),
}


@pytest.mark.parametrize("beside", [False, True])
def test_every_source_becomes_its_values_in_order(*, beside: bool) -> None:
    sources = [make() for make in SOURCES.values()]
    targets = [
        torch.zeros(each.shape, dtype=each.dtype)
        if each.is_complex()
        else torch.full(each.shape, -1.0, dtype=each.dtype)
        for each in sources
    ]
    if beside:
        copying = HostCopies().prepare(targets, sources, list(SOURCES))
        copying.begin()
        copying.wait()
    else:
        HostCopies().copy(targets, sources)
    for name, target, source in zip(SOURCES, targets, sources, strict=True):
        assert torch.equal(target, source), name
        assert target.is_contiguous(), name
        assert not target.requires_grad, name


class Opening:
    """Copies that are let go on only by a step that waits for them."""

    def __init__(self, gate: Gate, inner: InFlight) -> None:
        self.gate = gate
        self.begin = inner.begin
        self.wait = inner.wait
        self._inner = inner

    def before_change(self) -> None:
        self.gate.open.set()
        self._inner.before_change()


def test_a_step_changes_nothing_before_the_copies_are_done(
    gated: Callable[..., InFlight],
) -> None:
    gate = Gate()
    parameter = torch.nn.Parameter(torch.ones(3))
    parameter.grad = torch.ones(3)
    target = torch.zeros(3)
    copies = [Opening(gate, gated(gate, target, parameter))]
    hold_steps(copies)
    # Not one that anybody registered: whoever steps may step what is being copied.
    torch.optim.SGD([parameter], lr=1.0).step()
    gate.open.set()
    copies[0].wait()
    assert torch.equal(parameter.detach(), torch.zeros(3))
    assert torch.equal(target, torch.ones(3)), "as it was before the step"
    release_steps(copies)


@pytest.mark.filterwarnings("ignore:.*script_method.*:DeprecationWarning")
def test_a_compiled_step_waits_too(gated: Callable[..., InFlight]) -> None:
    parameter = torch.nn.Parameter(torch.zeros(3))
    step: Any = torch.compile(torch.optim.SGD([parameter], lr=1.0).step, backend="eager")
    for saving in (False, True, False, True):  # compiled where nothing is in flight
        gate = Gate()
        target = torch.full((3,), 7.0)
        before = parameter.detach().clone()
        copies = [Opening(gate, gated(gate, target, parameter))]
        if saving:
            hold_steps(copies)
        parameter.grad = torch.ones(3)
        step()
        assert torch.equal(parameter.detach(), before - 1)
        gate.open.set()
        copies[0].wait()
        if saving:
            assert torch.equal(target, before), "as it was before the step"
            release_steps(copies)


def test_a_copy_that_fails_tells_who_waits_and_lets_steps_go_on(
    gated: Callable[..., InFlight],
) -> None:
    gate = Gate(OSError("a page that cannot be read"))
    copies = [gated(gate)]
    hold_steps(copies)
    gate.open.set()
    parameter = torch.nn.Parameter(torch.zeros(3))
    parameter.grad = torch.ones(3)
    torch.optim.SGD([parameter], lr=1.0).step()
    assert torch.equal(parameter.detach(), -torch.ones(3))
    for _ in range(2):
        with pytest.raises(OSError, match="cannot be read"):
            copies[0].wait()
    release_steps(copies)


def test_without_a_thread_the_copy_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    target = torch.zeros(3)
    copying = HostCopies().prepare([target], [torch.ones(3)], ["w"])
    copying.begin()
    copying.before_change()
    copying.wait()
    assert torch.equal(target, torch.ones(3))


def fork_while_copying() -> int:
    gate = Gate()
    original = torch._foreach_copy_
    torch._foreach_copy_ = gate.copy
    copying = HostCopies().prepare([torch.zeros(3)], [torch.ones(3)], ["w"])
    copying.begin()
    hold_steps([copying])
    gate.reached.wait()
    child = os.fork()
    if child == 0:
        # The thread is not here: whoever waited for it would wait for ever.
        torch._foreach_copy_ = original
        parameter = torch.nn.Parameter(torch.zeros(3))
        parameter.grad = torch.ones(3)
        torch.optim.SGD([parameter], lr=1.0).step()
        copying.wait()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    gate.open.set()
    copying.wait()
    return os.waitstatus_to_exitcode(status)


def test_a_forked_process_does_not_wait_for_its_parents_copies() -> None:
    assert run_ranks(1, fork_while_copying) == [0]


def exported() -> torch.Tensor:
    made = torch.ones(3)
    made.numpy()  # somebody may write to it past torch from now on
    return made


def shared() -> torch.Tensor:
    made = torch.ones(3)
    made.share_memory_()  # type: ignore[no-untyped-call]
    return made


WRITES: dict[str, Callable[[torch.Tensor], object]] = {
    "in place": lambda source: source.fill_(2),
    "through .data": lambda source: source.data.clamp_(5, 6),
    "through a view": lambda source: source.view(-1)[1:].zero_(),
    "resized to nothing": lambda source: source.untyped_storage().resize_(0),
    "exchanged": lambda source: setattr(source, "data", torch.zeros(3)),
    "an optimizer of its own": lambda source: torch._foreach_add_([source], 1.0),
    "numpy, later": lambda source: source.numpy().fill(4),
    "numpy, before": lambda source: source.numpy().fill(4),
    "another process": lambda source: source.fill_(2),
}

MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "numpy, before": exported,
    "another process": shared,
}


@pytest.mark.parametrize("write", WRITES)
def test_no_writer_reaches_a_copy_in_flight(gated: Callable[..., InFlight], write: str) -> None:
    gate = Gate()
    target = torch.zeros(3)
    source = MEMORY.get(write, lambda: torch.ones(3))()
    if write in MEMORY:
        gate.open.set()  # what torch cannot keep writers away from is copied at once
    copying = gated(gate, target, source)
    WRITES[write](source)
    gate.open.set()
    copying.wait()
    assert torch.equal(target, torch.ones(3))


def test_what_nobody_wrote_to_stays_where_it_is(gated: Callable[..., InFlight]) -> None:
    gate = Gate()
    source = torch.ones(3)
    address = source.data_ptr()
    copying = gated(gate, torch.zeros(3), source)
    gate.open.set()
    copying.wait()
    source.add_(1)
    assert source.data_ptr() == address
