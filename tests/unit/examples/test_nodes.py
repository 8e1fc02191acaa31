"""What the demo on two hosts makes of the logs, however many ranks each start had."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from examples.demo_parts.nodes import TwoHosts, samples_of_all
from examples.demo_parts.nodes_report import Stretch, draw
from examples.demo_parts.records import RecordError, read_losses, standing
from tests.services.hosts import Hosts

BATCH = 4


def write(folder: Path, rank: int, starts: list[tuple[int, int, int]]) -> None:
    """Write the logs of `rank`: for each start the step it resumed from, the size, and its last."""
    with (folder / f"losses.rank{rank}.jsonl").open("w") as samples:
        for resumed, size, last in starts:
            setup = {"resumed": resumed, "layout": "fsdp", "world_size": size, "time": 10 * resumed}
            samples.write(json.dumps(setup) + "\n")
            for step in range(resumed + 1, last + 1):
                share = BATCH // size
                first = step * BATCH + rank * share
                taken = {"step": step, "samples": [*range(first, first + share)], "time": step}
                samples.write(json.dumps(taken) + "\n")


def logs(folder: Path) -> Path:
    """Write what a run leaves that lost ranks 2 and 3 in step 3 and had them back after 5."""
    for rank in range(4):
        lost = [(2, 2, 5)] if rank < 2 else []
        # The lost ones had not logged the step that they were killed in.
        write(folder, rank, [(0, 4, 4 if rank < 2 else 3), *lost, (5, 4, 6)])
    losses = folder / "losses.jsonl"
    with losses.open("w") as log:
        for line in (folder / "losses.rank0.jsonl").read_text().splitlines():
            entry = json.loads(line)
            if "step" in entry:
                entry = {"step": entry["step"], "loss": (3.0).hex(), "time": entry["time"]}
            log.write(json.dumps(entry) + "\n")
    return losses


def test_samples_of_all_ranks_are_one_history(tmp_path: Path) -> None:
    losses = logs(tmp_path)
    together = samples_of_all(losses, read_losses(losses))
    assert [[entry.step for entry in one.entries] for one in together] == [
        [1, 2, 3],
        [3, 4, 5],
        [6],
    ]
    seen = [sample for entry in standing(together) for sample in entry.value]
    assert sorted(seen) == list(range(BATCH, 7 * BATCH))


def test_a_rank_without_a_record_is_an_error(tmp_path: Path) -> None:
    losses = logs(tmp_path)
    write(tmp_path, 3, [(0, 4, 3)])
    with pytest.raises(RecordError, match="no record of the start from step 5"):
        samples_of_all(losses, read_losses(losses))


def test_the_command_lines(tmp_path: Path) -> None:
    hosts = Hosts("", real=False)
    training = TwoHosts(hosts, tmp_path, "s3://bucket/run", ["--seed", "7"], 24)
    first = " ".join(training.command(hosts[0], doomed=False))
    second = " ".join(training.command(hosts[1], doomed=True))
    assert "--nnodes 1:2 --nproc-per-node 2 --local-addr 127.0.0.10" in first
    assert "is_host=1," in first
    assert "--kill-at" not in first
    assert "is_host=0," in second
    assert "--kill-at 24 --victim 2 --whole-host -- " in second
    assert second.endswith(
        "--checkpoint-dir s3://bucket/run --auto-resume --losses "
        f"{tmp_path}/losses.jsonl --parallel fsdp --seed 7"
    )


def test_the_picture(tmp_path: Path) -> None:
    attempts = read_losses(logs(tmp_path))
    stretches = [Stretch.of(attempt, 2) for attempt in attempts]
    assert [(one.hosts, one.workers, one.resumed) for one in stretches] == [
        *((2, 4, 0), (1, 2, 2), (2, 4, 5))
    ]
    draw(stretches, standing(attempts), 4, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
