"""The background thread: one job after another, and another thread when one is lost."""

from __future__ import annotations

import gc
import os
import sys
import threading
import weakref

import pytest

from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.threads import WriterThread, in_parallel


def thread_of(writer: WriterThread) -> threading.Thread:
    found: list[threading.Thread] = []
    writer.submit(lambda: found.append(threading.current_thread()))
    assert writer.wait_idle()
    return found[0]


def test_jobs_run_in_order_on_one_thread_that_is_a_daemon() -> None:
    writer = WriterThread()
    assert writer.wait_idle(0), "idle before the first job"
    done: list[int] = []
    first = thread_of(writer)
    for number in range(5):
        writer.submit(lambda number=number: done.append(number))  # type: ignore[misc]
    assert writer.wait_idle()
    assert done == [0, 1, 2, 3, 4]
    assert thread_of(writer) is first
    assert first.daemon
    writer.stop()
    first.join()


def test_a_job_that_hangs_is_left_behind() -> None:
    writer = WriterThread()
    hung, release = threading.Event(), threading.Event()
    lost: list[threading.Thread] = []

    def hang() -> None:
        lost.append(threading.current_thread())
        hung.set()
        release.wait()

    writer.submit(hang)
    hung.wait()
    assert not writer.wait_idle(0.01)
    writer.abandon()
    assert writer.wait_idle(0)
    second = thread_of(writer)
    assert second is not lost[0]
    release.set()
    lost[0].join()  # it ends, and takes no other job
    assert second.is_alive()
    writer.stop()
    second.join()


def test_a_stopped_thread_finishes_its_job() -> None:
    writer = WriterThread()
    release = threading.Event()
    done: list[bool] = []
    writer.submit(lambda: done.append(release.wait()))
    writer.stop()
    release.set()
    assert writer.wait_idle()
    assert done == [True]
    thread_of(writer)
    writer.stop()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_died_is_replaced() -> None:
    writer = WriterThread()
    first = thread_of(writer)

    def die() -> None:
        raise SystemExit

    writer.submit(die)
    assert writer.wait_idle()
    first.join()
    assert thread_of(writer) is not first
    writer.stop()


def priority() -> int:
    return os.getpriority(os.PRIO_PROCESS, threading.get_native_id())


@pytest.mark.skipif(sys.platform != "linux", reason="a thread has no priority of its own")
def test_it_leaves_the_processors_to_the_training() -> None:
    writer = WriterThread()
    found: list[int] = []

    def work() -> None:
        found.append(priority())
        in_parallel(lambda _: found.append(priority()), range(8), threads=3)

    before = priority()
    writer.submit(work)
    assert writer.wait_idle()
    writer.stop()
    # Whoever it starts to help it is as humble.
    assert set(found) == {max(10, before)}
    assert len(found) == 9
    assert priority() == before


def test_a_priority_that_is_refused_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: int) -> None:
        raise PermissionError("not in this sandbox")

    monkeypatch.setattr(os, "setpriority", refuse)
    writer = WriterThread()
    assert thread_of(writer).is_alive()
    writer.stop()


class Heavy:
    def run(self) -> None:
        pass


def test_what_a_job_looked_at_is_let_go() -> None:
    writer = WriterThread()
    heavy = Heavy()
    alive = weakref.ref(heavy)
    writer.submit(heavy.run)
    assert writer.wait_idle()
    thread = thread_of(writer)  # a second job: the first is certainly over
    del heavy
    gc.collect()
    assert alive() is None
    writer.stop()
    thread.join()


def test_the_thread_ends_with_an_owner_that_forgot_to_stop_it() -> None:
    writer = WriterThread()
    thread = thread_of(writer)
    del writer
    gc.collect()
    thread.join()
    assert not thread.is_alive()


def fork_and_save() -> int:
    writer = WriterThread()
    parents = thread_of(writer)
    child = os.fork()
    if child == 0:
        # The thread did not come along: a job for it would wait for ever.
        os._exit(0 if thread_of(writer) is not parents else 1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_forked_process_gets_a_thread_of_its_own() -> None:
    assert run_ranks(1, fork_and_save) == [0]
