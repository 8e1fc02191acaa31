"""The options of saves and loads, which every call takes as plain keywords."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from typing import Any, Literal, TypeAlias, TypedDict, get_args

import torch

from dist_ckpt.errors import UsageError, describe, is_refusal, near
from dist_ckpt.format.files import BLOCK_BYTES, bytes_digest
from dist_ckpt.format.names import as_integer, is_text
from dist_ckpt.ranks.job import JOB_KEYWORDS, JobKeywords
from dist_ckpt.state.resizing import ResizeRule, check_resize, rule_for

Rename: TypeAlias = Mapping[str, str] | Callable[[str], str]
Exchange: TypeAlias = Literal["auto", "always", "never"]

_EXCHANGES = ("auto", "always", "never")
_SWITCHES = ("strict", "cast", "verify")
# A block, of which nothing less can be compared with a digest.
_MIN_IN_FLIGHT_BYTES = 1 << 20
# What torch.load calls an option that there is here.
_ELSEWHERE = {"map_location": "device"}
# What calls that load know by name, besides their options.
_ARGUMENTS = ("url", "step", "part", "timeout_seconds", "ranks", "process_group")


TieRule: TypeAlias = Literal["refuse", "last"]
TIE_RULES: tuple[TieRule, ...] = ("refuse", "last")


TIMEOUT_SECONDS = 1800.0
"""How long, in seconds, a save or a load may take on all ranks, unless the call says otherwise."""


class LoadKeywords(TypedDict, total=False):
    """The keywords of `LoadOptions`, for the signatures of the calls that take them."""

    strict: bool
    only: str | Iterable[str]
    skip: str | Iterable[str]
    rename: Rename | None
    cast: bool
    resize: Mapping[str, ResizeRule]
    device: str | torch.device | None
    ties: TieRule
    verify: bool
    exchange: Exchange
    in_flight_bytes: int


class LoadCallKeywords(LoadKeywords, JobKeywords, total=False):
    """The keywords of `LoadOptions` and `JobRanks`: a call that has no Checkpointer takes both."""


@dataclass(frozen=True)
class LoadOptions:
    """What to load, and how. Names are `part/name`, as the state has them after `rename`.

    Attributes:
        strict: a name that only one of state and checkpoint has is an error. Without it such names
            are left alone (on the meta device, where they are there), and the report lists them.
        only: glob patterns: nothing else is loaded. One without `/` is of whole parts: `model`;
            others are of names: `model/blocks.*`. A `*` matches dots and slashes, too.
        skip: glob patterns: what is not loaded, even where `only` has it.
        rename: from stored names to those of the state: a function of `part/name`, or a mapping.
            A key of the mapping is a whole name, or the beginning of names up to a `.` or `/`
            (`{"model/encoder": "model/backbone"}`, `{"ema": "model"}`, `{"model/net": "model"}`);
            the longest one counts.
        cast: let floating tensors take another floating dtype, and integers a wider one. Nothing
            else is ever cast.
        resize: by glob pattern, what becomes of tensors of the state that have another shape than
            the stored ones: what both have is loaded, and with "pad" the state may have more, which
            stays as it is, with "crop" the checkpoint, with "overlap" either. A pattern without `/`
            is of names: `{"*embed*": "pad"}`. The moments of a parameter go with it.
        device: where tensors of the state that are on the meta device get their memory; None for
            the CPU, and for the device of its mesh where it is a DTensor.
        ties: what becomes of names that share memory in the state (one tensor under two names, in
            two parts, or as a view of another) where the checkpoint has different values for them:
            "refuse": an error that names both, before anything is changed; "last": the name that
            comes last in the state has its way, as in `load_state_dict` of torch.
        verify: compare every block read with its digest.
        exchange: whether bytes that several ranks want are read by one of them and sent to the
            others: "auto" where that is expected to be faster.
        in_flight_bytes: how much of this rank's host memory the bytes under way may take.
    """

    strict: bool = True
    only: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    rename: Rename | None = None
    cast: bool = False
    resize: Mapping[str, ResizeRule] = field(default_factory=dict)
    device: torch.device | None = None
    ties: TieRule = "refuse"
    verify: bool = True
    exchange: Exchange = "auto"
    in_flight_bytes: int = 256 << 20

    @classmethod
    def of(cls, keywords: Mapping[str, Any]) -> LoadOptions:
        """Return the options that the keywords of a call mean.

        Raises:
            UsageError: an unknown keyword, or a value that is none of its option's; names it.
        """
        known = [field.name for field in fields(cls)]
        check_known(keywords, known, besides=_ARGUMENTS, verb="load")
        values = dict(keywords)
        for name in ("only", "skip"):
            if name in values:
                values[name] = _patterns(name, values[name])
        if values.get("device") is not None:
            values["device"] = _device(values["device"])
        return cls(**values)

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{name} is True or False, not {getattr(self, name)!r}")
        if self.exchange not in _EXCHANGES:
            raise UsageError(f"exchange is one of {', '.join(_EXCHANGES)}, not {self.exchange!r}")
        if self.ties not in TIE_RULES:
            raise UsageError(f"ties is one of {', '.join(TIE_RULES)}, not {self.ties!r}")
        number = self.in_flight_bytes
        whole = as_integer(number)
        if whole is None or whole < _MIN_IN_FLIGHT_BYTES:
            raise UsageError(
                f"in_flight_bytes is a number of bytes of at least {_MIN_IN_FLIGHT_BYTES}, "
                f"not {number!r}"
            )
        _check_rename(self.rename)
        if self.resize != {}:
            check_resize(self.resize)

    def selects(self, name: str) -> bool:
        """Tell whether `name`, a part or `part/name` of the state, is to be loaded."""
        chosen = not self.only or any(matches(pattern, name) for pattern in self.only)
        return chosen and not any(matches(pattern, name) for pattern in self.skip)

    def resizes(self, name: str) -> ResizeRule | None:
        """Return the rule by which `part/name` may be of another shape than what is stored."""
        return rule_for(self.resize, name) if self.resize else None

    def selects_part(self, part: str) -> bool:
        """Tell whether any name of `part` could be selected: if not, nothing of it is read."""
        # Patterns of whole parts alone: of the others some name may be left.
        if any("/" not in pattern and fnmatchcase(part, pattern) for pattern in self.skip):
            return False
        # What follows the slash decides later, name by name.
        heads = (pattern.partition("/")[0] for pattern in self.only)
        # A `*` matches slashes too, so a head with one may go on into names.
        return not self.only or any(fnmatchcase(part, head) or "*" in head for head in heads)

    def selects_stored(self, part: str) -> bool:
        """Tell whether anything of the stored `part` could be selected, under whatever name."""
        if self.rename is None:
            return self.selects_part(part)
        # What a function makes of names is known only when it has each of them.
        if not isinstance(self.rename, Mapping):
            return True
        heads = [self.rename[key] for key in self.rename if key.partition("/")[0] == part]
        homes = {head.partition("/")[0] for head in (*heads, part)}
        return any(self.selects_part(home) for home in homes)

    def renamed(self, name: str) -> str:
        """Return what the stored `part/name` is called in the state.

        Raises:
            UsageError: the function failed, or returned no `part/name`.
        """
        if self.rename is None:
            return name
        if isinstance(self.rename, Mapping):
            return _mapped(self.rename, name)
        try:
            new = self.rename(name)
        except Exception as error:
            if not is_refusal(error):
                raise
            raise UsageError(f"rename({name!r}) failed: {describe(error)}") from error
        if not is_text(new):
            raise UsageError(f"rename({name!r}) returned {new!r}: it must return a name")
        return new

    def fingerprint(self) -> dict[str, str]:
        """Return each option as short text: equal on all ranks, or they load different things."""
        shown = {field.name: repr(getattr(self, field.name)) for field in fields(self)}
        # Each rank has a device of its own; that all are of one type is enough.
        shown["device"] = "None" if self.device is None else self.device.type
        if isinstance(self.rename, Mapping):
            # The order of a mapping means nothing, and its names may be thousands.
            pairs = repr(sorted(self.rename.items()))
            shown["rename"] = f"{len(self.rename)} names, {bytes_digest(pairs.encode())}"
        elif self.rename is not None:
            # The address in a function's repr differs from process to process.
            shown["rename"] = getattr(self.rename, "__qualname__", type(self.rename).__qualname__)
        return shown


def matches(pattern: str, name: str) -> bool:
    """Tell whether a pattern matches `part/name`; one without `/` is of the part alone."""
    return fnmatchcase(name if "/" in pattern else name.partition("/")[0], pattern)


def rename_key(rename: Mapping[str, str], name: str) -> str | None:
    """Return the longest key of `rename` that is `name`, or its beginning up to a `.` or `/`.

    The key may have that separator or leave it out.
    """
    if name in rename:
        return name
    # From the end, as the longest key counts.
    for stop in range(len(name) - 1, 0, -1):
        # With its separator first, so that `model/value.` can become `model/`.
        if name[stop] in "./":
            for key in (name[: stop + 1], name[:stop]):
                if key in rename:
                    return key
    return None


def _mapped(rename: Mapping[str, str], name: str) -> str:
    key = rename_key(rename, name)
    if key is None:
        return name
    new, rest = rename[key], name[len(key) :]
    if rest and rest[0] in "./" and key[-1] not in "./":
        # A name has one slash, behind its part: where a beginning gains or loses its part, the
        # separator behind it changes, so that `{"model": "model/net"}` does what it says.
        rest = ("." if "/" in new else "/") + rest[1:]
    return new + rest


def check_known(
    keywords: Mapping[str, Any], known: Iterable[str], *, besides: Iterable[str] = (), verb: str
) -> None:
    """Check the names of what a call was given besides its arguments.

    Args:
        keywords: what it was given.
        known: the names of its options.
        besides: those of its other arguments, for the hint at a mistyped one.
        verb: what it does.

    Raises:
        UsageError: a name is unknown; offers the nearest.
    """
    listed = list(known)
    for name in sorted(keywords.keys() - set(listed)):
        others = [*besides]
        # Known elsewhere, but not to this call: nothing is mistyped.
        hint = "" if name in others else near(name, [*listed, *others])
        if _ELSEWHERE.get(name) in listed:
            hint = f" (here it is {_ELSEWHERE[name]}=)"
        if name == "storage_options":
            hint = " (give the place as dist_ckpt.storage.resolve(url, storage_options=...))"
        article = "an" if verb[0] in "aeiou" else "a"
        raise UsageError(
            f"unknown option {name!r}{hint}: {article} {verb} knows {', '.join(listed)}"
        )


def _patterns(option: str, value: object) -> tuple[str, ...]:
    # One string is one pattern: its letters would be patterns, too.
    listed = (value,) if isinstance(value, str) else value
    if not isinstance(listed, Iterable):
        raise UsageError(f"{option} is a pattern or a list of them, not {value!r}")
    patterns = tuple(listed)
    bad = [pattern for pattern in patterns if not _is_name(pattern)]
    if bad:
        raise UsageError(f"{option} is made of patterns such as 'model/*', not {bad[0]!r}")
    if option == "only" and not patterns:
        # Taken for no choice it would load everything, the opposite of what it says.
        raise UsageError(
            "only is an empty list, of which nothing would be loaded: leave it away to load all"
        )
    return patterns


def _device(value: Any) -> torch.device:
    try:
        device: torch.device = torch.device(value)
    except (RuntimeError, TypeError) as error:
        why = str(error).partition("\n")[0]  # behind it all signatures that there are
        raise UsageError(f"device {value!r} is none that torch knows: {why}") from error
    if device.type == "meta":
        raise UsageError("device='meta' has no memory to load into: give a real one")
    return device


def _check_rename(rename: object) -> None:
    if isinstance(rename, Mapping):
        bad = [(old, new) for old, new in rename.items() if not (_is_name(old) and _is_name(new))]
        if bad:
            raise UsageError(f"rename maps names to names, not {bad[0][0]!r} to {bad[0][1]!r}")
    elif rename is not None and not callable(rename):
        raise UsageError(f"rename is a mapping or a function of names, not {rename!r}")


def _is_name(value: object) -> bool:
    return is_text(value) and bool(value)


Staging = Literal["blocking", "overlapped"]
WhenBusy = Literal["wait", "skip", "replace"]

MIN_MEMORY_BYTES = BLOCK_BYTES
"""The smallest `memory_limit_bytes`: below it, files would be more header than data."""

# What the header of a file takes beside its one box.
_HEADER_BYTES = 64 * 1024


class SaveKeywords(JobKeywords, total=False):
    """The keywords of `SaveOptions` and `JobRanks`, for the signatures of calls that take them."""

    staging: Staging
    when_busy: WhenBusy
    memory_limit_bytes: int | None
    check_replicas: bool | None
    command: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveOptions:
    """How saves copy, wait and check. The same on every rank.

    Attributes:
        staging: "blocking": `save` returns when this rank's share is copied. "overlapped": what
            only an optimizer step changes is copied while training goes on, and the step waits if
            it comes first. Whatever else writes to it meanwhile does not reach the checkpoint: in
            host memory the writer gets a copy of its own, on a device the save fails and names
            the tensor. Not for what writes past torch: the replay of a CUDA graph that holds a
            step, another process, a pointer.
        when_busy: what a save does while the one before is still being written: "wait" for it,
            "skip" itself, or "replace" (cancel) the other.
        memory_limit_bytes: how much host memory the copy may take, at least 1 MiB; a larger share
            goes through it in turns, and `save` blocks for longer. None: as much as the share has.
            Python values are not counted.
        check_replicas: compare what ranks hold as copies of one tensor before they save it. None:
            all of it at the first save and whenever the structure of the state changed, and at
            each other save one part in 32, another one each time; True: all at each save; False:
            never. Buffers of modules may differ between ranks, as statistics of BatchNorm do: they
            are never compared, and those of the lowest rank that has them are stored.
        command: store the command line in the manifest, with the secrets masked that can be
            recognized. False: the program and the names of its options, without any value.

    Raises:
        UsageError: an option has a value that it cannot have.
    """

    staging: Staging = "blocking"
    when_busy: WhenBusy = "wait"
    memory_limit_bytes: int | None = None
    check_replicas: bool | None = None
    command: bool = False

    @classmethod
    def of(cls, keywords: Mapping[str, Any], *, besides: Iterable[str] = ()) -> SaveOptions:
        """Return the options that the keywords of a call mean.

        Args:
            keywords: as they were given; those of `JobRanks` are passed over.
            besides: what else the call knows by name, for the hint at a mistyped one.

        Raises:
            UsageError: an unknown keyword, or a value that is none of its option's; names it.
        """
        known = [field.name for field in fields(cls)]
        check_known(keywords, [*known, *sorted(JOB_KEYWORDS)], besides=besides, verb="save")
        return cls(**{name: keywords[name] for name in known if name in keywords})

    def __post_init__(self) -> None:
        """Check every value, so that a bad one is not found at the first save."""
        _check_choice("staging", self.staging, get_args(Staging))
        _check_choice("when_busy", self.when_busy, get_args(WhenBusy))
        limit = self.memory_limit_bytes
        if limit is not None and as_integer(limit) is None:
            raise UsageError(f"memory_limit_bytes must be an integer or None, not {limit!r}")
        if limit is not None and limit < MIN_MEMORY_BYTES:
            raise UsageError(
                f"memory_limit_bytes={limit} is too small: give at least {MIN_MEMORY_BYTES}"
            )
        if not isinstance(self.check_replicas, bool | None):
            raise UsageError(
                f"check_replicas must be True, False or None, not {self.check_replicas!r}"
            )
        if not isinstance(self.command, bool):
            raise UsageError(f"command must be True or False, not {self.command!r}")

    def alike(self) -> dict[str, str]:
        """Return what all ranks must have been given alike, as text that is equal where that is."""
        names = ("when_busy", "staging", "memory_limit_bytes", "check_replicas")
        return {name: str(getattr(self, name)) for name in names}

    @property
    def max_piece_bytes(self) -> int | None:
        """How large a box a rank may own, so that a file of it alone fits the memory limit."""
        if self.memory_limit_bytes is None:
            return None
        return self.memory_limit_bytes - _HEADER_BYTES


def _check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        listed = ", ".join(map(repr, choices))
        raise UsageError(f"{name} must be one of {listed}, not {value!r}")
