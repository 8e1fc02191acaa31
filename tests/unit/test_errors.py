"""Errors: how handlers tell them apart, and how they cross ranks as plain data."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt import errors
from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    CoordinationError,
    ErrorKind,
    FencedError,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
    describe,
    from_wire,
    to_wire,
)

CLASSES = (
    NotFound,
    AlreadyExists,
    IntegrityError,
    IncompatibleError,
    StorageError,
    CoordinationError,
    FencedError,
    UsageError,
)


@given(
    st.sampled_from(CLASSES),
    st.text(),
    st.sampled_from(ErrorKind),
    st.dictionaries(st.integers(0, 10**5), st.text()),
)
def test_an_error_crosses_ranks_whole(
    cls: type[CheckpointError], message: str, kind: ErrorKind, ranks: dict[int, str]
) -> None:
    error = cls(message, kind=kind, ranks=ranks)
    wire = msgspec.msgpack.decode(msgspec.msgpack.encode(to_wire(error)), type=dict[str, object])
    found = from_wire(wire)
    assert type(found) is cls
    assert (str(found), found.kind, found.ranks) == (message, kind, ranks)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_of_the_module_crosses(cls: type[CheckpointError]) -> None:
    known = {each for each in vars(errors).values() if isinstance(each, type)}
    public = {each for each in known if issubclass(each, CheckpointError)} - {CheckpointError}
    assert set(CLASSES) == public
    assert from_wire(to_wire(cls("x"))).kind == cls.default_kind


@pytest.mark.parametrize(
    ("cls", "builtin"),
    [(NotFound, FileNotFoundError), (AlreadyExists, FileExistsError), (UsageError, ValueError)],
)
def test_builtin_handlers_see_them(cls: type[CheckpointError], builtin: type[Exception]) -> None:
    with pytest.raises(builtin) as caught:
        raise cls("what, where, what to do")
    assert str(caught.value) == "what, where, what to do"


class BackendError(StorageError):
    """A store's own subclass, with a constructor of its own."""

    def __init__(self, code: int) -> None:
        super().__init__(f"code {code}", kind=ErrorKind.STORAGE_FULL)


def test_a_subclass_travels_as_what_handlers_know() -> None:
    found = from_wire(to_wire(BackendError(507)))
    assert type(found) is StorageError
    assert (str(found), found.kind) == ("code 507", ErrorKind.STORAGE_FULL)


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no text")


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (KeyError("w"), "KeyError: 'w'"),
        (ValueError(), "ValueError"),
        (Mute(), "Mute: <its text could not be read: RuntimeError>"),
        (KeyboardInterrupt(), "KeyboardInterrupt"),
        (StorageError("disk full"), "disk full"),
    ],
)
def test_describe(error: BaseException, text: str) -> None:
    assert describe(error) == text


def test_a_foreign_error_becomes_one_of_coordination() -> None:
    found = from_wire(to_wire(Mute()))
    assert type(found) is CoordinationError
    assert "Mute" in str(found)


@pytest.mark.parametrize("wire", [{}, {"class": "os.system", "kind": "?", "ranks": 3}])
def test_what_is_not_known_is_still_an_error(wire: dict[str, object]) -> None:
    assert type(from_wire(wire)) is CoordinationError


def test_kinds_never_change_their_values() -> None:
    assert [kind.value for kind in ErrorKind] == [kind.name.lower() for kind in ErrorKind]
