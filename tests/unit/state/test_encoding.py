"""Plain values as typed JSON: exact both ways, and strict."""

from __future__ import annotations

import datetime
import enum
import json
import math
import struct
from collections import Counter, OrderedDict, UserDict
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

import dist_ckpt
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.encoding import encode
from dist_ckpt.state.registry import register

Array = np.ndarray[Any, Any]


def round_trip(value: object) -> Any:
    return decode(encode(value, path="x"), tensors={})


def same(left: Any, right: Any) -> bool:
    """Equality that sees types, signs, nan payloads and the order of keys."""
    if type(left) is not type(right):
        return False
    if isinstance(left, float) and not isinstance(left, np.generic):
        return struct.pack(">d", left) == struct.pack(">d", right)
    if isinstance(left, (np.ndarray, np.generic)):
        a, b = np.asarray(left), np.asarray(right)
        alike = a.dtype == b.dtype and a.shape == b.shape
        if a.dtype.names:  # between the fields lie bytes that mean nothing
            return alike and repr(a.tolist()) == repr(b.tolist())
        return alike and a.tobytes() == b.tobytes()
    if isinstance(left, dict):
        pairs = zip(left.items(), right.items(), strict=True)
        return len(left) == len(right) and all(
            same(k, n) and same(v, w) for (k, v), (n, w) in pairs
        )
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(same, left, right))
    return bool(left == right)


text = st.text(st.characters(exclude_categories=["Cs"]), max_size=6)
hashables = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False)
    | text
    | st.binary(max_size=6)
    | st.dates()
    | st.datetimes(timezones=st.none() | st.just(datetime.UTC))
    | st.timedeltas(),
    lambda inner: st.tuples(inner, inner) | st.frozensets(inner, max_size=3),
    max_leaves=4,
)
values = st.recursive(
    hashables
    | st.floats()
    | st.integers(min_value=-(2**300), max_value=2**300)
    | st.sets(hashables, max_size=3)
    | st.dictionaries(hashables, st.integers(), max_size=3).map(Counter),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(hashables, inner, max_size=3)
        | st.dictionaries(st.sampled_from(["!", "v", "tensor", "a"]), inner, max_size=3)
        | st.dictionaries(hashables, inner, max_size=3).map(OrderedDict)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(values)
def test_every_nesting_comes_back_exactly(value: object) -> None:
    assert same(round_trip(value), value)


@settings(deadline=None)
@given(
    st.one_of(npst.scalar_dtypes(), npst.array_dtypes()).flatmap(
        lambda dtype: npst.arrays(dtype, npst.array_shapes(min_dims=0, min_side=0, max_side=3))
    )
)
def test_every_array_comes_back_exactly(array: Array) -> None:
    back = round_trip(array)
    assert same(back, array)
    assert back.flags.owndata
    assert back.flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        float("inf"),
        -float("inf"),
        float("nan"),
        -0.0,
        5e-324,
        0.1 + 0.2,
        2**63 - 1,
        2**63,
        -(2**63) - 1,
        10**6000,
        torch.float32,
        torch.float8_e4m3fn,
        torch.Size([0, 3]),
        torch.device("cuda:3"),
        torch.device("cpu"),
        np.float32(0.1),
        np.int8(-1),
        np.bool_(True),
        np.str_("end\0"),
        np.bytes_(b"\0end\0"),
        np.datetime64("NaT"),
        np.float64(1.5),
        np.array([(1, 2.5)], dtype=np.dtype([("a", "i1"), ("b", ">f8", (2,))], align=True)),
        np.array([(1, 2.5)], dtype=[("a", "i1"), ("b", "f8")])[0],
        np.asfortranarray(np.arange(6).reshape(2, 3)),
        datetime.datetime(2026, 10, 25, 2, 30, tzinfo=None, fold=1),  # noqa: DTZ001
        {"!": "tensor", "v": "x"},
        {"!": 1, 2: "!"},
        {True: 1, 2: 3, 4.5: 6, b"7": 8, (9,): 10, None: 11},
        OrderedDict(b=1, a=2),
        Counter("abca"),
        [1.5, -0.0, float("nan")],
        (1.5, 2.0, float("-inf")),
        [2**63 - 1, -(2**63)],
        [1, 2**63],
        [1, -(2**63) - 1],
        [True, False, 1],
        [1, 1.0, "1", None],
        ["a", "\u00e9", "[{:"],
        {"a:": ["[", "{"], "b": {"c:d": ":"}},
    ],
    ids=lambda value: type(value).__name__,
)
def test_hard_values_come_back_exactly(value: object) -> None:
    assert same(round_trip(value), value)


def test_nan_keeps_its_payload() -> None:
    odd = struct.unpack(">d", bytes.fromhex("fff800000000beef"))[0]
    assert struct.pack(">d", round_trip(odd)).hex() == "fff800000000beef"


def test_the_order_of_a_set_does_not_show_in_the_bytes() -> None:
    names = [f"name{i}" for i in range(50)]
    assert encode(set(names), path="x") == encode({*sorted(names, reverse=True)}, path="x")


def test_what_is_written_is_readable_json() -> None:
    state = {"epoch": 3, "best": float("inf"), "names": ["a"]}
    assert json.loads(encode(state, path="x")) == {
        "epoch": 3,
        "best": {"!": "float", "v": "7ff0000000000000"},
        "names": ["a"],
    }


# ------------------------------------------------------------------ tensors


def test_tensors_are_put_aside_under_dotted_names() -> None:
    weight = torch.nn.Parameter(torch.ones(2))
    value = {"a": [weight, 1], 3: torch.tensor(2.0), ("k", 1): torch.zeros(0)}
    tensors: dict[str, torch.Tensor] = {}
    data = encode(value, path="x", tensors=tensors, prefix="value")
    assert list(tensors) == ["value.a.0", "value.3", 'value.{"!":"tuple","v":["k",1]}']
    assert references(data) == tuple(tensors)
    assert tensors["value.a.0"].data_ptr() == weight.data_ptr()
    assert not tensors["value.a.0"].requires_grad
    back = decode(data, tensors=tensors)
    assert back["a"][0] is tensors["value.a.0"]
    assert list(back) == list(value)


def test_equal_tensor_names_are_told_apart_the_same_way_each_time() -> None:
    value = {"a.0": torch.zeros(1), "a": [torch.zeros(2), torch.zeros(3)], "a.0~1": torch.zeros(4)}
    for _ in range(2):
        tensors: dict[str, torch.Tensor] = {}
        data = encode(value, path="x", tensors=tensors, prefix="v")
        assert {name: len(t) for name, t in tensors.items()} == {
            "v.a.0": 1,
            "v.a.0~1": 2,
            "v.a.1": 3,
            "v.a.0~1~1": 4,
        }
        assert [len(t) for t in decode(data, tensors=tensors)["a"]] == [2, 3]


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5, dtype=torch.bfloat16),
        torch.arange(4.0).to(torch.float8_e5m2),
        torch.zeros(0, 3, dtype=torch.int64),
        torch.randn(2, 3).t(),
        torch.randn(2, dtype=torch.complex128).conj(),
        torch.tensor([True, False]),
    ],
)
def test_without_a_place_aside_tensors_are_in_the_encoding(tensor: torch.Tensor) -> None:
    back = round_trip([tensor])[0]
    assert (back.dtype, back.shape) == (tensor.dtype, tensor.shape)
    assert back.tolist() == tensor.tolist()


def test_plain_dicts_that_look_like_placeholders_refer_to_nothing() -> None:
    assert references(encode([{"!": "tensor", "v": "x"}], path="x")) == ()


# ------------------------------------------------------------------ refusals


class Custom:
    pass


@pytest.mark.parametrize(
    ("value", "path", "kind"),
    [
        ({"history": [0, 1, 2, {"fn": lambda: 0}]}, r"stats\.history\[3\]\.fn,", "function"),
        ({"a b": (i for i in "ab")}, r"stats\['a b'\],", "generator"),
        ({7: Custom()}, r"stats\[7\],", "test_encoding.Custom"),
        ((1, open), r"stats\[1\],", "builtin_function_or_method"),
        ({Custom(): 1}, r"stats\.<key>,", "Custom"),
        ({(1, Custom()): 1}, r"stats\.<key>\[1\],", "Custom"),
        (frozenset([Custom()]), r"stats\.<member>,", "Custom"),
        (UserDict(), "stats,", "collections.UserDict"),
        (memoryview(b"x"), "stats,", "memoryview"),
        (np.ma.masked_array([1]), "stats,", "MaskedArray"),
    ],
)
def test_an_unknown_type_is_named_with_its_path_and_the_way_out(
    value: object, path: str, kind: str
) -> None:
    with pytest.raises(UsageError, match=path) as caught:
        encode(value, path="stats")
    assert caught.value.kind is ErrorKind.UNENCODABLE
    assert kind in caught.value.message
    assert "dist_ckpt.register_type(" in caught.value.message


def cyclic_dict() -> object:
    value: dict[str, Any] = {}
    value["me"] = [value]
    return value


def deep_list() -> object:
    value: list[Any] = []
    for _ in range(10_000):
        value = [value]
    return value


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (cyclic_dict(), r"stats\.me\[0\], a dict: it contains itself"),
        (deep_list(), "levels deep"),
        (["\ud800"], r"stats\[0\], a str: .*surrogate"),
        ({"\udfff": 1}, "surrogate"),
        (np.array([None]), "numpy dtype object"),
        (np.array([(None,)], dtype=[("a", "O")]), "without pickle"),
        ({torch.zeros(1)}, "a tensor in a set or a key"),
        (torch.eye(2).to_sparse(), "cannot store stats"),
        (
            datetime.datetime(2026, 1, 1, tzinfo=type("Tz", (datetime.tzinfo,), {})()),
            "fixed datetime.timezone",
        ),
    ],
)
def test_what_has_no_exact_form_is_refused(value: object, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as caught:
        encode(value, path="stats")
    assert caught.value.kind is ErrorKind.UNENCODABLE


def test_a_list_reached_twice_is_no_cycle() -> None:
    shared = [1]
    assert round_trip([shared, {"again": shared}]) == [[1], {"again": [1]}]


def test_a_long_encoding_is_read_as_a_short_one_is() -> None:
    """Its brackets and colons are counted by other means."""
    value = {"text": "[{:" * 40_000, "numbers": [[0.5, {"a": 1}]] * 5_000}
    assert round_trip(value) == value
    text = b" " * (1 << 17)
    for twice in (b'{"a":1,"a":2}', b'{":":1,":":2}'):
        with pytest.raises(IntegrityError, match="twice"):
            decode(text + twice, tensors={})


def test_a_meta_tensor_is_refused() -> None:
    with pytest.raises(UsageError, match=r"x\.w has no data"):
        encode({"w": torch.zeros(2, device="meta")}, path="x", tensors={})


def with_buffer(tensor: torch.Tensor) -> nn.Module:
    module = nn.Module()
    module.register_buffer("odd", tensor)
    return module


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")  # of torch
@pytest.mark.parametrize("wrap", [lambda odd: odd, lambda odd: {"a": [odd]}, with_buffer])
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: nested_tensor(layout=torch.strided), "a nested tensor is"),
        (lambda: nested_tensor(layout=torch.jagged), "a nested tensor is"),
        (
            lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
            r"quantized tensor \(qint8",
        ),
        (lambda: torch.ones(3).to_mkldnn(), "layout torch._mkldnn"),
        (lambda: torch.eye(2).to_sparse_csr(), "layout torch.sparse_csr"),
    ],
)
def test_a_tensor_that_is_not_dense_is_refused_by_its_kind_wherever_it_stands(
    make: Callable[[], torch.Tensor],
    said: str,
    wrap: Callable[[torch.Tensor], object],
    tmp_path: Path,
) -> None:
    with pytest.raises(UsageError, match=said) as caught:
        dist_ckpt.save({"stats": wrap(make())}, tmp_path)
    assert caught.value.kind is ErrorKind.UNENCODABLE


def nested_tensor(layout: torch.layout) -> torch.Tensor:
    rows = [torch.ones(2), torch.ones(3)]
    return torch.nested.nested_tensor(rows, layout=layout)


# ------------------------------------------------------------------ strict decoding

BAD = [
    b"",
    b"\xff",
    b"[1",
    b"[1] 2",
    b"NaN",
    b"1e999",
    b'{"a": [1, [-1e999, 2]]}',
    b"1" + b"0" * 400 + b".0",
    b'{"a":1,"a":2}',
    b'{"a" : 1, "a" : 2}',
    b'{"a":1,"\\u0061":2}',
    b'[":",{"a":1,"a":2}]',
    b'{":":1,":":2}',
    b'["[{",{"!":"set","v":[1,1]}]',
    b'{"!":"dict"}',
    b'{"!":"int","v":"0x1","w":1}',
    b'{"!":3,"v":1}',
    b'{"!":"nothing","v":1}',
    b'{"!":"int","v":"ten"}',
    b'{"!":"float","v":"00"}',
    b'{"!":"bytes","v":"*"}',
    b'{"!":"torch.Size","v":["a"]}',
    b'{"!":"torch.device","v":"os.system"}',
    b'{"!":"date","v":"soon"}',
    b'{"!":"tuple","v":3}',
    b'{"!":"set","v":[1,1]}',
    b'{"!":"set","v":[[]]}',
    b'{"!":"dict","v":[[1,2],[1,3]]}',
    b'{"!":"dict","v":[[[],2]]}',
    b'{"!":"dict","v":[1]}',
    b'{"!":"tensor","v":"absent"}',
    b'{"!":"tensor","v":[1]}',
    b'{"!":"tensor_data","v":["float32",[4611686018427387904],""]}',
    b'{"!":"tensor_data","v":["float32",[-1,-1],"AAAAAA=="]}',
    b'{"!":"np.ndarray","v":["|O",[0],""]}',
    b'{"!":"np.ndarray","v":["<f4",[2],"AAAAAA=="]}',
    b'{"!":"np.ndarray","v":["<f4",[4611686018427387904,4],""]}',
    b'{"!":"np.ndarray","v":["<f4",[-1],""]}',
    b'{"!":"np.ndarray","v":["f4,(2,)f4",[0],""]}',
    b'{"!":"np.ndarray","v":[[["a","|O"]],[0],""]}',
    b'{"!":"np.ndarray","v":[{"a":1},[0],""]}',
    b"[" * 5000 + b"]" * 5000,
    b'{"!":"tuple","v":[' * 250 + b"]}" * 250,
]


@pytest.mark.parametrize("data", BAD, ids=lambda data: repr(data[:40]))
def test_foreign_bytes_are_an_integrity_error(data: bytes) -> None:
    with pytest.raises(IntegrityError, match=r"stored value stats") as caught:
        decode(data, tensors={}, path="stats")
    assert caught.value.kind is ErrorKind.MALFORMED


@settings(deadline=None, max_examples=200)
@given(values, st.data())
def test_damaged_bytes_never_raise_anything_else(value: object, data: st.DataObject) -> None:
    encoded = bytearray(encode(value, path="x"))
    at = data.draw(st.integers(0, len(encoded) - 1))
    encoded[at] ^= data.draw(st.integers(1, 255))
    for cut in (bytes(encoded), bytes(encoded[:at])):
        try:
            decode(cut, tensors={})
        except (IntegrityError, IncompatibleError):
            continue


def test_a_dtype_of_another_torch_is_incompatible_not_damaged() -> None:
    with pytest.raises(IncompatibleError, match="no dtype 'float1'"):
        decode(b'{"!":"torch.dtype","v":"float1"}', tensors={})


def test_references_of_bytes_that_are_no_encoding() -> None:
    with pytest.raises(IntegrityError):
        references(b"{")


# ------------------------------------------------------------------ registered types


class Point:
    def __init__(self, x: float, y: float) -> None:
        self.x = x
        self.y = y


def make_point(fields: dict[str, float]) -> Point:
    return Point(**fields)


def call(kind: type, fields: dict[str, Any]) -> object:
    return kind(**fields)


class Color(enum.Enum):
    RED = "r"
    BLUE = ("b", 1)


@pytest.fixture(autouse=True)
def _fresh_registry(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    registry = "dist_ckpt.state.registry.REGISTRY"
    with monkeypatch.context() as patch:
        patch.setattr(f"{registry}.types", {})
        patch.setattr(f"{registry}.names", {})
        yield


def test_a_registered_type_comes_back() -> None:
    register(Point, name="point", encode=lambda p: (p.x, p.y), decode=lambda xy: Point(*xy))
    data = encode({"at": Point(1.0, math.inf)}, path="x")
    assert b'"!":"@point"' in data
    back = decode(data, tensors={})["at"]
    assert (type(back), back.x, back.y) == (Point, 1.0, math.inf)


def test_a_registered_type_may_hold_tensors() -> None:
    register(Point, name="point", encode=vars, decode=make_point)
    tensors: dict[str, torch.Tensor] = {}
    value = Point(torch.ones(2), 1)  # type: ignore[arg-type]
    back = decode(encode([value], path="x", tensors=tensors, prefix="v"), tensors=tensors)
    assert list(tensors) == ["v.0.x"]
    assert back[0].x is tensors["v.0.x"]


def test_an_enum_is_stored_by_value_once_registered() -> None:
    with pytest.raises(UsageError, match="register_type"):
        encode(Color.RED, path="x")
    register(Color, name="color")
    assert round_trip({Color.RED: [Color.BLUE]}) == {Color.RED: [Color.BLUE]}


def test_a_name_or_value_that_this_program_lacks_is_incompatible() -> None:
    register(Color, name="color")
    with pytest.raises(IncompatibleError, match=r"register_type\(\.\.\., name='shape'"):
        decode(b'{"!":"@shape","v":1}', tensors={})
    with pytest.raises(IncompatibleError, match="refused what stats holds: ValueError"):
        decode(b'{"!":"@color","v":"green"}', tensors={}, path="stats")


def test_a_failing_encoder_is_named_with_the_path() -> None:
    register(Point, name="point", encode=lambda p: p.z, decode=make_point)
    with pytest.raises(UsageError, match=r"x\[0\], a .*Point: the encoder .*AttributeError"):
        encode([Point(0, 0)], path="x")


def test_an_encoder_that_returns_its_own_type_ends() -> None:
    register(Point, name="point", encode=lambda p: Point(p.x, p.y), decode=make_point)
    with pytest.raises(UsageError, match="levels deep"):
        encode(Point(0, 0), path="x")


def test_one_name_is_one_type() -> None:
    register(Color, name="color")
    register(Color, name="color")
    with pytest.raises(UsageError, match="stands for"):
        register(Point, name="color", encode=vars, decode=make_point)
    with pytest.raises(UsageError, match="registered as 'color' already"):
        register(Color, name="colour")
    with pytest.raises(UsageError, match="is no enum"):
        register(Point, name="point")
    with pytest.raises(UsageError, match="bad name"):
        register(Point, name="", encode=vars, decode=make_point)


def test_a_class_defined_anew_takes_the_place_of_the_old_one() -> None:
    old, new = (type("Late", (Point,), {}) for _ in range(2))
    for late in (old, new):
        register(late, name="late", encode=vars, decode=partial(call, late))
    assert type(round_trip(new(1, 2))) is new
    with pytest.raises(UsageError):
        encode(old(1, 2), path="x")
