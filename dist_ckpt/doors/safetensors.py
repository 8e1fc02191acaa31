"""Files of safetensors, one or as many as Hugging Face cuts a model into."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence

import msgspec

from dist_ckpt.doors.content import Item
from dist_ckpt.doors.image import Image
from dist_ckpt.errors import ErrorKind, IncompatibleError
from dist_ckpt.format.shard import DTYPES, ShardEntry, layout
from dist_ckpt.state.layout import dtype_name

INDEX_FILE = "model.safetensors.index.json"
ONE_FILE = "model.safetensors"

# What heads are called that share their weights with the embedding below.
_HEAD = re.compile(
    r"(^|\.)(lm_head|embed_out|output|output_layer|proj_out|decoder|generator)\.\w+$"
)
_SHARED = re.compile(r"(^|\.)shared\.\w+$")


def check_dtypes(items: Iterable[Item]) -> None:
    """Check that safetensors has the dtypes of `items`.

    Raises:
        IncompatibleError: it has not.
    """
    for item in items:
        name = dtype_name(item.dtype)
        code, _ = DTYPES.get(name, ("U8", 1))
        if code == "U8" and name != "uint8":
            raise IncompatibleError(
                f"{item.name} has the dtype {name}, which safetensors does not know: export with "
                "format='torch' or 'dcp'",
                kind=ErrorKind.STATE_MISMATCH,
            )


def draw_shard(items: Sequence[Item], aliases: Mapping[str, str]) -> Callable[[], Image]:
    """Return what draws the file of `items`.

    Args:
        items: in any order.
        aliases: names that are left out, and the item that has their memory.
    """
    entries = [ShardEntry(item.name, dtype_name(item.dtype), item.shape) for item in items]
    # As transformers asks for it, and as `safetensors.torch.save_model` notes what it leaves out.
    placed = layout(entries, {"format": "pt", **dict(sorted(aliases.items()))})
    order = sorted(zip(placed.offsets, items, strict=True), key=lambda pair: pair[0])

    def draw() -> Image:
        image = Image()
        image.add_bytes(placed.header)
        for _, item in order:
            image.add_tensor(item)
        return image

    return draw


def aliases_of(ties: Iterable[tuple[str, ...]]) -> dict[str, str]:
    """Return for each tied name that is left out the one that is kept.

    Transformers keeps the embedding and ties the head to it anew: a file that had the head alone
    would be loaded with a new embedding.
    """
    found: dict[str, str] = {}
    for group in ties:
        names = sorted(name for name in group if not _HEAD.search(name)) or sorted(group)
        kept = next((name for name in names if _SHARED.search(name)), names[0])
        found |= {name: kept for name in group if name != kept}
    return found


def cut_shards(items: Iterable[Item], max_bytes: int) -> list[list[Item]]:
    """Return `items` in shards of at most `max_bytes`; a tensor that is larger has one of its own.

    The order is kept.
    """
    shards: list[list[Item]] = [[]]
    nbytes = 0
    for item in items:
        if shards[-1] and nbytes + item.nbytes > max_bytes:
            shards.append([])
            nbytes = 0
        shards[-1].append(item)
        nbytes += item.nbytes
    return shards


def shard_names(count: int) -> list[str]:
    """Return what the shards are called."""
    if count == 1:
        return [ONE_FILE]
    return [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]


def weight_index(shards: Sequence[Sequence[Item]]) -> bytes:
    """Return the index of several shards."""
    names = shard_names(len(shards))
    files = {item.name: name for name, shard in zip(names, shards, strict=True) for item in shard}
    total = sum(item.nbytes for shard in shards for item in shard)
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(files.items()))}
    return msgspec.json.format(msgspec.json.encode(index), indent=2) + b"\n"
