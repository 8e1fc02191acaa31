"""Loads: all ranks take one decision, one checkpoint, and one outcome."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import msgspec
import torch

from dist_ckpt import events
from dist_ckpt.dcp.planner import describe
from dist_ckpt.dcp.reader import fill, plan_reads
from dist_ckpt.engine.choice import Choice, choose
from dist_ckpt.engine.coordinator import Decide, Topic
from dist_ckpt.engine.job import Job
from dist_ckpt.engine.matching import Misfits, compare, judge
from dist_ckpt.engine.messages import LoadRequest, check_same, pack, unpack
from dist_ckpt.engine.report import LoadReport
from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError
from dist_ckpt.format import document
from dist_ckpt.repository import Checkpoint
from dist_ckpt.state.part import Stored, TensorSpec
from dist_ckpt.state.train_state import TrainState

ResultT = TypeVar("ResultT")

_log = logging.getLogger("dist_ckpt")


@dataclass(frozen=True, slots=True)
class _Opened:
    """A checkpoint and where its bytes go: nothing live has been changed yet."""

    checkpoint: Checkpoint
    stored: Mapping[str, Stored]
    targets: Mapping[str, Mapping[str, torch.Tensor]]
    misfits: Misfits


class Loader:
    """Loads checkpoints of one job into one state."""

    def __init__(self, job: Job, state: TrainState) -> None:
        self._job = job
        self._state = state

    def load(
        self,
        step: int | None,
        *,
        fall_back: bool,
        own: bool,
        failed: CheckpointError | None = None,
        wants: Callable[[str], bool] = lambda _: True,
    ) -> LoadReport | None:
        """Restore the state from `step`, or from the newest checkpoint.

        Args:
            step: which one, None for the newest.
            fall_back: whether to go on with the next older one when one is damaged.
            own: whether to take the run over first, so that an older job can no longer commit, and
                to return None, not raise, when the run has no checkpoint.
            failed: what keeps this rank from loading; all ranks hear of it.
            wants: tells by its name whether a part is to be loaded; the others stay as they are,
                and whether the checkpoint has them does not matter.

        Raises:
            CheckpointError: the same on every rank. Nothing live was changed when the state does
                not fit (`IncompatibleError`); a later failure may leave tensors half restored.
        """
        begun = time.perf_counter()
        refused: dict[int, str] = {}
        while True:
            topic = self._job.topic("load", f"load from {self._job.url}")
            decide = self._chooser(step, refused, fall_back=fall_back, own=own)
            request = failed or pack(LoadRequest(step, self._job.url))
            data = self._job.training.round(
                topic.phase("choose"), request, decide, deadline=self._job.deadline()
            )
            choice = msgspec.msgpack.decode(data, type=Choice)
            self._announce(choice.refused.items() - refused.items())
            if choice.step is None:
                return None
            refused = dict(choice.refused)
            try:
                report = self._load(topic, choice, begun, wants)
            except IntegrityError as error:
                # One round raised it on all ranks, so all of them go on to the next one together.
                if not fall_back:
                    raise
                refused[choice.step] = error.message
                self._announce([(choice.step, error.message)])
                continue
            if own:
                self._job.restored_step = report.step
                self._job.refuse(report.refused.keys())
            return report

    def _chooser(
        self, step: int | None, refused: Mapping[int, str], *, fall_back: bool, own: bool
    ) -> Decide:
        job = self._job

        def decide(messages: Sequence[bytes]) -> bytes:
            check_same([unpack(data, LoadRequest) for data in messages], "load")
            if own:
                job.claim()
            choice = choose(job.repository, step, refused, fall_back=fall_back, empty_is_new=own)
            return msgspec.msgpack.encode(choice)

        return decide

    def _load(
        self, topic: Topic, choice: Choice, begun: float, wants: Callable[[str], bool]
    ) -> LoadReport:
        where = f"step {choice.step} in {self._job.url}"
        opened = self._together(
            topic.phase("fits"),
            lambda: self._open(choice, wants),
            message=lambda found: msgspec.msgpack.encode(found.misfits),
            decide=lambda messages: _judge(messages, where),
        )
        nbytes = self._together(topic.phase("read"), lambda: _read(opened))
        self._together(topic.phase("restore"), lambda: self._restore(opened))
        manifest = opened.checkpoint.manifest
        report = LoadReport(
            url=self._job.url,
            step=manifest.step,
            save_id=manifest.save_id,
            parts=tuple(opened.stored),
            tensors=sum(len(named) for named in opened.targets.values()),
            nbytes_read=nbytes,
            seconds=time.perf_counter() - begun,
            saved_world_size=manifest.world_size,
            world_size=self._job.training.world_size,
            refused=choice.refused,
        )
        rank = self._job.training.rank
        events.emit(
            events.CheckpointRestored(report.url, report.step, rank, nbytes, report.seconds)
        )
        return report

    def _together(
        self,
        topic: Topic,
        work: Callable[[], ResultT],
        *,
        message: Callable[[ResultT], bytes] = lambda _: b"",
        decide: Decide = lambda _: b"",
    ) -> ResultT:
        """Do `work` on this rank and return its result when it succeeded on every rank.

        Raises:
            CheckpointError: it failed on some rank, or `decide` refused; the same on every rank.
        """
        done: list[ResultT] = []
        outcome: bytes | Exception
        try:
            done.append(work())
            outcome = message(done[0])
        except Exception as error:
            outcome = error
        self._job.training.round(topic, outcome, decide, deadline=self._job.deadline())
        return done[0]

    def _open(self, choice: Choice, wants: Callable[[str], bool]) -> _Opened:
        """Find where each stored byte would go, and everything that does not fit."""
        assert choice.step is not None
        store = self._job.repository.store
        checkpoint = Checkpoint(store, choice.manifest, choice.index, step=choice.step)
        found_parts = self._stored(checkpoint)
        stored = {name: each for name, each in found_parts.items() if wants(name)}
        wanted = {name: part for name, part in self._state.parts.items() if wants(name)}
        misfits = Misfits(
            missing=[part for part in wanted if part not in stored],
            unexpected=[part for part in stored if part not in wanted],
        )
        targets: dict[str, Mapping[str, torch.Tensor]] = {}
        for name, part in wanted.items():
            if name not in stored:
                continue
            found = part.targets(stored[name])
            targets[name] = found.tensors
            differing = compare(name, found.tensors, stored[name].tensors)
            misfits.missing += [f"{name}/{entry}" for entry in found.missing] + differing.missing
            misfits.unexpected += [f"{name}/{entry}" for entry in found.unexpected]
            misfits.mismatched += differing.mismatched
        return _Opened(checkpoint, stored, targets, misfits)

    def _stored(self, checkpoint: Checkpoint) -> dict[str, Stored]:
        """Gather what the checkpoint holds for each of its parts, as seen from this rank."""
        rank, world_size = self._job.training.rank, self._job.training.world_size
        saved_world_size = checkpoint.manifest.world_size
        # At another world size nobody has a predecessor: rank 0's values stand for all.
        whose = rank if world_size == saved_world_size else 0
        tensors: dict[str, dict[str, TensorSpec]] = {part: {} for part in checkpoint.manifest.parts}
        objects: dict[str, dict[str, bytes]] = {part: {} for part in checkpoint.manifest.parts}
        for tensor in checkpoint.index.tensors:
            spec = TensorSpec(tensor.dtype, tensor.shape)
            tensors.setdefault(tensor.part, {})[tensor.name] = spec
        for entry in checkpoint.index.objects:
            wanted = entry.rank is None or entry.rank == whose
            if wanted and entry.part in self._state.parts:
                data = checkpoint.read_object(entry)
                where = f"part {entry.part!r} of {checkpoint.where}"
                found = document.decode(data, where=where)
                known = objects.setdefault(entry.part, {})
                twice = sorted(found.keys() & known.keys())
                if twice:
                    raise IntegrityError(
                        f"{where}: value {twice[0]!r} is stored twice", kind=ErrorKind.MALFORMED
                    )
                known.update(found)
        return {
            part: Stored(
                tensors.get(part, {}), objects.get(part, {}), rank, world_size, saved_world_size
            )
            for part in checkpoint.manifest.parts
        }

    def _restore(self, opened: _Opened) -> None:
        for name, part in self._state.parts.items():
            if name in opened.targets:
                part.restore(opened.stored[name], opened.targets[name])

    def _announce(self, refused: Sequence[tuple[int, str]] | set[tuple[int, str]]) -> None:
        rank = self._job.training.rank
        for step, reason in sorted(refused, reverse=True):
            events.emit(events.CheckpointRefused(self._job.url, step, rank, reason))
            if rank == 0:  # nobody should have to subscribe to learn that steps are taken again
                _log.warning("step %d in %s was passed over: %s", step, self._job.url, reason)


def _read(opened: _Opened) -> int:
    """Read and verify the wanted ranges, straight into the targets; return the bytes read."""
    plan = plan_reads(opened.checkpoint.index, describe(opened.targets))
    for segment in plan.segments:
        data = opened.checkpoint.read_blocks(segment.file, segment.start, segment.stop)
        for number in segment.pieces:
            fill(plan.reads[number], segment, data)
    return plan.nbytes


def _judge(messages: Sequence[bytes], where: str) -> bytes:
    judge([msgspec.msgpack.decode(data, type=Misfits) for data in messages], where=where)
    return b""
