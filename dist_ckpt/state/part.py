"""The hinge between a live training state and the bytes of a checkpoint.

A part says what it is made of (`capture`), where stored bytes should go (`targets`) and takes
what was read (`restore`). It never sees a file, a rank's peers or a plan. Names are unique
within the tensors and within the objects of one part; an object owns the tensors that its
encoding refers to (`dist_ckpt.state.decoding.references`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import torch

_dry = ContextVar("_dry", default=False)


@contextmanager
def dry_capture() -> Iterator[None]:
    """Look at parts in a `with` block and store nothing: what is left out is not told there."""
    token = _dry.set(True)
    try:
        yield
    finally:
        _dry.reset(token)


def is_dry() -> bool:
    """Tell whether a `capture` is a look only."""
    return _dry.get()


@dataclass(frozen=True)
class Captured:
    """What a part is made of at this moment.

    Attributes:
        tensors: live references, plain tensors or DTensors, not copied and not detached; whoever
            stores them copies them before training goes on.
        objects: encoded plain values, a snapshot.
        per_rank: the values belong to this rank alone and are never taken for replicas of
            another rank's. A per-rank part has objects only: its tensors are inside them.
        unequal: names of tensors whose replicas may differ between ranks. That of the lowest
            rank is the one to store, whole: under DDP every forward pass starts from the buffers
            of rank 0, so rows of several ranks' running means would be nobody's.
        stepped: names of tensors whose memory changes in a step of an optimizer of this very state
            and at no other time: its parameters, and what it keeps for them. They may be read
            until that step begins; all others must be copied before training goes on.
        versioned: names of objects of which ranks may hold versions, alike but for what each rank
            has of its own in them: groups of an optimizer, which list the parameters of a stage.
    """

    tensors: dict[str, torch.Tensor]
    objects: dict[str, bytes]
    per_rank: bool = False
    unequal: frozenset[str] = frozenset()
    stepped: frozenset[str] = frozenset()
    versioned: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TensorSpec:
    """A stored tensor: its dtype as torch names it without `torch.`, and its global shape."""

    dtype: str
    shape: tuple[int, ...]


def _no_ranks() -> Sequence[Mapping[str, bytes]]:
    return ()


def _every(_: str) -> bool:
    return True


LayOut = Callable[[str, TensorSpec, Any], torch.Tensor | None]


def nowhere(_: str, __: TensorSpec, ___: Any) -> None:
    """Lay out nothing."""
    return


def nothing(names: Sequence[str]) -> list[torch.Tensor]:
    """Have no bytes to look at.

    Raises:
        KeyError: always.
    """
    raise KeyError(*names)


def _unresized(_: str) -> None:
    return None


@dataclass(frozen=True)
class Stored:
    """What a checkpoint holds for one part, under the names of this program.

    Attributes:
        tensors: every stored tensor of the part, of all ranks; those that are not to be loaded
            are left out.
        objects: encoded values by name. For a per-rank part, those that this very rank saved
            when `saved_world_size == world_size`, and those of rank 0 otherwise.
        rank: this rank, now.
        world_size: ranks now.
        saved_world_size: ranks at the save; 0 where the checkpoint does not say.
        by_rank: of a per-rank part, returns the objects of every rank that saved, by rank. They are
            read when asked for: only who reshards wants more than its own.
        selects: tells whether a name, stored or live, is to be loaded. What is not stays as it is.
        cast: whether the program asked for other dtypes than the stored ones where it has others.
        is_adapter: whether the checkpoint has an adapter only, and no model under it.
        is_foreign: whether another program gave the names, so that more may be meant than is there.
        resize: gives the rule by which a name of another shape is loaded in part
            (`dist_ckpt.state.resizing`); None where it is not.
        lay_out: returns an unfilled tensor for what was a DTensor and is not there yet
            (`dist_ckpt.loading.fitting`); None where nobody knows how.
        peek: reads stored tensors at once, for what depends on their values; small ones.
    """

    tensors: Mapping[str, TensorSpec]
    objects: Mapping[str, bytes]
    rank: int
    world_size: int
    saved_world_size: int
    by_rank: Callable[[], Sequence[Mapping[str, bytes]]] = _no_ranks
    selects: Callable[[str], bool] = _every
    cast: bool = False
    is_adapter: bool = False
    is_foreign: bool = False
    resize: Callable[[str], Any] = _unresized
    lay_out: LayOut = nowhere
    peek: Callable[[Sequence[str]], list[torch.Tensor]] = nothing


@dataclass(frozen=True)
class Targets:
    """Where stored bytes go.

    Attributes:
        tensors: what to fill, by stored name: live tensors or fresh ones, plain or DTensors. One
            on the meta device gets its memory after the checkpoint was found to fit; the same
            object under two names gets it once.
        missing: names that the state has and the checkpoint has not.
        unexpected: names that the checkpoint has and the state, on this rank, has not.
        note: what a user should know of this restore although nothing is wrong, for the report.
        resized: by stored name, the rule by which a tensor of another shape takes a part of what is
            stored, or gets it as a part.
        unlike: why the checkpoint was written by something else than this part, where its names and
            shapes might fit all the same; no reason not to load where the program asked for that.
    """

    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    note: str | None = None
    unlike: list[str] = field(default_factory=list)
    resized: dict[str, Any] = field(default_factory=dict)


@runtime_checkable
class Part(Protocol):
    """One named piece of a training state. All three are called on the training thread."""

    def capture(self) -> Captured:
        """Return what the part is made of now.

        Raises:
            UsageError: a value that cannot be stored, named by its path in the state.
        """
        ...

    def targets(self, stored: Stored) -> Targets:
        """Return where the bytes of `stored` should go. Changes nothing live.

        Raises:
            IntegrityError: a stored object is malformed.
            IncompatibleError: the part cannot be restored in this program at all.
        """
        ...

    def restore(self, stored: Stored, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take what was read: `tensors` are the filled targets, `stored` has the objects.

        Names that a lenient load left out are left as they are.

        Raises:
            IncompatibleError: the live value refuses what is stored.
        """
        ...
