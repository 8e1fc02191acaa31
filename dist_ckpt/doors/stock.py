"""A directory as `torch.distributed.checkpoint.save` writes it: `.distcp` files and `.metadata`."""

from __future__ import annotations

from collections.abc import Mapping

from dist_ckpt.doors.content import Item
from dist_ckpt.doors.image import Image
from dist_ckpt.doors.pickling import Built, Call, Name, Pairs, pickled
from dist_ckpt.doors.torch_archive import Archive, whole_storage
from dist_ckpt.state.layout import dtype_name

DATA_FILE = "__0_0.distcp"
METADATA_FILE = ".metadata"
_CLASSES = "torch.distributed.checkpoint.metadata"
_ALIGN_BYTES = 64


def draw_data(items: Mapping[str, Item]) -> tuple[Image, dict[str, tuple[int, int]]]:
    """Return the image of the one data file, and by name where in it a tensor's archive lies."""
    image = Image()
    places: dict[str, tuple[int, int]] = {}
    for name, item in items.items():
        image.skip_to(image.nbytes + -image.nbytes % _ALIGN_BYTES)
        start = image.nbytes
        Archive(image).add(whole_storage(item, 0), [item])
        places[name] = start, image.nbytes - start
    return image, places


def describe_data(items: Mapping[str, Item], places: Mapping[str, tuple[int, int]]) -> bytes:
    """Return the `.metadata` of that file: a pickle of what DCP plans a load by."""
    fields = {
        "state_dict_metadata": {name: _tensor(item) for name, item in items.items()},
        "planner_data": {name: (name,) for name in items},
        "storage_data": Pairs(
            tuple((_index(item), _place(*places[name])) for name, item in items.items())
        ),
        "storage_meta": None,
    }
    return pickled(Built(Name(_CLASSES, "Metadata"), fields))


def _tensor(item: Item) -> Built:
    dtype = Name("torch", dtype_name(item.dtype))
    layout = Call(Name("torch.serialization", "_get_layout"), ("torch.strided",))
    contiguous = Call(Name(_CLASSES, "_MEM_FORMAT_ENCODING"), (0,))
    properties = (dtype, layout, False, contiguous, False)
    whole = {"offsets": _size((0,) * len(item.shape)), "sizes": _size(item.shape)}
    fields = {
        "properties": Built(Name(_CLASSES, "TensorProperties"), properties),
        "size": _size(item.shape),
        "chunks": [Built(Name(_CLASSES, "ChunkStorageMetadata"), whole)],
    }
    return Built(Name(_CLASSES, "TensorStorageMetadata"), fields)


def _index(item: Item) -> Built:
    fields = {"fqn": item.name, "offset": _size((0,) * len(item.shape)), "index": 0}
    return Built(Name(_CLASSES, "MetadataIndex"), fields)


def _place(offset: int, nbytes: int) -> Built:
    fields = {"relative_path": DATA_FILE, "offset": offset, "length": nbytes}
    return Built(Name("torch.distributed.checkpoint.filesystem", "_StorageInfo"), fields)


def _size(sizes: tuple[int, ...]) -> Call:
    return Call(Name("torch", "Size"), (sizes,))
