"""One rank's state at the moment of a save: live tensors described, Python values encoded."""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np
import torch
import xxhash

from dist_ckpt.errors import ErrorKind, IncompatibleError, UsageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import encode_document
from dist_ckpt.planning.columns import Table, numbers_of
from dist_ckpt.planning.describe import Describer, Held, LocalBox
from dist_ckpt.planning.files import Document
from dist_ckpt.ranks.rounds import unpack
from dist_ckpt.saving.messages import Description, ObjectName, ReplicaDigests
from dist_ckpt.staging.checksum import bytes_of, checksum
from dist_ckpt.state.decoding import unordered_digest
from dist_ckpt.state.groups import options_digest
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
        return Description(digest, sent, numbers, digests, versioned)

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


# Are replicas equal? Ranks compare digests of what they hold alike.
#
# The first difference is named: rows of replicas that drifted apart would be a checkpoint of a
# state that no rank ever had. All is compared when a plan is new, by one digest for each group of
# ranks; only where these differ is each box told by itself. Later saves compare a sample,
# another one each time, within the messages that they exchange anyway; all again where samples
# differ.


_log = logging.getLogger("dist_ckpt")

DIGEST_BYTES = 8
# How the digest of a box was made. Digests are comparable where both letters are equal.
_ON_HOST, _ON_DEVICE = b"h", b"d"


def digest_replicas(boxes: Sequence[LocalBox]) -> ReplicaDigests:
    """Digest the memory of each of `boxes`, without copying a device's memory to the host."""
    methods: list[bytes] = []
    sums: list[torch.Tensor] = []
    host: dict[int, bytes] = {}
    for number, box in enumerate(boxes):
        if box.memory.device.type == "cpu":
            host[number] = _host_digest(box.memory)
            methods.append(_ON_HOST)
        else:
            sums.append(checksum(box.memory))
            methods.append(_ON_DEVICE)
    # Fetched together: one wait for the device, not one for each box.
    fetched = iter(_fetch(sums))
    parts = [host[number] if number in host else next(fetched) for number in range(len(boxes))]
    return ReplicaDigests(b"".join(methods), b"".join(parts))


SAMPLES = 32
"""In so many saves everything is compared: what the last of them costs, each of them costs.

A digest reads 29 GiB/s where the copy of a share writes 14 (two cores, x86-64): with four replicas
of everything a sample takes 6 % of the time that the copies take.
"""


def digest_sample(boxes: Sequence[LocalBox], turn: int) -> bytes:
    """Digest one of `SAMPLES` stretches of the memory of all `boxes` laid end to end.

    Args:
        boxes: what is held alike on other ranks, in the same order there.
        turn: which stretch; they come round.

    Returns:
        A letter that says how it was made, and the digest; comparable where the letters are equal.
    """
    hasher = xxhash.xxh3_64()
    sums: list[torch.Tensor] = []
    methods: set[bytes] = set()
    for memory, start, stop in _stretch([box.memory for box in boxes], turn % SAMPLES):
        part = bytes_of(memory)[start:stop]
        if part.device.type == "cpu":
            methods.add(_ON_HOST)
            hasher.update(part.numpy().data)
        else:
            methods.add(_ON_DEVICE)
            sums.append(checksum(part))
    for value in _fetch(sums):
        hasher.update(value)
    return b"".join(sorted(methods)) + hasher.digest()


def samples_differ(samples_by_rank: Iterable[Mapping[int, bytes]]) -> bool:
    """Tell whether two ranks of a group have comparable digests that are not equal."""
    seen: dict[tuple[int, bytes], bytes] = {}
    return any(
        seen.setdefault((group, digest[:-DIGEST_BYTES]), digest) != digest
        for samples in samples_by_rank
        for group, digest in samples.items()
    )


def _stretch(
    memories: Sequence[torch.Tensor], number: int
) -> Iterable[tuple[torch.Tensor, int, int]]:
    """Return which bytes of which memory belong to the stretch `number`."""
    total = sum(memory.nbytes for memory in memories)
    low, high = total * number // SAMPLES, total * (number + 1) // SAMPLES
    begin = 0
    for memory in memories:
        start, stop = max(low - begin, 0), min(high - begin, memory.nbytes)
        if start < stop:
            yield memory, start, stop
        begin += memory.nbytes


def compare_replicas(
    held_by_rank: Sequence[Sequence[Held]],
    replicas_by_rank: Sequence[Sequence[int]],
    messages: Sequence[bytes],
) -> bytes:
    """Rank 0: compare the digests of every box over the ranks that hold it; the answer is empty.

    Raises:
        IncompatibleError: a box differs; the message names the tensor and two ranks.
    """
    first: dict[tuple[object, ...], tuple[int, bytes, bytes]] = {}
    incomparable: dict[str, tuple[int, int]] = {}
    for rank, data in enumerate(messages):
        found = unpack(data, ReplicaDigests)
        mine = held_by_rank[rank]  # once: it may be made of columns anew each time
        for number, position in enumerate(replicas_by_rank[rank]):
            held = mine[position]
            method = found.methods[number : number + 1]
            value = found.digests[number * DIGEST_BYTES : (number + 1) * DIGEST_BYTES]
            where = (held.part, held.name, held.offsets, held.sizes)
            other, its_method, its_value = first.setdefault(where, (rank, method, value))
            if method != its_method:
                incomparable.setdefault(f"{held.part}/{held.name}", (other, rank))
            elif value != its_value:
                raise _differ(held, other, rank)
    _warn(incomparable)
    return b""


def _host_digest(memory: torch.Tensor) -> bytes:
    # Zero-copy where the tensor is contiguous, as nearly all are.
    return xxhash.xxh3_64_digest(bytes_of(memory).numpy().data)


def _fetch(sums: Sequence[torch.Tensor]) -> list[bytes]:
    by_device: dict[torch.device, list[int]] = {}
    for number, one in enumerate(sums):
        by_device.setdefault(one.device, []).append(number)
    out = [b""] * len(sums)
    for numbers in by_device.values():
        values = torch.stack([sums[number] for number in numbers]).cpu().numpy()
        for number, value in zip(numbers, values.astype(np.int64), strict=True):
            out[number] = value.tobytes()
    return out


def _differ(held: Held, rank: int, other: int) -> IncompatibleError:
    where = "" if held.sizes == held.shape else f" (its box at {list(held.offsets)})"
    return IncompatibleError(
        f"tensor {held.name!r} of part {held.part!r}{where} has other values on rank {rank} than "
        f"on rank {other}, which hold it as copies of one another: find out why they drifted "
        "apart, or wrap what may differ in PerRank(...)",
        kind=ErrorKind.REPLICAS_DIFFER,
        ranks={rank: f"differs from rank {other}", other: f"differs from rank {rank}"},
    )


def _warn(incomparable: Mapping[str, tuple[int, int]]) -> None:
    if incomparable:
        name, (rank, other) = next(iter(incomparable.items()))
        _log.warning(
            "%d tensors lie on a device on some ranks and in host memory on others (%s, ranks %d "
            "and %d): they were not compared",
            len(incomparable),
            name,
            rank,
            other,
        )
