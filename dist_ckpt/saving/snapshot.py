"""One rank's share of a save: its state is described and encoded, then copied into the arena."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import msgspec
import torch

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.index import Held
from dist_ckpt.format.manifest import encode_document
from dist_ckpt.options import Staging
from dist_ckpt.planning.columns import Table, numbers_of
from dist_ckpt.planning.describe import Describer, LocalBox
from dist_ckpt.planning.files import (
    BoxCopy,
    Document,
    FilePlan,
    StagedFile,
    box_copies,
    files_nbytes,
    lay_out,
    plan_files,
    stage_documents,
)
from dist_ckpt.planning.owners import Owned
from dist_ckpt.saving.messages import Description, ObjectName
from dist_ckpt.staging.arena import (
    Arena,
    CopyEngine,
    InFlight,
    engine_for,
    hold_steps,
    pin_of,
    release_steps,
)
from dist_ckpt.state.decoding import unordered_digest
from dist_ckpt.state.optimizer_content import options_digest
from dist_ckpt.state.train_state import TrainState

Objects = Mapping[str, Mapping[str, bytes]]
"""Encoded values by part and name."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a rank holds.

    Attributes:
        local: its boxes with the live memory behind them.
        shared: encoded values that are the same on every rank that holds them.
        per_rank: encoded values of this rank alone.
        fingerprint: digest of all that a plan depends on: names, shapes, dtypes, boxes.
        versioned: by part, the names of shared values of which ranks may hold versions.
    """

    local: list[LocalBox]
    shared: Objects
    per_rank: Objects
    fingerprint: str
    versioned: Mapping[str, Collection[str]] = field(default_factory=dict)

    @property
    def held(self) -> list[Held]:
        """The boxes as they are described to others."""
        return [box.held for box in self.local]

    def table(self) -> Table:
        """Return the table of what is held."""
        return Table.of(self.held)

    def description(self, table: Table, digest: str, sent: bytes) -> Description:
        """Return all that the coordinator needs for a plan.

        Args:
            table: of what is held.
            digest: of the table as it travels.
            sent: the table as it travels, if this rank is to send it; else empty.
        """
        digests = {
            part: {name: unordered_digest(data) for name, data in objects.items()}
            for part, objects in self.shared.items()
        }
        versioned = {
            part: {name: options_digest(self.shared[part][name]) for name in names}
            for part, names in self.versioned.items()
        }
        numbers = table.pack(numbers_of(self.held))
        return Description(digest, sent, numbers, digests, versioned, list(self.per_rank))

    def group_digest(self, names: Iterable[ObjectName], versions: Versions | None = None) -> str:
        """Return one digest over encoded values; a missing one changes it too.

        Args:
            names: of the values, as they are stored.
            versions: what this rank calls those that it has under another name.
        """
        found = [self._find(part, name, versions or {}) for part, name in names]
        return bytes_digest(msgspec.msgpack.encode(found))

    def documents(
        self, shared: Iterable[ObjectName], versions: Versions | None = None
    ) -> dict[str, bytes]:
        """Return what this rank writes into its `extra` file, by part.

        Args:
            shared: the shared values that the plan gave to this rank.
            versions: see `group_digest`.
        """
        chosen: dict[str, dict[str, bytes]] = {}
        for part, name in shared:
            data = self._find(part, name, versions or {})
            assert data is not None  # the plan was made of what this rank described
            chosen.setdefault(part, {})[name] = data
        every = chosen | {part: dict(objects) for part, objects in self.per_rank.items()}
        return {part: encode_document(objects) for part, objects in every.items()}

    def _find(self, part: str, name: str, versions: Versions) -> bytes | None:
        return self.shared.get(part, {}).get(versions.get(part, {}).get(name, name))

    def describe_documents(self, documents: Mapping[str, bytes]) -> list[Document]:
        """Return what the coordinator must know of `documents`."""
        return [
            Document(part, part in self.per_rank, len(data), bytes_digest(data))
            for part, data in documents.items()
        ]


def take_snapshot(
    state: TrainState, *, world_size: int, describer: Describer | None = None
) -> Snapshot:
    """Capture every part of `state`.

    Args:
        state: the live state.
        world_size: how many ranks there are.
        describer: what earlier snapshots of this state found out; None to find out all anew.

    Raises:
        UsageError: the state is empty, something in it cannot be stored (the message names it), or
            a CUDA graph is being captured.
    """
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        # What is copied now would be copied at each replay, and nothing is copied now.
        raise UsageError(
            "save was called while a CUDA graph is being captured: call it outside of the capture"
        )
    state.check_current()
    captured = {name: part.capture() for name, part in state.parts.items()}
    if not any(part.tensors or part.objects for part in captured.values()):
        raise UsageError("the state is empty: give TrainState at least one part with content")
    describer = describer or Describer()
    local = describer.describe(
        {name: part.tensors for name, part in captured.items()},
        unequal={name: part.unequal for name, part in captured.items()},
        stepped={name: part.stepped for name, part in captured.items()},
    )
    shared = {name: part.objects for name, part in captured.items() if not part.per_rank}
    per_rank = {name: part.objects for name, part in captured.items() if part.per_rank}
    names = [[(part, sorted(objs)) for part, objs in group.items()] for group in (shared, per_rank)]
    boxes = describer.digest([box.held for box in local])
    # Names, and not the values: a plan holds for as long as nothing else changes.
    depends = msgspec.msgpack.encode((boxes, names, world_size))
    versioned = {name: part.versioned for name, part in captured.items() if part.versioned}
    return Snapshot(local, shared, per_rank, bytes_digest(depends), versioned)


# Values that ranks hold under one name, each for its own share: the groups of an optimizer.
#
# A group is called by its first parameter. Where several stages of a pipeline have that parameter,
# and each of them others beside it, their groups are versions of one name: all of them are stored.


Digests = dict[str, dict[str, str]]
"""Digests of encoded values, by part and name."""

Versions = Mapping[str, Mapping[str, str]]
"""By part and stored name, what the rank itself calls a value that is stored as a version."""


def split_versions(descriptions: Sequence[Description]) -> tuple[list[Digests], list[Versions]]:
    """Give each version of a value that may have versions a name of its own.

    Returns:
        For each rank the digests of its values by the names under which they are stored, and what
        it calls those with another name.

    Raises:
        IncompatibleError: versions differ in what must be equal on all ranks.
    """
    by_rank: list[Digests] = []
    own_names: list[Versions] = []
    # For each name what was seen so far: digests in the order of ranks, the first rank of each.
    seen: dict[tuple[str, str], dict[str, int]] = {}
    taken = {
        (part, name)
        for each in descriptions
        for part, named in each.objects.items()
        for name in named
    }
    for rank, each in enumerate(descriptions):
        digests: Digests = {}
        own: dict[str, dict[str, str]] = {}
        for part, named in each.objects.items():
            versioned = each.versioned.get(part, {})
            for name, digest in named.items():
                stored = name
                if name in versioned:
                    ranks = seen.setdefault((part, name), {})
                    first = ranks.setdefault(digest, rank)
                    _check_common(descriptions, part, name, (next(iter(ranks.values())), first))
                    stored = _stored_name(part, name, list(ranks).index(digest), taken)
                    if stored != name:
                        own.setdefault(part, {})[stored] = name
                digests.setdefault(part, {})[stored] = digest
        by_rank.append(digests)
        own_names.append(own)
    return by_rank, own_names


def _stored_name(part: str, name: str, number: int, taken: set[tuple[str, str]]) -> str:
    if not number:
        return name
    stored = f"{name}~{number}"
    while (part, stored) in taken:  # a parameter may be called so
        stored += "~"
    return stored


def _check_common(
    descriptions: Sequence[Description], part: str, name: str, ranks: tuple[int, int]
) -> None:
    one, other = (descriptions[rank].versioned.get(part, {}).get(name) for rank in ranks)
    if one != other:
        raise IncompatibleError(
            f"{name!r} of part {part!r} has other options on rank {ranks[0]} than on rank "
            f"{ranks[1]}, and both step its first parameter: give a parameter the same options on "
            "all ranks that have it",
            kind=ErrorKind.REPLICAS_DIFFER,
        )


# Staging of one save after another: this rank's share, from live memory into the arena.


WriteOut = Callable[[Sequence[StagedFile]], None]
"""Writes files whose memory is used again when it returns; raises what went wrong."""


class Staged:
    """This rank's share of one save, or what is left of it to be written.

    Attributes:
        files: images in the arena; their bytes are right once `wait` returned.
        nbytes: size of all files of this save, those that were written out already included.
        plans: of all files but that of the values.
    """

    def __init__(
        self,
        files: Sequence[StagedFile],
        nbytes: int,
        plans: Sequence[FilePlan] = (),
        in_flight: Sequence[InFlight] = (),
    ) -> None:
        self.files = files
        self.nbytes = nbytes
        self.plans = plans
        self._in_flight = in_flight

    def wait(self) -> None:
        """Wait until every copy is in the arena, on any thread; raise what a copy raised."""
        try:
            for copying in self._in_flight:
                copying.wait()
        finally:
            release_steps(self._in_flight)


@dataclass(frozen=True, slots=True)
class _Turn:
    """The files that are in the arena together."""

    plans: tuple[FilePlan, ...]
    nbytes: int


@dataclass(slots=True)
class _Layout:
    """What was laid out for one plan, kept for the saves that follow the same plan.

    `owned` is the very list that the plan has: as long as it is given again, nothing changed.
    """

    owned: Sequence[Owned]
    turns: Sequence[_Turn]
    files: Sequence[StagedFile] = ()
    copies: Sequence[BoxCopy] = ()

    @property
    def plans(self) -> list[FilePlan]:
        """All files, in their order."""
        return [plan for turn in self.turns for plan in turn.plans]

    @property
    def nbytes(self) -> int:
        """Size of all files."""
        return sum(plan.layout.nbytes for plan in self.plans)

    @property
    def arena_bytes(self) -> int:
        """What every turn fits into, so that the memory stays the same from turn to turn."""
        return max(turn.nbytes for turn in self.turns)


class Stager:
    """Copies this rank's share of each save; one save at a time, on the training thread.

    Attributes:
        arena: where to.
    """

    def __init__(
        self, *, mode: Staging, memory_limit_bytes: int | None, apart: bool = False
    ) -> None:
        """Make an empty one; memory is taken by `Saver.prewarm` or by the first save.

        Args:
            mode: "blocking", or "overlapped": see `SaveOptions.staging`.
            memory_limit_bytes: how large the arena may be, None for no limit.
            apart: see `plan_files`.
        """
        self._overlapped = mode == "overlapped"
        self._limit = memory_limit_bytes
        self._apart = apart
        self.arena = Arena()
        self._layout: _Layout | None = None
        self._engines: dict[torch.device, CopyEngine] = {}
        self._in_flight: Sequence[InFlight] = ()

    def stage(
        self,
        *,
        rank: int,
        local: Sequence[LocalBox],
        owned: Sequence[Owned],
        documents: Mapping[str, bytes],
        write_out: WriteOut,
        twin_of: int | None = None,
    ) -> Staged:
        """Copy what `rank` writes, each box once, straight to its place in a file.

        When it returns, everything may change again but what only an optimizer step changes
        (`LocalBox.stepped`), and that as well unless the mode is "overlapped". The caller makes
        sure that nobody reads the files of the save before any more.

        Args:
            rank: this rank.
            local: what it holds, in the order that was described.
            owned: what it writes; the very same list for as long as the plan is the same.
            documents: the encoded values it writes, by part.
            write_out: called, on this thread, with each part of the share that has to leave the
                arena before the rest can be staged.
            twin_of: under whose names the files of tensors go; None for those of this rank.

        Raises:
            Exception: what a copy or `write_out` raised.
        """
        self.settle()
        layout = self._laid_out(rank if twin_of is None else twin_of, local, owned)
        extra = [stage_documents(rank, documents)] if documents else []
        for turn in layout.turns[:-1]:
            self._reset(layout, local)
            files, copies = _place(self.arena, turn, local)
            self._copy(copies, local)
            write_out(files)
        files = []
        if layout.turns:
            files, copies = self._last_turn(layout, local)
            later = [copy for copy in copies if self._waits_for_step(local[copy.held])]
            # Begun first: the others are copied meanwhile, and have to be done at the return.
            self._begin(later, local)
            now = [copy for copy in copies if not self._waits_for_step(local[copy.held])]
            self._copy(now, local)
        nbytes = layout.nbytes + sum(len(file.image) for file in extra)
        return Staged([*extra, *files], nbytes, layout.plans, self._in_flight)

    def settle(self) -> None:
        """Wait until no copy reads the state or fills the arena any more, however it ended."""
        for copying in self._in_flight:
            with suppress(Exception):  # it failed the save it was for; `Staged.wait` said so
                copying.wait()
        release_steps(self._in_flight)
        self._in_flight = ()

    def abandon(self) -> None:
        """Leave the memory to a writer that may never come back; the next save gets its own."""
        self._layout = None
        self.arena = Arena()

    def release(self) -> None:
        """Give the memory back."""
        self.settle()
        self._layout = None
        self.arena.release()

    def _laid_out(self, rank: int, local: Sequence[LocalBox], owned: Sequence[Owned]) -> _Layout:
        if self._layout is None or self._layout.owned is not owned:
            # Dropped before the new one is made: its views keep the arena from being resized.
            self._layout = None
            held = [box.held for box in local]
            plans = plan_files(rank, held, owned, max_file_bytes=self._limit, apart=self._apart)
            self._layout = _Layout(owned, _turns(plans, self._limit))
        return self._layout

    def _last_turn(
        self, layout: _Layout, local: Sequence[LocalBox]
    ) -> tuple[Sequence[StagedFile], Sequence[BoxCopy]]:
        turn = layout.turns[-1]
        same = self._reset(layout, local)
        if len(layout.turns) > 1:
            # Nothing is kept: there may be as many turns as there are boxes.
            return _place(self.arena, turn, local)
        # The headers are still there from the save before, as long as the memory is the same.
        if not same or not layout.files:
            layout.files, layout.copies = _place(self.arena, turn, local)
        return layout.files, layout.copies

    def _reset(self, layout: _Layout, local: Sequence[LocalBox]) -> bool:
        devices = {box.memory.device for box in local}
        return self.arena.reset(layout.arena_bytes, pin=pin_of(devices))

    def _waits_for_step(self, box: LocalBox) -> bool:
        # Of other devices it is not known here how their copies and their steps are ordered.
        return self._overlapped and box.stepped and box.memory.device.type in ("cpu", "cuda")

    def _copy(self, copies: Sequence[BoxCopy], local: Sequence[LocalBox]) -> None:
        for device, targets, sources, _ in _by_device(copies, local):
            self._engine(device).copy(targets, sources)

    def _begin(self, copies: Sequence[BoxCopy], local: Sequence[LocalBox]) -> None:
        prepared = [
            # Views of their own: `parameter.data = other` must not reach a copy in flight.
            self._engine(device).prepare(targets, [source.detach() for source in sources], names)
            for device, targets, sources, names in _by_device(copies, local)
        ]
        if not prepared:
            return
        # Known before the first is begun: an interrupt must not leave one that nobody waits for.
        self._in_flight = prepared
        hold_steps(prepared)
        for copying in prepared:
            copying.begin()

    def _engine(self, device: torch.device) -> CopyEngine:
        if device not in self._engines:
            self._engines[device] = engine_for(device)
        return self._engines[device]


def _turns(plans: Sequence[FilePlan], limit: int | None) -> list[_Turn]:
    """Pack files into turns of at most `limit` bytes, in their order; a larger file is alone."""
    turns: list[list[FilePlan]] = []
    room = 0
    for plan in plans:
        nbytes = files_nbytes([plan])
        if not turns or (limit is not None and nbytes > room):
            turns.append([])
            room = limit or 0
        turns[-1].append(plan)
        room -= nbytes
    return [_Turn(tuple(turn), files_nbytes(turn)) for turn in turns]


def _place(
    arena: Arena, turn: _Turn, local: Sequence[LocalBox]
) -> tuple[Sequence[StagedFile], Sequence[BoxCopy]]:
    files = lay_out(arena, turn.plans)
    held = [box.held for box in local]
    pairs = zip(turn.plans, files, strict=True)
    return files, [copy for plan, file in pairs for copy in box_copies(plan, file, held)]


def _by_device(
    copies: Sequence[BoxCopy], local: Sequence[LocalBox]
) -> Iterator[tuple[torch.device, list[torch.Tensor], list[torch.Tensor], list[str]]]:
    """Return for each device targets, sources and the names of the sources."""
    grouped: dict[torch.device, tuple[list[torch.Tensor], list[torch.Tensor], list[str]]] = {}
    for copy in copies:
        source = copy.source(local)
        targets, sources, names = grouped.setdefault(source.device, ([], [], []))
        targets.append(copy.target)
        sources.append(source)
        names.append(local[copy.held].held.name)
    for device, columns in grouped.items():
        yield device, *columns
