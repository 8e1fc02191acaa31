"""Names, numbers and tables as they are stored, and their strict reading: no byte is trusted.

A name that another program wrote never parses: whatever `parse_*` accepts, the matching function
here would have written, character for character. A number is within its bounds, and a table, which
is named columns of whole numbers in one zlib stream, is read within them.
"""

from __future__ import annotations

import math
import re
import secrets
import threading
import zlib
from collections.abc import Hashable, Iterable, Sequence
from numbers import Real
from operator import index
from typing import Any, SupportsIndex, TypeGuard, TypeVar

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from dist_ckpt.errors import ErrorKind, IncompatibleError, IntegrityError, UsageError

MANIFEST = "manifest.json"
INDEX = "index.msgpack"
EXTRA = "extra"
PIN = "pin.json"
EPOCH_NOTE = "epoch.json"
REMOVED = "removed.json"
DISCARDS = "discards"
# Each is what the digits of its name hold.
STEP_LIMIT = 10**10
RANK_LIMIT = 10**5
CLAIM_LIMIT = 10**6
FILES_LIMIT = 10**5
"""How many files a rank may write for one part."""

# A spelled-out 0-9 where \d would also take digits of other scripts.
_STEP = re.compile(r"step-([0-9]{10})")
_CLAIM = re.compile(r"([0-9]{6})\.json")
# A status bears the number of a claim and is none: commit-v1, section 10.
_STATUS = re.compile(r"([0-9]{6})\.status\.json")
_SAVE_ID = re.compile(r"c([0-9]{6})-[0-9a-f]{16}")
_PART = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")
_SEGMENT = re.compile(r"index\.r[0-9]{5}\.msgpack")
_SHARD = re.compile(r"([A-Za-z_][A-Za-z0-9_-]{0,63})\.r([0-9]{5})(?:-([0-9]{5}))?\.safetensors")


def step_dir(step: int) -> str:
    """Return the directory of `step` inside its run, `step-0000001000`.

    Raises:
        UsageError: `step` is not one that `check_step` takes.
    """
    return f"step-{check_step(step):010d}"


def parse_step_dir(name: str) -> int | None:
    """Return the step whose directory is called exactly `name`, or None for a foreign name."""
    found = _STEP.fullmatch(name)
    return int(found[1]) if found else None


def manifest_key(step: int) -> str:
    """Return the key of the manifest of `step`, relative to the run."""
    return f"{step_dir(step)}/{MANIFEST}"


def index_key(step: int, save_id: str) -> str:
    """Return the key of the index of one attempt, relative to the run."""
    return file_key(step, save_id, INDEX)


def attempt_dir(step: int, save_id: str) -> str:
    """Return the folder of the files of one attempt, relative to the run, with a slash at its end.

    Raises:
        UsageError: the step or the save id is not one that dist_ckpt writes.
    """
    if parse_save_id(save_id) is None:
        raise UsageError(f"bad save id {save_id!r}: take one from new_save_id")
    return f"{step_dir(step)}/{save_id}/"


def file_key(step: int, save_id: str, file_name: str) -> str:
    """Return the key of the file `file_name` of one attempt, relative to the run.

    Raises:
        UsageError: the step, the save id or the file name is not one that dist_ckpt writes.
    """
    # Checked where the key is made, so that none leaves the directory of its attempt.
    folder = attempt_dir(step, save_id)
    if not is_attempt_file(file_name):
        raise UsageError(f"bad file name {file_name!r}: take one from shard_name, or {INDEX!r}")
    return folder + file_name


def shard_name(part: str, rank: int, *, number: int = 0) -> str:
    """Return the name of a file that `rank` writes for `part`; here "extra" is a part too.

    Args:
        part: the part.
        rank: the rank.
        number: which of its files for this part; the first one, usually the only one, has none in
            its name: `model.r00000.safetensors`, then `model.r00000-00001.safetensors`.

    Raises:
        UsageError: a bad part name, or a rank or a number outside [0, 100000).
    """
    if part != EXTRA:
        check_part(part)
    which = f"-{number:05d}" if _check_count("file number", number, FILES_LIMIT) else ""
    return f"{part}.r{_check_count('rank', rank, RANK_LIMIT):05d}{which}.safetensors"


def parse_shard_name(name: str) -> tuple[str, int, int] | None:
    """Return (part, rank, number) of a shard file name, or None for a foreign name."""
    found = _SHARD.fullmatch(name)
    # The first file never says its number, so `-00000` is foreign: a file has one name.
    if found is None or (found[3] and not int(found[3])):
        return None
    return found[1], int(found[2]), int(found[3] or 0)


def segment_name(rank: int) -> str:
    """Return the name of the file with the segment of `rank`: `index.r00001.msgpack`.

    Raises:
        UsageError: a rank outside [0, 100000).
    """
    return f"index.r{_check_count('rank', rank, RANK_LIMIT):05d}.msgpack"


def claim_key(claim: int) -> str:
    """Return the key of claim number `claim`, relative to the run: `claims/000003.json`.

    Raises:
        UsageError: a number outside [0, 1000000).
    """
    return f"claims/{_check_count('claim', claim, CLAIM_LIMIT):06d}.json"


def discard_key(claim: int) -> str:
    """Return the key of what the job of `claim` gave up: `discards/000003.json`.

    Raises:
        UsageError: a number outside [0, 1000000).
    """
    return f"{DISCARDS}/{_check_count('claim', claim, CLAIM_LIMIT):06d}.json"


def parse_claim(name: str) -> int | None:
    """Return the number of the claim whose file in `claims/` is called `name`, or None."""
    found = _CLAIM.fullmatch(name)
    return int(found[1]) if found else None


def status_key(claim: int) -> str:
    """Return the key of what the job of `claim` says of itself: `claims/000003.status.json`.

    Raises:
        UsageError: a number outside [0, 1000000).
    """
    return f"claims/{_check_count('claim', claim, CLAIM_LIMIT):06d}.status.json"


def parse_status(name: str) -> int | None:
    """Return the claim of the job that says what is in the file `name` in `claims/`, or None."""
    found = _STATUS.fullmatch(name)
    return int(found[1]) if found else None


def new_save_id(claim: int) -> str:
    """Return a fresh id for one attempt to save under `claim`: `c000003-` and 16 random hex digits.

    Raises:
        UsageError: a claim outside [0, 1000000).
    """
    # 64 random bits, so that no attempt ever writes a key of another one: commit-v1, section 2.
    return f"c{_check_count('claim', claim, CLAIM_LIMIT):06d}-{secrets.token_hex(8)}"


def parse_save_id(text: str) -> int | None:
    """Return the claim under which the attempt `text` was made, or None for a foreign name."""
    found = _SAVE_ID.fullmatch(text)
    return int(found[1]) if found else None


def is_part(name: str) -> bool:
    """Tell whether `name` can be a part of a state: a plain identifier, and not "extra"."""
    return isinstance(name, str) and name != EXTRA and _PART.fullmatch(name) is not None


def check_part(name: str) -> str:
    """Return `name` if it can be a part of a state.

    Raises:
        UsageError: not 1 to 64 of `A-Za-z0-9_-` starting with a letter or `_`, or "extra".
    """
    if name == EXTRA:
        raise UsageError(f"{EXTRA!r} is reserved for Python values: give the part another name")
    if not is_part(name):
        raise UsageError(
            f"bad part name {name!r}: use 1 to 64 letters, digits, '_' or '-', "
            "beginning with a letter or '_'"
        )
    return name


def check_step(step: SupportsIndex) -> int:
    """Return `step` as an `int` if it is an integer in [0, 10**10), of numpy or torch too.

    Raises:
        UsageError: anything else, booleans included.
    """
    return _check_count("step", step, STEP_LIMIT)


def plain_step(step: SupportsIndex) -> int:
    """Return an integer of whatever type as an `int`, anything else as it is.

    For calls whose ranks check the step together, so that all of them hear what is wrong with it.
    """
    number = as_integer(step)
    return step if number is None else number  # type: ignore[return-value]


def chunk_name(tensor_name: str, offsets: Sequence[int] | None) -> str:
    """Return the name of a chunk inside its safetensors file.

    A whole tensor (`offsets=None`) bears its own name, a box of a larger one the name and
    `#o0,o1,...`. Every `#` of the tensor's name is doubled, so no two chunks share a name.

    Raises:
        UsageError: the tensor cannot be stored under that name, or a box has no offsets.
    """
    check_tensor_name(tensor_name)
    escaped = tensor_name.replace("#", "##")
    if offsets is None:
        return escaped
    if not offsets:
        raise UsageError(f"a box of {tensor_name!r} without offsets: pass None for a whole tensor")
    return f"{escaped}#{','.join(str(offset) for offset in offsets)}"


def check_tensor_name(name: str) -> str:
    """Return `name` if a tensor may bear it: any text that UTF-8 can hold, but `__metadata__`.

    Raises:
        UsageError: `__metadata__`, which safetensors keeps for itself, or a lone surrogate.
    """
    if name == "__metadata__":
        raise UsageError("a tensor named '__metadata__' cannot be stored: rename it")
    if not is_text(name):
        raise UsageError(f"tensor name {name!r} is not valid Unicode text: rename it")
    return name


def is_text(value: object) -> TypeGuard[str]:
    """Whether `value` is a text that UTF-8 can hold: with half of a surrogate pair it cannot."""
    # The least of what each name of a call has to be: it is stored, or told to other ranks.
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def is_attempt_file(name: str) -> bool:
    """Tell whether `name` is one that dist_ckpt itself writes inside a save id's directory."""
    # All that may be deleted there, for a foreign name never is: commit-v1, section 6, rule 4.
    if name in (INDEX, PIN, EPOCH_NOTE, REMOVED) or _SEGMENT.fullmatch(name) is not None:
        return True
    return parse_shard_name(name) is not None


def _check_count(what: str, value: SupportsIndex, limit: int) -> int:
    number = as_integer(value)
    if number is None or not 0 <= number < limit:
        raise UsageError(f"bad {what} {value!r}: must be an integer from 0 to {limit - 1}")
    return number


# Numbers that callers give and bytes claim.


INT64_MAX = 2**63 - 1
MAX_NDIM = 64
"""Of a tensor of torch, and of an array of numpy."""

_MAX_EQUAL_HASHES = 64
# Fewer keys than this cannot take long, however they collide.
_FEW = 256


def as_integer(value: Any) -> int | None:
    """Return an integer of whatever type, of numpy or torch too, as an `int`; None for all else.

    A boolean is none: where a number is asked for it is a slip.
    """
    # A tensor of torch.bool says that it is an index.
    if isinstance(value, bool) or str(getattr(value, "dtype", "")).endswith("bool"):
        return None
    try:
        return index(value)
    except Exception:  # a foreign __index__ may do anything
        return None


def as_number(value: object) -> float | None:
    """Return a real number of whatever type, of numpy too, as a `float`; None for all else.

    A boolean is none, as in `as_integer`. NaN is one, which no bound lets pass.
    """
    number: Any = value
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    try:
        return float(value)
    except OverflowError:  # an integer of any length
        return math.inf if number > 0 else -math.inf


def checked_seconds(value: object, what: str) -> float:
    """Return `value`, which a caller was given as `what`, if one can wait for so long.

    Raises:
        UsageError: it is no number, not above 0, or longer than any lock can be waited for.
    """
    seconds = as_number(value)
    if seconds is None or not 0 < seconds <= threading.TIMEOUT_MAX:  # refuses NaN too
        raise UsageError(
            f"{what} must be a finite number above 0, and at most {threading.TIMEOUT_MAX:.0f}, "
            f"not {value!r}"
        )
    return seconds


def count_elements(shape: Sequence[object]) -> int:
    """Return how many elements a tensor of `shape` has.

    Raises:
        ValueError: an entry is no whole number from 0 on, there are more than 64 of them, or the
            number of elements, empty dimensions left out, is more than 64 bits hold.
    """
    if len(shape) > MAX_NDIM:
        raise ValueError(f"it claims {len(shape)} dimensions, more than {MAX_NDIM}")
    sizes: list[int] = []
    for size in shape:
        # By its very type, as `isinstance` would take True for a size.
        if type(size) is not int or not 0 <= size <= INT64_MAX:
            raise ValueError("it claims a dimension that no tensor has")
        sizes.append(size)
    # Strides are products of sizes, so those of an empty tensor must fit too.
    if math.prod(size for size in sizes if size) > INT64_MAX:
        raise ValueError("it claims more elements than 2**63 bytes hold")
    return math.prod(sizes)


class HashCounts:
    """Finds keys that were made to collide, before a dict or a set compares all with all.

    Hashes of text and bytes are salted by the interpreter; those of numbers and tuples anybody can
    compute backwards. Only equal hashes cost time in proportion to their number.
    """

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}

    def add(self, keys: Iterable[Hashable]) -> None:
        """Count `keys`.

        Raises:
            ValueError: too many keys have one hash.
            TypeError: one has none.
        """
        for key in keys:
            kind = type(key)
            if kind is str or kind is bytes:
                continue
            number = hash(key)
            count = self._counts[number] = self._counts.get(number, 0) + 1
            if count > _MAX_EQUAL_HASHES:
                raise ValueError("its keys collide, as if they were made to")


def check_hashes(keys: Sequence[Hashable]) -> None:
    """Refuse keys that were made to collide; see `HashCounts`.

    Raises:
        ValueError: too many of them have one hash.
        TypeError: one has none.
    """
    if len(keys) > _FEW:
        HashCounts().add(keys)


# Tables of format 2: named columns of whole numbers in one zlib stream.


FORMAT = 2
LIMIT_BYTES = 1 << 28
"""How large a table may be, and a segment."""

MOST_NAMES = 1 << 22
"""How many texts there may be in a row: of each an object is made."""

Column = NDArray[np.int64]

# Kept for what is coming: checkpoints that have them are of a newer release, not damaged.
_RESERVED = ("earlier", "packed")

_T = TypeVar("_T")


def column(numbers: ArrayLike) -> bytes:
    """Return whole numbers of 64 bits as a column: each as the difference to the one before."""
    values = np.asarray(numbers, np.int64).reshape(-1)
    # Equal steps give equal differences, which deflate to next to nothing.
    return np.diff(values, prepend=np.int64(0)).astype("<i8").tobytes()


def read_column(data: bytes, *, most: int = INT64_MAX, where: str) -> Column:
    """Return the numbers of a column.

    Raises:
        IntegrityError: it is none, or a number is negative or above `most`.
    """
    if len(data) % 8:
        raise bad_index(f"{where} of {len(data)} bytes is no column")
    # Modulo 2**64, like the differences: whether a sum is a number that can be, its bounds say.
    numbers: Column = np.cumsum(np.frombuffer(data, "<i8"), dtype=np.int64)
    if len(numbers) and (int(numbers.min()) < 0 or int(numbers.max()) > most):
        raise bad_index(f"{where} has a number that cannot be")
    return numbers


def check_lengths(where: str, *pairs: tuple[int, int]) -> None:
    """Check that lengths are what they should be.

    Raises:
        IntegrityError: the two numbers of a pair differ.
    """
    if any(found != expected for found, expected in pairs):
        raise bad_index(f"the columns of {where} do not fit one another")


def check_distinct(texts: Sequence[str], where: str) -> None:
    """Check that no text is there twice.

    Raises:
        IntegrityError: one is.
    """
    if len(set(texts)) != len(texts):
        raise bad_index(f"{where} has a text twice")


def positions(first: Column) -> Column:
    """Return where each run begins, given the lengths of all, and behind them the end."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(first)])


def runs(first: Column, count: Column) -> Column:
    """Return the numbers from each of `first` on, as many as its `count` says."""
    ends = np.cumsum(count)
    step = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(ends - count, count)
    return np.repeat(first, count) + step


def deflate(table: msgspec.Struct) -> bytes:
    """Return the bytes of a table.

    Raises:
        UsageError: a name is not Unicode text, or the table is too large.
    """
    raw = encode_map(table)
    # Refused by the writer, since no reader would inflate it.
    if len(raw) > LIMIT_BYTES:
        raise UsageError(
            f"a description of {len(raw)} bytes is over {LIMIT_BYTES}: save fewer tensors, or by "
            "more ranks"
        )
    return zlib.compress(raw)


def inflate(data: bytes, kind: type[_T], *, where: str) -> _T:
    """Return the table in `data`, of which no more than `LIMIT_BYTES` are ever made.

    Raises:
        IntegrityError: it is none.
        IncompatibleError: a newer release wrote it.
    """
    # A few bytes may inflate to any number: it stops at the limit, and `eof` says if that was all.
    stream = zlib.decompressobj()
    try:
        raw = stream.decompress(data, LIMIT_BYTES)
    except zlib.error as error:
        raise bad_index(f"{where} cannot be inflated ({error})") from error
    if not stream.eof or stream.unused_data:
        raise bad_index(f"{where} is cut short, too large, or followed by something")
    return decode_map(raw, kind, where=where)


def encode_map(table: msgspec.Struct) -> bytes:
    """Return the MessagePack map of `table`.

    Raises:
        UsageError: a name is not Unicode text.
    """
    try:
        return msgspec.msgpack.encode(table)
    except UnicodeEncodeError as error:
        raise UsageError(f"the index cannot hold this state: {error}") from error


def decode_map(data: bytes, kind: type[_T], *, where: str) -> _T:
    """Return the map in `data`, which has the fields of `kind` and no other.

    Raises:
        IntegrityError: it has not.
        IncompatibleError: it has one that is kept for newer releases.
    """
    try:
        return msgspec.msgpack.decode(data, type=kind)
    # RecursionError: how deep the bytes nest is chosen by whoever wrote them.
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        # Kept names are no damage, so that a restore stops and does not take an older checkpoint.
        newer = [name for name in _keys(data) if name in _RESERVED]
        if newer:
            raise IncompatibleError(
                f"{where} has {newer[0]!r}, which this program does not know: use the release that "
                "wrote it or a newer one",
                kind=ErrorKind.VERSION,
            ) from error
        raise bad_index(f"{where} cannot be decoded ({error})") from error


def _keys(data: bytes) -> Iterable[str]:
    try:
        # Names alone are wanted, so what they stand for need not be of any known type.
        return msgspec.msgpack.decode(data, type=dict[str, msgspec.Raw])
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return ()


def bad_index(problem: str) -> IntegrityError:
    """Return the error of an index that breaks a rule."""
    return IntegrityError(f"index: {problem}. Use another checkpoint", kind=ErrorKind.MALFORMED)
