"""Background saves of this process: each on a copy of the state dict, one after another.

The stock `async_save` gives each save a thread of its own, and each thread speaks to the other
ranks. Of two that do so at once over one process group, one may get what is meant for the other,
and which of them is first is up to each rank's scheduler. What is the same on every rank is the
order of the calls: it is noted in the call, where the state is staged, and kept in the threads.

That a save is over may be told by a destructor, wherever that runs: so by a `Latch`, which takes no
lock.

Of what is several tensors behind one face torch's own staging makes a plain tensor, or fails: it
asks the class for operations that few of them have. Here the tensors that it is made of are copied,
and the whole is built of the copies.
"""

from __future__ import annotations

import copy
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.checkpoint import staging
from torch.distributed.tensor import DTensor

from dist_ckpt.state.layout import is_wrapped, leaves_of, local_of, shard_like
from dist_ckpt.state.rebuilding import remade
from dist_ckpt.state.registry import is_namedtuple
from dist_ckpt.threads import Latch

_STOCK_SAVE = ("_save_state_dict", "torch.distributed.checkpoint.state_dict_saver")


class ThreadEnd:
    """Tells that a save is over when its thread ends, or has another one; for a `threading.local`.

    Args:
        over: what to tell.
    """

    def __init__(self, over: Latch) -> None:
        tell_when_gone(self, over)


def tell_when_gone(what: object, over: Latch) -> None:
    """Tell `over` when `what` is let go of."""
    weakref.finalize(what, over.open).atexit = False


def in_stock_save(thread: int) -> bool:
    """Tell whether the thread of that identity is in a save of torch.distributed.checkpoint."""
    frame = sys._current_frames().get(thread)  # noqa: SLF001  the only way to ask
    while frame is not None:
        if (frame.f_code.co_name, frame.f_globals.get("__name__")) == _STOCK_SAVE:
            return True
        frame = frame.f_back
    return False


class _Here(threading.local):
    end: ThreadEnd | None = None
    begun = False


class _Line:
    """Those that wait, of which each knows the one before it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.last: Latch | None = None
        self.here = _Here()

    def join(self, over: Latch) -> Latch | None:
        """Note that `over` is the last one now; return the one before it."""
        with self.lock:
            before, self.last = self.last, over
        return before


_line = _Line()


def _forget() -> None:
    global _line
    _line = _Line()  # in a forked child no thread of them is there


os.register_at_fork(after_in_child=_forget)


class StagedState(dict[str, Any]):
    """A staged state dict: a save that begins to look at it waits for its turn.

    That is what both ways of `async_save` do first in their own thread: the one goes through its
    items, the other pickles it for another process.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        super().__init__(state)
        self._over = Latch()
        self._before = _line.join(self._over)
        self._begun = False
        # Let go of before it ever began, or by a thread that has other things to do afterwards.
        tell_when_gone(self, self._over)

    def items(self) -> Any:
        """Wait for the turn, then return the items."""
        self._begin()
        return super().items()

    def __reduce__(self) -> tuple[type[dict[str, Any]], tuple[dict[str, Any]]]:
        self._begin()
        return dict, (dict(super().items()),)

    def _begin(self) -> None:
        if self._begun:
            return
        self._begun = True
        # First, or a thread that takes one after another would wait for itself.
        _line.here.end = ThreadEnd(self._over)
        _line.here.begun = True
        before, self._before = self._before, None
        if before is not None:
            before.wait()


def stage(state: dict[str, Any]) -> StagedState:
    """Copy `state` to memory that training does not change, as stock does where nobody else does.

    The copy holds the order of this call: see `StagedState`.
    """
    return StagedState(copied(state, _copied_by_torch))


def _copied_by_torch(state: dict[str, Any]) -> dict[str, Any]:
    if not hasattr(staging, "DefaultStager"):  # torch before 2.9
        return staging.BlockingAsyncStager().stage(state)
    stager = staging.DefaultStager(staging.StagingOptions(False, False, False, False))
    try:
        found = stager.stage(state)
    finally:
        stager.close()
    assert isinstance(found, dict)  # a future only with asynchronous staging
    return found


def wait_for_those_before() -> None:
    """Let a save that was not staged here wait for all that were, unless this is one of them."""
    if _line.here.begun:
        _line.here.begun = False
        return
    with _line.lock:
        last = _line.last
    if last is not None:
        last.wait()


def wait_for_all() -> None:
    """Let a load wait for all saves that were staged here, unless it is asked for by one of them.

    They have threads of their own, and over one process group torch would give what is meant for
    the one to the other: both would wait for ever.
    """
    if _line.here.end is not None:
        return
    with _line.lock:
        last = _line.last
    if last is not None:
        last.wait()


# The copy of a state dict for a save in the background, wrapped tensors included.


class _Place:
    """Stands for a wrapped tensor while all else is copied.

    Args:
        tensor: that.
    """

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> _Place:
        return self  # to be found again in the copy


def copied(
    state: dict[str, Any], copy_others: Callable[[dict[str, Any]], dict[str, Any]]
) -> dict[str, Any]:
    """Return what `copy_others` makes of `state`, and copies of the wrapped tensors in it.

    Args:
        state: the state dict.
        copy_others: copies everything else.
    """
    places: dict[int, _Place] = {}

    def take(leaf: object) -> object:
        if not is_wrapped(leaf):
            return leaf
        assert isinstance(leaf, torch.Tensor)
        return places.setdefault(id(leaf), _Place(leaf))

    taken = _replaced(state, take)
    if not places:
        return copy_others(state)
    # Once for each, so that one under two names stays one.
    copies = {id(place): _copy_of(place.tensor) for place in places.values()}
    result = _replaced(
        copy_others(taken), lambda leaf: copies[id(leaf)] if isinstance(leaf, _Place) else leaf
    )
    assert isinstance(result, dict)
    return result


def _replaced(value: Any, leaf: Callable[[object], object]) -> Any:
    """Return the nested `value` with other leaves."""
    if isinstance(value, dict):
        again = copy.copy(value)  # of its class, with the attributes that it has
        for key, each in value.items():
            again[key] = _replaced(each, leaf)
        return again
    if isinstance(value, Mapping):
        return {key: _replaced(each, leaf) for key, each in value.items()}
    if is_namedtuple(type(value)):
        return value._make(_replaced(each, leaf) for each in value)
    if type(value) in (list, tuple):
        return type(value)(_replaced(each, leaf) for each in value)
    return leaf(value)


def _copy_of(tensor: torch.Tensor) -> torch.Tensor:
    """Return a copy of a wrapped tensor: of what is on this rank, be it nothing."""
    local = local_of(tensor)
    with torch.no_grad():
        inner = {
            suffix: _copy_of(leaf) if is_wrapped(leaf) else _to_cpu(leaf)
            for suffix, leaf in leaves_of(local)
        }
        made = remade(local, inner)
        return shard_like(tensor, made) if isinstance(tensor, DTensor) else made


def _to_cpu(tensor: torch.Tensor) -> torch.Tensor:
    # Laid out alike, as its class may rely on that.
    return torch.empty_like(tensor, device="cpu").copy_(tensor.detach())
