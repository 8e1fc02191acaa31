"""Signals as notes: the handler writes one down, and everything else happens at a step's end."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterable
from types import FrameType

from dist_ckpt.errors import UsageError


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
