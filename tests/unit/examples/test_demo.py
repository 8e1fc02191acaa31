"""The demo's proofs hold for what good phases leave behind, and each of them is wired up."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ckpt.storage import MemoryStore, read_all
from examples.demo import (
    KILL_AT,
    SAVE_EVERY,
    STEPS,
    chosen_folder,
    copy_run,
    make_empty,
    prove,
    remove_runs,
)
from examples.demo_parts.evidence import Evidence
from examples.demo_parts.launch import Phase
from examples.demo_parts.proofs import ProofFailed
from examples.demo_parts.records import Attempt, Entry, Note
from examples.demo_parts.report import Save, close_together

EPOCH = STEPS + 20
BATCH = 4
BEFORE_KILL = KILL_AT - SAVE_EVERY


def attempt(world_size: int, first: int, last: int, *, layout: str = "fsdp") -> Attempt[str]:
    entries = [Entry(step, (1 / step).hex(), float(step)) for step in range(first, last + 1)]
    return Attempt(first - 1, layout, world_size, 0.0, entries)


def evidence(phase: Phase, *attempts: Attempt[str]) -> Evidence:
    """Return what `phase` would leave behind after good `attempts`."""
    share = BATCH // phase.world_size
    samples = [
        [
            Attempt(
                one.resumed,
                one.layout,
                one.world_size,
                one.time,
                [
                    Entry(e.step, tuple(range(first, first + share)), e.time)
                    for e in one.entries
                    for first in [(e.step - 1) * BATCH + rank * share]
                ],
            )
            for one in attempts
        ]
        for rank in range(phase.world_size)
    ]
    notes = [
        note
        for rank in range(phase.world_size)
        for number, one in enumerate(attempts)
        for note in notes_of(rank, number, one)
    ]
    return Evidence(phase, list(attempts), samples, notes, {EPOCH: ()})


def notes_of(rank: int, number: int, one: Attempt[str]) -> list[Note]:
    notes = [Note("start", rank, number, 0.0, {"listed": [one.resumed] if one.resumed else []})]
    if one.resumed:
        notes.append(digests(rank, number, "restore", one.resumed))
    for entry in one.entries:
        if entry.step % SAVE_EVERY == 0:
            notes.append(digests(rank, number, "save", entry.step))
            staged = {"step": entry.step, "stall_seconds": 0.002, "nbytes": 3_000_000}
            notes.append(Note("SaveStaged", rank, number, entry.time, staged))
            if (entry.step, number) != (KILL_AT, 0) or one.entries[-1].step > KILL_AT + 1:
                committed = {"step": entry.step}
                notes.append(Note("SaveCommitted", rank, number, entry.time + 0.5, committed))
    return notes


def digests(rank: int, number: int, at: str, step: int) -> Note:
    values = {"model.w": f"w{step}", "optimizer.w.exp_avg": f"m{step}"}
    return Note("digests", rank, number, 0.0, {"at": at, "step": step, "digests": values})


@pytest.fixture
def chain() -> list[Evidence]:
    folder = Path("nowhere")
    reference = evidence(Phase("undisturbed", folder, "fsdp", 2, STEPS), attempt(2, 1, STEPS))
    killed = evidence(
        Phase("killed", folder, "fsdp", 2, STEPS, kill_at=KILL_AT),
        attempt(2, 1, KILL_AT + 1),
        attempt(2, BEFORE_KILL + 1, STEPS),
    )
    listed = {"step": KILL_AT, "listed": [BEFORE_KILL]}
    killed.notes.append(Note("killed", 1, 0, KILL_AT + 0.3, listed))
    continued = [
        evidence(
            Phase("continued", folder, layout, size, EPOCH),
            attempt(size, STEPS + 1, EPOCH, layout=layout),
        )
        for size in (1, 4)
        for layout in ("ddp", "fsdp")
    ]
    return [reference, killed, *continued]


def proved(chain: list[Evidence]) -> list[str]:
    return list(prove(chain[0], chain[1], chain[2:], samples=EPOCH * BATCH))


def test_good_phases_prove_everything(chain: list[Evidence]) -> None:
    lines = proved(chain)
    assert len(lines) == 9
    assert f"resumed from {BEFORE_KILL}" in lines[0]
    assert f"all {STEPS} losses" in lines[1]
    assert "each of the 2 workers" in lines[2]
    assert "each of the 10 workers" in lines[3]
    assert all("exactly once" in line for line in lines[4:8])
    assert "all 6 checkpoints of the 6 runs" in lines[8]


def change_loss(chain: list[Evidence]) -> None:
    entries = chain[1].losses[1].entries
    entries[-1] = replace(entries[-1], value=(0.5).hex())


def change_digest(number: int, at: str) -> Callable[[list[Evidence]], None]:
    def change(chain: list[Evidence]) -> None:
        note = [n for n in chain[number].notes if n.what == "digests" and n.values["at"] == at][-1]
        note.values["digests"]["model.w"] = "other"

    return change


def repeat_sample(chain: list[Evidence]) -> None:
    entries = chain[4].samples[3][0].entries
    entries[0] = replace(entries[0], value=entries[1].value)


def forget_rank(chain: list[Evidence]) -> None:
    notes = chain[5].notes
    notes.remove(next(n for n in notes if n.what == "digests" and n.rank == 3))


def damage(chain: list[Evidence]) -> None:
    chain[3].problems[EPOCH] = ("one bit flipped",)


def list_the_lost_step(chain: list[Evidence]) -> None:
    next(n for n in chain[1].notes if n.what == "start" and n.attempt == 1).values["listed"].append(
        KILL_AT
    )


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (change_loss, f"loss of step {STEPS}"),
        (change_digest(0, "save"), f"step {STEPS}: 1 of 2 values differ"),
        (change_digest(1, "restore"), f"step {BEFORE_KILL}: 1 of 2 values differ"),
        (change_digest(2, "restore"), "rank 0 of continued, DDP x 1"),
        (change_digest(5, "restore"), "rank 3 of continued, FSDP2 x 4"),
        (forget_rank, "9 of 10"),
        (repeat_sample, "FSDP2 x 2, then DDP x 4: 1 of 320 samples were seen never"),
        (damage, "one bit flipped"),
        (list_the_lost_step, "was listed as a checkpoint"),
    ],
)
def test_each_fault_fails_the_demo(
    chain: list[Evidence], break_it: Callable[[list[Evidence]], None], message: str
) -> None:
    break_it(chain)
    with pytest.raises(ProofFailed, match=message):
        proved(chain)


def test_table_row(chain: list[Evidence]) -> None:
    assert chain[0].table_row()[1:] == [
        *("FSDP2 x 2", "new", "2.0 ms", "3.00 MB"),
        "1 of 1",
    ]
    chain[2].problems[7] = ("damaged",)
    assert chain[2].table_row()[1:] == [
        *("DDP x 1", f"step {STEPS}", "2.0 ms", "3.00 MB"),
        "1 of 2",
    ]


def test_lane_of_the_killed_run(chain: list[Evidence]) -> None:
    lane = chain[1].lane()
    assert lane.killed == pytest.approx(KILL_AT + 0.3)
    assert lane.resumed == BEFORE_KILL
    assert len(lane.training) == 2
    (lost,) = [save for save in lane.saves if not save.committed]
    assert lost.step == KILL_AT
    assert lost.stop == pytest.approx(KILL_AT + 0.3)


def test_curve_is_the_history_that_stands(chain: list[Evidence]) -> None:
    curve = chain[1].curve("killed")
    assert list(curve.steps) == list(range(1, STEPS + 1))
    assert curve.losses[3] == 0.25


def test_run_is_copied_between_stores_and_removed() -> None:
    source, target = MemoryStore("demo-test/runs/killed"), MemoryStore("demo-test/runs/copy")
    source.put("claims/000001.json", [b"{}"])
    source.put("step-0000000001/manifest.json", [b"not ", b"one"])
    copy_run(source.url, target.url)
    assert list(target.list_entries()) == list(source.list_entries())
    assert read_all(target, "step-0000000001/manifest.json") == b"not one"
    remove_runs("memory://demo-test/runs/copy")
    assert list(target.list_entries()) == []
    assert len(list(source.list_entries())) == 2


def test_its_folder_is_made_empty_and_is_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "output"
    assert make_empty(folder)
    # Once more, as by another process: the lock is that of an open file.
    (folder / "report.png").touch()
    assert not make_empty(folder)
    assert (folder / "report.png").exists(), "what the other one writes stays"


def test_what_an_earlier_demo_left_goes(tmp_path: Path) -> None:
    (tmp_path / "killed" / "run").mkdir(parents=True)
    (tmp_path / "report.png").touch()
    assert make_empty(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_labels_that_would_overlap_are_one() -> None:
    saves = [Save(step, at - 0.1, at, committed=True) for step, at in ((10, 1.0), (70, 2.0))]
    saves += [Save(72, 2.1, 2.2, committed=True), Save(74, 2.2, 2.3, committed=False)]
    found = [[save.step for save in group] for group in close_together(saves, 0.5)]
    assert found == [[10], [70, 72], [74]]


def test_a_folder_with_something_in_it_is_not_taken_by_a_demo(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(SystemExit):
        chosen_folder(argparse.ArgumentParser(), tmp_path)
    assert f"{tmp_path} is not empty" in capsys.readouterr().err
    assert (tmp_path / "thesis.tex").exists()
    assert chosen_folder(argparse.ArgumentParser(), tmp_path / "new") == tmp_path / "new"
