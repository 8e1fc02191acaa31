"""What one phase of the demo left behind, as the proofs, the table and the picture need it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from statistics import median

from dist_ckpt.repository import Repository
from dist_ckpt.storage.resolve import resolve
from examples.demo_parts.launch import Phase
from examples.demo_parts.records import (
    Attempt,
    Note,
    read_diary,
    read_losses,
    read_samples,
    standing,
)
from examples.demo_parts.report import Curve, Lane, Save


@dataclass(frozen=True)
class Evidence:
    """The records of one phase.

    Attributes:
        phase: which one.
        losses: its log, one attempt per start of the workers.
        samples: the logs of sample ids, by rank.
        notes: the diaries of all ranks, in the order of time.
        problems: by committed step, what verification found.
    """

    phase: Phase
    losses: list[Attempt[str]]
    samples: list[list[Attempt[tuple[int, ...]]]]
    notes: list[Note]
    problems: dict[int, tuple[str, ...]]

    @classmethod
    def gather(cls, phase: Phase) -> Evidence:
        """Read what `phase` left behind, and every byte of its checkpoints.

        Raises:
            RecordError: a log is missing or contradicts itself.
        """
        repository = Repository(resolve(phase.run))
        notes = [note for diary in phase.diaries for note in read_diary(diary)]
        return cls(
            phase=phase,
            losses=read_losses(phase.losses),
            samples=[read_samples(log) for log in phase.sample_logs],
            notes=sorted(notes, key=lambda note: note.time),
            problems={step: repository.verify(step).problems for step in repository.steps()},
        )

    def digests(self, at: str, step: int) -> dict[str, Mapping[str, str]]:
        """Return the digests that each rank noted at the `save` or `restore` of `step`."""
        return {
            f"rank {note.rank} of {self.phase.title} (start {note.attempt + 1})": note.values[
                "digests"
            ]
            for note in self.notes
            if note.what == "digests" and (note.values["at"], note.values["step"]) == (at, step)
        }

    def table_row(self) -> list[str]:
        """Return name, workers, resumed from, stall per save, bytes per rank, verified."""
        staged = [note.values for note in self.notes if note.what == "SaveStaged"]
        stall = median(values["stall_seconds"] for values in staged)
        nbytes = max(values["nbytes"] for values in staged)
        good = sum(not found for found in self.problems.values())
        resumed = self.losses[-1].resumed
        return [
            self.phase.name,
            self.phase.workers,
            f"step {resumed}" if resumed else "new",
            f"{1000 * stall:.1f} ms",
            f"{nbytes / 1e6:.2f} MB",
            f"{good} of {len(self.problems)}",
        ]

    def curve(self, label: str) -> Curve:
        """Return the losses that stand."""
        history = standing(self.losses)
        losses = [float.fromhex(entry.value) for entry in history]
        return Curve(label, [entry.step for entry in history], losses)

    def lane(self) -> Lane:
        """Return what happened when."""
        zero = min(note.time for note in self.notes if note.what == "start")
        kills = [note.time - zero for note in self.notes if note.what == "killed"]
        return Lane(
            label=self.phase.title,
            training=[
                (attempt.time - zero, attempt.entries[-1].time - zero) for attempt in self.losses
            ],
            saves=self._saves(zero),
            killed=kills[0] if kills else None,
            resumed=self.losses[-1].resumed,
        )

    def _saves(self, zero: float) -> list[Save]:
        """Return the saves as rank 0 saw them; one that a kill cut short ended with the kill."""
        saves = []
        for attempt in range(len(self.losses)):
            mine = [note for note in self.notes if note.attempt == attempt]
            ends = {
                note.values["step"]: note
                for note in mine
                if note.what == "killed" or (note.what == "SaveCommitted" and note.rank == 0)
            }
            for note in mine:
                if note.what == "SaveStaged" and note.rank == 0:
                    end = ends[note.values["step"]]
                    start = note.time - zero - note.values["stall_seconds"]
                    committed = end.what == "SaveCommitted"
                    saves.append(Save(note.values["step"], start, end.time - zero, committed))
        return saves
