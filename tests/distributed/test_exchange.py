"""Loads in which ranks read for one another: bytes, failures, and what is left behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import CheckpointError
from dist_ckpt.format.index import Held
from dist_ckpt.loading import reading
from dist_ckpt.loading.fetching import ReadOptions
from dist_ckpt.loading.filling import Wanted
from dist_ckpt.loading.reading import ReadResult
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.ranks.channels import SILENCE_SECONDS, running_loop
from dist_ckpt.ranks.rendezvous import join_job, training_store
from dist_ckpt.ranks.rounds import Deadline, Topic
from dist_ckpt.repository import Repository
from dist_ckpt.storage import LocalStore
from dist_ckpt.testing.ranks import ranks, run_ranks

ROWS, COLUMNS = 5 << 10, 1000  # 20 MB of float32: no row and no rank's share ends with a block
WHOLE = (0, 0, ROWS, COLUMNS)

Rectangle = tuple[int, int, int, int]
"""First row, first column, rows, columns."""


def weights() -> torch.Tensor:
    return torch.arange(ROWS * COLUMNS, dtype=torch.float32).reshape(ROWS, COLUMNS)


def save(folder: Path) -> str:
    place = str(folder / "run")
    dist_ckpt.save({"model": {"w": weights(), "b": torch.ones(7)}}, place, step=1)
    return place


def read(
    place: str,
    boxes: list[Rectangle],
    *,
    in_flight_bytes: int = 8 << 20,
    exchange: str = "auto",
    seconds: float = 40.0,
) -> tuple[list[torch.Tensor], ReadResult]:
    """Read boxes of the tensor, in float64, as a rank that wants them does."""
    source = Repository(LocalStore(place)).open(1)
    (number,) = (n for n, each in enumerate(source.index.tensors) if each.shape[1:] == (COLUMNS,))
    memory = [torch.zeros(box[2], box[3], dtype=torch.float64) for box in boxes]
    wanted = [
        Wanted(number, LocalBox(held(box), target), torch.float32)
        for box, target in zip(boxes, memory, strict=True)
    ]
    options = ReadOptions(exchange=exchange, in_flight_bytes=in_flight_bytes)  # type: ignore[arg-type]
    assert dist.group.WORLD is not None
    coordinator = join_job(dist.group.WORLD, timeout_seconds=600).training
    topic, deadline = Topic("read", f"load from {place}"), Deadline.after(seconds)
    with reading.JointRead(source, options, coordinator, topic, deadline=lambda: deadline) as joint:
        joint.agree(lambda: wanted)
        joint.begin()
        return memory, joint.read()


def held(box: Rectangle) -> Held:
    return Held("model", "w", "float32", (ROWS, COLUMNS), box[:2], box[2:])


def outcome(place: str, by_rank: list[list[Rectangle]], options: dict[str, object]) -> ReadResult:
    """Read, compare every element, and see that nothing is left behind."""
    boxes = by_rank[dist.get_rank()]
    running_loop()  # its thread stays
    threads = set(threading.enumerate())
    groups = len(dist.distributed_c10d._world.pg_map)
    memory, result = read(place, boxes, **options)  # type: ignore[arg-type]
    for target, (row, column, rows, columns) in zip(memory, boxes, strict=True):
        expected = weights()[row : row + rows, column : column + columns]
        assert torch.equal(target, expected.double())
    assert set(threading.enumerate()) <= threads
    assert len(dist.distributed_c10d._world.pg_map) == groups
    one = torch.ones(1)
    dist.all_reduce(one)
    assert one.item() == dist.get_world_size()
    return result


def thirds(rows: int) -> list[list[Rectangle]]:
    edges = [0, rows // 3, 2 * rows // 3, rows]
    return [[(edges[n], 0, edges[n + 1] - edges[n], COLUMNS)] for n in range(3)]


def test_what_several_ranks_want_is_read_once(tmp_path: Path) -> None:
    place = save(tmp_path)
    file = sum(each.stat().st_size for each in Path(place).rglob("model*.safetensors"))
    layouts: dict[str, list[list[Rectangle]]] = {
        "replicas": [[WHOLE]] * 3,
        "rows": thirds(ROWS),
        "columns": [[(0, 0, ROWS, 400)], [(0, 400, ROWS, 600)], []],
        "uneven": [[WHOLE], [(100, 3, 3000, 500), (4000, 0, 7, 9)], [(0, 0, 1, 1)]],
    }
    for name, by_rank in layouts.items():
        # A window holds less than there is, so that there are several. Of rows only two blocks are
        # needed twice: that alone would not be worth it.
        options = {"in_flight_bytes": 5 << 20, "exchange": "always"}
        results = run_ranks(3, outcome, place, by_rank, options)
        assert sum(each.nbytes_read for each in results) <= file, name
        assert all(each.exchanged for each in results), name
        assert sum(each.nbytes_exchanged for each in results) > 0
    apart = run_ranks(3, outcome, place, layouts["replicas"], {"exchange": "never"})
    assert all(each.nbytes_read >= 4 * ROWS * COLUMNS for each in apart)
    assert {each.nbytes_exchanged for each in apart} == {0}


def damaged(place: str) -> None:
    caught: CheckpointError | None = None
    try:
        read(place, [WHOLE])
    except CheckpointError as error:
        caught = error
    assert caught is not None
    for word in ("differs from its digest", "holds bytes of model/", "step 1", "model.r00000"):
        assert word in str(caught), str(caught)
    (rank,) = caught.ranks
    found: list[object] = [None] * dist.get_world_size()
    dist.all_gather_object(found, (str(caught), rank))
    assert len(set(found)) == 1


@ranks(3)
def on_three(place: str) -> None:
    damaged(place)


def test_a_damaged_block_is_everybodys_error_and_is_named(tmp_path: Path) -> None:
    place = save(tmp_path)
    (file,) = Path(place).rglob("model*.safetensors")
    with file.open("r+b") as opened:
        opened.seek((9 << 20) + 5)
        old = opened.read(1)[0]
        opened.seek(-1, os.SEEK_CUR)
        opened.write(bytes([old ^ 16]))
    on_three(place)


def dies(place: str) -> tuple[str, list[int]]:
    """Rank 1 is killed when all have read the first window and begin to exchange it."""
    if dist.get_rank() == 1:
        vars(reading)["swap"] = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
    try:
        read(place, [WHOLE], seconds=30.0)
    except CheckpointError as error:
        return str(error), sorted(error.ranks)
    raise AssertionError("the load went on without a rank")


def test_a_rank_that_dies_is_named_by_the_others(tmp_path: Path) -> None:
    results = run_ranks(3, dies, save(tmp_path), expect_killed=[1])
    told = [each for each in results if each is not None]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0][1] == [1]
    assert "rank 1" in told[0][0]


class Killed(reading.Peers):
    """What a rank has in the place of connections, when it is killed as it makes them."""

    def __init__(self, *_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)


def dies_connecting(place: str) -> tuple[str, list[int]]:
    """Rank 1 is killed when all connect: nothing is broken yet that would throw the others out."""
    if dist.get_rank() == 1:
        vars(reading)["Peers"] = Killed
    try:
        read(place, [WHOLE], seconds=3600.0)
    except CheckpointError as error:
        return str(error), sorted(error.ranks)
    raise AssertionError("the load went on without a rank")


def test_a_rank_that_dies_while_others_connect_is_heard_of_at_once(tmp_path: Path) -> None:
    place = save(tmp_path)
    # Gloo waits for it as long as a host that was cut off may stay away.
    results = run_ranks(
        3, dies_connecting, place, expect_killed=[1], timeout_seconds=SILENCE_SECONDS / 2
    )
    told = [each for each in results if each is not None]
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0][1] == [1]
    assert "probably died" in told[0][0]


SIZES = {"a": 100_000, "b": 7, "c": 100_000, "d": 1_000_000}


def between_what_one_rank_wants(place: str) -> int:
    wanted = sorted(SIZES) if dist.get_rank() == 0 else ["b", "d"]
    live = torch.nn.ParameterDict({name: torch.zeros(SIZES[name]) for name in wanted})
    report = dist_ckpt.load({"model": live}, place, strict=False, exchange="always")
    assert all(torch.equal(live[name], torch.ones(SIZES[name])) for name in wanted)
    return report.nbytes_exchanged


def test_what_comes_from_others_is_not_read_over(tmp_path: Path) -> None:
    # So short a gap is read along by whoever loads alone: here its bytes would come twice.
    place = str(tmp_path / "run")
    dist_ckpt.save({"model": {name: torch.ones(size) for name, size in SIZES.items()}}, place)
    assert sum(run_ranks(2, between_what_one_rank_wants, place)) == 4 * (SIZES["b"] + SIZES["d"])


def hangs(place: str) -> tuple[str, list[int]]:
    """Rank 1 waits for its disk until the others have given up."""
    store = training_store()
    if dist.get_rank() == 1:
        original = reading.swap

        def late(*arguments: Any) -> int:
            store.wait(["told 0", "told 2"])
            return original(*arguments)

        vars(reading)["swap"] = late
    try:
        read(place, [WHOLE], seconds=20.0)
    except CheckpointError as error:
        store.set(f"told {dist.get_rank()}", "")
        return str(error), sorted(error.ranks)
    raise AssertionError("the load went on without a rank")


def test_a_rank_that_is_silent_is_named_at_the_deadline(tmp_path: Path) -> None:
    results = run_ranks(3, hangs, save(tmp_path))
    assert results[0] == results[1] == results[2]
    assert results[0][1] == [1]
    assert "rank 1 did not arrive within 20 s" in results[0][0]


def comes_to_nobody(_: object) -> str:
    """Rank 1 does not connect until rank 0 has given up."""
    store = training_store()
    if dist.get_rank() == 1:
        store.wait(["given up"])
        return ""
    try:
        reading.Peers(Deadline.after(3600), silence_seconds=1.0)
    except CheckpointError as error:
        store.set("given up", "")
        return str(error)
    raise AssertionError("it is connected to nobody")


def test_who_cannot_be_reached_is_not_waited_for_to_the_deadline(tmp_path: Path) -> None:
    assert "GLOO_SOCKET_IFNAME" in run_ranks(2, comes_to_nobody, tmp_path)[0]
