"""The encoded Python values of one part as one entry of an `extra` file.

A document is the JSON object `{"name": value, ...}`; the values are JSON that the state made and
that this room neither reads nor changes.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec

from dist_ckpt.errors import ErrorKind, IntegrityError


def encode(objects: Mapping[str, bytes]) -> bytes:
    """Return the document of `objects`, which are encoded JSON values by name."""
    return msgspec.json.encode({name: msgspec.Raw(data) for name, data in objects.items()})


def decode(data: bytes, *, where: str) -> dict[str, bytes]:
    """Return the encoded values by name.

    Raises:
        IntegrityError: `data` is no document; the message begins with `where`.
    """
    try:
        document = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise IntegrityError(
            f"{where}: the stored values are no document ({error})", kind=ErrorKind.MALFORMED
        ) from error
    return {name: bytes(raw) for name, raw in document.items()}
