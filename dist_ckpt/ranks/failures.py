"""The words of a round, and how one rank's failure becomes the error of the whole job."""

from __future__ import annotations

import msgspec

from dist_ckpt.errors import (
    CheckpointError,
    CoordinationError,
    ErrorKind,
    describe,
    from_wire,
    to_wire,
)


def envelope(rank: int, message: bytes | BaseException) -> bytes:
    """Return what a rank sends: who it is, and its message or its error."""
    if isinstance(message, BaseException):
        return msgspec.msgpack.encode((rank, b"", to_wire(message)))
    return msgspec.msgpack.encode((rank, message, None))


def opened(data: bytes) -> tuple[int, bytes, dict[str, object] | None]:
    """Return what `envelope` put together: the rank, its message, and its error if it has one."""
    return msgspec.msgpack.decode(data, type=tuple[int, bytes, dict[str, object] | None])


def failure(label: str, rank: int, cause: BaseException) -> CheckpointError:
    """Return the error of the whole job: the class of the cause, and the rank in the message."""
    text = describe(cause)
    if isinstance(cause, CheckpointError) and cause.ranks:
        # It says itself whose fault it was; who passes it on must not be blamed.
        message = text if text.startswith(label) else f"{label} failed: {text}"
        return type(cause)(message, kind=cause.kind, ranks=cause.ranks)
    message = f"{label} failed on rank {rank}: {text}"
    if isinstance(cause, CheckpointError):
        return type(cause)(message, kind=cause.kind, ranks={rank: text})
    return CoordinationError(message, kind=ErrorKind.PEER_FAILED, ranks={rank: text})


def noted(label: str, error: BaseException) -> BaseException:
    """Return `error` with a note of what it ended; an error of ours says so itself."""
    note = f"{label} failed"
    if not isinstance(error, CheckpointError) and note not in getattr(error, "__notes__", ()):
        error.add_note(note)
    return error


def decode_error(data: bytes) -> CheckpointError:
    """Return the error that rank 0 sent."""
    return from_wire(msgspec.msgpack.decode(data, type=dict[str, object]))
