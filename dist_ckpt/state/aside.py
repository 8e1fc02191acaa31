"""Large arrays and byte strings, whose bytes are stored beside the encoding as a tensor.

What stays in the encoding is how to read them, and their digest: values that must be equal on all
ranks are compared by their encodings, and so the bytes are compared at every save, too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from dist_ckpt.format.digest import bytes_digest
from dist_ckpt.state.leaves import Refuse, dtype_from_json, dtype_to_json

ASIDE_BYTES = 16 * 1024
"""From here on base64 in JSON costs more than one more tensor in a plan does."""

# What a tensor can be as it is; other arrays are put aside as their bytes.
_NATIVE = frozenset(
    np.dtype(name)
    for name in (
        *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
        *("float16", "float32", "float64", "complex64", "complex128"),
    )
)

NDARRAY, BYTES = "ndarray", "bytes"
"""The names under which the two are stored."""


def take_aside(value: Any, refuse: Refuse) -> tuple[str, list[Any], torch.Tensor] | None:
    """Return the name, the head and the bytes of a large value; None for any other.

    The tensor of a writable array is the array's own memory, as that of a tensor of the state is.
    """
    kind = type(value)
    if kind is bytes and len(value) >= ASIDE_BYTES:
        # Copied: what is immutable must never be written through a tensor.
        return BYTES, [bytes_digest(value)], torch.frombuffer(bytearray(value), dtype=torch.uint8)
    if kind is np.ndarray and value.nbytes >= ASIDE_BYTES:
        described = dtype_to_json(value.dtype, value, refuse)
        packed = np.require(value, requirements=["C", "W"])
        flat = packed.reshape(-1).view(np.uint8)
        head = [described, list(value.shape), bytes_digest(flat.data)]
        return NDARRAY, head, torch.from_numpy(packed if packed.dtype in _NATIVE else flat)
    return None


def from_aside(name: str, head: Any, body: Any) -> Any:
    """Return the value that was put aside as `name`.

    Raises:
        ValueError, TypeError: head and tensor do not belong together.
    """
    if not isinstance(body, torch.Tensor) or body.device.type != "cpu":
        raise ValueError("its bytes are no tensor")
    flat = body.detach().contiguous().reshape(-1).view(torch.uint8).numpy()
    *kind, digest = head
    # The blocks of the file were verified; this finds that another tensor took the name.
    if bytes_digest(flat.data) != digest:
        raise ValueError("its bytes are those of another value")
    if name == BYTES:
        return flat.tobytes()
    described, shape = kind
    dtype = dtype_from_json(described)
    if not all(type(size) is int and size >= 0 for size in shape):
        raise ValueError("not the shape of an array")
    if math.prod(shape) * dtype.itemsize != flat.nbytes:
        raise ValueError(f"{flat.nbytes} bytes for shape {shape} of {dtype}")
    return flat.view(dtype).reshape(shape)
