"""Work shared out over threads: all of it is done, or its failure is heard, and no thread stays."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest

from dist_ckpt.storage.parallel import in_parallel


@pytest.mark.parametrize("threads", [1, 2, 8])
@pytest.mark.parametrize("count", [0, 1, 7, 100])
def test_every_item_is_done_once(count: int, threads: int) -> None:
    done: list[int] = []
    before = threading.active_count()
    in_parallel(done.append, range(count), threads=threads)
    assert sorted(done) == list(range(count))
    assert threading.active_count() == before


def test_threads_work_at_the_same_time() -> None:
    # Nobody comes through before all four are there.
    barrier = threading.Barrier(4, timeout=60)

    def work(_: int) -> None:
        barrier.wait()

    in_parallel(work, range(4), threads=4)


def test_a_generator_is_never_entered_twice() -> None:
    inside = threading.Lock()

    def items() -> Iterator[int]:
        for number in range(200):
            assert inside.acquire(blocking=False)
            inside.release()
            yield number

    done: list[int] = []
    in_parallel(done.append, items(), threads=8)
    assert sorted(done) == list(range(200))


@pytest.mark.parametrize("failing", [0, 3, 9])
def test_a_failure_in_any_thread_is_raised_and_ends_the_rest(failing: int) -> None:
    begun: list[int] = []

    def work(number: int) -> None:
        begun.append(number)
        if number == failing:
            raise OSError(number, "broken")

    before = threading.active_count()
    with pytest.raises(OSError, match="broken"):
        in_parallel(work, range(100_000), threads=4)
    assert failing in begun
    assert len(begun) < 100_000
    assert threading.active_count() == before


def test_a_failure_of_the_items_is_raised() -> None:
    def items() -> Iterator[int]:
        yield 1
        raise MemoryError("no more")

    with pytest.raises(MemoryError):
        in_parallel(lambda _: None, items(), threads=2)


def test_where_no_thread_can_be_had_the_caller_does_it_all(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def start(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    done: list[int] = []
    in_parallel(done.append, range(10), threads=8)
    assert done == list(range(10))


def test_an_interrupt_waits_for_the_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    interrupted, ended = threading.Event(), threading.Event()
    caller = threading.current_thread()
    real = threading.Thread.join

    def join(thread: threading.Thread, timeout: float | None = None) -> None:
        if not interrupted.is_set():
            interrupted.set()
            raise KeyboardInterrupt
        real(thread, timeout)

    def work(number: int) -> None:
        if threading.current_thread() is not caller:
            interrupted.wait(60)
            ended.set()

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "join", join)
        barrier = threading.Barrier(2, timeout=60)

        def both(number: int) -> None:
            barrier.wait()
            work(number)

        with pytest.raises(KeyboardInterrupt):
            in_parallel(both, range(2), threads=2)
    assert ended.is_set()
