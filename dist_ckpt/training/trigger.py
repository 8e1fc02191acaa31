"""Whether a save is due, decided once for all ranks.

What every rank knows is decided by every rank. For the rest rank 0 keeps one note up, its *word*:
up to which call of `step` it has decided, and what. Nobody waits for all: a rank looks at the note
only when it has come to a call that the note it knows does not cover.
"""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import FrameType

import msgspec

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    UsageError,
    from_wire,
    to_wire,
)
from dist_ckpt.policy import Better, Moment, OnSignal, SavePolicy, Scope, members
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.ranks.waiting import failure
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.metrics import Metrics, as_numbers

# Signals as notes: the handler writes one down, and everything else happens at a step's end.


class SignalNote:
    """Listens for signals until it is closed.

    A child that was forked does not: there the signals do what they did before. It has no step at
    whose end anything would be done about them, and a pool whose processes swallow the SIGTERM that
    is to end them is waited for for ever.

    Attributes:
        wanted: the signals that it listens for.
    """

    def __init__(self, wanted: Iterable[signal.Signals]) -> None:
        """Begin to listen.

        Raises:
            UsageError: Python takes signals on the main thread only, and this is another.
        """
        self.wanted = frozenset(wanted)
        if self.wanted and threading.current_thread() is not threading.main_thread():
            raise UsageError(
                "policy.on_signal: make the Checkpointer on the main thread, the only one where "
                "Python takes signals"
            )
        self._name = ""
        self._closed = False
        # The bound method is kept, as each access would make another object.
        self._ours = self._on_signal
        self._listen()

    def take(self) -> str:
        """Return the name of the signal that arrived last, "" for none, and forget it."""
        if self._pid != os.getpid() and threading.current_thread() is threading.main_thread():
            # Asked for in a child: the training itself was moved there, as a daemon's is.
            self._listen()
        name, self._name = self._name, ""
        return name

    def close(self) -> None:
        """Put the handlers back that were there before, where nobody else took our place."""
        self._closed = True
        # Changed on the main thread only. Off it ours stays, and does what those before it did.
        if threading.current_thread() is threading.main_thread():
            self._put_back()
            if self._put_back in _undo_in_child:
                _undo_in_child.remove(self._put_back)

    def _listen(self) -> None:
        self._pid = os.getpid()
        self._before = {each: signal.signal(each, self._ours) for each in self.wanted}
        _undo_in_child.append(self._put_back)

    def _put_back(self) -> None:
        for each, before in self._before.items():
            if signal.getsignal(each) == self._ours:
                signal.signal(each, signal.SIG_DFL if before is None else before)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Nothing but this in a handler: it may interrupt any line of the training.
        before = self._before.get(signal.Signals(number))
        if self._closed or self._pid != os.getpid():
            _act_as(before, number, frame)
            return
        again = bool(self._name)
        self._name = signal.Signals(number).name
        # Ctrl-C is Python's own handler: the first one asks for a save, the second one means it.
        if callable(before) and (before is not signal.default_int_handler or again):
            before(number, frame)


def _act_as(before: object, number: int, frame: FrameType | None) -> None:
    """Do what the handler `before` ours would have done."""
    if callable(before):
        before(number, frame)
    elif before != signal.SIG_IGN:
        # None is a handler of a library, which only the system could call: nobody here can.
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)


# In the order in which they began: each puts back what it had found, beginning with the last.
_undo_in_child: list[Callable[[], None]] = []


# What was blocked on the thread that forks, before it began to.
_mask = threading.local()


def _hold_back() -> None:
    """Let no signal come while there are two processes and one set of handlers.

    One that came to the child before its handlers are put back would be written down by ours, and
    swallowed: whoever sent it waits for an end that does not come.
    """
    held = signal.valid_signals() if _undo_in_child else set()
    _mask.before = signal.pthread_sigmask(signal.SIG_BLOCK, held)


def _let_through() -> None:
    signal.pthread_sigmask(signal.SIG_SETMASK, _mask.before)


def _stop_in_child() -> None:
    while _undo_in_child:
        _undo_in_child.pop()()
    _let_through()


# Runs in the child before any of its own code. The thread that forked is the main one there.
os.register_at_fork(before=_hold_back, after_in_parent=_let_through, after_in_child=_stop_in_child)


_WORD, _SIGNAL, _ENDED = "word", "signal", "ended"
# How much time the decisions told cover ahead: how late a signal or the clock may be heeded.
_AHEAD_SECONDS = 0.5
_AHEAD_CALLS = 256
# After so many calls the ranks meet once, so that no entry of the decisions is kept for ever.
_MEET_CALLS = 256


class _Entry(msgspec.Struct, frozen=True):
    """What rank 0 decided for one call, or the error that kept it from deciding."""

    reason: str = ""
    signal: str = ""
    metrics: dict[str, float] = {}
    error: dict[str, object] = {}


class _Decisions(msgspec.Struct, frozen=True):
    """All that rank 0 has decided, up to the call `horizon`; calls without an entry are nothing."""

    horizon: int
    entries: dict[int, _Entry]


class _Arrival(msgspec.Struct, frozen=True):
    """A signal that arrived at another rank before its call number `call`."""

    call: int
    signal: str


@dataclass(frozen=True, slots=True)
class Decision:
    """What holds for all ranks at one call.

    Attributes:
        reason: why to save now, None when nothing is due.
        metrics: those that somebody watches, as rank 0 gave them.
    """

    reason: str | None
    metrics: Mapping[str, float] = field(default_factory=dict)


class SaveTrigger:
    """Decides when to save, the same on every rank.

    Attributes:
        signaled: the name of the signal that all ranks have agreed to heed, "" for none.
    """

    def __init__(
        self,
        job: Job,
        policy: SavePolicy,
        *,
        best: Callable[[Sequence[Criterion]], Mapping[Criterion, float]],
    ) -> None:
        """Made with the Checkpointer; other ranks are not contacted yet.

        Args:
            job: the ranks.
            policy: when to save. The metrics of its `better` are those that all ranks hear.
            best: called once on rank 0: the best values among the checkpoints that exist.
        """
        self._job = job
        parts = members(policy)
        self._local = [each for each in parts if each.scope is Scope.LOCAL]
        self._shared = [each for each in parts if each.scope is not Scope.LOCAL]
        self._criteria = [each.criterion for each in parts if isinstance(each, Better)]
        self._at_once = any(each.scope is Scope.AT_ONCE for each in parts)
        self._note = SignalNote(
            [each for one in parts if isinstance(one, OnSignal) for each in one.signals]
        )
        self._find_best = best
        self._best: dict[Criterion, float] | None = None
        self._calls = 0
        # Rank 0: what kept it from deciding, by call; there it is raised as it is.
        self._mistakes: dict[int, Exception] = {}
        self._saved_at = self._told_at = time.monotonic()
        self._told_call = 0
        self._heeded_call = 0
        # Nothing was said of the first call, so nothing can be due there that needs to be said.
        self._decisions = _Decisions(0 if self._at_once else 1, {})
        self.signaled = ""

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
        leads = self._job.training.rank == 0
        entry = self._lead(moment, metrics, saves=bool(reasons)) if leads else self._follow()
        if entry.error:
            raise self._mistakes.pop(self._calls, None) or from_wire(entry.error)
        if entry.reason:
            reasons.append(entry.reason)
        if entry.signal:
            self.signaled = entry.signal
            self._note.take()  # one that came here too is heeded by this very save
        if self._calls % _MEET_CALLS == 0:
            self._meet(step)
        return Decision(", ".join(reasons) or None, entry.metrics)

    def saved(self) -> None:
        """Take note that all ranks have begun a save together."""
        self._saved_at = time.monotonic()
        self._forget()

    def close(self) -> None:
        """Stop listening for signals; rank 0 says that it decides nothing more."""
        self._note.close()
        training = self._job.training if self._shared and self._calls else None
        if training is not None and training.rank == 0:
            # Be it by an exception: the others must not wait for a word that never comes.
            training.post(_ENDED, b"")

    def _lead(self, moment: Moment, metrics: Metrics, *, saves: bool) -> _Entry:
        """Rank 0: decide what is to be decided now, and tell the others."""
        call = self._calls
        if self._at_once or self._job.training.world_size == 1:
            self._tell(call, {call: self._decide(moment, metrics, call)})
        elif call >= self._decisions.horizon:
            if saves or self._decisions.entries.get(call, _Entry()).reason:
                # This very call saves: what is decided here comes after that.
                self._saved_at = time.monotonic()
            entry = self._decide(moment, metrics, call + 1)
            self._tell(call + self._span(), {} if entry == _Entry() else {call + 1: entry})
        return self._decisions.entries.get(call, _Entry())

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
            self._best = dict(self._find_best(self._criteria)) if self._criteria else {}
        known = replace(
            moment,
            metrics=watched,
            seconds=time.monotonic() - self._saved_at,
            best=self._best,
            signal=self._arrived(call),
        )
        reasons = [reason for each in self._shared if (reason := each.due(known))]
        for criterion in self._criteria:
            value = watched.get(criterion.metric, math.nan)
            if criterion.beats(value, self._best.get(criterion)):
                self._best[criterion] = value
        return _Entry(", ".join(reasons), known.signal, watched)

    def _arrived(self, call: int) -> str:
        """Return the signal that arrived at any rank and was not heeded yet."""
        name = self._note.take()
        posted = self._job.training.look(_SIGNAL) if self._note.wanted else None
        if not name and posted is not None:
            arrival = msgspec.msgpack.decode(posted, type=_Arrival)
            # One signal is often sent to all ranks: what came before the last save was heeded.
            name = arrival.signal if arrival.call > self._heeded_call else ""
        if name:
            self._heeded_call = call
        return name

    def _tell(self, horizon: int, entries: Mapping[int, _Entry]) -> None:
        self._decisions = _Decisions(horizon, {**self._decisions.entries, **entries})
        self._told_at, self._told_call = time.monotonic(), self._calls
        if self._job.training.world_size > 1:
            self._job.training.post(_WORD, msgspec.msgpack.encode(self._decisions))

    def _span(self) -> int:
        """Return how many calls `_AHEAD_SECONDS` are, as fast as they come now."""
        seconds = (time.monotonic() - self._told_at) / max(1, self._calls - self._told_call)
        return max(1, min(_AHEAD_CALLS, int(_AHEAD_SECONDS / max(seconds, 1e-6))))

    def _follow(self) -> _Entry:
        """Any other rank: hear what rank 0 decided for this call."""
        name = self._note.take()
        if name:
            arrival = _Arrival(self._calls, name)
            self._job.training.post(_SIGNAL, msgspec.msgpack.encode(arrival))
        training, deadline = self._job.training, self._job.deadline()

        def hear() -> bool:
            posted = training.look(_WORD)
            if posted is not None:
                self._decisions = msgspec.msgpack.decode(posted, type=_Decisions)
            return self._decisions.horizon >= self._calls

        def is_told() -> bool:
            # The word once more after the end: what rank 0 decided before it ended holds.
            return hear() or (training.look(_ENDED) is not None and (hear() or True))

        if self._decisions.horizon < self._calls:
            training.wait_for(is_told, deadline)
        if self._decisions.horizon < self._calls:
            raise self._silence(deadline)
        return self._decisions.entries.get(self._calls, _Entry())

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

    def _meet(self, step: int) -> None:
        topic = self._job.topic("meet", f"meeting after step {step}")
        self._job.training.round(topic, b"", lambda _: b"", deadline=self._job.deadline())
        self._forget()

    def _forget(self) -> None:
        # All ranks have arrived at this call, so all have heard what was said of it and before.
        later = {
            call: entry for call, entry in self._decisions.entries.items() if call > self._calls
        }
        self._decisions = _Decisions(self._decisions.horizon, later)
