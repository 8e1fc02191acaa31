"""Loads: all ranks take one decision, one checkpoint, and one outcome, which the report says."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, NoReturn, TypeVar

import msgspec
from torch.distributed.tensor import DTensor

from dist_ckpt import events
from dist_ckpt.decodable import decodable
from dist_ckpt.errors import CheckpointError, ErrorKind, IncompatibleError, IntegrityError, NotFound
from dist_ckpt.loading.across_hosts import HostsChooser
from dist_ckpt.loading.choosing import Chooser, Chosen, LoadCall, Which
from dist_ckpt.loading.fetching import BounceMemory, ReadOptions, warm_memory
from dist_ckpt.loading.filling import Wanted
from dist_ckpt.loading.fitting import Matched, Mismatches, check_matched, fit, in_all, taken_whole
from dist_ckpt.loading.reading import JointRead, ReadResult
from dist_ckpt.loading.ties import Ties, compare_ties, prepare
from dist_ckpt.options import LoadOptions
from dist_ckpt.planning.describe import NamedTensors
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Decide, Topic, on_every_rank
from dist_ckpt.repository.checkpoint import deleted_meanwhile
from dist_ckpt.repository.source import Again, Source, reason
from dist_ckpt.staging.arena import no_collection
from dist_ckpt.state.layout import note_written
from dist_ckpt.state.train_state import TrainState
from dist_ckpt.storage.resolve import Place

ResultT = TypeVar("ResultT")

# How many checkpoints may be deleted under one reader, who is slower than the run by then.
_MOST_LOST = 10

_log = logging.getLogger("dist_ckpt")


@decodable
class _Found(msgspec.Struct, frozen=True):
    """What a rank found: how its state fits, and whether it sees the place, where that is asked."""

    mismatches: Mismatches
    sight: bytes = b""


class _Opened(NamedTuple):
    """The checkpoint, where everything in it would go on this rank, and memory for reading it."""

    source: Source
    matched: Matched
    memory: BounceMemory


class _Prepared(NamedTuple):
    """What this rank is to fill, what of it shares memory, and the bytes read to compare that."""

    targets: NamedTensors
    ties: Ties
    nbytes_compared: int


class Loader:
    """Loads checkpoints of one job into one state."""

    def __init__(self, job: Job, state: TrainState) -> None:
        self._job = job
        self._state = state

    def load(
        self,
        step: Which,
        *,
        place: Place | None = None,
        options: Mapping[str, Any] | None = None,
        fall_back: bool,
        own: bool,
        claims: bool = False,
        failed: Exception | None = None,
    ) -> LoadReport | None:
        """Restore the state from `step`, or from the newest checkpoint.

        Args:
            step: which one: its number, None for the newest, or by what it is the best.
            place: where from; None for the run of the job.
            options: the keywords of `LoadOptions`.
            fall_back: whether to go on with the next older one when one is damaged.
            own: whether the job goes on from what is loaded; its run without a checkpoint is then
                no error: None is returned.
            claims: whether to take the run of the job over first, so that an older job can no
                longer commit. Without it nothing is written, and nobody is disturbed.
            failed: what keeps this rank from loading; all ranks hear of it.

        Raises:
            CheckpointError: the same on every rank. Nothing live was changed when the state does
                not fit (`IncompatibleError`); after a later failure the message says that tensors
                may be partly restored.
        """
        progress = _Progress()
        call = LoadCall.of(step, place, options, failed)
        call = replace(call, whole=lambda: taken_whole(self._state.parts, call.options))
        chooser = self._chooser_of(place)(self._job, call, own=own, claims=claims)
        while True:
            topic = self._job.topic("load", f"load from {chooser.url}")
            chosen = self._choose(topic, chooser, progress, fall_back=fall_back)
            if chosen is None:
                if claims:
                    # Now, and not at the first save: rank 0 has just taken the run over.
                    self._job.check_same_place(topic)
                self._job.go_on(None)
                return None
            try:
                with ExitStack() as stack:
                    report = self._load(topic, chosen, chooser.options, progress, stack)
            except IntegrityError as error:
                self._give_up(topic, chosen, chooser, progress, error, fall_back=fall_back)
                continue
            except CheckpointError as error:
                _raise_told(error, progress)
            except BaseException as error:  # as it is: whoever handles it knows its class
                if progress.changed:
                    error.add_note(progress.changed)
                raise
            if own and place is None:
                self._job.go_on(report.step, chooser.passed_over())  # which it may save anew
            elif own:
                self._job.go_on(None)  # the run itself begins
            return report

    def _chooser_of(self, place: Place | None) -> type[Chooser]:
        # Another place is one for all hosts, whatever the run of the job is.
        return HostsChooser if place is None and self._job.ranks.node_local else Chooser

    def _choose(
        self, topic: Topic, chooser: Chooser, progress: _Progress, *, fall_back: bool
    ) -> Chosen | None:
        since = time.perf_counter()
        try:
            chosen, news = chooser.choose(topic, fall_back=fall_back)
        except CheckpointError as error:
            _raise_told(error, progress)
        progress.clock("choose", since)
        self._announce(chooser.url, news)
        return chosen

    def _load(
        self,
        topic: Topic,
        chosen: Chosen,
        options: LoadOptions,
        progress: _Progress,
        stack: ExitStack,
    ) -> LoadReport:
        since = time.perf_counter()
        # What is made of all the names would set off the collection that the imports are due for.
        with no_collection():
            (source, matched, memory), verdict = self._match(topic, chosen, options, stack)
            if progress.touched not in ("", source.save_id) and verdict.missing:
                # What an older one lacks would keep the values of the newer one that was damaged.
                raise IncompatibleError(
                    f"{source.where} has no {verdict.missing[0]}, which another checkpoint that "
                    "was given up half-way may have filled: build the state anew and restore this "
                    "step by its number",
                    kind=ErrorKind.STATE_MISMATCH,
                )
            progress.clock("match", since)
            reading = stack.enter_context(self._reading(topic, matched, options, memory))
            prepared: list[_Prepared] = []

            def find_wanted() -> Sequence[Wanted]:
                # In the round, where the others hear if names of one memory differ here.
                prepared.append(self._prepare(topic, source, matched, options))
                return prepared[0].ties.wanted

            reading.agree(find_wanted, asks=bool(matched.first))
        if self._job.training.rank == 0:
            tell_empty(source.where, verdict.empty)
        targets, ties, _ = prepared[0]
        result = self._read(reading, matched, prepared[0], progress)
        for phase, seconds in result.seconds.items():
            progress.seconds[phase] = progress.seconds.get(phase, 0.0) + seconds
        since = time.perf_counter()
        # A round of its own: this is code of the program, which may fail on one rank alone.
        self._together(topic.phase("restore"), lambda: self._restore(matched, targets, ties))
        progress.clock("restore", since)
        report = self._report(
            chosen, source, matched, verdict, result, options=options, progress=progress
        )
        events.emit(
            events.CheckpointRestored(
                report.url, report.step, self._job.training.rank, report.nbytes_read, report.seconds
            )
        )
        return report

    def _reading(
        self, topic: Topic, matched: Matched, options: LoadOptions, memory: BounceMemory
    ) -> JointRead:
        return JointRead(
            matched.source,
            self._how(options),
            self._job.training,
            topic,
            deadline=self._job.deadline,
            memory=memory,
        )

    def _how(self, options: LoadOptions) -> ReadOptions:
        members = self._job.ranks.members()
        return ReadOptions(options.verify, options.exchange, options.in_flight_bytes, members)

    def _prepare(
        self, topic: Topic, source: Source, matched: Matched, options: LoadOptions
    ) -> _Prepared:
        """Give memory to what has none, and see that what shares memory agrees."""
        targets, ties = prepare(source, matched.targets, matched.holdings.numbers, options=options)
        compared = compare_ties(matched.source, ties, self._how(options), label=topic.label)
        return _Prepared(targets, ties, compared)

    def _read(
        self, reading: JointRead, matched: Matched, prepared: _Prepared, progress: _Progress
    ) -> ReadResult:
        """Read everything to its place, after what code of the program may refuse."""
        since = time.perf_counter()
        if len(matched.first) > 1 or self._job.training.world_size > 1:
            # One alone that refuses here has nobody beside it who did not.
            progress.asked = tuple(matched.first)
        reading.begin(lambda: self._restore_first(matched))
        progress.clock("match", since)
        # From here on an error has to say that tensors may be partly restored.
        progress.touched = matched.source.save_id
        for name in prepared.targets:
            for target in prepared.targets[name].values():
                if isinstance(target, DTensor):  # of others the memory is the tensor itself
                    note_written(target)
        result = reading.read()
        return replace(
            result,
            nbytes_read=result.nbytes_read + prepared.nbytes_compared,
            nbytes_wanted=result.nbytes_wanted + prepared.ties.nbytes_kept,
        )

    def _match(
        self, topic: Topic, chosen: Chosen, options: LoadOptions, stack: ExitStack
    ) -> tuple[_Opened, Mismatches]:
        """Open the checkpoint on all ranks, and compare names, shapes and dtypes.

        Returns:
            What this rank opened and found, and what all ranks found together.

        Raises:
            UsageError: some ranks do not see the place that rank 0 does.
        """
        mine: list[_Opened] = []

        def decide(messages: Sequence[bytes]) -> bytes:
            found = [msgspec.msgpack.decode(data, type=_Found) for data in messages]
            if chosen.token:
                # Before any name: who looks at another place has compared something else.
                self._job.check_seen(chosen.token, [each.sight for each in found])
            mismatches = [each.mismatches for each in found]
            # Of rank 0, whose names only this decision needs.
            ((source, matched, _),) = mine
            check_matched(mismatches, matched.known)
            where = f"{source.where} (parts {', '.join(matched.source.parts) or 'none'})"
            return msgspec.msgpack.encode(
                refuse_mismatches(mismatches, where=where, strict=options.strict)
            )

        def work() -> _Found:
            sees, sight = self._job.sees(chosen.token) if chosen.token else (True, b"")
            if not sees:
                return _Found(Mismatches(), sight)  # which is refused, whatever is there
            job, parts = self._job.training, self._state.parts
            source = chosen.open()
            # Made ready while it is found out what goes where.
            memory = stack.enter_context(warm_memory(source, options.in_flight_bytes))
            matched = fit(source, options, parts, rank=job.rank, world_size=job.world_size)
            mine.append(_Opened(source, matched, memory))
            return _Found(matched.mismatches, sight)

        _, answer = self._together(
            topic.phase("fits"), work, message=msgspec.msgpack.encode, decide=decide
        )
        if chosen.token:
            self._job.all_see_it()
        return mine[0], msgspec.msgpack.decode(answer, type=Mismatches)

    def _restore_first(self, matched: Matched) -> None:
        """Restore what code of the program may refuse, while no tensor has changed yet."""
        for name in matched.first:
            self._state.parts[name].restore(matched.holdings.parts[name], {})

    def _restore(self, matched: Matched, targets: NamedTensors, ties: Ties) -> None:
        ties.finish()
        for name, part in self._state.parts.items():
            if name in targets and name not in matched.first:
                part.restore(matched.holdings.parts[name], targets[name])

    def _report(
        self,
        chosen: Chosen,
        source: Source,
        matched: Matched,
        verdict: Mismatches,
        result: ReadResult,
        *,
        options: LoadOptions,
        progress: _Progress,
    ) -> LoadReport:
        return LoadReport(
            url=chosen.url,
            step=source.step,
            save_id=source.save_id,
            parts=tuple(matched.targets),
            loaded=tuple(f"{p}/{name}" for p, named in matched.targets.items() for name in named),
            missing=tuple(verdict.missing),
            unexpected=tuple(verdict.unexpected),
            casts=tuple(verdict.casts),
            resized=tuple(verdict.resized),
            notes=(*matched.notes, *chosen.notes),
            nbytes_wanted=result.nbytes_wanted,
            nbytes_read=result.nbytes_read,
            nbytes_exchanged=result.nbytes_exchanged,
            exchanged=result.exchanged,
            exchange_reason=result.why,
            verified=options.verify and source.verified,
            seconds=time.perf_counter() - progress.begun,
            seconds_by_phase=dict(progress.seconds),
            saved_world_size=source.saved_world_size,
            world_size=self._job.training.world_size,
            refused=dict(chosen.refused),
        )

    def _together(
        self,
        topic: Topic,
        work: Callable[[], ResultT],
        *,
        message: Callable[[ResultT], bytes] = lambda _: b"",
        decide: Decide = lambda _: b"",
    ) -> tuple[ResultT, bytes]:
        return on_every_rank(
            self._job.training,
            topic,
            work,
            deadline=self._job.deadline(),
            message=message,
            decide=decide,
        )

    def _give_up(
        self,
        topic: Topic,
        chosen: Chosen,
        chooser: Chooser,
        progress: _Progress,
        error: IntegrityError,
        *,
        fall_back: bool,
    ) -> None:
        """Pass over what turned out to be damaged, or was deleted meanwhile; all ranks together.

        Raises:
            IntegrityError: it is damaged, and nothing else was asked for.
            NotFound: again and again retention was faster.
        """
        again = self._look_again(topic, chooser)
        # The same checkpoint is chosen again, without the copy that is damaged (docs/design/013).
        if again == "elsewhere":
            return
        if again:
            # That is no damage, so nothing is noted: what there is by now is chosen next.
            progress.lost += 1
            if progress.lost == _MOST_LOST:
                _raise_told(deleted_meanwhile(chosen.store, chosen.step), progress, error)
            return
        if not fall_back:
            _raise_told(error, progress)
        # On every rank, so that the next round brings no news of it: it is announced here.
        chooser.refuse(chosen.step, error.message)
        self._announce(chooser.url, {chosen.step: error.message})

    def _look_again(self, topic: Topic, chooser: Chooser) -> Again:
        """Return why rank 0 has to choose again, and need not give up what it chose; a round.

        The next choice then is what a reader who came later would get: the newest there is by
        then, or that the step which was asked for is not found.
        """
        _, answer = self._together(
            topic.phase("gone"),
            chooser.damage,
            message=bytes,
            decide=lambda messages: msgspec.msgpack.encode(chooser.look_again(messages)),
        )
        found: Again = msgspec.msgpack.decode(answer, type=Again)
        return found

    def _announce(self, url: str, refused: Mapping[int, str]) -> None:
        rank = self._job.training.rank
        for step, why in sorted(refused.items(), reverse=True):
            events.emit(events.CheckpointRefused(url, step, rank, why))
            if rank == 0:  # nobody should have to subscribe to learn that steps are taken again
                told = reason(step, url, why)
                _log.warning("step %d in %s was passed over: %s", step, url, told)


# What a load did.


_SHOWN = 5


@dataclass(frozen=True, slots=True)
class LoadReport:
    """The outcome of a load, on this rank; `str` of it is for people.

    Names are `part/name`, as the state has them. What was missing, unexpected, cast or resized is
    that of all ranks together; bytes and seconds are this rank's. A shape that differs and is not
    resized, or a dtype that may not be cast, never gets this far: it is an `IncompatibleError`.

    Attributes:
        url: where the checkpoint is: its run, or its directory where another program wrote it.
        step: the checkpoint that was loaded; 0 where it has none.
        save_id: the attempt that wrote it, or the format where another program did.
        parts: the parts that were restored.
        loaded: the tensors that this rank filled.
        missing: wanted by the state, not stored; left as they were.
        unexpected: stored, unknown to the state.
        casts: tensors that took another dtype than the stored one; the entry tells both.
        resized: tensors of another shape than the stored one, loaded in part; the entry tells both,
            and what became of the rest.
        nbytes_wanted: bytes of the tensors, or of its boxes of them, that this rank holds.
        nbytes_read: bytes read from storage by this rank, manifest and index excluded.
        nbytes_exchanged: bytes received from ranks that read them.
        exchanged: whether ranks read what several want once, and sent it to one another.
        exchange_reason: what that was decided by.
        verified: whether every byte was compared with its digest.
        seconds: how long it took on this rank.
        seconds_by_phase: the same by phase: `choose` the checkpoint, `match` the names, `plan`,
            `read`, `exchange`, and `restore`, which hands the values to the parts.
        saved_world_size: ranks at the save; 0 where the checkpoint does not say.
        world_size: ranks now.
        refused: newer checkpoints that were passed over, each with the reason.
        notes: what else to know, though nothing is wrong: new streams of random numbers, values of
            each rank that were resharded.
    """

    url: str
    step: int
    save_id: str
    parts: tuple[str, ...]
    loaded: tuple[str, ...]
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    casts: tuple[str, ...]
    nbytes_wanted: int
    nbytes_read: int
    nbytes_exchanged: int
    exchanged: bool
    exchange_reason: str
    verified: bool
    seconds: float
    seconds_by_phase: Mapping[str, float]
    saved_world_size: int
    world_size: int
    refused: Mapping[int, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    resized: tuple[str, ...] = ()

    @property
    def tensors(self) -> int:
        """How many tensors were filled on this rank."""
        return len(self.loaded)

    def __str__(self) -> str:
        saved = self.saved_world_size or "an unknown number of"
        verified = "verified" if self.verified else "NOT verified"
        phases = ", ".join(f"{name} {value:.2f}" for name, value in self.seconds_by_phase.items())
        head = f"step {self.step} of {self.url} ({self.save_id}), saved by {saved} ranks"
        what = f"{len(self.loaded)} tensors of {', '.join(self.parts) or 'no part'}"
        moved = f"{_size(self.nbytes_read)} read, {_size(self.nbytes_exchanged)} received"
        lines = [
            f"loaded {head}, by {self.world_size} now",
            f"  {what}: {_size(self.nbytes_wanted)}, {verified}",
            f"  {moved} ({self.exchange_reason})",
            f"  {self.seconds:.2f} s: {phases}",
        ]
        for kind in ("missing", "unexpected", "casts", "resized"):
            names = getattr(self, kind)
            if names:
                rest = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
                lines.append(f"  {kind}: {', '.join(names[:_SHOWN])}{rest}")
        lines += [
            f"  passed over step {step}: {reason(step, self.url, why)}"
            for step, why in self.refused.items()
        ]
        lines += [f"  {note}" for note in self.notes]
        return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if nbytes >= factor:
            return f"{nbytes / factor:.1f} {unit}"
    return f"{nbytes} B"


# How far a load has come, and what an error that ends it says of the state.


@dataclass(slots=True)
class _Progress:
    """One load on its way.

    Attributes:
        begun: when, on the clock of `time.perf_counter`.
        touched: of which attempt bytes may have reached live tensors; "" for none.
        lost: how many checkpoints were deleted while they were read.
        asked: the parts that were restored first, some perhaps before another one refused.
        seconds: how long each phase took.
    """

    begun: float = field(default_factory=time.perf_counter)
    touched: str = ""
    lost: int = 0
    asked: tuple[str, ...] = ()
    seconds: dict[str, float] = field(default_factory=dict)

    def clock(self, phase: str, since: float) -> None:
        """Count the time since `since` for `phase`."""
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - since

    @property
    def changed(self) -> str:
        """What of the state may have changed, as a sentence; empty for nothing."""
        if self.touched:
            return "Tensors of the state may be partly restored: load again before use"
        if self.asked:
            return f"No tensor was changed; of {', '.join(self.asked)} some may be restored"
        return ""


def _raise_told(
    error: CheckpointError, progress: _Progress, cause: CheckpointError | None = None
) -> NoReturn:
    """Raise `error`, with what became of the state where that may have changed.

    Args:
        error: how the load failed.
        progress: how far it was.
        cause: what led to it; None where `error` has a cause of its own.

    Raises:
        CheckpointError: always.
    """
    known = NotFound if isinstance(error, NotFound) else type(error)
    if progress.changed and known.__init__ is not CheckpointError.__init__:
        # A class of the program's own, and only that knows what its constructor takes.
        error.add_note(progress.changed)
    elif progress.changed:
        told = known(f"{error.message}. {progress.changed}", kind=error.kind, ranks=error.ranks)
        raise told from cause or error
    if cause is None:
        raise error  # with the cause that it has
    raise error from cause


# What does not fit on all ranks together: refused, or told.


_REFUSED_SHOWN = 20


def refuse_mismatches(
    mismatches_by_rank: Sequence[Mismatches], *, where: str, strict: bool = True
) -> Mismatches:
    """Return what the ranks together found, if it is no reason not to load.

    A name is unexpected only when no rank knows it: the stages of a pipeline each know their own.

    Raises:
        IncompatibleError: a shape or dtype differs, or with `strict` a name is missing or
            unexpected. The message has all of it: the first names of each kind and the counts of
            the rest.
    """
    found = Mismatches(
        missing=_union(each.missing for each in mismatches_by_rank),
        unexpected=in_all(each.unexpected for each in mismatches_by_rank),
        shapes=_union(each.shapes for each in mismatches_by_rank),
        dtypes=_union(each.dtypes for each in mismatches_by_rank),
        casts=_union(each.casts for each in mismatches_by_rank),
        unlike=_union(each.unlike for each in mismatches_by_rank),
        resized=_union(each.resized for each in mismatches_by_rank),
        filled=(filled := _union(each.filled for each in mismatches_by_rank)),
        # What one rank fills is not empty: a stage of a pipeline may have nothing of a part.
        empty=sorted(set(_union(each.empty for each in mismatches_by_rank)) - set(filled)),
    )
    findings = {
        "missing in the checkpoint": found.missing,
        "unexpected in the checkpoint": found.unexpected,
        "of another shape": found.shapes,
        "of another dtype": found.dtypes,
        "of another kind": found.unlike,
    }
    loose = found.missing or found.unexpected or found.unlike
    if found.shapes or found.dtypes or (strict and loose):
        lines = [f"  {kind}: {_some_names(names)}" for kind, names in findings.items() if names]
        raise IncompatibleError(
            f"{where} does not fit this state; nothing was changed{_way_out(found)}\n"
            + "\n".join(lines),
            kind=ErrorKind.STATE_MISMATCH,
        )
    if found.empty and not found.filled:
        # Nobody means to load nothing.
        raise IncompatibleError(
            f"{where} and this state have {_nothing_of(found)}", kind=ErrorKind.STATE_MISMATCH
        )
    return found


def tell_empty(where: str, parts: Sequence[str]) -> None:
    """Say which parts nothing is loaded into: with `strict=False` that is no error."""
    if parts:
        _log.warning(
            "nothing of %s goes into %s of the state: they have no name in common",
            where,
            ", ".join(parts),
        )


def _some_names(names: Sequence[str]) -> str:
    """Return the first names, and the count of the rest."""
    rest = len(names) - _REFUSED_SHOWN
    return ", ".join(names[:_REFUSED_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def _nothing_of(found: Mismatches) -> str:
    if not (found.missing or found.unexpected):
        parts = ", ".join(found.empty)
        return (
            f"nothing of {parts} to load beside what only= and skip= leave out; nothing was "
            "changed. Leave out less"
        )
    # What strict=False leaves alone would be everything.
    return (
        "not one name in common, so strict=False would load nothing; nothing was changed. rename= "
        f"maps names\n  stored: {_some_names(found.unexpected)}\n  wanted: "
        f"{_some_names(found.missing)}"
    )


def _way_out(found: Mismatches) -> str:
    ways = []
    if found.missing or found.unexpected:
        ways.append("rename= maps names, skip= leaves some out, strict=False what has no partner")
    # Such as the generators, which other programs do not keep.
    parts = [name for name in found.missing if "/" not in name]
    if parts:
        ways.append(f"skip={parts!r} leaves as it is what was never saved")
    if any("/param_groups." in name for name in (*found.missing, *found.unexpected)):
        ways.append(
            "an optimizer is built with the parameters and groups that it had when it was saved, "
            "add_param_group included, before it is loaded"
        )
    if found.unlike:
        ways.append("skip= begins with a new one, strict=False takes what fits of the other")
    if any(entry.endswith("]") for entry in found.shapes):
        ways.append(
            'resize={"<name>": "pad"} loads what both have where the state has more, "crop" where '
            "the checkpoint has more"
        )
    if any(not entry.endswith("(never cast)") for entry in found.dtypes):
        ways.append("cast=True converts floating dtypes, and integers to wider ones")
    return f" ({'; '.join(ways)})" if ways else ""


def _union(lists: Iterable[list[str]]) -> list[str]:
    return sorted({name for names in lists for name in names})
