"""Whether a save is due, decided once for all ranks.

What every rank knows is decided by every rank. For the rest rank 0 keeps one note up, its *word*:
up to which call of `step` it has decided, and what. Nobody waits for all: a rank looks at the note
only when it has come to a call that the note it knows does not cover.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    from_wire,
    to_wire,
)
from dist_ckpt.policy import Better, Moment, SavePolicy, Scope, members
from dist_ckpt.policy.ending import OnEnding, OnNotice, OnSignal
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.ranks.waiting import failure
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.handle import Outlook
from dist_ckpt.saving.provenance import Metrics, as_numbers
from dist_ckpt.training.notices import NoticeWatch, SignalNote

_log = logging.getLogger("dist_ckpt")

_WORD, _ENDED = "word", "ended"
SIGNAL = "signal"
"""The name of the note by which another rank tells rank 0 of a signal."""

AHEAD_SECONDS = 0.5
"""How much time the decisions told cover ahead: how late a signal or the clock may be heeded."""

_AHEAD_CALLS = 256
MEET_CALLS = 256
"""After so many calls the ranks meet once, so that no entry of the decisions is kept for ever."""


@decodable
class _Entry(msgspec.Struct, frozen=True):
    """What rank 0 decided for one call, or the error that kept it from deciding."""

    reason: str = ""
    signal: str = ""
    held: str = ""
    within: float | None = None
    metrics: dict[str, float] = {}
    error: dict[str, object] = {}


@decodable
class _Decisions(msgspec.Struct, frozen=True):
    """All that rank 0 has decided, up to the call `horizon`; calls without an entry are nothing."""

    horizon: int
    entries: dict[int, _Entry]


@decodable
class _Arrival(msgspec.Struct, frozen=True):
    """A signal that arrived at another rank, so long before its call number `call`."""

    call: int
    signal: str
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for all ranks at one call.

    Attributes:
        reason: why to save now, None when nothing is due.
        metrics: those that somebody watches, as rank 0 gave them.
        within_seconds: how much time there is for the save; infinite for the usual.
        urgent: whether the training is about to be ended from outside.
    """

    reason: str | None
    metrics: Mapping[str, float] = field(default_factory=dict)
    within_seconds: float = math.inf
    urgent: bool = False


class SaveTrigger:
    """Decides when to save, the same on every rank.

    Attributes:
        signaled: the name of the signal that all ranks have agreed to heed, "notice" for a notice,
            "" for none.
        out_of_time: whether no save was begun for it, because there was no time left for one.
        note: where it is written down what arrives from outside.
        decisions: what rank 0 has decided, as far as this rank has heard and it is not over.
    """

    def __init__(
        self,
        job: Job,
        policy: SavePolicy,
        *,
        best: Callable[[Sequence[Criterion]], Mapping[Criterion, float]],
        outlook: Callable[[], Outlook] = Outlook,
    ) -> None:
        """Made with the Checkpointer; other ranks are not contacted yet.

        Args:
            job: the ranks.
            policy: when to save. The metrics of its `better` are those that all ranks hear.
            best: called once on rank 0: the best values among the checkpoints that exist.
            outlook: called on rank 0 when a signal arrived.
        """
        self._job = job
        parts = members(policy)
        self._local = [each for each in parts if each.scope is Scope.LOCAL]
        self._shared = [each for each in parts if each.scope is not Scope.LOCAL]
        self._criteria = [each.criterion for each in parts if isinstance(each, Better)]
        self._at_once = any(each.scope is Scope.AT_ONCE for each in parts)
        self._endings = [each for each in parts if isinstance(each, OnEnding)]
        self.note = SignalNote(
            [each for one in parts if isinstance(one, OnSignal) for each in one.signals]
        )
        self._notices = NoticeWatch([each for each in parts if isinstance(each, OnNotice)])
        self._outlook = outlook
        self._find_best = best
        # Rank 0: the best so far; of what is stored for certain; of the save that was begun last.
        self._best: dict[Criterion, float] | None = None
        self._stored: dict[Criterion, float] = {}
        self._begun: dict[Criterion, float] = {}
        self._told_values: dict[Criterion, float] = {}
        self._calls = 0
        # Rank 0: what kept it from deciding, by call; there it is raised as it is.
        self._mistakes: dict[int, Exception] = {}
        self._saved_at = self._told_at = time.monotonic()
        self._told_call = 0
        self._usual_seconds = math.inf
        self._heeded_call = 0
        # Nothing was said of the first call, so nothing can be due there that needs to be said.
        self.decisions = _Decisions(0 if self._at_once else 1, {})
        self.signaled = ""
        self.out_of_time = False

    @property
    def exit_code(self) -> int:
        """With which status the program should end: 0 where nothing asked it to."""
        heeding = [each for each in self._endings if each.heeds(self.signaled)]
        codes = [each.status(self.signaled) for each in heeding if each.exit_code is not None]
        return (codes or [each.status(self.signaled) for each in heeding] or [0])[0]

    def at(self, step: int, epoch: int | None, metrics: Metrics) -> Decision:
        """Return what holds after `step`; every rank asks at the same steps.

        Args:
            step: the training step that is done.
            epoch: the epoch that ends with it, None in the middle of one.
            metrics: as the caller gave them; read on rank 0 alone.

        Raises:
            UsageError: a metric that somebody watches is no number; on every rank.
            CoordinationError: rank 0 said nothing before the deadline.
        """
        self._calls += 1
        moment = Moment(step, epoch)
        reasons = [reason for each in self._local if (reason := each.due(moment))]
        if not self._shared:
            return Decision(", ".join(reasons) or None)
        rank = self._job.training.rank
        leads = rank == 0
        if self._endings:
            self._notices.begin(self.note, rank)
        entry = self._lead(moment, metrics, saves=bool(reasons)) if leads else self._follow()
        if entry.error:
            raise self._mistakes.pop(self._calls, None) or from_wire(entry.error)
        if entry.reason:
            reasons.append(entry.reason)
        if entry.signal:
            self._heed(entry)
        if self._calls % MEET_CALLS == 0:
            self.meet(step)
        reason = None if entry.held else ", ".join(reasons) or None
        within = math.inf if entry.within is None else entry.within
        return Decision(reason, entry.metrics, within, urgent=bool(entry.signal))

    def saved(self, *, lost: bool = False, begun: bool = True) -> None:
        """Take note that all ranks have begun a save together.

        Args:
            lost: whether the one before failed: what was best in it is not stored.
            begun: whether this one was: else it counts as made, so that the next one is when due.
        """
        if self._best is not None:
            self._stored = self._stored if lost else self._better(self._stored, self._begun)
            self._begun = self._told_values if begun else {}
            self._best = self._better(self._stored, self._begun)
        self._saved_at = time.monotonic()
        self.out_of_time = False
        self._forget()

    def end(self) -> None:
        """Take note that nothing more is told; rank 0 says that it decides nothing more."""
        self.note.end()
        training = self._job.training if self._shared and self._calls else None
        if training is not None and training.rank == 0:
            # Be it by an exception: the others must not wait for a word that never comes.
            training.post(_ENDED, b"")

    def close(self) -> None:
        """Stop listening: only now, since a second signal must not end the last save."""
        self._notices.close()
        self.note.close()
        # It came too late for a step, and the caller has to know of it.
        self.signaled = self.signaled or self.note.take()

    def _heed(self, entry: _Entry) -> None:
        """All ranks: take note of the signal that was decided about."""
        self.signaled = entry.signal
        self.out_of_time = bool(entry.held)
        self.note.take()  # one that came here too is heeded by this very save
        if entry.held and self._job.training.rank == 0:
            _log.warning("%s in %s: %s", entry.signal, self._job.url, entry.held)

    def _lead(self, moment: Moment, metrics: Metrics, *, saves: bool) -> _Entry:
        """Rank 0: decide what is to be decided now, and tell the others."""
        call = self._calls
        if self._at_once or self._job.training.world_size == 1:
            self._tell(call, {call: self._decide(moment, metrics, call)})
        elif call >= self.decisions.horizon:
            if saves or self.decisions.entries.get(call, _Entry()).reason:
                # This very call saves: what is decided here comes after that.
                self._saved_at = time.monotonic()
            entry = self._decide(moment, metrics, call + 1)
            self._tell(call + self._span(), {} if entry == _Entry() else {call + 1: entry})
        return self.decisions.entries.get(call, _Entry())

    def _decide(self, moment: Moment, metrics: Metrics, call: int) -> _Entry:
        try:
            return self._decided(moment, metrics, call)
        except Exception as error:  # a policy of the user may raise anything
            self._mistakes[call] = error
            # The others wait for a word, and get this one.
            ours = isinstance(error, CheckpointError)
            told = error if ours else failure("deciding whether a save is due", 0, error)
            return _Entry(error=to_wire(told))

    def _decided(self, moment: Moment, metrics: Metrics, call: int) -> _Entry:
        names = {criterion.metric for criterion in self._criteria}
        watched = as_numbers({n: value for n, value in metrics.items() if n in names})
        if self._best is None:
            self._stored = dict(self._find_best(self._criteria)) if self._criteria else {}
            self._best = self._stored
        known = replace(
            moment,
            metrics=watched,
            seconds=time.monotonic() - self._saved_at,
            best=self._best,
        )
        known = self._with_signal(known, call)
        reasons = [reason for each in self._shared if (reason := each.due(known))]
        self._told_values = {
            each: watched[each.metric] for each in self._criteria if each.metric in watched
        }
        self._best = self._better(self._best, self._told_values)
        heeding = [each for each in self._endings if each.heeds(known.signal)]
        held = next(filter(None, (each.lacks_time(known) for each in heeding)), "")
        left = [each.left_seconds(known) for each in heeding]
        within = min((each for each in left if each is not None), default=None)
        return _Entry(", ".join(reasons), known.signal, held, within, watched)

    def _better(
        self, best: Mapping[Criterion, float], values: Mapping[Criterion, float]
    ) -> dict[Criterion, float]:
        """Return the better one of two values by each criterion."""
        beating = {each: v for each, v in values.items() if each.beats(v, best.get(each))}
        return {**best, **beating}

    def _with_signal(self, moment: Moment, call: int) -> Moment:
        """Return `moment` with the signal that arrived at any rank and was not heeded yet."""
        name, waited = self.note.take(), self.note.age_seconds
        posted = self._job.training.look(SIGNAL) if self._endings else None
        if not name and posted is not None:
            arrival = msgspec.msgpack.decode(posted, type=_Arrival)
            # One signal is often sent to all ranks: what came before the last save was heeded.
            name = arrival.signal if arrival.call > self._heeded_call else ""
            # Rank 0, which is about as far as that rank, has come from that call to this one.
            waited = arrival.seconds + (self._calls - arrival.call) * self._call_seconds()
        if not name:
            return moment
        self._heeded_call = call
        outlook = self._outlook()
        # An evaluation may lie between the last two calls: the next step is as long as usual.
        step_seconds = min(self._usual_seconds, self._call_seconds())
        return replace(
            moment,
            signal=name,
            waited_seconds=max(waited, 0.0) + (call - self._calls) * step_seconds,
            save_seconds=outlook.seconds,
            in_flight=outlook.in_flight,
        )

    def _tell(self, horizon: int, entries: Mapping[int, _Entry]) -> None:
        self.decisions = _Decisions(horizon, {**self.decisions.entries, **entries})
        self._usual_seconds = self._call_seconds()
        self._told_at, self._told_call = time.monotonic(), self._calls
        if self._job.training.world_size > 1:
            self._job.training.post(_WORD, msgspec.msgpack.encode(self.decisions))

    def _span(self) -> int:
        """Return how many calls `AHEAD_SECONDS` are, as fast as they come now."""
        return max(1, min(_AHEAD_CALLS, int(AHEAD_SECONDS / max(self._call_seconds(), 1e-6))))

    def _call_seconds(self) -> float:
        """Return how long it takes from one call to the next, as fast as they come now."""
        return (time.monotonic() - self._told_at) / max(1, self._calls - self._told_call)

    def _follow(self) -> _Entry:
        """Any other rank: hear what rank 0 decided for this call."""
        name = self.note.take()
        if name:
            arrival = _Arrival(self._calls, name, self.note.age_seconds)
            self._job.training.post(SIGNAL, msgspec.msgpack.encode(arrival))
        training, deadline = self._job.training, self._job.deadline()

        def hear() -> bool:
            posted = training.look(_WORD)
            if posted is not None:
                self.decisions = msgspec.msgpack.decode(posted, type=_Decisions)
            return self.decisions.horizon >= self._calls

        def is_told() -> bool:
            # The word once more after the end: what rank 0 decided before it ended holds.
            return hear() or (training.look(_ENDED) is not None and (hear() or True))

        if self.decisions.horizon < self._calls:
            training.wait_for(is_told, deadline)
        if self.decisions.horizon < self._calls:
            raise self._silence(deadline)
        return self.decisions.entries.get(self._calls, _Entry())

    def _silence(self, deadline: Deadline) -> CoordinationError:
        when = (
            f"within {deadline.span_seconds:g} s"
            if deadline.passed
            else "before it closed its Checkpointer or ended by an error"
        )
        return CoordinationError(
            f"rank 0 did not say {when} whether a save is due at call "
            f"{self._calls} of step or epoch_end on {self._job.url}: every rank must make the same "
            "calls in the same order",
            kind=ErrorKind.PEER_ABSENT,
            ranks={0: "said nothing"},
        )

    def meet(self, step: int) -> None:
        """Wait for all ranks to come to this call: what was decided up to it can be forgotten.

        Args:
            step: that all have done.

        Raises:
            CoordinationError: one of them does not come.
        """
        topic = self._job.topic("meet", f"meeting after step {step}")
        self._job.training.round(topic, b"", lambda _: b"", deadline=self._job.deadline())
        self._forget()

    def _forget(self) -> None:
        # All ranks have arrived at this call, so all have heard what was said of it and before.
        later = {
            call: entry for call, entry in self.decisions.entries.items() if call > self._calls
        }
        self.decisions = _Decisions(self.decisions.horizon, later)
