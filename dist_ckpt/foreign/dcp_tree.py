"""The tree of a stock state dict, as `dist_ckpt.dcp.Writer` keeps it beside the tensors.

A stock checkpoint has it in its metadata, as `planner_data`: the path of each flattened name, or
whatever the planner put there. Here it is typed JSON in a file of its own, since the names of a
checkpoint do not tell where in `optim.state.layers.0.weight.step` the keys end. With it goes what
must be known of entries that are stored as several tensors behind one face.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import msgspec

from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.files import parse_header
from dist_ckpt.format.manifest import decode_document, encode_document
from dist_ckpt.format.names import shard_name
from dist_ckpt.repository.checkpoint import Checkpoint
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode

TREE = "planner_data"
"""What no part is called, for the name of the file."""

FACES = "wrapped"
"""What the same file has of entries that are several tensors."""

TREE_FILE = shard_name(TREE, 0)
"""The file that holds it. No part is called so, and the index names it as one of the files."""


@dataclass(frozen=True, slots=True)
class Tree:
    """What a planner said of the names; its being there says that the planner was asked.

    Attributes:
        planner_data: that.
        faces: of what is several tensors behind one face, by flattened name: see `how_made`.
    """

    planner_data: Any
    faces: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def read_tree(checkpoint: Checkpoint) -> Tree | None:
    """Return the tree that is kept with `checkpoint`, if one is.

    Raises:
        IntegrityError: it is damaged.
        IncompatibleError: it holds a type that is not registered in this program.
    """
    # Before trees were kept this may have been the name of a part.
    a_part = any(tensor.part == TREE for tensor in checkpoint.tensors)
    for number, (name, nbytes) in enumerate(checkpoint.files):
        if name == TREE_FILE and not a_part:
            image = bytes(checkpoint.read_blocks(number, 0, nbytes))
            entries = parse_header(image, nbytes).entries
            kept = {each.name: image[each.offset : each.offset + each.nbytes] for each in entries}
            where = f"{TREE} of {checkpoint.where}"
            # The file is there, so the planner was asked, and its answer is lost.
            if TREE not in kept:
                raise _malformed(where, "there is none in its file")
            return Tree(_decoded(kept[TREE], where), _faces(kept.get(FACES), where))
    return None


_PATHS, _VALUE = "paths", "value"


def encode_tree(data: object) -> bytes:
    """Return what a planner said as it is stored.

    Raises:
        UsageError: it holds something of an unknown type, named by its path.
    """
    # Tens of thousands of paths are the common case, and as typed JSON would take seconds to read.
    if type(data) is dict and all(map(_is_path, data.items())):
        return msgspec.json.encode({_PATHS: list(data.values())})
    return encode_document({_VALUE: encode(data, path=TREE, aside=False)})


def encode_faces(faces: Mapping[str, Mapping[str, Any]]) -> bytes:
    """Return what is noted of wrapped tensors as it is stored."""
    return encode_document({name: encode(dict(noted), path=name) for name, noted in faces.items()})


def _faces(data: bytes | None, where: str) -> dict[str, Mapping[str, Any]]:
    if data is None:
        return {}
    found: dict[str, Mapping[str, Any]] = {}
    for name, encoded in decode_document(data, where=where).items():
        noted = decode(encoded, tensors={}, path=f"{where}: {name}")
        if not isinstance(noted, dict):
            raise _malformed(where, f"what is noted of {name!r} is no dict")
        found[name] = noted
    return found


def _is_path(item: tuple[object, object]) -> bool:
    fqn, path = item
    if type(fqn) is not str or type(path) is not tuple or not path:
        return False
    plain = all(type(key) is str or (type(key) is int and -(2**63) <= key < 2**63) for key in path)
    # `_decoded` makes the names out of the paths: others need the form that keeps both.
    return plain and ".".join(map(str, path)) == fqn


def _decoded(data: bytes, where: str) -> Any:
    stored = decode_document(data, where=where)
    if stored.keys() == {_VALUE}:
        return decode(stored[_VALUE], tensors={}, path=where)
    if stored.keys() != {_PATHS}:
        raise _malformed(where, "it is neither paths nor a value")
    try:
        paths = msgspec.json.decode(stored[_PATHS], type=list[tuple[str | int, ...]])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise _malformed(where, str(error)) from error
    return {".".join(map(str, path)): path for path in paths}


def _malformed(where: str, problem: str) -> IntegrityError:
    return IntegrityError(f"{where}: {problem}. Use another checkpoint", kind=ErrorKind.MALFORMED)
