"""The tree of a stock state dict: what its planner says of the names, kept beside the tensors.

A stock checkpoint has it in its metadata, as `planner_data`: the path of each flattened name, or
whatever the planner put there. Here it is typed JSON in a file of its own, since the names of a
checkpoint do not tell where in `optim.state.layers.0.weight.step` the keys end.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.foreign.dcp_runs import TREE, TREE_FILE, path_of
from dist_ckpt.format.digest import file_digest
from dist_ckpt.format.index import FileEntry, Index
from dist_ckpt.format.shard import parse_header
from dist_ckpt.planning.files import plan_extra
from dist_ckpt.planning.index import WrittenFile
from dist_ckpt.repository import Checkpoint
from dist_ckpt.state.objects import decode, encode
from dist_ckpt.storage.direct import aligned_buffer


@dataclass(frozen=True, slots=True)
class Tree:
    """What a planner said of the names; its being there says that the planner was asked."""

    planner_data: Any


def tree_image(metadata: Metadata) -> memoryview | None:
    """Return the image of the file that keeps the tree, None if the names alone tell it.

    Raises:
        UsageError: the planner's data hold something of an unknown type, named by its path.
    """
    data = metadata.planner_data
    paths: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    told = {fqn: path_of(*part_and_name(fqn, paths)) for fqn in metadata.state_dict_metadata}
    if data == told:
        return None
    encoded = encode(data, path=TREE, aside=False)
    layout = plan_extra({TREE: len(encoded)})
    image = aligned_buffer(layout.nbytes)
    image[: len(layout.header)] = layout.header
    image[layout.offsets[0] : layout.offsets[0] + len(encoded)] = encoded
    return image


def with_tree(index: Index, tree: WrittenFile | None) -> Index:
    """Return `index` with the file of the tree, if there is one: nothing in it is an entry."""
    if tree is None:
        return index
    entry = FileEntry(tree.name, tree.nbytes, file_digest(tree.blocks), tree.blocks)
    return replace(index, files=(*index.files, entry))


def read_tree(checkpoint: Checkpoint) -> Tree | None:
    """Return the tree that is kept with `checkpoint`, if one is.

    Raises:
        IntegrityError: it is damaged.
        IncompatibleError: it holds a type that is not registered in this program.
    """
    for number, file in enumerate(checkpoint.index.files):
        if file.name == TREE_FILE:
            image = bytes(checkpoint.read_blocks(number, 0, file.nbytes))
            (entry,) = parse_header(image, file.nbytes).entries[:1]
            data = image[entry.offset : entry.offset + entry.nbytes]
            return Tree(decode(data, tensors={}, path=f"{TREE} of {checkpoint.where}"))
    return None
