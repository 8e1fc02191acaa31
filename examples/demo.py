"""A training loses a worker to SIGKILL in the middle of a save, and nothing else.

    python examples/demo.py
    python examples/demo.py --store s3://bucket/folder

Runs `train_gpt.py` under torchrun: once undisturbed; once with a worker killed while a checkpoint
is being written, and restarted by torchrun; then that run's last checkpoint is continued to the
end of the epoch with one and with four workers, as DDP and as FSDP2. Ends with exit code 1 and a
message if anything was lost, repeated or changed.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Makes `examples` importable when this file is run as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_ckpt.storage import read_all, resolve
from examples.demo_parts import proofs
from examples.demo_parts.evidence import Evidence
from examples.demo_parts.launch import LAYOUT_NAMES, ROOT, Phase, PhaseFailed, run_phases
from examples.demo_parts.records import RecordError, undone
from examples.demo_parts.report import Story, draw

SAVE_EVERY = 10
KILL_AT = 40
# Small: what is shown is what becomes of checkpoints, and eighteen workers train on one machine.
MODEL = ("--width", "64", "--layers", "2")
STEPS = 60  # where the first two runs end and the others go on
CONTINUED_WITH = (1, 4)  # workers
OUTPUT = ROOT / "demo-output"
REPORT = "report.png"


def run_demo(arguments: argparse.Namespace, folder: Path, store: str, console: Console) -> None:
    """Run all phases, print the table and the proofs, draw the picture.

    Args:
        arguments: the command line.
        folder: where picture, logs and diaries go, and run directories unless there is a `store`.
        store: URL below which run directories go, or "".
        console: where everything is shown.

    Raises:
        PhaseFailed: a phase failed or did not end in time.
        ProofFailed: something was lost, repeated or changed.
        RecordError: the logs of a phase contradict themselves.
    """
    training = ["--checkpoint-interval", str(SAVE_EVERY), "--seed", str(arguments.seed)]
    training += ["--device", arguments.device, *MODEL]
    layout = arguments.parallel
    first = [
        Phase("undisturbed", folder / "undisturbed", layout, 2, STEPS, store=store),
        Phase("killed", folder / "killed", layout, 2, STEPS, kill_at=KILL_AT, store=store),
    ]
    run_phases(first, training, console)
    reference, killed = map(Evidence.gather, first)
    epoch = next(note.values for note in reference.notes if note.what == "start")
    continued: list[Evidence] = []
    for world_size in CONTINUED_WITH:
        phases = [
            Phase(
                "continued",
                folder / f"{layout}-{world_size}",
                layout,
                world_size,
                epoch["epoch_steps"],
                store=store,
            )
            for layout in LAYOUT_NAMES
        ]
        for phase in phases:
            copy_run(killed.phase.run, phase.run)
        run_phases(phases, training, console)
        continued += map(Evidence.gather, phases)

    console.print(_table([reference, killed, *continued]))
    for line in prove(reference, killed, continued, samples=epoch["samples"]):
        console.print(f"[green]proved[/] {line}", highlight=False, soft_wrap=True)
    draw(_story(reference, killed, continued), folder / REPORT)
    console.print(f"picture {folder / REPORT}", highlight=False, soft_wrap=True)
    if not store:
        console.print(
            f"checkpoints {killed.phase.run} and beside it, until the next demo",
            highlight=False,
            soft_wrap=True,
        )


def copy_run(source: str, target: str) -> None:
    """Copy all objects of one run to another place, whatever the two are."""
    origin, copy = resolve(source), resolve(target)
    for entry in origin.list_entries():
        copy.put(entry.key, [read_all(origin, entry.key)])
    for place in (origin, copy):
        place.close()


def make_empty(folder: Path) -> bool:
    """Make an empty folder that is this process's own until it ends; return False if it cannot be.

    What an earlier demo left there goes.
    """
    folder.mkdir(exist_ok=True)
    try:
        # Never closed: the lock ends with the process.
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    for entry in folder.iterdir():
        if entry.is_dir():
            shutil.rmtree(entry)
        else:
            entry.unlink()
    return True


def chosen_folder(parser: argparse.ArgumentParser, output: Path | None) -> Path:
    """Return where a demo leaves what it makes: its own folder made anew, or an empty `output`.

    Exits with a message of `parser` where neither can be: what is not a demo's is never deleted.
    """
    if output is None:
        if not make_empty(OUTPUT):
            parser.error(f"another demo runs in {OUTPUT}: give --output DIR")
        return OUTPUT
    if output.exists() and any(output.iterdir()):
        parser.error(f"{output} is not empty")
    return output


def remove_runs(store: str) -> None:
    """Delete everything below the URL `store`."""
    place = resolve(store)
    place.delete([entry.key for entry in place.list_entries()])
    place.close()


def prove(
    reference: Evidence, killed: Evidence, continued: Sequence[Evidence], *, samples: int
) -> Iterator[str]:
    """Yield one line for each thing proved.

    Raises:
        ProofFailed: something was lost, repeated or changed.
        RecordError: the logs of a phase contradict themselves.
    """
    yield proofs.kill_hit_a_save(killed.notes, killed.losses, step=KILL_AT)
    yield proofs.same_losses(reference.losses, killed.losses)
    resumed = killed.losses[-1].resumed
    for step, readers in ((resumed, [killed]), (STEPS, continued)):
        saved = {**reference.digests("save", step), **killed.digests("save", step)}
        loaded = {k: v for one in readers for k, v in one.digests("restore", step).items()}
        workers = sum(one.phase.world_size for one in readers)
        yield proofs.same_tensors(saved, loaded, step=step, workers=workers)
    for one in continued:
        parts = [killed.samples, one.samples]
        yield proofs.each_sample_once(
            parts, samples=samples, label=f"{killed.phase.workers}, then {one.phase.workers}"
        )
    everything = [reference, killed, *continued]
    yield proofs.all_verified({one.phase.title: one.problems for one in everything})


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Kill a training during a save; lose nothing.")
    parser.add_argument(
        "--parallel", choices=tuple(LAYOUT_NAMES), default="fsdp", help="layout of the killed run"
    )
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="cpu")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--store", metavar="URL", help="put the checkpoints below URL, not into a local folder"
    )
    parser.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="put picture, run directories and logs into DIR (default: demo-output, made anew)",
    )
    arguments = parser.parse_args()
    folder = chosen_folder(parser, arguments.output)
    # A name of its own, so that no earlier demo is resumed.
    store = f"{arguments.store.rstrip('/')}/demo-{uuid.uuid4().hex}" if arguments.store else ""
    console = Console()
    started = time.monotonic()
    try:
        run_demo(arguments, folder.resolve(), store, console)
    except (PhaseFailed, proofs.ProofFailed, RecordError) as error:
        console.print(f"[bold red]FAILED[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        console.print(f"run directories and logs: {folder}", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("interrupted; all workers were stopped")
        status = 130
    else:
        console.print(f"done in {time.monotonic() - started:.0f} s", highlight=False)
        status = 0
    if store:
        remove_runs(store)
    return status


def _table(evidence: Sequence[Evidence]) -> Table:
    columns = ("run", "layout", "resumed from", "stall per save", "bytes per rank", "verified")
    table = Table(
        *columns, caption="stall: median over ranks and saves; bytes: of the largest rank"
    )
    for one in evidence:
        table.add_row(*one.table_row())
    return table


def _story(reference: Evidence, killed: Evidence, continued: Sequence[Evidence]) -> Story:
    lost = [entry.step for entry in undone(killed.losses)]
    return Story(
        reference=reference.curve(f"{reference.phase.workers}, undisturbed"),
        killed=killed.curve("the same, killed and restarted"),
        lost=(min(lost), max(lost)),
        kill_step=KILL_AT,
        continued=[one.curve(f"continued as {one.phase.workers}") for one in continued],
        lanes=[one.lane() for one in (reference, killed, *continued)],
    )


if __name__ == "__main__":
    sys.exit(main())
