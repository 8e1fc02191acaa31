"""The rank runner: results, failures, deaths and hangs of real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from dist_ckpt.errors import CoordinationError, ErrorKind, UsageError
from dist_ckpt.testing.ranks import ranks, run_ranks

# ------------------------------------------------------------------ what ranks run


def _sum_of_ranks(plus: int) -> tuple[int, int, int]:
    total = torch.tensor([dist.get_rank() + plus])
    dist.all_reduce(total)
    return dist.get_rank(), dist.get_world_size(), int(total)


def _facts() -> tuple[int, int, str, str, str]:
    return (
        os.getpid(),
        torch.get_num_threads(),
        os.environ["RANK"] + os.environ["WORLD_SIZE"],
        os.environ.get("DIST_CKPT_TEST_COLOUR", ""),
        str(Path.cwd()),
    )


def _double(tensor: torch.Tensor) -> torch.Tensor:
    return tensor * 2


def _fail_on(rank: int) -> None:
    if dist.get_rank() == rank:
        raise ValueError("the disk is made of cheese")
    dist.barrier()


def _fail_alone(rank: int) -> str:
    if dist.get_rank() == rank:
        raise ValueError("the disk is made of cheese")
    return "fine"


def _leave(status: int) -> None:
    os._exit(status)


def _say_exit() -> None:
    sys.exit("enough")


def _die(rank: int, how: int) -> int:
    if dist.get_rank() == rank:
        os.kill(os.getpid(), how)
    return dist.get_rank()


def _hang_on(rank: int) -> None:
    if dist.get_rank() == rank:
        _wait_for_ever()


def _wait_for_ever() -> None:
    threading.Event().wait()


def _leave_thread_behind() -> None:
    threading.Thread(target=_wait_for_ever).start()


def _lose_thread() -> None:
    thread = threading.Thread(target=_fail_in_thread, name="writer")
    thread.start()
    thread.join()


def _fail_in_thread() -> None:
    raise RuntimeError("the writer broke its pencil")


def _unpicklable_result() -> object:
    return threading.Lock()


# ------------------------------------------------------------------ results


@pytest.mark.parametrize("n", [1, 2, 4])
def test_results_come_back_by_rank(n: int) -> None:
    total = n * (n - 1) // 2 + 10 * n
    assert run_ranks(n, _sum_of_ranks, 10) == [(rank, n, total) for rank in range(n)]


def test_rank_has_a_process_and_the_callers_surroundings(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("DIST_CKPT_TEST_COLOUR", "green")
    monkeypatch.chdir(tmp_path)
    found = run_ranks(2, _facts)
    assert len({pid for pid, *_ in found} | {os.getpid()}) == 3
    assert [rest for _, *rest in found] == [
        [1, "02", "green", str(tmp_path)],
        [1, "12", "green", str(tmp_path)],
    ]


def test_tensors_travel_both_ways() -> None:
    tensor = torch.arange(100_000, dtype=torch.float32)
    for result in run_ranks(2, _double, tensor):
        assert torch.equal(result, tensor * 2)


@ranks(2)
def test_decorated_test_runs_on_ranks(tmp_path: Path) -> None:
    (tmp_path / str(dist.get_rank())).touch()
    dist.barrier()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


@pytest.mark.parametrize("word", ["one", "two"])
@ranks(2, timeout_seconds=600)
def test_decorated_test_takes_parameters(word: str) -> None:
    words: list[object] = [None, None]
    dist.all_gather_object(words, word)
    assert words == [word, word]


@ranks(2)
def _failing_body(rank: int) -> None:
    _fail_on(rank)


def test_decorated_failure_reaches_the_caller() -> None:
    with pytest.raises(CoordinationError, match="made of cheese"):
        _failing_body(0)


# ------------------------------------------------------------------ failures


def test_exception_names_the_rank_and_has_its_traceback() -> None:
    with pytest.raises(CoordinationError) as caught:
        run_ranks(3, _fail_alone, 1)
    assert caught.value.ranks == {1: "ValueError: the disk is made of cheese"}
    assert caught.value.kind is ErrorKind.PEER_FAILED
    assert "1 of 3 ranks failed" in caught.value.message
    assert "in _fail_alone" in caught.value.message


def test_peers_of_a_failed_rank_do_not_hang() -> None:
    # Rank 0 waits in a barrier that rank 1 never reaches.
    with pytest.raises(CoordinationError) as caught:
        run_ranks(2, _fail_on, 1)
    assert "made of cheese" in caught.value.ranks[1]
    assert sorted(caught.value.ranks) == [0, 1]


def test_exit_is_a_failure() -> None:
    with pytest.raises(CoordinationError) as caught:
        run_ranks(2, _leave, 3)
    assert caught.value.ranks == {0: "exited with status 3", 1: "exited with status 3"}
    with pytest.raises(CoordinationError, match="SystemExit: enough"):
        run_ranks(1, _say_exit)


def test_lost_thread_is_a_failure() -> None:
    with pytest.raises(CoordinationError, match="thread writer") as caught:
        run_ranks(1, _lose_thread)
    assert "broke its pencil" in caught.value.message


def test_result_that_does_not_pickle_is_a_failure() -> None:
    with pytest.raises(CoordinationError, match="result does not pickle"):
        run_ranks(1, _unpicklable_result)


# ------------------------------------------------------------------ deaths and hangs


def test_unexpected_death_names_the_signal() -> None:
    with pytest.raises(CoordinationError) as caught:
        run_ranks(2, _die, 1, signal.SIGKILL)
    assert caught.value.ranks == {1: "was killed by SIGKILL"}


def test_crash_shows_where() -> None:
    with pytest.raises(CoordinationError, match="SIGSEGV") as caught:
        run_ranks(1, _die, 0, signal.SIGSEGV)
    assert "in _die" in caught.value.message


def test_expected_death_leaves_the_other_results() -> None:
    results = run_ranks(3, _die, 1, signal.SIGKILL, expect_killed={1})
    assert results == [0, None, 2]


def test_expected_death_that_does_not_come_is_a_failure() -> None:
    with pytest.raises(CoordinationError) as caught:
        run_ranks(2, _die, 5, signal.SIGKILL, expect_killed={0})
    assert caught.value.ranks == {0: "returned, though a signal was to end it"}


def test_hang_is_dumped_killed_and_named(capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(CoordinationError) as caught:
        run_ranks(2, _hang_on, 1, timeout_seconds=15)
    assert caught.value.ranks == {1: "did not finish in time and was stopped"}
    assert caught.value.kind is ErrorKind.TIMEOUT
    assert "in _wait_for_ever" in caught.value.message
    assert "in _wait_for_ever" in capfd.readouterr().err


def test_thread_left_behind_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_ckpt.testing.ranks.EXIT_SECONDS", 2.0)
    with pytest.raises(CoordinationError, match="does one of its threads still run"):
        run_ranks(1, _leave_thread_behind)


def test_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    with pytest.raises(CoordinationError):
        run_ranks(2, _die, 0, signal.SIGKILL)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------ wrong calls


def test_wrong_calls_are_refused() -> None:
    def inner() -> None:
        """A function that no other process can import."""

    with pytest.raises(UsageError, match="at least one rank"):
        run_ranks(0, _facts)
    with pytest.raises(UsageError, match="top level of an importable module"):
        run_ranks(1, inner)
    with pytest.raises(UsageError, match="argument of _double does not pickle"):
        run_ranks(1, _double, threading.Lock())


def test_import_of_the_package_for_testing_is_light() -> None:
    code = "import sys, dist_ckpt.testing; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
