"""The proofs of the demo: pure comparisons of what the workers wrote down.

Each returns one line that says what was proved and on how much, or raises `ProofFailed`.
None of them passes on nothing: empty logs fail too.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from examples.demo_parts.records import Attempt, Entry, Note, standing, undone

Digests = Mapping[str, str]


class ProofFailed(Exception):
    """Something was lost, repeated or changed; the message says what."""


def kill_hit_a_save(notes: Sequence[Note], losses: Sequence[Attempt[str]], *, step: int) -> str:
    """Prove that a worker died while `step` was being saved, and that the step did not count.

    Args:
        notes: the diaries of all ranks of the killed run.
        losses: its log of losses.
        step: the step whose save was to be hit.
    """
    kills = [note for note in notes if note.what == "killed"]
    if [kill.values["step"] for kill in kills] != [step]:
        raise ProofFailed(f"one kill during the save of step {step} was planned, found {kills}")
    if len(losses) != 2:
        raise ProofFailed(f"one restart was expected, found {len(losses) - 1}")
    restarts = [note for note in notes if note.what == "start" and note.attempt == 1]
    if len(restarts) != losses[1].world_size:
        raise ProofFailed(f"{losses[1].world_size} workers restarted, {len(restarts)} noted it")
    for note in (*kills, *restarts):
        if step in note.values["listed"]:
            raise ProofFailed(
                f"step {step} was listed as a checkpoint although its save was cut short "
                f"({note.what}, rank {note.rank}: {note.values['listed']})"
            )
    newest = max(kills[0].values["listed"], default=0)
    if not newest or newest != losses[1].resumed:
        raise ProofFailed(
            f"the newest checkpoint at the kill was {newest}, but the restarted workers resumed "
            f"from {losses[1].resumed}"
        )
    again = len(undone(losses))
    return (
        f"a worker was killed while step {step} was being saved: the step is not listed, "
        f"training resumed from {newest}, {again} steps were taken again"
    )


def same_losses(reference: Sequence[Attempt[str]], killed: Sequence[Attempt[str]]) -> str:
    """Prove that the killed run's losses equal the uninterrupted run's in every bit.

    The steps that were taken and lost count too: both times they must have had the same loss.
    """
    setups = {(attempt.layout, attempt.world_size) for attempt in (*reference, *killed)}
    if len(setups) != 1 or len(reference) != 1:
        raise ProofFailed(f"the two runs cannot be compared: they ran as {sorted(setups)}")
    expected, found = standing(reference), standing(killed)
    if not expected or [e.step for e in expected] != [e.step for e in found]:
        raise ProofFailed(
            f"the reference logged {_steps(expected)}, the killed run {_steps(found)}"
        )
    good = {entry.step: entry.value for entry in expected}
    for entry in (*found, *undone(killed)):
        if entry.value != good.get(entry.step):
            raise ProofFailed(
                f"the loss of step {entry.step} is {entry.value} in the killed run and "
                f"{good.get(entry.step)} in the reference"
            )
    return f"all {len(expected)} losses of the killed run equal the reference's in every bit"


def same_tensors(
    saved: Mapping[str, Digests], loaded: Mapping[str, Digests], *, step: int, workers: int
) -> str:
    """Prove that what was loaded, by every rank of every layout, is what was saved.

    Args:
        saved: by rank (any label), the digest of each value when `step` was saved.
        loaded: the same right after a restore.
        step: the checkpoint.
        workers: how many ranks should have loaded it.
    """
    if not saved or len(loaded) != workers:
        raise ProofFailed(
            f"step {step}: {len(saved)} ranks noted what they saved, and {len(loaded)} of "
            f"{workers} what they loaded"
        )
    first, expected = next(iter(saved.items()))
    if not {"model", "optimizer"} <= {name.split(".")[0] for name in expected}:
        raise ProofFailed(f"step {step}: {first} noted no values of model or optimizer")
    for label, digests in (*saved.items(), *loaded.items()):
        names = {n for n in expected.keys() | digests.keys() if expected.get(n) != digests.get(n)}
        if names:
            raise ProofFailed(
                f"step {step}: {len(names)} of {len(expected)} values differ between {first} and "
                f"{label}, among them {', '.join(sorted(names)[:3])}"
            )
    return (
        f"step {step}: all {len(expected)} tensors and settings of model and optimizer equal the "
        f"saved ones in every bit, on each of the {workers} workers that loaded them"
    )


def each_sample_once(
    parts: Iterable[Sequence[Sequence[Attempt[tuple[int, ...]]]]], *, samples: int, label: str
) -> str:
    """Prove that the history that stands saw every sample of the epoch exactly once.

    Args:
        parts: for each run in the chain, the sample logs of its ranks.
        samples: how many samples the epoch has, numbered from 0.
        label: how to name this chain.
    """
    seen: Counter[int] = Counter()
    reached = 0
    for ranks in parts:
        histories = [standing(rank) for rank in ranks]
        if not histories or len({_steps(history) for history in histories}) != 1:
            raise ProofFailed(f"{label}: the ranks took different steps")
        # A later run goes on where the one before it ended: nothing is skipped in between.
        if not histories[0] or histories[0][0].step != reached + 1:
            raise ProofFailed(f"{label}: {_steps(histories[0])} do not follow step {reached}")
        reached = histories[0][-1].step
        seen.update(sample for history in histories for e in history for sample in e.value)
    never = [sample for sample in range(samples) if not seen[sample]]
    twice = [sample for sample, count in seen.items() if count > 1]
    strange = [sample for sample in seen if not 0 <= sample < samples]
    for problem, found in (("never", never), ("more than once", twice), ("of no epoch", strange)):
        if found:
            raise ProofFailed(
                f"{label}: {len(found)} of {samples} samples were seen {problem}, "
                f"among them {found[:5]}"
            )
    return f"{label}: each of the {samples} samples of the epoch was seen exactly once"


def all_verified(problems: Mapping[str, Mapping[int, Sequence[str]]]) -> str:
    """Prove that every checkpoint of every run verifies.

    Args:
        problems: by run, by step, the problems that verification found.
    """
    if not problems:
        raise ProofFailed("no run was verified")
    for run, steps in problems.items():
        if not steps:
            raise ProofFailed(f"the run {run} has no checkpoint")
        for step, found in steps.items():
            if found:
                raise ProofFailed(f"step {step} of the run {run} is damaged: {found[0]}")
    count = sum(len(steps) for steps in problems.values())
    return f"all {count} checkpoints of the {len(problems)} runs verify, byte by byte"


def _steps(entries: Sequence[Entry[Any]]) -> str:
    return f"steps {entries[0].step} to {entries[-1].step}" if entries else "no steps"
