"""Signals in processes that were forked from one that listens, and after the listening is over."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import pytest

from dist_ckpt.training.trigger import SignalNote

Handler = Callable[[int, FrameType | None], object] | int | None


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    found = {each: signal.getsignal(each) for each in (signal.SIGTERM, signal.SIGINT)}
    yield
    for each, handler in found.items():
        signal.signal(each, handler)


def end_of_child(work: Callable[[], object]) -> int:
    """Fork, do `work` in the child, and return how that ended; 42 where it came to its end."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except KeyboardInterrupt:
            os._exit(43)
        finally:
            os._exit(42)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def test_a_child_dies_of_sigterm_as_it_would_without_us() -> None:
    note = SignalNote([signal.SIGTERM])
    assert end_of_child(terminate) == -signal.SIGTERM
    terminate()
    assert note.take() == "SIGTERM", "and the parent still listens"
    note.close()


def test_a_child_is_interrupted_at_once() -> None:
    note = SignalNote([signal.SIGINT])
    assert end_of_child(lambda: os.kill(os.getpid(), signal.SIGINT)) == 43
    note.close()


def test_a_child_has_the_handler_of_the_program() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    note = SignalNote([signal.SIGTERM])

    def check() -> None:
        terminate()
        os._exit(len(heard))

    assert end_of_child(check) == 1
    note.close()


def test_a_child_ignores_what_the_program_ignored() -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    note = SignalNote([signal.SIGTERM])
    assert end_of_child(terminate) == 42
    note.close()


def test_several_that_listen_are_all_undone_in_a_child() -> None:
    notes = [SignalNote([signal.SIGTERM]) for _ in range(3)]
    assert end_of_child(terminate) == -signal.SIGTERM
    for note in notes:  # not in the order of a stack
        note.close()
    assert end_of_child(terminate) == -signal.SIGTERM


def test_a_handler_of_the_program_that_calls_ours_does_no_harm_in_a_child() -> None:
    note = SignalNote([signal.SIGTERM])
    ours = signal.getsignal(signal.SIGTERM)
    assert callable(ours)
    signal.signal(signal.SIGTERM, lambda number, frame: ours(number, frame))
    assert end_of_child(terminate) == -signal.SIGTERM
    terminate()
    assert note.take() == "SIGTERM"
    note.close()


def told(caplog: pytest.LogCaptureFixture) -> list[str]:
    """Return what was said of signals: threads of earlier tests may say something else."""
    return [each for each in caplog.messages if each.startswith("policy.on_signal")]


def test_a_handler_that_took_our_place_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    note = SignalNote([signal.SIGTERM, signal.SIGINT])
    note.take()
    assert told(caplog) == []
    signal.signal(signal.SIGTERM, handler_of_the_program)
    note.take()
    note.take()
    (said,) = told(caplog)
    assert "SIGTERM is handled by handler_of_the_program" in said
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    note.take()
    assert "SIGINT is ignored" in told(caplog)[1]
    note.close()
    note.take()
    assert len(told(caplog)) == 2
    assert signal.getsignal(signal.SIGTERM) is handler_of_the_program


def test_another_listener_that_calls_ours_is_nothing_to_tell(
    caplog: pytest.LogCaptureFixture,
) -> None:
    notes = [SignalNote([signal.SIGTERM]) for _ in range(3)]
    terminate()
    assert [note.take() for note in notes] == ["SIGTERM"] * 3
    notes[2].close()
    assert [note.take() for note in notes] == [""] * 3
    assert told(caplog) == []
    for note in notes:
        note.close()


def handler_of_the_program(number: int, frame: FrameType | None) -> None:
    """Take the place of ours, and call nobody."""


def test_a_child_that_was_forked_on_another_thread() -> None:
    note = SignalNote([signal.SIGTERM])
    ends: list[int] = []
    thread = threading.Thread(target=lambda: ends.append(end_of_child(terminate)))
    thread.start()
    thread.join()
    assert ends == [-signal.SIGTERM]
    note.close()


def test_the_child_of_a_child() -> None:
    note = SignalNote([signal.SIGTERM])
    assert end_of_child(lambda: os._exit(-end_of_child(terminate))) == signal.SIGTERM
    note.close()


def wait_for_ever() -> None:
    threading.Event().wait()


def test_a_process_that_multiprocessing_forked_is_terminated() -> None:
    note = SignalNote([signal.SIGTERM])
    child = multiprocessing.get_context("fork").Process(target=wait_for_ever, daemon=True)
    child.start()
    child.terminate()
    child.join()
    assert child.exitcode == -signal.SIGTERM
    note.close()


def test_who_goes_on_in_a_child_is_heard_there() -> None:
    """A program that makes itself a daemon trains in a child."""
    note = SignalNote([signal.SIGTERM])

    def train() -> None:
        note.take()
        terminate()
        os._exit(7 if note.take() == "SIGTERM" else 8)

    assert end_of_child(train) == 7
    note.close()


def test_after_a_close_on_another_thread_signals_do_what_they_did_before() -> None:
    heard: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, frame: heard.append(number))
    note = SignalNote([signal.SIGTERM])
    thread = threading.Thread(target=note.close)
    thread.start()
    thread.join()
    terminate()
    assert (heard, note.take()) == ([signal.SIGTERM], "")
    signal.signal(signal.SIGTERM, signal.SIG_DFL)

    def closed_elsewhere() -> None:
        other = SignalNote([signal.SIGTERM])
        closing = threading.Thread(target=other.close)
        closing.start()
        closing.join()
        terminate()

    assert end_of_child(closed_elsewhere) == -signal.SIGTERM
