"""Signals as notes: the handler writes one down, and everything else happens at a step's end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterable
from types import FrameType

from dist_ckpt.errors import UsageError


class SignalNote:
    """Listens for signals until it is closed.

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
        # The bound method is kept, as each access would make another object.
        self._ours = self._on_signal
        self._before = {each: signal.signal(each, self._ours) for each in self.wanted}

    def take(self) -> str:
        """Return the name of the signal that arrived last, "" for none, and forget it."""
        name, self._name = self._name, ""
        return name

    def close(self) -> None:
        """Put the handlers back that were there before, where nobody else took our place."""
        if threading.current_thread() is not threading.main_thread():
            return  # handlers are changed there only; ours stays, and calls those before it
        for each, before in self._before.items():
            if signal.getsignal(each) == self._ours:
                signal.signal(each, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # Nothing but this in a handler: it may interrupt any line of the training.
        again = bool(self._name)
        self._name = signal.Signals(number).name
        before = self._before.get(signal.Signals(number))
        # Ctrl-C is Python's own handler: the first one asks for a save, the second one means it.
        if callable(before) and (before is not signal.default_int_handler or again):
            before(number, frame)
