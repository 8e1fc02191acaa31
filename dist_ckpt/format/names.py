"""The names that dist_ckpt writes, and the exact inverse of each.

A name that another program wrote never parses: whatever `parse_*` accepts, the matching
function here would have written, character for character.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Sequence
from typing import SupportsIndex

from dist_ckpt.errors import UsageError
from dist_ckpt.format.limits import as_integer

MANIFEST = "manifest.json"
INDEX = "index.msgpack"
EXTRA = "extra"
PIN = "pin.json"
EPOCH_NOTE = "epoch.json"
REMOVED = "removed.json"
DISCARDS = "discards"
STEP_LIMIT = 10**10
RANK_LIMIT = 10**5
CLAIM_LIMIT = 10**6
FILES_LIMIT = 10**5
"""How many files a rank may write for one part."""

# A spelled-out 0-9 where \d would also take digits of other scripts.
_STEP = re.compile(r"step-([0-9]{10})")
_CLAIM = re.compile(r"([0-9]{6})\.json")
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


def file_key(step: int, save_id: str, file_name: str) -> str:
    """Return the key of the file `file_name` of one attempt, relative to the run.

    Raises:
        UsageError: the step, the save id or the file name is not one that dist_ckpt writes.
    """
    if parse_save_id(save_id) is None:
        raise UsageError(f"bad save id {save_id!r}: take one from new_save_id")
    if not is_attempt_file(file_name):
        raise UsageError(f"bad file name {file_name!r}: take one from shard_name, or {INDEX!r}")
    return f"{step_dir(step)}/{save_id}/{file_name}"


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
    return f"c{_check_count('claim', claim, CLAIM_LIMIT):06d}-{secrets.token_hex(8)}"


def parse_save_id(text: str) -> int | None:
    """Return the claim under which the attempt `text` was made, or None for a foreign name."""
    found = _SAVE_ID.fullmatch(text)
    return int(found[1]) if found else None


def is_part(name: str) -> bool:
    """Tell whether `name` can be a part of a state: a plain identifier, and not "extra"."""
    return name != EXTRA and _PART.fullmatch(name) is not None


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
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise UsageError(f"tensor name {name!r} is not valid Unicode text: rename it") from error
    return name


def is_attempt_file(name: str) -> bool:
    """Tell whether `name` is one that dist_ckpt itself writes inside a save id's directory."""
    if name in (INDEX, PIN, EPOCH_NOTE, REMOVED) or _SEGMENT.fullmatch(name) is not None:
        return True
    return parse_shard_name(name) is not None


def _check_count(what: str, value: SupportsIndex, limit: int) -> int:
    number = as_integer(value)
    if number is None or not 0 <= number < limit:
        raise UsageError(f"bad {what} {value!r}: must be an integer from 0 to {limit - 1}")
    return number
