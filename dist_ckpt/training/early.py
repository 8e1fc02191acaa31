"""What can be known of a call before the first save: told when it is made, not hours later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from dist_ckpt.errors import ErrorKind, UsageError
from dist_ckpt.format.manifest import plain_metadata
from dist_ckpt.format.names import checked_seconds
from dist_ckpt.options import SaveKeywords, SaveOptions
from dist_ckpt.ranks.job import JobRanks
from dist_ckpt.saving.handle import Tolerance, WhenFailed
from dist_ckpt.staging.arena import no_collection
from dist_ckpt.state.early_stopping import EarlyStopping
from dist_ckpt.state.part import Captured, dry_capture
from dist_ckpt.state.rng import GeneratorPart, RngPart
from dist_ckpt.state.train_state import TrainState, refuse_generator_states, tell_of_schedules
from dist_ckpt.state.values import ValuePart


class TrainingKeywords(SaveKeywords, total=False):
    """The keywords of `TrainingOptions` and of saves, for the signatures that take them."""

    when_failed: WhenFailed
    max_failures: int
    exclusive: bool
    status_seconds: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingOptions:
    """What a training wants of its saves, and single saves do not. The same on every rank.

    Attributes:
        when_failed: "raise": the next call raises what a save in the background failed with.
            "warn": where storage or another rank failed, that is a warning, training goes on, and
            the next save is made when it is due. That this job was replaced, and calls that are
            wrong, are raised all the same, and so is a failure of the last save.
        max_failures: with "warn", how many saves in a row fail until the last of them is raised.
        exclusive: take the run over only where no other job is at work on it: one that gave a sign
            of life while it was looked for. Else the job that comes later owns the run.
        status_seconds: how often rank 0 says that the job is alive (`Run.status`, `dist-ckpt ls`),
            for the first time after so long; None for never.
        saves: how each of them is made.
        ranks: which ranks train together.

    Raises:
        UsageError: an option has a value that it cannot have.
    """

    when_failed: WhenFailed = "raise"
    max_failures: int = 3
    exclusive: bool = False
    status_seconds: float | None = 15.0
    saves: SaveOptions = field(default_factory=SaveOptions)
    ranks: JobRanks = field(default_factory=JobRanks)

    @classmethod
    def of(cls, keywords: Mapping[str, Any], *, besides: Iterable[str]) -> TrainingOptions:
        """Return what the keywords of a call mean.

        Args:
            keywords: as they were given.
            besides: what else the call knows by name, for the hint at a mistyped one.

        Raises:
            UsageError: an unknown keyword, or a value that is none of its option's; names it.
        """
        names = TrainingKeywords.__annotations__.keys() - SaveKeywords.__annotations__.keys()
        own = {name: keywords[name] for name in names if name in keywords}
        others = {name: value for name, value in keywords.items() if name not in own}
        saves = SaveOptions.of(others, besides=(*besides, *sorted(names)))
        return cls(**own, saves=saves, ranks=JobRanks.of(others))

    def __post_init__(self) -> None:
        """Check every value, so that a bad one is not found when it matters."""
        Tolerance(when_failed=self.when_failed, max_failures=self.max_failures)
        if not isinstance(self.exclusive, bool):
            raise UsageError(f"exclusive is True or False, not {self.exclusive!r}")
        if self.status_seconds is not None:
            checked_seconds(self.status_seconds, "status_seconds")
        elif self.exclusive:
            raise UsageError(
                "exclusive=True with status_seconds=None: a job that gives no sign of life cannot "
                "be told from none, give a number of seconds"
            )

    @property
    def tolerance(self) -> Tolerance:
        """Whether training goes on when a save failed."""
        return Tolerance(when_failed=self.when_failed, max_failures=self.max_failures)


def as_said(
    state: TrainState | Mapping[str, Any], metadata: Mapping[str, Any] | None, ranks: JobRanks
) -> tuple[TrainState, dict[str, Any], Exception | None]:
    """Return what was given as state and metadata, and what is wrong with it on this rank.

    Raises:
        Exception: that, where this process is the whole job.
    """
    try:
        return TrainState.of(state), checked_metadata(metadata), None
    except Exception as error:
        held = ranks.hold(error)
    values = list(state.values()) if isinstance(state, Mapping) else []
    # What decides with the other ranks when a save is due, so that it is for this one, too.
    stoppers = [value for value in values if isinstance(value, EarlyStopping)]
    parts: dict[str, Any] = {f"stopper-{number}": each for number, each in enumerate(stoppers)}
    return TrainState(rng=None, **parts), {}, held


def check_state(state: TrainState, ranks: JobRanks) -> Exception | None:
    """Check that what `state` holds now can be stored, by capturing it once; nothing is copied.

    What is not there yet (an optimizer's state, the weights of a model on the meta device) is no
    error: only what can never be stored is one.

    Returns:
        What is wrong, on one of several ranks: the others wait in its next call, and must hear it.

    Raises:
        UsageError: a value of a type without a stored form, named by its path; or a tensor of which
            the job does not hold all. Only where this process is the whole job.
    """
    try:
        # What is made here would set off the collection that the imports of the program are due
        # for, 0.2 s (docs/design/005).
        with no_collection(), dry_capture():
            check_generators_kept(state)
            tell_of_schedules(state)
            for name, part in state.parts.items():
                if type(part) is ValuePart:
                    refuse_generator_states(name, part.value)
            for name, captured in _captured(state, strict=True):
                _check_held(name, captured, ranks)
    except UsageError as error:
        return ranks.hold(error)
    return None


def check_generators_kept(state: TrainState) -> None:
    """Check that the name of the generators of the process is not that of something else.

    Raises:
        UsageError: it is, and they would not be kept.
    """
    part = state.parts.get("rng")
    if part is None or isinstance(part, RngPart) or part is state["rng"]:
        return
    raise UsageError(
        f"part 'rng' is a {type(state['rng']).__qualname__}: this name is that of the generators "
        "of Python, numpy, torch and CUDA, which would not be kept. Call it otherwise, or leave it "
        "out if it is the state of these; rng=None leaves them out"
    )


def check_job_holds_all(state: TrainState, ranks: JobRanks) -> None:
    """Check that the ranks of the job hold all of every tensor between them.

    Raises:
        UsageError: a tensor is spread over ranks outside of it, too.
    """
    if ranks.members() is not None:  # else nobody is outside
        with dry_capture():
            for name, captured in _captured(state, strict=False):
                _check_held(name, captured, ranks)


def checked_metadata(metadata: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return `metadata` as plain JSON values.

    Raises:
        UsageError: it is no mapping, or holds what JSON cannot; named by its path.
    """
    if metadata is None:
        return {}
    if not isinstance(metadata, Mapping):
        raise UsageError(f"metadata is a dict of JSON values, not a {type(metadata).__name__}")
    return plain_metadata(metadata)


def _captured(state: TrainState, *, strict: bool) -> Iterator[tuple[str, Captured]]:
    for name, part in state.parts.items():
        # A loader begins to iterate, and draws random numbers, when it is asked where it is; and
        # generators are of types that are known.
        if isinstance(part, RngPart | GeneratorPart) or _is_loader(state[name]):
            continue
        try:
            yield name, part.capture()
        except UsageError as error:
            if strict and error.kind is ErrorKind.UNENCODABLE:
                raise
        # Code of the program, perhaps not ready before a first step: what is wrong a save finds.
        except Exception:
            continue


def _is_loader(value: object) -> bool:
    has_state = callable(getattr(value, "state_dict", None))
    return has_state and isinstance(value, Iterable) and not isinstance(value, Mapping)


def _check_held(part: str, captured: Captured, ranks: JobRanks) -> None:
    for name, tensor in captured.tensors.items():
        if ranks.lacks(tensor):
            raise UsageError(
                f"{part}/{name} is spread over ranks that are not in this job "
                f"({ranks.ranks!r}, process_group={ranks.process_group}): let all ranks that hold "
                "a piece of it make the call, or give a state that this job holds whole"
            )
