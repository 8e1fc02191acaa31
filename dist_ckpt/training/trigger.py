"""Whether a save is due, decided once for all ranks, and what comes from outside to decide it.

What every rank knows is decided by every rank. For the rest rank 0 keeps one note up, its *word*:
up to which call of `step` it has decided, and what. Nobody waits for all: a rank looks at the note
only when it has come to a call that the note it knows does not cover.
"""

from __future__ import annotations

import json
import logging
import math
import os
import signal
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from urllib.parse import urljoin

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    UsageError,
    describe,
    from_wire,
    to_wire,
    without_secrets,
)
from dist_ckpt.policy import Better, Moment, SavePolicy, Scope, members
from dist_ckpt.policy.ending import NOTICE, OnEnding, OnNotice, OnSignal
from dist_ckpt.ranks.job import Job
from dist_ckpt.ranks.rounds import Deadline
from dist_ckpt.ranks.waiting import failure
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.handle import Outlook
from dist_ckpt.saving.provenance import Metrics, as_numbers
from dist_ckpt.threads import Latch, start

_log = logging.getLogger("dist_ckpt")

_WORD, _ENDED, _NO_WORD = "word", "ended", "no word"
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
        kinds: what rank 0 decides for all, in words that are equal on ranks with the same policies.
        note: where it is written down what arrives from outside.
        decisions: what rank 0 has decided, as far as this rank has heard and it is not over.
        best: by criterion the best value, on rank 0; None where it is to be looked for, as at the
            start and when another state was restored.
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
            best: called on rank 0, at first and after a restore: the best values among the
                checkpoints that exist.
            outlook: called on rank 0 when a signal arrived.
        """
        self._job = job
        parts = members(policy)
        self._local = [each for each in parts if each.scope is Scope.LOCAL]
        self._shared = [each for each in parts if each.scope is not Scope.LOCAL]
        # Without what is in brackets, a notice may lie elsewhere on each host; and no address.
        kinds = {str(each).partition("(")[0].partition(" at 0x")[0] for each in self._shared}
        self.kinds = " | ".join(sorted(kinds)) or "nothing"
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
        self.best: dict[Criterion, float] | None = None
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
            UsageError: a metric that somebody watches is no number; on every rank. Or rank 0 has
                none of the policies that it would have to decide by.
            CoordinationError: rank 0 said nothing before the deadline.
        """
        self._calls += 1
        moment = Moment(step, epoch)
        reasons = [reason for each in self._local if (reason := each.due(moment))]
        if not self._shared:
            several = self._calls == 1 and self._job.ranks.world_size() > 1
            if several and self._job.training.rank == 0:
                # Whoever waits for a word of it was given another policy.
                self._job.training.post(_NO_WORD, b"")
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
        if self.best is not None:
            self._stored = self._stored if lost else self._better(self._stored, self._begun)
            self._begun = self._told_values if begun else {}
            self.best = self._better(self._stored, self._begun)
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
            # Where a metric decides, nothing can be said ahead of the call that tells it.
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
        if self.best is None:
            # What was told before a restore is of another state, and what was best may be given up.
            self._begun = {}
            self._stored = dict(self._find_best(self._criteria)) if self._criteria else {}
            self.best = self._stored
        known = replace(
            moment,
            metrics=watched,
            seconds=time.monotonic() - self._saved_at,
            best=self.best,
        )
        known = self._with_signal(known, call)
        reasons = [reason for each in self._shared if (reason := each.due(known))]
        self._told_values = {
            each: watched[each.metric] for each in self._criteria if each.metric in watched
        }
        self.best = self._better(self.best, self._told_values)
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
        # All that may still be asked for: a note takes the place of one that has not left
        # (docs/design/009), so the newest alone has to be enough.
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
            ends = any(training.look(name) is not None for name in (_ENDED, _NO_WORD))
            return hear() or (ends and (hear() or True))

        if self.decisions.horizon < self._calls:
            training.wait_for(is_told, deadline)
        if self.decisions.horizon < self._calls:
            raise self._silence(deadline)
        return self.decisions.entries.get(self._calls, _Entry())

    def _silence(self, deadline: Deadline) -> CheckpointError:
        if self._job.training.look(_NO_WORD) is not None:
            rank = self._job.training.rank
            return UsageError(
                f"rank {rank} of {self._job.url} waits until rank 0 has decided by {self.kinds}, "
                "and rank 0 has no such policy: give the same when=, and the same early stopping "
                "in the state, on every rank",
                ranks={0: "nothing", rank: self.kinds},
            )
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


# What comes from outside while a training goes on: signals, and notices of a cloud.
#
# Both are notes: they are written down, and everything else happens at a step's end.


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
        self._arrived_at = 0.0
        self._closed = False
        self._ending = False
        self._told: set[signal.Signals] = set()
        # The bound method is kept, as each access would make another object.
        self._ours = self._on_signal
        self._listen()

    @property
    def age_seconds(self) -> float:
        """How long ago it was that what was taken last, or is there now, arrived."""
        return time.monotonic() - self._arrived_at

    def take(self) -> str:
        """Return the name of what arrived last, "" for nothing, and forget it."""
        moved = self._pid != os.getpid() and not self._closed
        if moved and threading.current_thread() is threading.main_thread():
            # Asked for in a child: the training itself was moved there, as a daemon's is.
            self._listen()
        if self._pid == os.getpid() and not self._closed:
            self._tell_replaced()
        name, self._name = self._name, ""
        return name

    def write(self, name: str) -> None:
        """Note that `name` arrived, from whatever thread."""
        if not self._name:
            # Of several the first: from then on the time runs.
            self._arrived_at = time.monotonic()
        self._name = name

    def end(self) -> None:
        """Note that no step follows: who asks for the end a second time is not to wait for one."""
        self._ending = True

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

    def found(self, number: signal.Signals) -> object:
        """Return the handler of `number` that was there before ours, which calls it."""
        return self._before.get(number)

    def _tell_replaced(self) -> None:
        """Say once of each signal that a later handler has it, which may well not call ours."""
        for each in self.wanted - self._told:
            handler: object = signal.getsignal(each)
            # Listeners call the handler that they found, so any of them may stand before ours.
            while isinstance(other := getattr(handler, "__self__", None), SignalNote):
                if other is self:
                    break
                handler = other.found(each)
            else:
                self._told.add(each)
                _log.warning(
                    "policy.on_signal: %s is %s since the Checkpointer was made, so no save is "
                    "made when it comes, unless our handler is called too. Set yours before: the "
                    "Checkpointer calls it",
                    each.name,
                    _in_words(handler),
                )

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Nothing but this in a handler: it may interrupt any line of the training.
        before = self._before.get(signal.Signals(number))
        if self._closed or self._pid != os.getpid():
            _act_as(before, number, frame)
            return
        again = bool(self._name) or self._ending
        self.write(signal.Signals(number).name)
        # Ctrl-C is Python's own handler: the first one asks for a save, the second one means it.
        if callable(before) and (before is not signal.default_int_handler or again):
            before(number, frame)


def _in_words(handler: object) -> str:
    if handler == signal.SIG_IGN:
        return "ignored"
    if handler == signal.SIG_DFL:
        return "left to the system"
    # None is a handler of a library, which Python does not see.
    return f"handled by {getattr(handler, '__qualname__', handler) or 'a library'}"


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


# Notices: a file that appears, or what a cloud's metadata answer.


_ANSWER_SECONDS = 2.0
_ANSWER_BYTES = 1 << 16
# What the metadata of Google and of Azure want to see, so that no browser asks by accident.
_HEADERS = {"Metadata-Flavor": "Google", "Metadata": "true"}
_TOKEN_PATH = "/latest/api/token"
_TOKEN_LIFE = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
_NOTHING = ("", "false", "none", "null")
_ENDS = ("Preempt", "Terminate")

# One rank of each host looks: a notice is about the machine that it is found on.
_LOCAL_RANKS = ("LOCAL_RANK", "SLURM_LOCALID", "OMPI_COMM_WORLD_LOCAL_RANK")


def is_first_of_host(rank: int) -> bool:
    """Whether this process is the first rank of its host, as far as its environment says so."""
    said = next((os.environ[name] for name in _LOCAL_RANKS if name in os.environ), None)
    return rank == 0 if said is None else said == "0"


class NoticeWatch:
    """Looks for notices in the background until one is there, or it is closed."""

    def __init__(self, policies: Sequence[OnNotice]) -> None:
        """Begin nothing yet."""
        self._policies = policies
        self._over = Latch()
        self._begun = False

    def begin(self, note: SignalNote, rank: int) -> None:
        """Look from now on, and write into `note` what is found; further calls do nothing.

        Only the first rank of a host looks, as far as its environment says which that is.
        """
        if self._begun:
            return
        self._begun = True
        if not is_first_of_host(rank):
            return
        # The threads know the latch alone, so they end with an owner that forgot to close this.
        weakref.finalize(self, self._over.open).atexit = False
        for each in self._policies:
            start(
                threading.Thread(
                    target=_watch,
                    args=(each, note, self._over),
                    name="dist_ckpt-notice",
                    daemon=True,
                )
            )

    def close(self) -> None:
        """Look no longer."""
        self._over.open()


def _watch(policy: OnNotice, note: SignalNote, over: Latch) -> None:
    said = False
    while not over.is_open:
        try:
            if is_noticed(policy.place):
                note.write(NOTICE)
                return
        except Exception as error:
            if not said:  # an outage is said once, and the looking goes on
                said = True
                _log.warning(
                    "no notice can be looked for at %s, it is tried again every %g s: %s",
                    without_secrets(policy.place),
                    policy.every_seconds,
                    without_secrets(describe(error)),
                )
        over.wait(policy.every_seconds)


def is_noticed(place: str) -> bool:
    """Whether a notice is at `place`; see `policy.on_notice`.

    Raises:
        OSError: it cannot be found out.
    """
    if "://" not in place:
        try:
            Path(place).stat()
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True
    answer = _ask(place, _HEADERS)
    if answer is None:
        # Metadata of EC2 may be set to answer only who shows a token (IMDSv2).
        token = _ask(urljoin(place, _TOKEN_PATH), _TOKEN_LIFE, method="PUT") or b""
        answer = _ask(place, {"X-aws-ec2-metadata-token": token.decode("ascii", "replace")})
        if answer is None:
            raise PermissionError(f"{without_secrets(place)} refuses the token that it gave out")
    return _says_end(answer)


def _ask(url: str, headers: Mapping[str, str], *, method: str = "GET") -> bytes | None:
    """Return what the server answers, b"" where nothing is there; None where it wants a token."""
    request = urllib.request.Request(url, headers=dict(headers), method=method)
    # Never by a proxy: it would answer for another machine.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(request, timeout=_ANSWER_SECONDS) as response:
            found: bytes = response.read(_ANSWER_BYTES)
            return found
    except urllib.error.HTTPError as error:
        with error:
            if error.code == HTTPStatus.NOT_FOUND:
                return b""
            if error.code == HTTPStatus.UNAUTHORIZED:
                return None
            raise


def _says_end(answer: bytes) -> bool:
    text = answer.decode(errors="replace").strip()
    if text.lower() in _NOTHING:
        return False
    try:
        said = json.loads(text)
    except (ValueError, RecursionError):
        return True
    events = said.get("Events") if isinstance(said, dict) else None
    if not isinstance(events, list):
        return True
    # Azure lists all that is going to be done to the machine: a Freeze, say, ends nothing.
    return any(isinstance(each, dict) and each.get("EventType") in _ENDS for each in events)
