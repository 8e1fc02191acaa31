from __future__ import annotations

import enum
import json
import math
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import (
    FilesTotal,
    Manifest,
    ManifestFile,
    RankTimings,
    decode,
    encode,
    longest,
)

SAVE_ID = "c000003-0123456789abcdef"
DIGEST = "0123456789abcdef"
STEP = 1000


def manifest(**changes: Any) -> Manifest:
    value = Manifest(
        step=STEP,
        save_id=SAVE_ID,
        claim=3,
        created="2025-01-02T03:04:05.123+00:00",
        world_size=2,
        versions={"dist_ckpt": "0.1.0", "torch": "2.13.0"},
        parts=["model", "rng"],
        files=FilesTotal(2, 12288),
        index=ManifestFile(f"{SAVE_ID}/index.msgpack", 300, DIGEST),
        metrics={"loss": 0.5},
        metadata={"commit": "abc", "config": {"lr": 0.1, "layers": [1, 2]}},
        timings={"0": RankTimings(0.1, 2.0, 8192), "1": RankTimings(0.0, 1.0, 4096)},
        parent_step=500,
    )
    return msgspec.structs.replace(value, **changes)


def sealed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    """The manifest after `change`, with a digest that fits: as a mistaken writer would make it."""
    fields = json.loads(encode(manifest()))
    del fields["digest"]
    change(fields)
    head = json.dumps(fields, indent=2).removesuffix("\n}").encode()
    return head + f',\n  "digest": "{bytes_digest(head)}"\n}}\n'.encode()


def test_epoch_and_origin_come_back_and_may_be_absent() -> None:
    said = manifest(epoch=3, origin={"hosts": ["a"], "git": {"dirty": True}})
    assert decode(encode(said), step=STEP) == said

    def forget(fields: dict[str, Any]) -> None:
        del fields["epoch"], fields["origin"]

    early = decode(sealed(forget), step=STEP)
    assert (early.epoch, early.origin) == (None, {})


@pytest.mark.parametrize("epoch", [-1, 1.5, "1", True])
def test_an_impossible_epoch_is_refused(epoch: object) -> None:
    with pytest.raises(IntegrityError):
        decode(sealed(lambda fields: fields.update(epoch=epoch)), step=STEP)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3)
    ),
    max_leaves=8,
)


@given(
    st.dictionaries(st.text(max_size=3), JSON, max_size=3),
    st.dictionaries(st.text(max_size=3), st.floats(allow_nan=False), max_size=3),
    st.none() | st.integers(0, 10**10 - 1),
)
def test_what_is_encoded_is_decoded(
    metadata: dict[str, Any], metrics: dict[str, float], parent_step: int | None
) -> None:
    value = manifest(metadata=metadata, metrics=metrics, parent_step=parent_step)
    assert decode(encode(value), step=STEP) == value


def test_the_text_is_readable_and_ends_in_a_newline() -> None:
    text = encode(manifest()).decode()
    assert text.startswith('{\n  "format": 2,\n  "step": 1000,\n  "save_id": "c000003-')
    assert text.endswith('"\n}\n')
    assert json.loads(text)["metadata"]["config"] == {"lr": 0.1, "layers": [1, 2]}


def test_metrics_that_json_cannot_write_come_back() -> None:
    metrics = {"a": math.inf, "b": -math.inf, "c": math.nan, "d": 3, "e": np.float64(0.25)}
    data = encode(manifest(metrics=metrics))
    assert json.loads(data)["metrics"]["c"] == "nan"
    found = decode(data, step=STEP).metrics
    assert math.isnan(found.pop("c"))
    assert found == {"a": math.inf, "b": -math.inf, "d": 3.0, "e": 0.25}


@pytest.mark.parametrize("value", ["nan", True, None, [1.0], 10**400])
def test_a_metric_that_is_no_number_is_refused(value: object) -> None:
    with pytest.raises(UsageError, match="metric 'loss'"):
        encode(manifest(metrics={"loss": value}))


class _Level(enum.IntEnum):
    HIGH = 3


class _Text(str):
    __slots__ = ()


def test_metadata_of_subclasses_is_stored_by_value() -> None:
    metadata = {
        _Text("a"): (_Level.HIGH, np.float64(0.5), _Text("x")),
        "b": OrderedDict(c=True),
    }
    found = decode(encode(manifest(metadata=metadata)), step=STEP).metadata
    assert found == {"a": [3, 0.5, "x"], "b": {"c": True}}


def _deep() -> dict[str, Any]:
    value: dict[str, Any] = {}
    for _ in range(100):
        value = {"a": value}
    return value


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"a": [{"b": math.nan}]}, r"metadata\['a'\]\[0\]\['b'\] is a float"),
        ({"a": object()}, r"metadata\['a'\] is a object"),
        ({"a": {1: 2}}, r"metadata\['a'\] is a dict"),
        ({"a": 2**64}, "64 bits"),
        ({"a": b"bytes"}, "bytes"),
        ({"a": "\ud800"}, r"metadata\['a'\] is a str that JSON cannot hold: use Unicode text"),
        (_deep(), "deeper than 64"),
    ],
)
def test_metadata_that_json_cannot_hold_names_its_path(
    metadata: dict[str, Any], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        encode(manifest(metadata=metadata))


def test_nothing_is_encoded_that_cannot_be_decoded() -> None:
    with pytest.raises(IntegrityError, match="world size 0"):
        encode(manifest(world_size=0, timings={}))


@pytest.mark.parametrize("created", ["2025-01-02T03:04:05Z", "2025-01-02T03:04:05.5+00:00"])
def test_times_in_utc_are_taken(created: str) -> None:
    assert decode(encode(manifest(created=created)), step=STEP).created == created


def test_what_a_later_release_adds_is_passed_over() -> None:
    data = sealed(lambda fields: fields.update(added={"later": 1}))
    assert decode(data, step=STEP) == manifest()


def _set(*path: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(fields: dict[str, Any]) -> None:
        place: Any = fields
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to

    return change


def _drop(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda fields: fields.pop(name)


SHARD = "model.r00000.safetensors"
LISTED: list[dict[str, Any]] = [
    {"key": f"{SAVE_ID}/model.r00000.safetensors", "nbytes": 8192, "digest": DIGEST},
    {"key": f"{SAVE_ID}/extra.r00001.safetensors", "nbytes": 4096, "digest": DIGEST},
]


def first(change: Callable[[dict[str, Any]], Any] = lambda fields: None) -> bytes:
    """The same of format 1, after `change`."""

    def as_first(fields: dict[str, Any]) -> None:
        fields |= {"format": 1, "files": json.loads(json.dumps(LISTED))}
        change(fields)

    return sealed(as_first)


def test_the_files_of_format_1_are_listed_and_added_up() -> None:
    found = decode(first(), step=STEP)
    assert found.format == 1
    assert found.listed == [ManifestFile(**each) for each in LISTED]
    assert found.files == FilesTotal(2, 12288)
    # In another format such a field would be one that nobody knows.
    assert decode(sealed(_set("listed", to=LISTED)), step=STEP).listed is None


def test_of_many_ranks_the_slowest_are_named() -> None:
    timings = [RankTimings(0.0, float(rank % 1000), 1) for rank in range(16_384)]
    named = longest(timings)
    assert len(named) == 64
    assert min(each.write_seconds for each in named.values()) >= 995
    assert longest(timings[:2]) == {"0": timings[0], "1": timings[1]}


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("files", to={"count": -1, "nbytes": 1}), "so many"),
        (_set("files", to={"count": 1, "nbytes": 2**63}), "so large"),
        (_set("index", "key", to=f"../{SAVE_ID}/index.msgpack"), "its index is"),
        (_set("index", "nbytes", to=-5), "impossible size"),
        (_set("step", to=1001), "it is of step 1001"),
        (_set("save_id", to="c000004-0123456789abcdef"), "not of claim 3"),
        (_set("save_id", to=".."), "not of claim 3"),
        (_set("claim", to=4), "not of claim 4"),
        (_set("created", to="yesterday"), "not a time in UTC"),
        (_set("created", to="2025-01-02T03:04:05"), "not a time in UTC"),
        (_set("created", to="2025-01-02T03:04:05+01:00"), "not a time in UTC"),
        (_set("created", to="2025-13-02T03:04:05+00:00"), "not a time in UTC"),
        (_set("world_size", to=0), "world size 0"),
        (_set("parts", to=["model", "model"]), "a name twice"),
        (_set("parts", to=["../model"]), "cannot be"),
        (_set("parent_step", to=-1), "parent step -1"),
        (_set("timings", "x", to={}), "timings"),
        (_set("timings", "2", to={"stage_seconds": 0, "write_seconds": 0, "nbytes": 0}), "timings"),
        (_set("timings", "0", "nbytes", to=-1), "negative"),
        (_set("timings", "0", "stage_seconds", to=-1.0), "negative"),
        (_set("metrics", to=None), "metrics are missing"),
        (_set("metrics", "loss", to="fine"), "no number"),
        (_set("metrics", "loss", to=True), "no number"),
        (_set("metrics", "loss", to=10**400), "large|range"),
        (_set("versions", to={"torch": 2}), "str"),
        (_set("step", to="1000"), "int"),
        (_set("step", to=True), "int"),
        (_set("format", to="1"), "no format version"),
        (_drop("format"), "no format version"),
        (_drop("index"), "its index is"),
        (_drop("files"), "missing required field"),
        (_drop("metrics"), "metrics are missing"),
    ],
)
def test_a_broken_rule_is_named(change: Callable[[dict[str, Any]], None], problem: str) -> None:
    with pytest.raises(IntegrityError, match=problem) as caught:
        decode(sealed(change), step=STEP)
    assert caught.value.kind is ErrorKind.MALFORMED


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (_set("files", 0, "key", to=f"../{SAVE_ID}/{SHARD}"), "is not a shard in"),
        (_set("files", 0, "key", to=f"{SAVE_ID}/../{SHARD}"), "is not a shard in"),
        (_set("files", 0, "key", to=f"/{SAVE_ID}/{SHARD}"), "is not a shard in"),
        (_set("files", 0, "key", to=SHARD), "is not a shard in"),
        (_set("files", 0, "key", to=f"c000003-fedcba9876543210/{SHARD}"), "is not a shard in"),
        (_set("files", 0, "key", to=f"{SAVE_ID}/index.msgpack"), "is not a shard in"),
        (_set("files", 0, "key", to=f"{SAVE_ID}/model.r00002.safetensors"), "beyond 2 ranks"),
        (_set("files", 1, "key", to=f"{SAVE_ID}/{SHARD}"), "same key"),
        (_set("files", 0, "nbytes", to=-1), "impossible size"),
        (_set("files", 0, "nbytes", to=2**63), "so large"),
        (_set("files", 0, "digest", to="0"), "impossible size or digest"),
    ],
)
def test_a_broken_rule_of_format_1_is_named(
    change: Callable[[dict[str, Any]], None], problem: str
) -> None:
    with pytest.raises(IntegrityError, match=problem) as caught:
        decode(first(change), step=STEP)
    assert caught.value.kind is ErrorKind.MALFORMED


def test_a_manifest_in_the_wrong_directory_is_refused() -> None:
    with pytest.raises(IntegrityError, match=r"manifest of step 7: .* step 1000"):
        decode(encode(manifest()), step=7)


@pytest.mark.parametrize(
    "data",
    [
        sealed(_set("format", to=3)),
        b'{"format": 3}',
        json.dumps({"format": 3, "unheard": ["of"]}, indent=2).encode(),
    ],
)
def test_another_version_is_not_damage(data: bytes) -> None:
    with pytest.raises(IncompatibleError, match=r"version 3, .* up to 2") as caught:
        decode(data, step=STEP)
    assert caught.value.kind is ErrorKind.VERSION


@pytest.mark.parametrize("data", [b"", b"{}", b"[1]", b"\xff\xfe", b"[" * 100_000, b"null", b'"x'])
def test_bytes_that_are_no_manifest_are_refused(data: bytes) -> None:
    with pytest.raises(IntegrityError) as caught:
        decode(data, step=STEP)
    assert caught.value.kind is ErrorKind.MALFORMED


def test_a_manifest_cut_short_anywhere_is_refused() -> None:
    data = encode(manifest())
    for stop in range(len(data)):
        with pytest.raises(IntegrityError) as caught:
            decode(data[:stop], step=STEP)
        assert caught.value.kind is ErrorKind.MALFORMED


@pytest.mark.parametrize("mask", [0x01, 0x08, 0x80])
def test_every_changed_byte_is_refused(mask: int) -> None:
    data = encode(manifest())
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= mask
        with pytest.raises(IntegrityError):
            decode(bytes(changed), step=STEP)


def test_the_example_of_the_specification_is_a_manifest() -> None:
    spec = Path(__file__).parents[3] / "docs" / "spec" / "format-2.md"
    example = spec.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    found = decode(example.encode(), step=STEP)
    assert encode(found).decode() == example
    assert math.isnan(found.metrics["val/loss"])


def test_the_example_of_format_1_is_still_read() -> None:
    spec = Path(__file__).parents[3] / "docs" / "spec" / "format-v1.md"
    example = spec.read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    found = decode(example.encode(), step=STEP)
    assert found.listed is not None
    assert found.files == FilesTotal(3, 8206336)


@given(st.binary(max_size=64))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((IntegrityError, IncompatibleError)):
        decode(data, step=STEP)
