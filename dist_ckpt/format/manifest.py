"""The manifest: a small readable JSON text whose existence is the checkpoint.

It ends with a digest of everything before it, since nothing else vouches for it.

A document, the other JSON in a checkpoint, has the encoded Python values of one part, by name.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

import msgspec

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.names import (
    INDEX,
    INT64_MAX,
    RANK_LIMIT,
    STEP_LIMIT,
    is_part,
    is_text,
    parse_save_id,
    parse_shard_name,
)

FORMAT = 2
_READ = (1, FORMAT)
LIMIT_BYTES = 1 << 28
"""How large a manifest may be: a hundred times what a hundred thousand ranks have to say."""

NODE_LOCAL = "node_local"
"""Under this name `origin` says which ranks wrote to a folder of which host alone."""

# A manifest is for people: of thousands of ranks they look at those that were slow.
_MOST_TIMINGS = 64
_MAX_DEPTH = 64
_DIGEST = re.compile(r"[0-9a-f]{16}")
_RANK = re.compile(r"0|[1-9][0-9]{0,4}")
_CREATED = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?.{1,6}")
# Fixed to the byte by format-v1, section 6: the digest goes over all that comes before.
_TAIL = re.compile(rb',\n  "digest": "([0-9a-f]{16})"\n}\n')
_TAIL_BYTES = len(b',\n  "digest": "0123456789abcdef"\n}\n')
_NON_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@decodable
class ManifestFile(msgspec.Struct, frozen=True):
    """One stored object: its key relative to the directory of the step, its size, its digest."""

    key: str
    nbytes: int
    digest: str


@decodable
class FilesTotal(msgspec.Struct, frozen=True):
    """How many shard files there are, and how many bytes they have together."""

    count: int
    nbytes: int

    @classmethod
    def of(cls, sizes: Iterable[int]) -> FilesTotal:
        """Return the total of files of `sizes` bytes."""
        found = list(sizes)
        return cls(len(found), sum(found))


@decodable
class RankTimings(msgspec.Struct, frozen=True):
    """What one rank spent on the save: seconds to stage, seconds to write, bytes it wrote."""

    stage_seconds: float
    write_seconds: float
    nbytes: int


@decodable
class _Host(msgspec.Struct, frozen=True):
    """Which ranks wrote to the folder of one host."""

    host: str
    ranks: list[int]


@decodable
class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """All that is said of a checkpoint before its index is read. What is encoded is of format 2.

    Attributes:
        step: the training step.
        save_id: the attempt whose files these are.
        claim: the claim under which it was made.
        created: when, ISO 8601 with a time zone of UTC.
        world_size: number of ranks that saved.
        versions: releases of dist_ckpt, torch and Python, by name.
        parts: names of the parts of the state.
        files: the shard files, in sum.
        index: the root; in format 1 the one index. A draft has none.
        metrics: numbers by name; any of them may be infinite or not a number.
        metadata: JSON of the user.
        timings: by rank, in decimal, of those ranks that took the longest.
        parent_step: the step that the run had restored, if any.
        epoch: the epoch that ended with this step, None in the middle of one.
        origin: what made it, as far as that is known: hosts, command line, commit of the program.
        format: version of the format.
        listed: every shard file, in format 1; None in others, whose root lists them.
    """

    step: int
    save_id: str
    claim: int
    created: str
    world_size: int
    versions: dict[str, str]
    parts: list[str]
    files: FilesTotal
    index: ManifestFile = ManifestFile("", 0, "")
    metrics: dict[str, float]
    metadata: dict[str, Any]
    timings: dict[str, RankTimings]
    parent_step: int | None
    # Not in the first manifests of format 1, which stay readable.
    epoch: int | None = None
    origin: dict[str, Any] = {}
    format: int = FORMAT
    listed: list[ManifestFile] | None = None

    @property
    def hosts(self) -> dict[int, str]:
        """Which rank wrote to the folder of which host, where hosts share no place; else nothing.

        Read with care, as `origin` is any JSON.
        """
        try:
            said = msgspec.convert(self.origin.get(NODE_LOCAL, []), list[_Host])
        except msgspec.ValidationError:
            return {}
        return {rank: each.host for each in said for rank in each.ranks}

    def elsewhere(self, name: str) -> str:
        """Say on which host a missing file may be, "" where all of them share one place."""
        hosts, shard = self.hosts, parse_shard_name(name)
        if shard is None or shard[1] not in hosts:
            return ""
        return (
            f": it was written on {hosts[shard[1]]}, into a folder of its own (node_local=True, on "
            "all hosts, restores from all of them)"
        )

    @property
    def nbytes(self) -> int:
        """How many bytes its shard files and its index hold."""
        return self.files.nbytes + self.index.nbytes


def encode(manifest: Manifest) -> bytes:
    """Return the text of `manifest`, having read it back: indented JSON ending in a newline.

    Raises:
        UsageError: a metric that is no number, or metadata that JSON cannot hold, named by path.
        IntegrityError: `decode` would refuse the text; the message says why.
    """
    fields: dict[str, Any] = {"format": manifest.format}
    fields |= {name: getattr(manifest, name) for name in manifest.__struct_fields__}
    del fields["listed"]
    fields["metrics"] = write_metrics(manifest.metrics)
    fields["metadata"] = plain_metadata(manifest.metadata)
    fields["origin"] = _plain(manifest.origin, "origin", 0)
    try:
        # Indented, since people open it; the digest goes over the text as it stands.
        text = msgspec.json.format(msgspec.json.encode(fields), indent=2)
    except UnicodeEncodeError as error:
        raise UsageError(f"the manifest cannot hold this text: {error}") from error
    head = text.removesuffix(b"\n}")
    data = head + f',\n  "digest": "{bytes_digest(head)}"\n}}\n'.encode()
    if len(data) > LIMIT_BYTES:
        raise UsageError(
            f"a manifest of {len(data)} bytes is over {LIMIT_BYTES}: store less metadata"
        )
    # Nothing may be committed that no reader would take.
    decode(data, step=manifest.step)
    return data


def decode(data: bytes, *, step: int) -> Manifest:
    """Read a manifest, trusting nothing in it.

    Args:
        data: the whole object.
        step: the step in whose directory it was found.

    Raises:
        IntegrityError: cut short, changed, malformed, or of another step.
        IncompatibleError: another format version.
    """
    # At the very end, so that nothing can follow that the digest does not go over.
    tail = _TAIL.fullmatch(data, max(0, len(data) - _TAIL_BYTES))
    # The digest is compared first: a flipped bit in the version is damage, not another version.
    if tail is not None and bytes_digest(data[:-_TAIL_BYTES]) != tail[1].decode():
        raise IntegrityError(
            f"manifest of step {step}: its text differs from its digest: it was changed after it "
            "was written. Use another checkpoint"
        )
    fields = _fields(data, step)
    version = fields.get("format")
    if isinstance(version, bool) or not isinstance(version, int):
        raise _malformed(step, "it has no format version")
    if version not in _READ:
        raise IncompatibleError(
            f"manifest of step {step} has format version {version}, this program reads versions "
            f"up to {FORMAT}: use the release that wrote it or a newer one",
            kind=ErrorKind.VERSION,
        )
    # Only now: another version may end otherwise, and is not damaged.
    if tail is None:
        raise _malformed(step, "it does not end in its digest: it was cut short or edited")
    try:
        fields["metrics"] = read_metrics(fields.get("metrics"))
        # `listed` in the text means nothing: only format 1 has a list, and under `files`.
        fields |= _listed(fields) if version == 1 else {"listed": None}
        manifest = msgspec.convert(fields, Manifest)
    # OverflowError: a metric of four hundred digits.
    except (msgspec.ValidationError, ValueError, OverflowError) as error:
        raise _malformed(step, str(error)) from error
    _check(manifest, step)
    return manifest


def _listed(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of format 1 that are others by now."""
    listed = msgspec.convert(fields.get("files"), list[ManifestFile])
    total = FilesTotal.of(file.nbytes for file in listed)
    return {"listed": listed, "files": total}


def _fields(data: bytes, step: int) -> dict[str, Any]:
    try:
        return msgspec.json.decode(data, type=dict[str, Any])
    # RecursionError: how deep the JSON goes is chosen by whoever wrote the bytes.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise _malformed(step, f"it is not JSON, or was cut short ({error})") from error


def _check(manifest: Manifest, step: int) -> None:
    if manifest.step != step or not 0 <= step < STEP_LIMIT:
        raise _malformed(step, f"it says that it is of step {manifest.step}")
    if parse_save_id(manifest.save_id) is None or parse_save_id(manifest.save_id) != manifest.claim:
        raise _malformed(step, f"save id {manifest.save_id!r} is not of claim {manifest.claim}")
    if not _is_utc(manifest.created):
        raise _malformed(step, f"created {manifest.created!r} is not a time in UTC")
    if not 1 <= manifest.world_size <= RANK_LIMIT:
        raise _malformed(step, f"world size {manifest.world_size}")
    parts = manifest.parts
    if len(set(parts)) != len(parts) or not all(is_part(part) for part in parts):
        raise _malformed(step, f"parts {parts} have a name twice or one that cannot be")
    if manifest.parent_step is not None and not 0 <= manifest.parent_step < STEP_LIMIT:
        raise _malformed(step, f"parent step {manifest.parent_step}")
    if manifest.epoch is not None and manifest.epoch < 0:
        raise _malformed(step, f"epoch {manifest.epoch}")
    _check_files(manifest, step)
    _check_timings(manifest, step)


def _check_files(manifest: Manifest, step: int) -> None:
    prefix = f"{manifest.save_id}/"
    # The name is known: whoever wrote the manifest cannot point to another object.
    if manifest.index.key != prefix + INDEX:
        raise _malformed(step, f"its index is {manifest.index.key!r}, not {prefix + INDEX!r}")
    if manifest.files.count < 0 or not 0 <= manifest.files.nbytes <= INT64_MAX:
        raise _malformed(step, "its files cannot be so many, or so large")
    listed = manifest.listed or []
    if len({file.key for file in listed}) != len(listed):
        raise _malformed(step, "two files have the same key")
    for file in (*listed, manifest.index):
        # Exactly one directory and one pattern: no key can leave the directory of the save id.
        # A key without the prefix comes back as it was, and is refused for that.
        name = file.key.removeprefix(prefix)
        shard = parse_shard_name(name)
        if file is not manifest.index and (shard is None or file.key == name):
            raise _malformed(step, f"file key {file.key!r} is not a shard in {prefix!r}")
        if shard is not None and shard[1] >= manifest.world_size:
            raise _malformed(step, f"file {name} is of a rank beyond {manifest.world_size} ranks")
        if not 0 <= file.nbytes <= INT64_MAX or _DIGEST.fullmatch(file.digest) is None:
            raise _malformed(step, f"file {file.key} has an impossible size or digest")


def _check_timings(manifest: Manifest, step: int) -> None:
    for rank, timing in manifest.timings.items():
        if _RANK.fullmatch(rank) is None or int(rank) >= manifest.world_size:
            raise _malformed(step, f"it has timings of rank {rank!r}")
        seconds = (timing.stage_seconds, timing.write_seconds)
        if min(seconds) < 0 or not 0 <= timing.nbytes <= INT64_MAX:
            raise _malformed(step, f"the timings of rank {rank} are negative")


def longest(timings: Sequence[RankTimings]) -> dict[str, RankTimings]:
    """Return what a manifest says of the times that ranks took, given those of all by rank."""
    ranks = list(range(len(timings)))
    if len(timings) > _MOST_TIMINGS:
        seconds = [each.stage_seconds + each.write_seconds for each in timings]
        # In the order of ranks again, as people read it from the top.
        ranks = sorted(sorted(ranks, key=lambda rank: -seconds[rank])[:_MOST_TIMINGS])
    return {str(rank): timings[rank] for rank in ranks}


def _is_utc(text: str) -> bool:
    if _CREATED.fullmatch(text) is None:
        # `fromisoformat` takes more than the format has: dates by week, and times without colons.
        return False
    try:
        return datetime.fromisoformat(text).utcoffset() == timedelta(0)
    except ValueError:
        return False


def _number(name: str, value: object) -> float | str:
    # The result of a comparison in the place of its number is a slip, and would read as 0 or 1.
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UsageError(
            f"metric {name!r} is a {type(value).__name__}: pass an int or a float, "
            "of a tensor its .item()"
        )
    try:
        number = float(value)
    except OverflowError as error:
        raise UsageError(f"metric {name!r} is larger than any float: scale it") from error
    # JSON has no such numbers; a metric is never text, so these three words are free.
    return number if math.isfinite(number) else str(number)


def write_metrics(metrics: Mapping[str, float]) -> dict[str, float | str]:
    """Return `metrics` as JSON holds them: NaN and the infinities are text.

    Raises:
        UsageError: one is no number.
    """
    return {name: _number(name, value) for name, value in metrics.items()}


def read_metrics(fields: object) -> dict[str, float]:
    """Return the metrics that `write_metrics` made `fields` of.

    Raises:
        ValueError: it made no such thing.
    """
    if not isinstance(fields, dict):
        raise ValueError("metrics are missing")
    metrics: dict[str, float] = {}
    for name, value in fields.items():
        number = _NON_FINITE.get(value) if isinstance(value, str) else value
        if isinstance(number, bool) or not isinstance(number, int | float):
            raise ValueError(f"metric {name!r} is no number")
        metrics[name] = float(number)
    return metrics


def plain_metadata(metadata: Mapping[str, object]) -> dict[str, Any]:
    """Return a user's metadata as built-in JSON types.

    Raises:
        UsageError: JSON cannot hold it; names the path.
    """
    plain: Any = _plain(metadata, "metadata", 0)
    return dict(plain)


def _plain(value: object, path: str, depth: int) -> object:
    """Return metadata as built-in JSON types, so that a subclass of them is stored by value."""
    if depth > _MAX_DEPTH:
        raise UsageError(f"metadata nests deeper than {_MAX_DEPTH} levels: flatten it")
    if value is None or isinstance(value, bool):
        return value
    if is_text(value):
        # Not `str(value)`, which a subclass such as an enum may answer otherwise.
        return str.__str__(value)
    if isinstance(value, int) and -(2**63) <= value < 2**64:
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    if isinstance(value, list | tuple):
        return [_plain(item, f"{path}[{i}]", depth + 1) for i, item in enumerate(value)]
    if isinstance(value, Mapping) and all(map(is_text, value)):
        return {
            str.__str__(key): _plain(item, f"{path}[{key!r}]", depth + 1)
            for key, item in value.items()
        }
    raise UsageError(
        f"{path} is a {type(value).__name__} that JSON cannot hold: use Unicode text, finite "
        "numbers of at most 64 bits, lists, and dictionaries with text keys"
    )


def _malformed(step: int, problem: str) -> IntegrityError:
    return IntegrityError(
        f"manifest of step {step}: {problem}. Use another checkpoint", kind=ErrorKind.MALFORMED
    )


# The encoded Python values of one part as one entry of an `extra` file: `{"name": value, ...}`. The
# values are JSON that the state made, and are neither read nor changed here.


def encode_document(objects: Mapping[str, bytes]) -> bytes:
    """Return the document of `objects`, which are encoded JSON values by name."""
    return msgspec.json.encode({name: msgspec.Raw(data) for name, data in objects.items()})


def decode_document(data: bytes, *, where: str) -> dict[str, bytes]:
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
