"""Every error that dist_ckpt raises, grouped by what a handler would do.

```text
CheckpointError(Exception)
  NotFound (FileNotFoundError)     no such run, step, key or tensor   -> look elsewhere
  AlreadyExists (FileExistsError)  the step is committed              -> choose another step
  IntegrityError                   size, digest or coverage disagree  -> use an older one
  IncompatibleError                version, keys, shape, dtype        -> change the program
  StorageError                     the backend failed after retries   -> wait, or fix the place
  CoordinationError                a peer failed or did not arrive    -> restart the job
  FencedError                      a newer claim owns the run         -> stop
  UsageError (ValueError)          the call is wrong                  -> change the call
```

Errors cross ranks as plain data (`to_wire`, `from_wire`), never as pickles, so the
same class with the same message is raised on every rank.

What is not of dist_ckpt keeps its class where it is raised: a MemoryError, an interrupt, or what
the state, a policy or an encoder of the program raised. On the rank where it happened it is that
very error, on the others a `CoordinationError` that names the rank and the cause. So a
`CoordinationError` always means a peer.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from enum import StrEnum

_MASK = "***"
# Text is cut here first, so that the work is in proportion to its length, whatever is in it.
_BETWEEN_WORDS = re.compile(r"([\s\"'<>]+)")
_AFTER_PATH = re.compile(r"[?#]")
# What stands before the @ there is a container, a bucket or a file system: part of the address.
_NAMED_BEFORE_AT = ("abfs", "abfss", "wasb", "wasbs", "oci", "az")


class ErrorKind(StrEnum):
    """What happened, finer than the class. Append-only: a value never changes its meaning."""

    NO_RUN = "no_run"
    NO_CHECKPOINT = "no_checkpoint"
    NO_KEY = "no_key"
    STEP_EXISTS = "step_exists"
    KEY_EXISTS = "key_exists"
    TRUNCATED = "truncated"
    DIGEST = "digest"
    MALFORMED = "malformed"
    COVERAGE = "coverage"
    MISSING_FILE = "missing_file"
    VERSION = "version"
    STATE_MISMATCH = "state_mismatch"
    REPLICAS_DIFFER = "replicas_differ"
    STORAGE = "storage"
    STORAGE_FULL = "storage_full"
    PERMISSION = "permission"
    PEER_FAILED = "peer_failed"
    PEER_ABSENT = "peer_absent"
    TIMEOUT = "timeout"
    FENCED = "fenced"
    USAGE = "usage"
    UNENCODABLE = "unencodable"
    STEP_BEHIND = "step_behind"
    CANCELLED = "cancelled"
    IN_DOUBT = "in_doubt"
    FOREIGN = "foreign"
    NOT_RESTORED = "not_restored"
    PROTECTED = "protected"
    IN_USE = "in_use"
    NO_BUCKET = "no_bucket"


def without_secrets(text: str) -> str:
    """Return `text` with stars for what the URLs in it may keep secret.

    That is the user and password before the host, and everything behind the path: signatures and
    tokens are arguments there, under whatever names. What UTF-8 cannot hold, as in the name of a
    file on an old disk, is written as its number: logs, streams and other ranks could not take it.
    """
    if not text.isascii():
        text = text.encode("utf-8", "backslashreplace").decode()
    # Most messages have no URL, and every one comes by here.
    if ":/" not in text:
        return text
    return "".join(map(_masked, _BETWEEN_WORDS.split(text)))


def _masked(word: str) -> str:
    before, *bodies = word.split(":/")
    shown = [before]
    for body in bodies:
        address = body.lstrip("/")
        slashes = "/" * (len(body) - len(address))
        authority, _, path = address.partition("/")
        port = authority.rpartition("@")[2].partition(":")[2]
        # A password that should have been quoted may hold a slash; behind a port none is.
        user, _, _ = (address if port and not port.isdecimal() else authority).rpartition("@")
        named = before.lower().endswith(_NAMED_BEFORE_AT) and ":" not in user
        if user and not named:
            # A mark before the @ is of the password, or the @ is of the arguments: none is shown.
            hidden = _AFTER_PATH.search(user) is not None
            address = _MASK if hidden else f"{_MASK}{address[len(user) :]}"
        mark = _AFTER_PATH.search(address)
        if mark is not None and mark.end() < len(address):
            shown.append(f"{slashes}{address[: mark.end()]}{_MASK}")
            break
        shown.append(slashes + address)
        before = path or authority
    return ":/".join(shown)


class CheckpointError(Exception):
    """Base of every error of this package.

    Args:
        message: what, where, and what to do.
        kind: a finer code than the class; each class has a default.
        ranks: for an error of a whole job, the cause by rank.
    """

    default_kind: ErrorKind = ErrorKind.USAGE

    def __init__(
        self,
        message: str,
        *,
        kind: ErrorKind | None = None,
        ranks: Mapping[int, str] | None = None,
    ) -> None:
        # Here and nowhere else, so that no message is forgotten: they travel into logs.
        self.message = without_secrets(message)
        # One argument reaches every base: OSError would read two as (errno, strerror).
        super().__init__(self.message)
        self.kind = self.default_kind if kind is None else kind
        self.ranks: dict[int, str] = {
            rank: without_secrets(cause) for rank, cause in (ranks or {}).items()
        }

    def __str__(self) -> str:
        return self.message


class NotFound(CheckpointError, FileNotFoundError):
    """No such run, checkpoint, key or tensor: look elsewhere."""

    default_kind = ErrorKind.NO_KEY


class AlreadyExists(CheckpointError, FileExistsError):
    """The step is committed, or the key exists: choose another."""

    default_kind = ErrorKind.KEY_EXISTS


class IntegrityError(CheckpointError):
    """Size, digest, structure or coverage disagree with what was committed: use an older one."""

    default_kind = ErrorKind.DIGEST


class IncompatibleError(CheckpointError):
    """The checkpoint is whole but does not fit this program: change the program."""

    default_kind = ErrorKind.STATE_MISMATCH


class StorageError(CheckpointError):
    """The backend failed: wait, or fix the place."""

    default_kind = ErrorKind.STORAGE


class CoordinationError(CheckpointError):
    """A peer failed or did not arrive: restart the job."""

    default_kind = ErrorKind.PEER_FAILED


class FencedError(CheckpointError):
    """A newer claim owns the run: this process must stop."""

    default_kind = ErrorKind.FENCED


class UsageError(CheckpointError, ValueError):
    """The call is wrong: change the call."""

    default_kind = ErrorKind.USAGE


# What other ranks send is made into these and no others.
_CLASSES: dict[str, type[CheckpointError]] = {
    cls.__name__: cls
    for cls in (
        NotFound,
        AlreadyExists,
        IntegrityError,
        IncompatibleError,
        StorageError,
        CoordinationError,
        FencedError,
        UsageError,
    )
}


def to_wire(error: BaseException) -> dict[str, object]:
    """Return `error` as plain data, whatever it is: only its type name and text travel."""
    if isinstance(error, CheckpointError):
        # A backend's own subclass travels as the class of ours that handlers know.
        known = (cls for cls in type(error).__mro__ if cls in _CLASSES.values())
        return {
            "class": next(known, CheckpointError).__name__,
            "kind": str(error.kind),
            "message": error.message,
            "ranks": {str(rank): cause for rank, cause in error.ranks.items()},
        }
    return {"class": "", "kind": "", "message": describe(error), "ranks": {}}


def from_wire(data: Mapping[str, object]) -> CheckpointError:
    """Rebuild the error that `to_wire` described; a foreign one becomes a `CoordinationError`."""
    cls = _CLASSES.get(str(data.get("class")), CoordinationError)
    # A kind that this release does not know becomes the default of the class.
    kinds = {str(kind): kind for kind in ErrorKind}
    ranks = data.get("ranks")
    causes = {int(r): str(c) for r, c in ranks.items()} if isinstance(ranks, dict) else {}
    return cls(
        str(data.get("message", "")),
        kind=kinds.get(str(data.get("kind")), cls.default_kind),
        ranks=causes,
    )


def may_pass(error: BaseException) -> bool:
    """Whether another try may go well: storage, a peer, or something foreign failed.

    All other errors of ours say that this job may not do it, or that the call is wrong.
    """
    if isinstance(error, CheckpointError):
        return isinstance(error, StorageError | CoordinationError)
    return isinstance(error, Exception)


def is_refusal(error: Exception) -> bool:
    """Whether `error` says no more than that code of the program cannot take what it was given.

    Then it becomes an error of ours, with the place. A class of its own (or of torch, or a lack of
    memory, or an error of the system) was raised to be handled, and keeps its class.
    """
    builtin = type(error).__module__ == "builtins"
    return builtin and not isinstance(error, MemoryError | OSError)


def as_ours(error: BaseException) -> CheckpointError:
    """Return `error`, or where it is foreign a plain `CheckpointError` with it as the cause.

    For events and notes. Where an error is raised a foreign one keeps its class.
    """
    if isinstance(error, CheckpointError):
        return error
    ours = CheckpointError(describe(error), kind=ErrorKind.FOREIGN)
    # As `raise ... from` does: a log of it shows where it came from.
    ours.__cause__ = error
    return ours


def describe(error: BaseException) -> str:
    """One line that names the type and the text of `error`, even when its `str` fails."""
    try:
        text = str(error)
    except Exception as failure:  # a foreign __str__ may do anything; the report must survive it
        text = f"<its text could not be read: {type(failure).__name__}>"
    if isinstance(error, CheckpointError):
        return text
    text = without_secrets(text)
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def near(name: object, known: Iterable[str]) -> str:
    """Return a question that offers the known names most like `name`; empty without any."""
    # Whoever gave something else than a name is told what is known; nothing is like it.
    found = difflib.get_close_matches(name, list(known), n=3) if isinstance(name, str) else []
    return f" (did you mean {' or '.join(map(repr, found))}?)" if found else ""
