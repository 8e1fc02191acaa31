"""What stands in a state out of the box besides plain values, and what one line registers."""

from __future__ import annotations

import array
import datetime
import enum
import io
import random
import sys
from argparse import Namespace
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple
from collections.abc import Callable
from dataclasses import dataclass, field
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import SimpleNamespace
from typing import Any, NamedTuple
from uuid import UUID, SafeUUID

import numpy as np
import pytest
import torch

import dist_ckpt
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.state.decoding import decode
from dist_ckpt.state.encoding import encode

LARGE = 100_000
# Python 3.13 warns of "u".
CHARACTERS: Any = "w" if sys.version_info >= (3, 13) else "u"


class Point(NamedTuple):
    x: Any
    y: Any = 0


class Labelled(Point):
    """Has a dict, unlike a namedtuple."""


Old = namedtuple("Old", "a b")


def back(value: object) -> Any:
    """Return what comes back of `value`, its tensors through other memory."""
    tensors: dict[str, torch.Tensor] = {}
    data = encode(value, path="x", tensors=tensors, prefix="value")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}
    inside = decode(encode(value, path="x"), tensors={})
    beside = decode(data, tensors=copies)
    assert repr(inside) == repr(beside)
    return beside


VALUES: list[Any] = [
    deque([1, (2, deque())], maxlen=5),
    deque(maxlen=0),
    deque("abc"),
    defaultdict(None, {1: 2}),
    defaultdict(dict, {"a": {1: [2]}}),
    *(defaultdict(kind, {"a": kind()}) for kind in (list, set, int, float, str, Counter, deque)),
    OrderedDict([(2, "b"), (1, "a")]),
    Counter("abca"),
    Point(1, [torch.float32]),
    Old(Point(Old(1, 2)), {Point(1, 2): Point(3)}),
    Path("runs/17"),
    Path(),
    PurePosixPath("/a/b"),
    PureWindowsPath("c:\\a"),
    Namespace(lr=0.1, path=Path("/x"), inner=Namespace(**{"not an identifier": 1})),
    SimpleNamespace(a=deque([1])),
    complex(1.5, -2),
    complex(float("nan"), -0.0),
    range(10),
    range(10, 0, -3),
    slice(None),
    slice(1, None, 2),
    (..., slice(2)),
    bytearray(b"\0x"),
    array.array("q", [1, -2]),
    array.array("d"),
    Decimal("-0.10E+5"),
    Decimal("sNaN12"),
    Decimal("Infinity"),
    Fraction(-3, 7),
    UUID(int=7),
    UUID(int=7, is_safe=SafeUUID.safe),
    datetime.time(1, 2, 3, 4, fold=1),
    datetime.time(1, tzinfo=datetime.UTC),
    datetime.UTC,
    datetime.timezone(datetime.timedelta(hours=-3), "BRT"),
    datetime.timezone(datetime.timedelta(seconds=1)),
    torch.strided,
    torch.sparse_coo,
    torch.channels_last,
    np.dtype("float32"),
    np.dtype(">i2"),
    np.dtype([("a", "i1"), ("b", "f8", (2,))]),
    {(Path("a"), 1j): {1j, Decimal(1), Fraction(1, 2), range(3)}, frozenset([Path("b")]): 1},
    {float("nan"): 1, 2**70: 2, -(2**63): 3, None: 4, b"": 5, True: 6},
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_back_equal_and_of_its_type(value: Any) -> None:
    found = back(value)
    assert type(found) is type(value)
    # By text: NaN is not equal to itself, and a dict is equal to one of another order.
    assert repr(found) == repr(value)
    for name in ("maxlen", "default_factory", "is_safe", "fold", "tzinfo"):
        assert getattr(found, name, None) == getattr(value, name, None)


def test_a_stream_comes_back_with_its_position() -> None:
    stream = io.BytesIO(b"abc")
    stream.seek(2)
    found = decode(encode(stream, path="x"), tensors={})
    assert (type(found), found.getvalue(), found.tell()) == (io.BytesIO, b"abc", 2)
    assert stream.tell() == 2


# ------------------------------------------------------------------ large ones


@pytest.mark.parametrize(
    "value",
    [
        np.random.default_rng(0).normal(size=(300, 70)),
        np.arange(LARGE).astype(">i4"),
        np.arange(LARGE, dtype=np.uint16).reshape(10, -1)[::-1, ::3],
        np.asfortranarray(np.arange(LARGE).reshape(100, -1)),
        np.zeros(LARGE, dtype=[("a", "i1"), ("b", ">f8")]),
        np.arange(LARGE).astype("M8[s]"),
        np.full(LARGE, "ab"),
        np.ones(LARGE, dtype=bool),
        np.ones(LARGE, dtype=np.complex64),
        bytes(range(256)) * 400,
        bytearray(range(256)) * 400,
        array.array("f", [0.5]) * LARGE,
    ],
    ids=lambda value: str(getattr(value, "dtype", type(value).__name__)),
)
def test_large_ones_are_tensors_beside_the_encoding(value: Any) -> None:
    tensors: dict[str, torch.Tensor] = {}
    data = encode({"a": [value]}, path="x", tensors=tensors, prefix="value")
    assert list(tensors) == ["value.a.0"]
    assert len(data) < 500
    (found,) = decode(data, tensors={name: t.clone() for name, t in tensors.items()})["a"]
    assert type(found) is type(value)
    if isinstance(value, np.ndarray):
        assert (found.dtype, found.shape) == (value.dtype, value.shape)
        assert found.tolist() == value.tolist()
        assert found.flags.writeable
    else:
        assert found == value


def test_a_large_array_is_not_copied_and_a_large_text_of_bytes_is() -> None:
    arrays = np.zeros(LARGE)
    frozen = np.zeros(LARGE)
    frozen.flags.writeable = False
    text = bytes(LARGE)
    tensors: dict[str, torch.Tensor] = {}
    encode([arrays, frozen, text], path="x", tensors=tensors, prefix="v")
    for tensor in tensors.values():
        tensor.view(torch.uint8).fill_(1)
    # A load that fills in place reaches the array; nothing reaches what cannot change.
    assert arrays.any()
    assert not frozen.any()
    assert text == bytes(LARGE)


def test_large_ones_in_a_key_stay_in_the_encoding() -> None:
    value = {bytes(LARGE): 1, (b"x" * LARGE,): {b"y" * LARGE}}
    tensors: dict[str, torch.Tensor] = {}
    data = encode(value, path="x", tensors=tensors, prefix="v")
    assert not tensors
    assert decode(data, tensors={}) == value


def test_equal_places_of_other_bytes_have_other_encodings() -> None:
    one, other = ({"a": np.full(LARGE, fill)} for fill in (0, 1))
    # What ranks compare at every save, without exchanging the bytes.
    assert encode(one, path="x", tensors={}) != encode(other, path="x", tensors={})


def test_bytes_of_another_value_are_refused() -> None:
    tensors: dict[str, torch.Tensor] = {}
    data = encode(np.arange(LARGE), path="x", tensors=tensors, prefix="v")
    for wrong in (tensors["v"] + 1, tensors["v"][1:], tensors["v"].to(torch.int32)):
        with pytest.raises(IntegrityError):
            decode(data, tensors={"v": wrong})


# ------------------------------------------------------------------ registered by one line


class Mode(enum.Enum):
    TRAIN = "train"


class Flag(enum.IntFlag):
    A = 1
    B = 2


@dataclass(frozen=True)
class Config:
    lr: float
    betas: tuple[float, float] = (0.9, 0.999)
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.lr > 100:
            raise ValueError("only __init__ looks at this")


@dataclass(slots=True)
class Slotted:
    a: int
    b: int = field(init=False, default=3)


@dataclass
class Growing:
    a: int


class Pair(NamedTuple):
    a: int
    b: int


@pytest.mark.parametrize(
    "value",
    [Mode.TRAIN, Flag.A | Flag.B, Config(0.1, names=["a"]), Slotted(1), Pair(1, 2)],
    ids=lambda value: type(value).__name__,
)
def test_one_line_registers_an_enum_a_dataclass_a_namedtuple(value: Any) -> None:
    kind = type(value)
    dist_ckpt.register_type(kind, name=f"tests.standard.{kind.__name__}")
    found = back([value, {"k": (value,)}])
    assert found == [value, {"k": (value,)}]
    assert type(found[0]) is kind
    assert b"@tests.standard." in encode(value, path="x")


def test_a_dataclass_comes_back_as_it_was_and_not_as_its_init_would_make_it() -> None:
    dist_ckpt.register_type(Config, name="tests.standard.Config")
    value = Config(1.0)
    object.__setattr__(value, "lr", 1000.0)
    assert back(value).lr == 1000.0


def test_fields_that_came_and_went() -> None:
    dist_ckpt.register_type(Growing, name="tests.standard.Growing")
    stored = encode(Growing(1), path="x")

    def again(**fields: Any) -> Any:
        kind = type("Growing", (), {"__annotations__": fields.pop("kinds"), **fields})
        kind.__module__, kind.__qualname__ = Growing.__module__, Growing.__qualname__
        dist_ckpt.register_type(dataclass(kind), name="tests.standard.Growing")
        return decode(stored, tensors={})

    assert vars(again(kinds={"a": int, "b": int}, b=7)) == {"a": 1, "b": 7}
    with pytest.raises(IncompatibleError, match="'b' is missing"):
        again(kinds={"a": int, "b": int})
    with pytest.raises(IncompatibleError, match="no field 'a'"):
        again(kinds={"b": int}, b=7)


def test_attributes_that_are_no_fields_are_not_lost() -> None:
    dist_ckpt.register_type(Growing, name="tests.standard.Growing")
    value = Growing(1)
    value.extra = 1  # type: ignore[attr-defined]
    with pytest.raises(UsageError, match=r"no fields \(extra\)"):
        encode(value, path="x")


class Unregistered(enum.Enum):
    A = 1


@dataclass
class Plain:
    a: int


@pytest.mark.parametrize("value", [Unregistered.A, Plain(1)], ids=["enum", "dataclass"])
def test_the_error_says_the_line(value: Any) -> None:
    kind = type(value).__name__
    with pytest.raises(UsageError) as caught:
        encode({"a": [value]}, path="part")
    assert f"dist_ckpt.register_type({kind}, name='{kind}')" in caught.value.message
    assert "part.a[0]" in caught.value.message


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"type_": Point(1), "name": "x"}, "takes a class"),
        ({"type_": UserDict, "name": "x"}, "no enum"),
        ({"type_": Plain, "name": "dist_ckpt:x"}, "dist_ckpt's own"),
        ({"type_": Plain, "name": 3}, "bad name"),
        ({"type_": Plain, "name": "x", "encode": vars}, "both"),
        *(
            ({"type_": kind, "name": "x", "encode": str, "decode": kind}, "stored as it is")
            for kind in (int, bool, dict, OrderedDict, tuple, frozenset, np.float32, torch.Tensor)
        ),
    ],
)
def test_a_bad_registration(arguments: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        dist_ckpt.register_type(**arguments)


# ------------------------------------------------------------------ refusals


def cyclic(make: Callable[[], Any], put: Callable[[Any, Any], object]) -> Any:
    value = make()
    put(value, value)
    return value


def deep(wrap: Callable[[Any], Any]) -> Any:
    value: Any = 0
    for _ in range(200):
        value = wrap(value)
    return value


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (cyclic(deque, deque.append), r"s\[0\]\[0\], a collections.deque: it contains itself"),
        (cyclic(Namespace, lambda v, w: setattr(v, "me", w)), r"s\[0\]\.me, .*contains itself"),
        (
            cyclic(partial(defaultdict, list), lambda v, w: v.update(a=w)),
            r"s\[0\]\.a, .*contains itself",
        ),
        (deep(lambda v: deque([v])), "levels deep"),
        (deep(Point), "levels deep"),
        (deep(lambda v: SimpleNamespace(a=v)), "levels deep"),
        (deep(lambda v: (v,)), "levels deep"),
        (defaultdict(lambda: 1), r"s\[0\], .*its factory .* is code"),
        (defaultdict(partial(list)), "its factory .* is code"),
        (Namespace(fn=len), r"s\[0\]\.fn, a builtin_function_or_method"),
        (deque([1, {"a": object()}]), r"s\[0\]\[1\]\.a, a object"),
        (Point(1, [object()]), r"s\[0\]\.y\[0\], a object"),
        (array.array(CHARACTERS, "abc"), f"typecode '{CHARACTERS}'"),
        (np.dtype(object), "numpy dtype object"),
        (np.empty(LARGE, dtype=object), "numpy dtype object"),
        (datetime.time(1, tzinfo=type("Tz", (datetime.tzinfo,), {})()), "fixed"),
        (Path("\udcff"), "surrogate"),
        ({"\ud800": 1}, "surrogate"),
        (UserDict(a=1), r"dist_ckpt.register_type\(UserDict, name=..., encode=..., decode=...\)"),
        (torch.nn.Linear(1, 1), "a name of its own"),
        (torch.Generator(), "a name of its own"),
        (random.Random(1), "a name of its own"),
        (np.random.default_rng(1), "a name of its own"),
        (dist_ckpt.PerRank(1), "only be a part"),
        (type("deque", (deque,), {})(), "its type is unknown"),
        (np.zeros(1).view(np.memmap), r"numpy\.memmap: .*numpy\.asarray\(\)"),
        (np.ma.array([1], mask=[True]), "a masked one its data and mask"),
        (np.rec.array([(1,)], dtype=[("a", "i4")]), r"numpy\.asarray\(\)"),
        (np.rec.array([(1,)], dtype=[("a", "i4")])[0], r"numpy\.record: .*\.item\(\)"),
        (type("Metres", (np.float64,), {})(1.5), r"Metres: .*\.item\(\)"),
        (np.array([None]), r"a list \(\.tolist\(\)\)"),
        (np.array(["a"], dtype=np.dtypes.StringDType()), r"StringDType\(\) .*\(\.astype\)"),
        (np.random.PCG64(1), r"numpy\.random\.Generator\(\) of it"),
    ],
)
def test_what_cannot_be_kept_is_named(value: Any, match: str) -> None:
    with pytest.raises(UsageError, match=match) as caught:
        encode([value], path="s")
    assert caught.value.kind is ErrorKind.UNENCODABLE


def test_a_namedtuple_with_attributes_of_its_own_is_refused() -> None:
    value: Any = Labelled(1)
    assert back(value) == value
    value.label = "a"
    with pytest.raises(UsageError, match="besides its fields"):
        encode(value, path="s")


def test_two_namedtuples_of_one_name_are_told_apart_by_registering() -> None:
    encode(Old(1, 2), path="s")
    make: Any = namedtuple
    other = make("Old", "a b", module="elsewhere")
    with pytest.raises(UsageError, match=r"register_type\(Old, name='Old'\)"):
        encode(other(1, 2), path="s")
    dist_ckpt.register_type(other, name="tests.standard.elsewhere.Old")
    assert type(back(other(1, 2))) is other
    assert type(back(Old(1, 2))) is Old


def test_no_class_is_made_of_a_stored_name() -> None:
    text = b'{"!":"@dist_ckpt:namedtuple","v":[["Nowhere",["a"]],[1]]}'
    with pytest.raises(IncompatibleError, match=r"register_type\(Nowhere, name='Nowhere'\)"):
        decode(text, tensors={})


@pytest.mark.parametrize(
    "payload",
    [
        '"@dist_ckpt:deque","v":[1,[1,2]]',
        '"@dist_ckpt:deque","v":[-1,[]]',
        '"@dist_ckpt:deque","v":1',
        '"@dist_ckpt:deque","v":[1]',
        '"@dist_ckpt:defaultdict","v":["eval",{}]',
        '"@dist_ckpt:defaultdict","v":["list",[]]',
        '"@dist_ckpt:namespace","v":[null,[1]]',
        '"@dist_ckpt:path","v":[null,1]',
        '"@dist_ckpt:complex","v":[null,[1,2]]',
        '"@dist_ckpt:range","v":[null,[1,2,0]]',
        '"@dist_ckpt:array","v":[["u",4],{"!":"bytes","v":""}]',
        '"@dist_ckpt:array","v":[["d",4],{"!":"bytes","v":""}]',
        '"@dist_ckpt:decimal","v":[null,"x"]',
        '"@dist_ckpt:decimal","v":[null,1]',
        '"@dist_ckpt:fraction","v":[null,[1,0]]',
        '"@dist_ckpt:uuid","v":[5,"0"]',
        '"@dist_ckpt:timezone","v":[1,null]',
        '"@dist_ckpt:torch.layout","v":[null,"nn"]',
        '"@dist_ckpt:np.dtype","v":[null,"O"]',
        '"@dist_ckpt:ndarray","v":[["<f8",[1],"0"],[1]]',
        '"@dist_ckpt:bytes","v":[["0"],{"!":"bytes","v":""}]',
        '"@dist_ckpt:namedtuple","v":[["Point",["x","y"]],[1]]',
        '"@dist_ckpt:namedtuple","v":[1,[1]]',
    ],
)
def test_a_payload_that_does_not_fit_is_damage(payload: str) -> None:
    with pytest.raises(IntegrityError):
        decode(f'{{"!":{payload}}}'.encode(), tensors={})


def test_a_name_of_a_later_release_is_no_damage() -> None:
    with pytest.raises(IncompatibleError, match=r"'shelf', which this dist_ckpt does not know"):
        decode(b'{"!":"@dist_ckpt:shelf","v":[null,1]}', tensors={})


# ------------------------------------------------------------------ in a state


def live_values(*, filled: bool) -> dict[str, Any]:
    stream = io.BytesIO(b"abc" if filled else b"")
    fill = 1 if filled else 0
    return {
        "window": deque([1, 2] if filled else [], maxlen=3),
        "table": defaultdict(list, {1: [2]} if filled else {}),
        "args": Namespace(lr=fill),
        "loose": SimpleNamespace(a=fill),
        "raw": bytearray([fill] * LARGE),
        "numbers": array.array("i", [fill]),
        "stream": stream,
        "array": np.full(LARGE, fill),
        "where": Path("a" if filled else "b"),
        "point": Point(fill, np.full(LARGE, fill)),
        "names": OrderedDict([("b", fill), ("a", fill)] if filled else []),
    }


def test_parts_come_back_in_place_where_they_can(tmp_path: Path) -> None:
    saved = live_values(filled=True)
    dist_ckpt.save(saved, tmp_path)
    live = live_values(filled=False)
    state = dist_ckpt.TrainState(rng=None, **live)
    dist_ckpt.load(state, tmp_path, skip=["rng"])
    for name, value in live.items():
        if name not in ("where", "point"):
            assert state[name] is value, name
        shown = [
            each.getvalue() if isinstance(each, io.BytesIO) else repr(each)
            for each in (state[name], saved[name])
        ]
        assert shown[0] == shown[1], name


def test_a_frozen_array_is_replaced(tmp_path: Path) -> None:
    dist_ckpt.save({"a": np.ones(3)}, tmp_path)
    frozen = np.zeros(3)
    frozen.flags.writeable = False
    state = dist_ckpt.TrainState(a=frozen)
    dist_ckpt.load(state, tmp_path)
    assert state["a"].tolist() == [1, 1, 1]
    assert not frozen.any()


def test_a_window_of_another_length_is_replaced(tmp_path: Path) -> None:
    dist_ckpt.save({"a": deque([1, 2], maxlen=2)}, tmp_path)
    state = dist_ckpt.TrainState(a=deque(maxlen=5))
    dist_ckpt.load(state, tmp_path)
    assert state["a"] == deque([1, 2])
    assert state["a"].maxlen == 2
