"""How to save: the choices that every rank of a job has to make alike."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

from dist_ckpt.engine.job_ranks import JOB_KEYWORDS, JobKeywords
from dist_ckpt.engine.load_options import check_known
from dist_ckpt.errors import UsageError
from dist_ckpt.format.digest import BLOCK_BYTES
from dist_ckpt.format.numbers import as_integer

Staging = Literal["blocking", "overlapped"]
WhenBusy = Literal["wait", "skip", "replace"]

MIN_MEMORY_BYTES = BLOCK_BYTES
"""The smallest `memory_limit_bytes`: below it, files would be more header than data."""

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
            never.
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
