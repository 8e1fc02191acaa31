"""The index of a save, from what every rank planned and reported."""

from __future__ import annotations

import pytest
import torch

from dist_ckpt.errors import IntegrityError
from dist_ckpt.format.files import ShardLayout, digest_blocks
from dist_ckpt.format.index import Box
from dist_ckpt.format.segments import decode_root, decode_segment, join_segments
from dist_ckpt.format.whole import encode_whole
from dist_ckpt.planning.files import (
    Document,
    RankShare,
    WrittenFile,
    build_index,
    plan_extra,
    plan_files,
)
from dist_ckpt.planning.owners import decide
from tests.unit.planning.boxes import whole
from tests.unit.planning.saved import checkpoint, content, local

DIGEST = "0123456789abcdef"


def written(name: str, planned: ShardLayout) -> WrittenFile:
    digests = digest_blocks(planned.blocks, bytes(planned.nbytes))
    return WrittenFile(name, planned.nbytes, digests, planned.blocks)


def share_of(rank: int, world: list[list[str]], documents: list[Document]) -> RankShare:
    held = [[whole(name, (5, 7)) for name in names] for names in world]
    owned = decide(held)[rank]
    files = [written(plan.name, plan.layout) for plan in plan_files(rank, held[rank], owned)]
    if documents:
        extra = plan_extra({each.part: each.nbytes for each in documents})
        files.append(written(f"extra.r{rank:05d}.safetensors", extra))
    return RankShare(held[rank], owned, files, documents)


def test_every_box_and_every_document_is_in_it() -> None:
    world = [["a", "shared"], ["b", "shared"]]
    shared = Document("notes", False, 10, DIGEST)
    shares = [
        share_of(0, world, [shared, Document("rng", True, 7, DIGEST)]),
        share_of(1, world, [Document("rng", True, 9, DIGEST)]),
    ]
    index = build_index(shares)
    assert sorted(tensor.name for tensor in index.tensors) == ["a", "b", "shared"]
    assert [(each.part, each.rank, each.nbytes) for each in index.objects] == [
        ("notes", None, 10),
        ("rng", 0, 7),
        ("rng", 1, 9),
    ]
    for entry in index.objects:
        assert index.files[entry.file].name.startswith("extra.")
    root = decode_root(encode_whole(index))
    places = range(len(root.segments))
    read = {n: decode_segment(root.segments[n].inside, root, n) for n in places}
    assert join_segments(root, read) == index, "a reader takes it"


def test_a_report_that_lacks_a_file_is_refused() -> None:
    whole_share = share_of(1, [["a"], ["b"]], [])
    short = RankShare(whole_share.held, whole_share.owned, [], [])
    with pytest.raises(IntegrityError, match="rank 1 wrote other files"):
        build_index([share_of(0, [["a"], ["b"]], []), short])


def test_the_index_of_a_real_save_says_where_the_bytes_are() -> None:
    tensor = content((6, 4), torch.int16)
    halves = [Box((0, 0), (3, 4)), Box((3, 0), (3, 4))]
    opened = checkpoint([[local("t", tensor, box)] for box in halves])
    rows = opened.index.chunks_of(0)
    for number in range(2):
        file, start = int(rows.file[number]), int(rows.offset[number])
        data = opened.read_blocks(file, 0, opened.index.files[file].nbytes)
        assert bytes(data[start : start + 24]) == tensor[3 * number :][:3].numpy().tobytes()
