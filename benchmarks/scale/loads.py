"""Opening a large checkpoint and planning what to read of it: `python -m benchmarks.scale.loads`.

The job of `benchmarks.scale.index`, loaded by half as many ranks, three quarters, and twice as
many. A few of them are looked at: each opens the checkpoint, fetches the segments that describe
what it wants, and plans its reads. No byte of a tensor is there.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import torch

from benchmarks.measure import in_own_process, peak_mib, say
from benchmarks.scale.index import described, segment, structure
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.index import Box, Held
from dist_ckpt.format.manifest import FilesTotal, ManifestFile
from dist_ckpt.format.names import (
    file_key,
    index_key,
    manifest_key,
    segment_name,
    shard_name,
    step_dir,
)
from dist_ckpt.format.segments import SegmentNote, Spent, encode_root, encode_segment
from dist_ckpt.format.structure import Structure
from dist_ckpt.loading.fetching import MAX_GAP_BYTES, bridge
from dist_ckpt.loading.filling import Files, ReadTargets, Wanted
from dist_ckpt.planning.describe import LocalBox
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.storage.memory import MemoryStore

RANKS = (64, 1024, 16_384)
FACTORS = (0.5, 0.75, 2.0)
SECONDS_TARGET = 2.0
MIB_TARGET = 512.0
READ_TARGET = 1.10

_LOOKED_AT = 4


@dataclass(frozen=True, slots=True)
class Row:
    """What it costs one rank to open a checkpoint, and to plan its reads.

    Attributes:
        ranks: that saved it.
        readers: that load it.
        seconds: of processor time, of the rank that needs the most.
        mib: of memory at its peak, above that of the checkpoint, of the first one looked at.
        read: bytes that they read for each that they want, all of them together, each for itself.
    """

    ranks: int
    readers: int
    seconds: float
    mib: float
    read: float

    @property
    def is_met(self) -> bool:
        """Whether all is within its bound."""
        return (
            self.seconds <= SECONDS_TARGET and self.mib <= MIB_TARGET and self.read <= READ_TARGET
        )


def measure(ranks: int, readers: int) -> Row:
    """Have some of `readers` ranks plan the load of what `ranks` saved."""
    of = structure(ranks)
    some = sorted({number * (readers - 1) // (_LOOKED_AT - 1) for number in range(_LOOKED_AT)})
    boxes = {reader: _boxes(of, reader, readers) for reader in some}
    store = MemoryStore(f"bench-loads-{ranks}-{readers}")
    _put(store, of, ranks, [pair for pairs in boxes.values() for pair in pairs])
    before = peak_mib()
    seconds, peaks, read, wanted = [], [], 0, 0
    for pairs in boxes.values():
        begun = time.process_time()
        planned = _plan(store, pairs)
        seconds.append(time.process_time() - begun)
        peaks.append(peak_mib())
        read += bridge(planned.needs, max_gap_bytes=MAX_GAP_BYTES).nbytes
        wanted += planned.nbytes_wanted
    return Row(ranks, readers, max(seconds), peaks[0] - before, read / wanted)


def _plan(store: MemoryStore, boxes: Sequence[tuple[int, Box]]) -> ReadTargets:
    checkpoint = Checkpoint.read(store, 1000)
    index = checkpoint.index_of(boxes)
    files = Files.of(index, apart_bytes=MAX_GAP_BYTES, verify=True)
    wanted = []
    for number, box in boxes:
        each = index.tensors[number]
        held = Held(each.part, each.name, each.dtype, each.shape, box.offsets, box.sizes)
        memory = torch.empty(box.sizes, device="meta")
        wanted.append(Wanted(number, LocalBox(held, memory), torch.float32))
    return ReadTargets(index, wanted, files, max_gap_bytes=MAX_GAP_BYTES)


def _boxes(of: Structure, reader: int, readers: int) -> list[tuple[int, Box]]:
    """Return what a rank wants: its rows of each tensor, and every counter."""
    found = []
    for number, tensor in enumerate(of.tensors):
        shape = tensor.shape
        if not shape:
            found.append((number, Box((), ())))
            continue
        each = -(-shape[0] // readers)
        start = min(each * reader, shape[0])
        rows = min(each, shape[0] - start)
        if rows:
            found.append((number, Box((start, *(0 for _ in shape[1:])), (rows, *shape[1:]))))
    return found


def _put(store: MemoryStore, of: Structure, ranks: int, wanted: Sequence[tuple[int, Box]]) -> None:
    """Commit the checkpoint; of the segments those are real that hold what is wanted."""
    rng = random.Random(ranks)
    draft, _, _ = described(ranks)
    real = set(of.holders(wanted).tolist()) | {0}
    like = segment(of, ranks - 1, rng)
    notes, inside = [], b""
    for rank in range(ranks):
        mine = segment(of, rank, rng) if rank in real else like
        data = encode_segment(mine)
        key = file_key(1000, draft.save_id, segment_name(rank))
        if rank in real and rank:
            store.put(key, [data])
        elif not rank:
            inside = data
        sizes = [file.nbytes for file in mine.files]
        names = [shard_name(part, rank) for part in ("model", "optimizer")]
        files = list(zip(names, sizes, strict=True))
        notes.append(SegmentNote(rank, len(data), bytes_digest(data), files, []))
    notes[0] = msgspec.structs.replace(notes[0], inside=inside)
    root = encode_root(structure_format.encode(of), notes, [Spent(0.1, 2.5)] * ranks)
    key = index_key(1000, draft.save_id)
    index = ManifestFile(key.removeprefix(f"{step_dir(1000)}/"), len(root), bytes_digest(root))
    total = FilesTotal.of(nbytes for note in notes for _, nbytes in note.files)
    store.put(key, [root])
    manifest = msgspec.structs.replace(draft, index=index, files=total)
    store.put(manifest_key(1000), [manifest_format.encode(manifest)])


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print a row for each number of ranks and readers, and return them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=RANKS)
    found: list[Row] = []
    say("| saved by | loaded by | CPU s, a rank | MiB | read / wanted | |")
    say("|---|---|---|---|---|---|")
    for ranks in sorted(parser.parse_args(arguments).ranks):
        for factor in FACTORS:
            row = in_own_process(measure, ranks, int(ranks * factor))
            found.append(row)
            say(
                f"| {row.ranks} | {row.readers} | {row.seconds:.2f} | {row.mib:.0f} | "
                f"{row.read:.3f} | {'met' if row.is_met else 'MISSED'} |"
            )
    return found


if __name__ == "__main__":
    sys.exit(sum(not row.is_met for row in rows(sys.argv[1:])))
