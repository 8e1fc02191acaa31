"""What comes from outside while a training goes on: signals, and notices of a cloud.

Both are notes: they are written down, and everything else happens at a step's end.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
import urllib.error
import urllib.request
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from http import HTTPStatus
from pathlib import Path
from types import FrameType
from urllib.parse import urljoin

from dist_ckpt.errors import UsageError, describe, without_secrets
from dist_ckpt.policy.ending import NOTICE, OnNotice
from dist_ckpt.threads import Latch, start

_log = logging.getLogger("dist_ckpt")


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
    return any(isinstance(each, dict) and each.get("EventType") in _ENDS for each in events)
