"""A training on two hosts loses one of them in the middle of a save, and nothing else.

    python examples/demo_nodes.py
    python examples/demo_nodes.py --store s3://bucket/folder

Runs `train_gpt.py` under an elastic torchrun on two hosts of two workers each: network namespaces,
or loopback addresses where these are not allowed. One host is lost while a checkpoint is being
written; torchrun goes on with the other at half the size; the host comes back, and training ends at
full size. Then the same sizes are trained from the same steps on with nothing lost, to compare.
Ends with exit code 1 and a message if anything was lost, repeated or changed.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
import uuid
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Makes `examples` importable when this file is run as a script.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve
from examples.demo import chosen_folder, remove_runs
from examples.demo_parts import proofs
from examples.demo_parts.launch import Phase, PhaseFailed, run_phases
from examples.demo_parts.nodes import HOSTS, WORKERS, TwoHosts, samples_of_all
from examples.demo_parts.nodes_report import Stretch, draw
from examples.demo_parts.records import Attempt, RecordError, read_diary, read_losses, standing
from examples.train_gpt import EPOCH_STEPS, GLOBAL_BATCH
from tests.services.hosts import Hosts, two_hosts
from tests.services.proxy import FaultProxy

SAVE_EVERY = 6
KILL_AT = 24
BACK_AFTER = 8  # steps at half size
REPORT = "report-nodes.png"


def lose_a_host(training: TwoHosts, console: Console) -> None:
    """Train on both hosts, on one, and on both again.

    Raises:
        PhaseFailed: it did not go on by itself.
    """
    try:
        training.start(0)
        training.start(1, doomed=True)
        training.wait_until("the loss of a host", lambda: training.agents[1].poll() is not None)
        say(console, f"the second host is lost while step {KILL_AT} is being saved")
        training.wait_until("training at half size", lambda: _half(training) >= BACK_AFTER)
        say(console, f"the other has gone on, {BACK_AFTER} steps by itself; the host comes back")
        training.start(1)
        training.wait_until("the end", training.has_ended)
    finally:
        training.stop()


def _half(training: TwoHosts) -> int:
    attempts = training.attempts()
    here = attempts and attempts[-1].world_size == WORKERS
    return len(attempts[-1].entries) if here else 0


def train_calmly(
    folder: Path, attempts: Sequence[Attempt[str]], training: Sequence[str], console: Console
) -> Phase:
    """Train on one host at the sizes of `attempts` from the same steps on, with nothing lost."""
    ends = [*(attempt.resumed for attempt in attempts[1:]), EPOCH_STEPS]
    phases = [
        Phase("nothing lost", folder, "fsdp", attempt.world_size, end)
        for attempt, end in zip(attempts, ends, strict=True)
    ]
    for phase in phases:  # one after another: each goes on where the one before it ended
        run_phases([phase], training, console)
    return phases[-1]


def prove(training: TwoHosts, calm: Phase) -> Iterator[str]:
    """Yield one line for each thing proved.

    Raises:
        ProofFailed: something was lost, repeated or changed.
        RecordError: the logs contradict themselves.
    """
    attempts = read_losses(training.losses)
    sizes = [attempt.world_size for attempt in attempts]
    whole = HOSTS * WORKERS
    if sizes != [whole, WORKERS, whole]:
        raise proofs.ProofFailed(f"sizes were to be {whole}, {WORKERS}, {whole}, found {sizes}")
    chain = f"{whole} workers, then {WORKERS}, then {whole}"
    yield f"training went on by itself: {chain}"
    kills = [n for d in training.diaries for n in read_diary(d) if n.what == "killed"]
    newest = max(kills[0].values["listed"])
    again = KILL_AT - newest
    if attempts[1].resumed != newest or again > SAVE_EVERY:
        raise proofs.ProofFailed(f"resumed from {attempts[1].resumed}, newest was {newest}")
    yield (
        f"the host was lost while step {KILL_AT} was being saved: the step is not listed, training "
        f"resumed from {newest}, the newest that was: {again} steps were taken again"
    )
    found, expected = standing(attempts), standing(read_losses(calm.losses))
    if [(e.step, e.value) for e in found] != [(e.step, e.value) for e in expected]:
        raise proofs.ProofFailed("the losses are not those of the same sizes with nothing lost")
    yield (
        f"all {len(found)} losses equal, in every bit, those of the same sizes from the same steps "
        "on with nothing lost"
    )
    samples = EPOCH_STEPS * GLOBAL_BATCH
    together = samples_of_all(training.losses, attempts)
    yield proofs.each_sample_once([[together]], samples=samples, label=chain)
    repository = Repository(resolve(training.run))
    problems = {step: repository.verify(step).problems for step in repository.steps()}
    yield proofs.all_verified({"two hosts": problems})


def table_of(attempts: Sequence[Attempt[str]]) -> Table:
    """Return what each start did."""
    table = Table("hosts", "workers", "resumed from", "steps", caption="one row for each start")
    for attempt in attempts:
        hosts = attempt.world_size // WORKERS
        last = attempt.entries[-1].step if attempt.entries else attempt.resumed
        begin = f"step {attempt.resumed}" if attempt.resumed else "new"
        table.add_row(
            str(hosts), f"FSDP2 x {attempt.world_size}", begin, f"{attempt.resumed + 1} to {last}"
        )
    return table


def run_demo(
    arguments: argparse.Namespace, folder: Path, run: str, hosts: Hosts, console: Console
) -> None:
    """Run everything, print table and proofs, draw the picture.

    Raises:
        PhaseFailed: something failed or did not end in time.
        ProofFailed: something was lost, repeated or changed.
        RecordError: the logs contradict themselves.
    """
    kind = "network namespaces" if hosts.is_real else "loopback addresses"
    say(console, f"two hosts ({kind}: {hosts[0].address}, {hosts[1].address})")
    options = ["--checkpoint-interval", str(SAVE_EVERY), "--seed", str(arguments.seed)]
    options += ["--device", "cpu"]
    training = TwoHosts(hosts, folder / "two-hosts", run, options, KILL_AT)
    lose_a_host(training, console)
    attempts = read_losses(training.losses)
    console.print(table_of(attempts))
    calm = train_calmly(folder / "nothing-lost", attempts, options, console)
    for line in prove(training, calm):
        console.print(f"[green]proved[/] {line}", highlight=False, soft_wrap=True)
    stretches = [Stretch.of(attempt, WORKERS) for attempt in attempts]
    draw(stretches, standing(read_losses(calm.losses)), KILL_AT, folder / REPORT)
    say(console, f"picture {folder / REPORT}")


def say(console: Console, text: str) -> None:
    """Print a line for people."""
    console.print(text, highlight=False, soft_wrap=True)


def main() -> int:
    """Run the demo; return the exit code."""
    parser = argparse.ArgumentParser(description="Lose one of two hosts during a save.")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--store", metavar="URL", help="put the checkpoints below URL")
    parser.add_argument("--output", type=Path, metavar="DIR", help="default: demo-output")
    arguments = parser.parse_args()
    folder = chosen_folder(parser, arguments.output)
    store = f"{arguments.store.rstrip('/')}/demo-{uuid.uuid4().hex}" if arguments.store else ""
    console, status = Console(), 0
    started = time.monotonic()
    with ExitStack() as stack:
        hosts = stack.enter_context(two_hosts())
        endpoint = os.environ.get("AWS_ENDPOINT_URL", "")
        if store and "127.0.0.1" in endpoint:  # which is another place on every host
            proxy = stack.enter_context(FaultProxy(endpoint, hosts.outside))
            os.environ["AWS_ENDPOINT_URL"] = proxy.endpoint
        try:
            run = store or str(folder.resolve() / "two-hosts" / "run")
            run_demo(arguments, folder.resolve(), run, hosts, console)
            say(console, f"done in {time.monotonic() - started:.0f} s")
        except (PhaseFailed, proofs.ProofFailed, RecordError) as error:
            console.print(f"[bold red]FAILED[/] {escape(str(error))}", highlight=False)
            status = 1
        except KeyboardInterrupt:
            say(console, "interrupted; all workers were stopped")
            status = 130
        if store and status != 1:
            remove_runs(store)
    return status


if __name__ == "__main__":
    sys.exit(main())
