"""What can be known of a call before the first save: told when it is made, not hours later."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from dist_ckpt.errors import ErrorKind, UsageError
from dist_ckpt.format.manifest import plain_metadata
from dist_ckpt.ranks.job_ranks import JobRanks
from dist_ckpt.staging.gc_pause import no_collection
from dist_ckpt.state.generators import GeneratorPart
from dist_ckpt.state.part import Captured, dry_capture
from dist_ckpt.state.rng import RngPart
from dist_ckpt.state.train_state import TrainState


def check_state(state: TrainState, ranks: JobRanks) -> UsageError | None:
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
        with no_collection(), dry_capture():
            for name, captured in _captured(state, strict=True):
                _check_held(name, captured, ranks)
    except UsageError as error:
        if ranks.world_size() == 1:
            raise
        return error
    return None


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
