"""How large the index of a large job is: `python -m benchmarks.scale.index`.

A model of 7 billion parameters with the moments of AdamW, sharded by FSDP2 over so many ranks,
described by the real codecs of format 2. No byte of a tensor is there.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np

from benchmarks.measure import say
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format import structure as structure_format
from dist_ckpt.format.files import ALIGN_BYTES, DIGEST_BYTES, FileEntry, cut_blocks
from dist_ckpt.format.index import TensorEntry
from dist_ckpt.format.manifest import FilesTotal, Manifest, ManifestFile, RankTimings
from dist_ckpt.format.names import segment_name, shard_name
from dist_ckpt.format.segments import (
    Segment,
    SegmentNote,
    Spent,
    chunk_nbytes,
    decode_root,
    encode_root,
    encode_segment,
)
from dist_ckpt.format.structure import Layout, Structure
from dist_ckpt.saving.provenance import few_hosts

RANKS = (64, 1024, 16_384)

CHUNK_TARGET = 8.0
ROOT_TARGET = 1 << 20
MANIFEST_TARGET = 64 << 10

_LAYERS, _WIDTH, _INNER, _WORDS = 32, 4096, 11_008, 32_000
_SAVE_ID = "c000001-0123456789abcdef"


@dataclass(frozen=True, slots=True)
class Sizes:
    """What describes one checkpoint.

    Attributes:
        ranks: how many saved it.
        chunks: how many it has.
        chunk_bytes: of the segments, without digests, for each chunk: of the ranks looked at.
        digest_bytes: of digests, for each MiB that is stored: likewise.
        root_bytes: of the root, with the segment of rank 0 behind it.
        manifest_bytes: of the manifest.
        root_seconds: to make the root of a save whose plan is there.
    """

    ranks: int
    chunks: int
    chunk_bytes: float
    digest_bytes: float
    root_bytes: int
    manifest_bytes: int
    root_seconds: float

    @property
    def is_met(self) -> bool:
        """Whether all is within its bound."""
        return (
            self.chunk_bytes <= CHUNK_TARGET
            and self.root_bytes <= ROOT_TARGET
            and self.manifest_bytes <= MANIFEST_TARGET
        )


def parameters() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield name and shape of each parameter."""
    yield "embed.weight", (_WORDS, _WIDTH)
    for layer in range(_LAYERS):
        for name in "qkvo":
            yield f"layers.{layer}.attention.{name}.weight", (_WIDTH, _WIDTH)
        for name in ("gate", "up"):
            yield f"layers.{layer}.mlp.{name}.weight", (_INNER, _WIDTH)
        yield f"layers.{layer}.mlp.down.weight", (_WIDTH, _INNER)
        for name in ("attention", "mlp"):
            yield f"layers.{layer}.{name}_norm.weight", (_WIDTH,)
    yield "norm.weight", (_WIDTH,)
    yield "head.weight", (_WORDS, _WIDTH)


def structure(ranks: int) -> Structure:
    """Return how the job is cut: each tensor by rows, a step of each parameter on some rank."""
    tensors: list[TensorEntry] = []
    layouts: dict[object, int] = {}
    made: list[Layout] = []
    numbers: list[int] = []

    def add(tensor: TensorEntry, layout: Layout, key: object) -> None:
        numbers.append(layouts.setdefault(key, len(made)))
        if numbers[-1] == len(made):
            made.append(layout)
        tensors.append(tensor)

    for number, (name, shape) in enumerate(parameters()):
        rows = _rows(ranks, shape)
        add(TensorEntry("model", name, "float32", shape), rows, shape)
        for kind in ("exp_avg", "exp_avg_sq"):
            add(TensorEntry("optimizer", f"state.{name}.{kind}", "float32", shape), rows, shape)
        rank = number % ranks
        scalar = Layout(np.array([rank]), np.zeros((1, 0), np.int64), np.zeros((1, 0), np.int64))
        add(TensorEntry("optimizer", f"state.{name}.step", "float32", ()), scalar, rank)
    own = np.arange(len(tensors), dtype=np.int64)
    return Structure(tuple(tensors), np.array(numbers, np.int64), own, tuple(made))


def _rows(ranks: int, shape: tuple[int, ...]) -> Layout:
    """Cut as `torch.chunk` does: equal pieces, a shorter one, and ranks that have none."""
    each = -(-shape[0] // ranks)
    first = np.arange(0, shape[0], each, dtype=np.int64)
    starts = np.zeros((len(first), len(shape)), np.int64)
    starts[:, 0] = first
    sizes = np.tile(np.array(shape, np.int64), (len(first), 1))
    sizes[:, 0] = np.minimum(each, shape[0] - first)
    return Layout(np.arange(len(first), dtype=np.int64), starts, sizes)


def segment(of: Structure, rank: int, rng: random.Random) -> Segment:
    """Return what `rank` writes, a file for each of the two parts, with digests drawn at random."""
    chunks = of.chunks_of(rank)
    nbytes = chunk_nbytes(chunks, of)
    parts = np.array([tensor.part == "optimizer" for tensor in of.tensors], np.int64)
    file = parts[chunks.tensor]
    offset = np.zeros(len(file), np.int64)
    files = []
    for number, part in enumerate(("model", "optimizer")):
        mine = np.flatnonzero(file == number)
        # Some KiB of header: its length depends on the names alone.
        head = ALIGN_BYTES * (1 + len(mine) // 40)
        offset[mine] = head + np.cumsum(nbytes[mine]) - nbytes[mine]
        lengths = cut_blocks(head, nbytes[mine].tolist())
        blocks = rng.randbytes(DIGEST_BYTES * len(lengths))
        files.append(FileEntry.of(shard_name(part, rank), sum(lengths), blocks, lengths))
    return Segment(rank, tuple(files), chunks, file, offset, ())


def measure(ranks: int, looked_at: int = 8) -> Sizes:
    """Describe the job at so many ranks; the segments of a few of them are made.

    Args:
        ranks: how many.
        looked_at: of how many ranks the segments are made; the others are taken to be like them.
    """
    rng = random.Random(ranks)
    of = structure(ranks)
    encoded = structure_format.encode(of)
    some = sorted({rank * (ranks - 1) // (looked_at - 1) for rank in range(looked_at)})
    made = {rank: segment(of, rank, rng) for rank in some}
    data = {rank: encode_segment(each) for rank, each in made.items()}
    notes = [
        _note(rank, made[near], data[near], rng)
        for rank, near in ((rank, some[rank * len(some) // ranks]) for rank in range(ranks))
    ]
    notes[0] = msgspec.structs.replace(notes[0], nbytes=len(data[0]), inside=data[0])
    spent = [Spent(rng.uniform(0.1, 0.2), rng.uniform(2, 3)) for _ in range(ranks)]
    begun = time.perf_counter()
    root = encode_root(encoded, notes, spent)
    seconds = time.perf_counter() - begun
    decode_root(root)
    digests = {rank: sum(len(f.blocks) for f in each.files) for rank, each in made.items()}
    counted = sum(len(each.file) for each in made.values())
    stored = sum(file.nbytes for each in made.values() for file in each.files)
    return Sizes(
        ranks,
        sum(len(of.layouts[number].rank) for number in of.layout.tolist()),
        sum(len(data[rank]) - digests[rank] for rank in some) / counted,
        sum(digests.values()) / stored * (1 << 20),
        len(root),
        len(_manifest(notes, spent, len(root))),
        seconds,
    )


def described(ranks: int) -> tuple[Manifest, bytes, list[str]]:
    """Return the manifest and the root of the job at so many ranks, and the names of its files."""
    rng = random.Random(ranks)
    of = structure(ranks)
    like = segment(of, ranks - 1, rng)
    notes = notes_of(ranks, like, rng)
    spent = [Spent(rng.uniform(0.1, 0.2), rng.uniform(2, 3)) for _ in range(ranks)]
    root = encode_root(structure_format.encode(of), notes, spent)
    names = [name for note in notes for name, _ in note.files]
    names += [segment_name(note.rank) for note in notes]
    return manifest_format.decode(_manifest(notes, spent, len(root)), step=1000), root, names


def notes_of(ranks: int, like: Segment, rng: random.Random) -> list[SegmentNote]:
    """Return what ranks would report of their segments, were they all like one."""
    data = encode_segment(like)
    return [_note(rank, like, data, rng) for rank in range(ranks)]


def _note(rank: int, like: Segment, data: bytes, rng: random.Random) -> SegmentNote:
    files = [
        (shard_name(part, rank), file.nbytes)
        for part, file in zip(("model", "optimizer"), like.files, strict=True)
    ]
    # No two segments are compressed to quite the same size, nor have they the same digest.
    nbytes = len(data) + rng.randrange(64)
    return SegmentNote(rank, nbytes, rng.randbytes(8).hex(), files, [])


def _manifest(notes: Sequence[SegmentNote], spent: Sequence[Spent], root_bytes: int) -> bytes:
    timings = [RankTimings(each.stage_seconds, each.write_seconds, 1 << 30) for each in spent]
    hosts = list(dict.fromkeys(f"node-{rank // 8:05d}.cluster" for rank in range(len(notes))))
    draft = Manifest(
        step=1000,
        save_id=_SAVE_ID,
        claim=1,
        created="2025-11-21T08:30:12.417+00:00",
        world_size=len(notes),
        versions={"dist_ckpt": "0.1.0", "torch": "2.13.0", "python": "3.11.9"},
        parts=["model", "optimizer"],
        files=FilesTotal.of(nbytes for note in notes for _, nbytes in note.files),
        index=ManifestFile(f"{_SAVE_ID}/index.msgpack", root_bytes, "0" * 16),
        metrics={"loss": 2.5},
        metadata={},
        timings=manifest_format.longest(timings),
        parent_step=None,
        origin=few_hosts(hosts),
    )
    return manifest_format.encode(draft)


def rows(arguments: Sequence[str]) -> list[Sizes]:
    """Measure, print a row for each number of ranks, and return them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    all_found = []
    say(
        f"{'ranks':>7} {'chunks':>11} {'B a chunk':>10} {'digests B a MiB':>16} {'root KiB':>9} "
        f"{'manifest KiB':>13} {'root s':>7}"
    )
    for ranks in parser.parse_args(arguments).ranks:
        found = measure(ranks)
        all_found.append(found)
        say(
            f"{found.ranks:7d} {found.chunks:11d} {found.chunk_bytes:10.2f} "
            f"{found.digest_bytes:16.1f} {found.root_bytes / 1024:9.1f} "
            f"{found.manifest_bytes / 1024:13.1f} {found.root_seconds:7.2f}"
            f"  {'met' if found.is_met else 'MISSED'}"
        )
    say(f"bounds: {CHUNK_TARGET:g} B a chunk, root 1,024 KiB, manifest 64 KiB")
    return all_found


if __name__ == "__main__":
    sys.exit(int(any(not found.is_met for found in rows(sys.argv[1:]))))
