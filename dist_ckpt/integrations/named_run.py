"""A run that a trainer of others saves to by names: one save for all names of one state."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
import torch.distributed as dist
from msgspec import structs
from torch.distributed.tensor import DTensor

from dist_ckpt.checkpointer import Checkpointer
from dist_ckpt.errors import CheckpointError, ErrorKind, NotFound, StorageError, UsageError
from dist_ckpt.format.manifest import Manifest
from dist_ckpt.integrations.begun import begun_by_another, refuse
from dist_ckpt.integrations.names import Names, PointedAt, StepName
from dist_ckpt.loading.loader import Loader, LoadReport
from dist_ckpt.options import TIMEOUT_SECONDS
from dist_ckpt.ranks.job import Job, JobRanks, Ranks
from dist_ckpt.run import Run
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.layout import address
from dist_ckpt.state.part import Stored
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.resolve import resolve

OWN = "lightning"  # the part in which the trainer says where a training stands

Gather: TypeAlias = Callable[[Any], list[Any]]
"""Returns what every rank gave, by rank; all of them call it."""


def alone(value: Any) -> list[Any]:
    """Be the only rank."""
    return [value]


def rank_and_size() -> tuple[int, int]:
    """Return the rank in the default process group, and how many there are."""
    if not (dist.is_available() and dist.is_initialized()):
        return 0, 1
    return dist.get_rank(), dist.get_world_size()


def of_all_ranks(value: Any) -> list[Any]:
    """Return what every rank of the default process group gave."""
    _, world_size = rank_and_size()
    if world_size == 1:
        return [value]
    found: list[Any] = [None] * world_size
    dist.all_gather_object(found, value)
    return found


@dataclass(frozen=True, slots=True)
class AskedSave:
    """What a trainer asks to have saved.

    Attributes:
        step: how often the optimizer has stepped.
        tensors: anything with the tensors of the state in it, to see whether they changed.
        values: everything else.
        full: whether that is all, and not the model alone.
        metrics: numbers by name; those of rank 0 count.
        about: what else the manifest is to say; that of rank 0 counts.
    """

    step: int
    tensors: Any
    values: Mapping[str, Any]
    full: bool
    metrics: Mapping[str, float]
    about: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class _Last:
    asked_step: int
    number: int
    prints: object
    full: bool
    values: bytes
    random: dict[str, str]
    handle: SaveHandle

    def holds(self, asked: AskedSave, prints: object) -> bool:
        """Tell whether what is asked for is what was saved, on this rank, but for values."""
        same = (self.asked_step, self.prints) == (asked.step, prints)
        # All of it serves for the model alone, and not the other way round.
        return same and self.full >= asked.full


class NamedRun:
    """Saves one state to one run, under names. Every rank of the job makes the same calls.

    A checkpoint has the number of its step. Where a state is another one although the optimizer
    has not stepped since the save before, it gets the next free number.
    """

    def __init__(
        self,
        place: str,
        make: Callable[[], TrainState],
        *,
        ranks: Ranks = "all",
        with_random: bool = False,
        discard_newer: bool = False,
        timeout_seconds: float = TIMEOUT_SECONDS,
    ) -> None:
        """Name the run; nothing is read yet.

        Args:
            place: a path or a URL.
            make: returns the state to save, asked anew after each `close`.
            ranks: which ranks form the job.
            with_random: whether random number generators are part of it.
            discard_newer: whether checkpoints may be given up that are newer than the one that
                training goes on from; else it refuses to leave them behind.
            timeout_seconds: after this long a save or a restore fails on every rank.
        """
        self.place = place
        self._make = make
        self._ranks: Ranks = ranks
        self._gather: Gather = alone if ranks == "alone" else of_all_ranks
        self._with_random = with_random
        self._discard_newer = discard_newer
        self._timeout_seconds = timeout_seconds
        self._names = Names(resolve(place))
        self._ckpt: Checkpointer | None = None
        self._last: _Last | None = None
        self._origin: int | None = None
        self._fell_back = False

    @property
    def _leads(self) -> bool:
        return self._ranks == "alone" or rank_and_size()[0] == 0

    def go_on_from(self, report: LoadReport) -> None:
        """Take note that training goes on from what was loaded by `look`.

        Who has saved here already only looked at it: its own saves are what it goes on from.
        """
        if self._ckpt is None and self._last is None:
            self._origin = report.step
            self._fell_back = bool(report.refused)

    def save(self, key: str, asked: AskedSave, put: Callable[[], None]) -> None:
        """Save what is asked for as `key`; return when the state may change again.

        Args:
            key: the name.
            asked: what, and what to say of it.
            put: makes the state be what is to be saved.

        Raises:
            CheckpointError: see `Checkpointer.save`.
        """
        put()
        values, random = encode(asked.values, path="values"), self._random()
        prints, last = _prints(asked.tensors), self._last
        # Of all ranks: where one has changed it is another save for everybody.
        if last is not None and all(self._gather(last.holds(asked, prints))):
            number, handle = last.number, last.handle
        else:
            # Steps of a run ascend, and what is committed is never written again.
            number = asked.step if last is None else max(asked.step, last.number + 1)
            ckpt = self._opened()
            put()  # once more: what was opened may have restored
            about = {**asked.about, "step": asked.step, "full": asked.full}
            about["unnamed"] = self._unnamed()
            handle = ckpt.save(number, metrics=asked.metrics, metadata={"trainer": about})
            new = _Last(asked.step, number, prints, asked.full, values, random, handle)
            # What was restored is not saved again, and its values may be others by now.
            self._last = last = replace(new, values=b"") if number == self._origin else new
        name = StepName(step=number, save_id=handle.save_id, full=asked.full)
        # A round of all ranks, as none knows whether another one has other values.
        if any(self._gather((values, random) != (last.values, last.random))):
            said = [each.decode() for each in self._gather(values)]
            name = structs.replace(name, values=said, random=self._gather(random))
        self._point(key, name, handle)

    def restore(self, found: PointedAt) -> LoadReport:
        """Restore the state in place, to go on from there.

        Raises:
            NotFound: there is none.
            IncompatibleError: another program began the run.
            CheckpointError: see `Checkpointer.restore`.
        """
        # What is in flight may be what is restored.
        self.close()
        self._last = None
        ckpt, parts = self._checkpointer()
        self._ckpt = ckpt
        skip = self._not_in(found, parts)
        ckpt.restore(step=found.step, skip=skip, discard_newer=self._discard_newer)
        if ckpt.restored is None:
            raise NotFound(f"no checkpoint in {self.place}", kind=ErrorKind.NO_CHECKPOINT)
        self._origin = ckpt.restored.step
        self._tidy_names()
        return _checked(found, ckpt.restored)

    def look(self, found: PointedAt, state: TrainState, *, only: list[str]) -> LoadReport:
        """Fill `state`; the run is not taken over, and whoever trains in it is not disturbed."""
        # What is in flight may be what is looked at.
        if self._ckpt is not None:
            self._ckpt.wait()
        job = Job(
            self.place,
            timeout_seconds=self._timeout_seconds,
            ranks=JobRanks(self._ranks),
            commits=False,
        )
        try:
            report = Loader(job, state).load(
                found.step,
                place=self.place,
                options={"only": only},
                fall_back=found.step is None,
                own=False,
            )
        except NotFound as error:
            raise _cut_off(found, error) from error
        finally:
            job.leave()
        assert report is not None  # `own=False` raises instead
        return _checked(found, report)

    def name_of(self, found: PointedAt, report: LoadReport) -> StepName | None:
        """Return the name of what was loaded: the one asked for, else the one that is latest."""
        name = found.name
        # The step may have been saved anew since the name was given.
        if self._leads and (name is None or name.save_id != report.save_id):
            name = self._names.latest_of(report.save_id)
        first: StepName | None = self._gather(name)[0]
        return first

    def remove(self, key: str) -> None:
        """Forget a name; what nothing names any more is deleted after the next commit.

        Where no save follows, `close` deletes it. Protected is what `Run.remove` says.
        """
        if self._leads:
            self._names.drop(key)
            if self._ckpt is None:
                self._names.remove_unnamed()

    def close(self, error: BaseException | None = None) -> None:
        """Finish what is in flight, and release everything; saving again opens it anew.

        Args:
            error: by which training ended.

        Raises:
            CheckpointError: a save failed.
        """
        # Forgotten first: should this raise, the next save opens it anew.
        ckpt, self._ckpt = self._ckpt, None
        if ckpt is None:
            return
        # Opened anew, training goes on from its own last save.
        if self._last is not None:
            self._origin = self._last.number
        try:
            # With the error: other ranks may not come to the end, so none waits for them.
            ckpt.__exit__(None if error is None else type(error), error, None)
        finally:
            if self._leads:
                # Names first: what has one after that is not deleted.
                self._names.settle()
                self._names.remove_unnamed()

    def _point(self, key: str, name: StepName, handle: SaveHandle) -> None:
        """Have rank 0 write the name; what keeps it from that, all ranks hear."""
        failed = ""
        if self._leads:
            try:
                self._names.point(key, name, handle)
            except CheckpointError as error:
                failed = error.message
        # All of them raise, or the others would wait for rank 0 in the next round.
        failed = self._gather(failed)[0]
        if failed:
            raise StorageError(f"{key} could not be written in {self.place}: {failed}")

    def _random(self) -> dict[str, str]:
        if not self._with_random:
            return {}
        return {kind: data.decode() for kind, data in RngPart().capture().objects.items()}

    def _checkpointer(self) -> tuple[Checkpointer, list[str]]:
        """Return a new one, and the names of its parts."""
        state = self._make()
        made = Checkpointer(
            self.place,
            state,
            keep=self._names,
            timeout_seconds=self._timeout_seconds,
            ranks=self._ranks,
        )
        return made, list(state)

    def _not_in(self, found: PointedAt, parts: list[str]) -> list[str]:
        """Return those of `parts` that were not saved; refuse a run of another program."""

        def look() -> tuple[list[str], str]:
            run = Run(self.place)
            try:
                manifest = run.newest() if found.step is None else run.manifest(found.step)
            except CheckpointError:
                return [], ""  # the restore finds it too, on all ranks together
            stored = list(manifest.parts)
            if OWN not in stored:
                return [], begun_by_another(self.place, stored, own=OWN, trainer="Lightning")
            # A save of the model alone has an optimizer, too, which is empty.
            alone = not _told(manifest).get("full", True)
            without = {"optimizer", "rng"} if alone else set()
            return [part for part in parts if part not in stored or part in without], ""

        # One looks and all hear it, as they have to restore the same parts.
        missing, said = self._gather(look() if self._leads else ([], ""))[0]
        refuse(said)
        return list(missing)

    def _opened(self) -> Checkpointer:
        """Return what saves, having told it where training goes on from."""
        if self._ckpt is None:
            ckpt, parts = self._checkpointer()
            self._ckpt = ckpt
            if self._fell_back:
                # All is read once more, so that it finds out itself what is damaged.
                ckpt.restore(discard_newer=self._discard_newer)
            elif self._origin is not None:
                # The one part that the save puts anew: a load of nothing is refused.
                skip = [part for part in parts if part != OWN]
                ckpt.restore(step=self._origin, skip=skip, discard_newer=self._discard_newer)
            elif self._discard_newer:
                # There is nothing to go on from: then all of the run is given up.
                ckpt.restore("none", discard_newer=True)
            self._tidy_names()
        return self._ckpt

    def _unnamed(self) -> list[int]:
        return self._names.unnamed() if self._leads else []

    def _tidy_names(self) -> None:
        """Hear which steps lost their names before, and take them from those that were given up."""
        if not self._leads:
            return
        if self._discard_newer:
            # No name may be left of what was given up, whose steps are saved anew.
            self._names.forget_after(-1 if self._origin is None else self._origin)
        if self._origin is not None:
            manifest = Run(self.place).manifest(self._origin)
            self._names.forget_before(_told(manifest).get("unnamed", []))


def random_of(name: StepName, *, rank: int, world_size: int) -> None:
    """Set the random number generators as they were when `name` was given."""
    own = name.random[rank if len(name.random) == world_size else 0]
    objects = {kind: data.encode() for kind, data in own.items()}
    RngPart().restore(Stored({}, objects, rank, world_size, len(name.random)), {})


def _prints(value: Any) -> object:
    """Return what differs when torch has written to a tensor in `value` in between."""
    return [(address(each), _writes(each)) for each in _tensors(value)]


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, Mapping | list | tuple):
        for each in value.values() if isinstance(value, Mapping) else value:
            yield from _tensors(each)


def _writes(tensor: torch.Tensor) -> int:
    with torch.no_grad():
        local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    # Autograd's count of writes in place, which tensors of inference mode do not have.
    return -1 if local.is_inference() else local._version  # noqa: SLF001


def _checked(found: PointedAt, report: LoadReport) -> LoadReport:
    """Return `report` unless a name meant another save of that step."""
    name = found.name
    if found.step is not None and name is not None and name.save_id != report.save_id:
        raise UsageError(
            f"the save of step {name.step} that was named was given up, and the step saved anew: "
            f"give {found.place}@{name.step} to load it all the same"
        )
    return report


def _cut_off(found: PointedAt, error: NotFound) -> NotFound:
    if found.name is None:
        return error
    newest = Run(found.place).latest()
    hint = "there is none" if newest is None else f"the newest is {found.place}@{newest}"
    return NotFound(
        f"the save of step {found.name.step} was cut off or its checkpoint deleted: {hint}",
        kind=ErrorKind.NO_CHECKPOINT,
    )


def _told(manifest: Manifest) -> Mapping[str, Any]:
    """Return what the trainer said of itself with a save; nothing in a save of somebody else."""
    told: Mapping[str, Any] = manifest.metadata.get("trainer", {})
    return told
