"""What the Writer adds to a checkpoint for the tree of its state dict: one more file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from dist_ckpt.dcp.edge import part_and_name
from dist_ckpt.foreign.dcp_runs import path_of
from dist_ckpt.foreign.dcp_tree import FACES, TREE, TREE_FILE, encode_faces, encode_tree
from dist_ckpt.format.files import FileEntry
from dist_ckpt.format.index import Index
from dist_ckpt.planning.files import StagedFile, WrittenFile, stage_documents


def tree_file(metadata: Metadata, faces: Mapping[str, Mapping[str, Any]]) -> StagedFile | None:
    """Return the file that keeps the tree, None if the names alone tell it.

    Args:
        metadata: what the planner said.
        faces: what is noted of entries that are several tensors behind one face.

    Raises:
        UsageError: the planner's data hold something of an unknown type, named by its path.
    """
    data = metadata.planner_data
    paths: Mapping[str, Any] = data if isinstance(data, Mapping) else {}
    told = {fqn: path_of(*part_and_name(fqn, paths)) for fqn in metadata.state_dict_metadata}
    if data == told and not faces:
        return None
    kept = {TREE: encode_tree(data)}
    if faces:
        kept[FACES] = encode_faces(faces)
    return replace(stage_documents(0, kept), name=TREE_FILE)


def with_tree(index: Index, tree: WrittenFile | None) -> Index:
    """Return `index` with the file of the tree, if there is one: nothing in it is an entry."""
    if tree is None:
        return index
    entry = FileEntry.of(tree.name, tree.nbytes, tree.blocks, tree.lengths)
    return replace(index, files=(*index.files, entry))
