"""Checkpoints of other programs into a run, under the names that a state here has."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from numbers import Real
from typing import Any, SupportsIndex

import numpy as np
import torch

from dist_ckpt.doors.content import StoredContent
from dist_ckpt.doors.export import open_at
from dist_ckpt.doors.spool import check_target, is_saved, save_parts
from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IncompatibleError,
    IntegrityError,
    UsageError,
    describe,
)
from dist_ckpt.foreign.dcp_files import BESIDE, METADATA
from dist_ckpt.foreign.detect import FILE_SUFFIXES, open_foreign
from dist_ckpt.format.names import STEP_LIMIT, plain_step
from dist_ckpt.loading.called_alike import ALIKE
from dist_ckpt.loading.opened import OpenedCheckpoint, locate, place_name
from dist_ckpt.saving.provenance import as_given, as_numbers
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.module_state import wrapper_prefix
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.storage.base import Store, read_all
from dist_ckpt.storage.resolve import Place, check_options_taken, options_for

_MODEL = "model"
_METRICS = "metrics"
# What says how far a training was, the best first.
# A step is finer than an epoch: where both are there, the step says more.
# Of the two that are called a step, the other one may count those of an epoch.
_STEPS = ("global_step", "step", "iteration", "iter", "epoch")
_LIGHTNING = "pytorch-lightning_version"

_TRAINER_STATE = "trainer_state.json"
_TRAINER_STATE_LIMIT_BYTES = 1 << 28
# With which suffixes both write them; of several optimizers each would need a name of its own.
_STATES = ("optimizer", "scheduler")
_STATE_SUFFIXES = (".pt", ".bin")
_NOT_READ = "beside the weights optimizer and scheduler alone are read"
# They say how far the training was, not how good it is.
_COUNTERS = ("step", "epoch", "total_flos")
# One number behind a word that says of what: `llama-2` is no step.
_NUMBERED = re.compile(
    r"(?:checkpoint|ckpt|global[-_]?step|step|iteration|iter|epoch)[-_=]?([0-9]+)", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of a checkpoint of another program.

    Attributes:
        url: the run.
        step: under which step it is committed.
        parts: the new name of each part by the one that it had.
        tensors: how many names there are.
        metrics: those that are stored with it.
        left_out: why what did not come along did not, by its name: values that cannot be read
            without executing what is in the file, what lies beside the weights in a folder, and
            metrics that are older than the checkpoint.
        was_there: whether it had been committed before, bit for bit the same.
    """

    url: str
    step: int
    parts: Mapping[str, str]
    tensors: int
    metrics: Mapping[str, float]
    left_out: Mapping[str, str] = field(default_factory=dict)
    was_there: bool = False

    def __str__(self) -> str:
        """Say it for people."""
        done = "was there already" if self.was_there else "committed"
        lines = [f"step {self.step} of {self.url} {done}: {self.tensors} tensors"]
        lines += [
            f"  {new}" + ("" if new == old else f", called {old!r} there")
            for old, new in self.parts.items()
        ]
        lines += [f"  metric {name}: {value:g}" for name, value in self.metrics.items()]
        lines += [f"  left out: {name}: {why}" for name, why in self.left_out.items()]
        return "\n".join(lines)


def import_(
    source: Place,
    url: Place,
    *,
    step: SupportsIndex | None = None,
    metrics: Mapping[str, float] | None = None,
    storage_options: Mapping[str, Any] | None = None,
) -> ImportReport:
    """Commit what another program saved as a checkpoint of a run.

    `torch.save` files, directories of stock `torch.distributed.checkpoint`, safetensors and folders
    of Hugging Face, as `load` reads them; nothing in them is executed. A later `load` or
    `Checkpointer.restore` of model and optimizer takes what there is.

    Parts get the names that they have here (`model_state_dict` becomes `model`), names of weights
    lose what DDP, `torch.compile` and Lightning put before them. Of a folder of the Trainer of
    transformers or of accelerate, optimizer and scheduler come along. The call takes the run over.
    If it is cut off the same call does the rest.

    ```python
    import dist_ckpt
    import torch

    model = torch.nn.Linear(4, 8)
    torch.save({"model_state_dict": model.state_dict(), "epoch": 3, "loss": 0.25}, "old.pt")
    report = dist_ckpt.import_("old.pt", "runs/imported")
    assert (report.step, report.metrics) == (3, {"loss": 0.25})
    ```

    Args:
        source: the file or folder.
        url: the run, new or with other steps.
        step: under which step; by default what the checkpoint calls `global_step`, `step`,
            `iteration` or `epoch`, or the `trainer_state.json` or the name of its folder says,
            and 0 where nothing does.
        metrics: numbers by name, besides those that are found: floats at the top, a dict
            `metrics`, and the newest that `trainer_state.json` has.
        storage_options: for each of the two places that takes any, as for `export`.

    Returns:
        What was committed.

    Raises:
        NotFound: there is nothing that can be read.
        AlreadyExists: the step is committed, and is something else.
        IntegrityError: what is there is malformed.
        UsageError: it is a checkpoint of dist_ckpt, it has no tensor, its step is none and `step`
            is not given, an argument is malformed, or `url` is a folder of runs, or in a run.
        StorageError: the run, or the folder for temporary files, is full or failed.
    """
    check_options_taken(storage_options, source, url)
    check_target(url, options_for(url, storage_options))
    with open_at(source, None, {"storage_options": storage_options}) as opened:
        # What it had besides (who wrote it, its digests) would be lost by being brought in anew.
        if opened.manifest is not None:
            raise UsageError(
                f"{opened.where} was committed by dist_ckpt already: there is nothing to import"
            )
        with _folder(source, opened, storage_options) as folder:
            return _import(source, _Reading(opened), folder, url, step, metrics, storage_options)


def _import(
    source: Place,
    weights: _Reading,
    folder: _Folder,
    url: Place,
    step: SupportsIndex | None,
    metrics: Mapping[str, float] | None,
    storage_options: Mapping[str, Any] | None,
) -> ImportReport:
    given = options_for(url, storage_options)
    number = _step(weights, folder) if step is None else plain_step(step)
    numbers = {**folder.metrics, **weights.metrics(), **as_numbers(as_given(metrics))}
    readings = [weights, *map(_Reading, folder.states.values())]
    parts = {old: new for each in readings for old, new in each.parts.items()}
    contents = {new: r.content(old, new) for r in readings for old, new in r.parts.items()}
    objects = {new: r.objects[old] for r in readings for old, new in r.parts.items()}
    left_out = {name: why for each in readings for name, why in each.left_out.items()}
    if left_out and not (contents or objects):
        raise IncompatibleError(f"nothing can be imported: {'; '.join(left_out.values())}")
    tensors = sum(len(content.items) for content in contents.values() if content is not None)
    if not tensors:
        # As the newest of the run it would be what a training goes on from, with nothing in it.
        # By the name that was given: a folder may hold many files.
        named = place_name(source, options_for(source, storage_options))
        there = f"there is {', '.join(map(repr, parts))} alone" if parts else "there is nothing"
        raise UsageError(f"{named} holds no tensor, {there}: name what holds the weights")
    was_there = is_saved(
        contents,
        objects,
        url,
        number,
        metrics=numbers,
        stored=StoredContent,
        storage_options=given,
    )
    if not was_there:
        save_parts(contents, objects, url, step=number, metrics=numbers, storage_options=given)
    # Of a folder all of them: whoever goes on with it must know what there was.
    told = {**left_out, **folder.others}
    # Those that were given, or that the file has, take the place of older ones.
    told |= {f"metric {name}": why for name, why in folder.older.items() if name not in numbers}
    return ImportReport(place_name(url, given), number, parts, tensors, numbers, told, was_there)


def _step(weights: _Reading, folder: _Folder) -> int:
    """Return how far the training was, 0 where nothing says it.

    Raises:
        UsageError: what says it is no step.
    """
    said = [("global_step", folder.global_step), *weights.steps()]
    for name, value in said:
        # A flag is an int to Python too, and says nothing of how far a training was.
        if isinstance(value, bool) or not isinstance(value, Real | str):
            continue
        number = _integer(value)
        if number is None or not 0 <= number < STEP_LIMIT:
            # Not the next one, and not 0: it would be found under a step that is not its own.
            raise UsageError(
                f"{name} of {weights.where} is {value!r}, which is no step: give it by step="
            )
        return number
    return folder.numbered or 0


def _integer(value: Any) -> int | None:
    """Return an integral number of any type as an `int`, None for anything else."""
    if isinstance(value, int):
        return value
    if isinstance(value, str) or not math.isfinite(value):
        return None
    number = int(value)
    return number if number == value else None


def _plain(value: Any) -> Any:
    """Return a number that is in an array or a tensor by itself as such, the rest as it is."""
    if isinstance(value, torch.Tensor):
        return value.item() if value.numel() == 1 else value
    if isinstance(value, np.generic | np.ndarray):
        return value.item() if value.size == 1 else value
    return value


class _Reading:
    """What there is of a checkpoint of another program, and what it is called here.

    Attributes:
        parts: the name here of each part.
        objects: the encoded values of each part that can be read.
        left_out: why those that cannot be read cannot, by their names.
    """

    def __init__(self, opened: OpenedCheckpoint) -> None:
        self._opened = opened
        self.left_out: dict[str, str] = {}
        self.objects = {part: self._readable(part) for part in opened.parts}
        self._with_tensors = {info.part for info in opened.info.values()}
        # A part whose one value cannot be read, and without tensors, leaves nothing to save.
        kept = [p for p in opened.parts if self.objects[p] or p in self._with_tensors]
        self.parts = {part: _name_here(part, kept) for part in kept}

    @property
    def where(self) -> str:
        """How messages name it."""
        return self._opened.where

    def content(self, old: str, new: str) -> StoredContent | None:
        """Return the tensors of a part, those of a model under the names of the bare model."""
        if old not in self._with_tensors:
            return None
        # Only a model: who wrapped it put this before names of weights alone.
        rename = self._without_wrappers(old) if new == _MODEL else {}
        return StoredContent(self._opened, old, rename=rename)

    def steps(self) -> Sequence[tuple[str, Any]]:
        """Return what says how far the training was, the best first, with its names."""
        known = [("step", self._opened.step)] if self._opened.step else []
        return [*known, *((name, self._value(name)) for name in _STEPS)]

    def metrics(self) -> dict[str, float]:
        """Return the numbers that are no counters: floats at the top, and those of `metrics`."""
        found = self._value(_METRICS)
        named = dict(found) if isinstance(found, dict) else {}
        for part in self.parts:
            value = self._value(part)
            if isinstance(value, float) and part not in _STEPS:
                named[part] = value
        return {
            name: float(value)
            for name, value in named.items()
            # A manifest has texts as names, and no checkpoint is the best by NaN.
            if isinstance(name, str) and isinstance(value, float) and math.isfinite(value)
        }

    def _value(self, part: str) -> Any:
        data = self.objects.get(part, {}).get(VALUE)
        if data is None:
            return None
        tensors = {}
        if references(data, path=part):
            alone = self._opened.info.get(f"{part}/{VALUE}")
            # Of a value with tensors in it only what is one number, in a tensor by itself.
            if alone is None or alone.shape.numel() != 1:
                return None
            tensors[VALUE] = self._opened[f"{part}/{VALUE}"].read()
        return _plain(decode(data, tensors=tensors, path=part))

    def _readable(self, part: str) -> dict[str, bytes]:
        found = {}
        for name, data in self._opened.read_encoded(part).items():
            try:
                # Decoded for a try: what fails here would fail at each load.
                if not references(data, path=part):
                    decode(data, tensors={}, path=part)
            # What only a program that executes pickles could read takes nothing else along.
            except CheckpointError as error:
                why = error.message.removeprefix(f"{part} ")
                self.left_out[part if name == VALUE else f"{part}/{name}"] = why
            else:
                found[name] = data
        return found

    def _without_wrappers(self, part: str) -> dict[str, str]:
        """Return how to rename what wrappers put before all names of a model."""
        if self.objects[part]:
            return {}  # they refer to names, too
        names = [info.name for info in self._opened.info.values() if info.part == part]
        prefix = wrapper_prefix(names)
        # The network of a LightningModule is an attribute of it.
        # Only if it is of all names: a loss with weights of its own would lose its place beside.
        inner = f"{prefix}{_MODEL}."
        if _LIGHTNING in self._opened.parts and all(name.startswith(inner) for name in names):
            rest = wrapper_prefix([name.removeprefix(inner) for name in names])
            prefix = inner + rest
        return {f"{prefix}*": "*"} if prefix else {}


def _name_here(part: str, parts: list[str]) -> str:
    """Return what `part` is called in a state here, where no other can be meant."""
    group = next((names for names in ALIKE if part in names), (part,))
    # Two names of one meaning both stay: neither may take the place of the other.
    alone = sum(name in parts for name in group) == 1
    return group[0] if alone else part


# What the Trainer of transformers and accelerate leave beside the weights in a folder.


@dataclass(frozen=True, slots=True)
class _Folder:
    """What is in a folder besides what was opened of it.

    Attributes:
        global_step: what the state of the trainer has under this name; None where there is none.
        numbered: the number in the name of the folder; None where there is none.
        metrics: those that the trainer logged at the step of the checkpoint.
        older: of those that it logged before alone, what says so.
        states: by part the files with the state of the optimizer and of the scheduler, opened.
        others: of what else may hold state, in order, why it was not read.
    """

    global_step: Any = None
    numbered: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    older: Mapping[str, str] = field(default_factory=dict)
    states: Mapping[str, OpenedCheckpoint] = field(default_factory=dict)
    others: Mapping[str, str] = field(default_factory=dict)


@contextmanager
def _folder(
    source: Place, opened: OpenedCheckpoint, storage_options: Mapping[str, Any] | None
) -> Iterator[_Folder]:
    """Give what is beside the files of `opened`: nothing, where `source` is a single file.

    Raises:
        IntegrityError: the state of the trainer, the optimizer or the scheduler is damaged.
        StorageError: the folder cannot be listed or read.
    """
    with closing(locate(source, None, options_for(source, storage_options))) as location:
        yield _Folder() if location.file is not None else _look(location.store, opened)


def _look(store: Store, opened: OpenedCheckpoint) -> _Folder:
    children = store.list_children()
    # What a stock checkpoint has beside its files was read with them.
    known = (*opened.files, *(BESIDE if METADATA in children else ()))
    rest = [name for name in children if name not in known]
    others = {name: _NOT_READ for name in rest if _may_hold_state(name)}
    states = {}
    for part in _STATES:
        named = [name for name in rest if name in [part + suffix for suffix in _STATE_SUFFIXES]]
        if len(named) == 1:
            state = _state(store, named[0], part, opened)
            if isinstance(state, str):
                others[named[0]] = state
            else:
                states[part] = state
                del others[named[0]]
        else:
            others |= {name: f"{' and '.join(named)} are two of one meaning" for name in named}
    said = _trainer_state(store) if _TRAINER_STATE in rest else {}
    numbered = _NUMBERED.fullmatch(store.url.rstrip("/").rpartition("/")[2])
    at = said.get("global_step")
    metrics, older = _metrics(said.get("log_history"), at)
    return _Folder(
        global_step=at,
        numbered=None if numbered is None else int(numbered[1]),
        metrics=metrics,
        older=older,
        states=states,
        others=others,
    )


def _may_hold_state(name: str) -> bool:
    # Of folders, which others save sharded state in, all; but `.git` and the like are none.
    return name.endswith(FILE_SUFFIXES) or (name.endswith("/") and not name.startswith("."))


def _state(store: Store, key: str, part: str, weights: OpenedCheckpoint) -> OpenedCheckpoint | str:
    """Open the file with the state `part`, or return why it does not come along."""
    if part in weights.parts:
        return f"the weights have a part {part} with them"
    try:
        source = open_foreign(store, key)
    # Whole, and of a kind that is not read here: the weights do not need it.
    except IncompatibleError as error:
        return error.message
    if source is None:
        return _NOT_READ
    state = OpenedCheckpoint(source, store=None)
    if state.parts != (part,):
        return f"it holds {', '.join(state.parts)}, and no {part} alone"
    return state


def _trainer_state(store: Store) -> Mapping[str, Any]:
    """Return what the trainer noted of itself.

    Raises:
        IntegrityError: it is no JSON object.
    """
    try:
        # Not as strictly as our own: a loss that is no number is written as NaN there.
        found = json.loads(read_all(store, _TRAINER_STATE, limit_bytes=_TRAINER_STATE_LIMIT_BYTES))
    except (ValueError, RecursionError) as error:
        raise IntegrityError(
            f"{_TRAINER_STATE} in {store.url} is no JSON: {describe(error)}",
            kind=ErrorKind.MALFORMED,
        ) from error
    if not isinstance(found, dict):
        raise IntegrityError(
            f"{_TRAINER_STATE} in {store.url} is no JSON object", kind=ErrorKind.MALFORMED
        )
    return found


def _metrics(history: object, at: object) -> tuple[dict[str, float], dict[str, str]]:
    """Return what the trainer logged at step `at`, and of what it logged before alone what says so.

    By a loss of another step the checkpoint would be the best, or not, in the place of that one.
    """
    found: dict[str, float] = {}
    older: dict[str, str] = {}
    for row in history if isinstance(history, list) else ():
        if not isinstance(row, dict):
            continue
        step = row.get("step")
        for name, value in row.items():
            if name in _COUNTERS or not _is_finite(value):
                continue
            # A flag is equal to 1, and no step.
            if isinstance(at, int | float) and not isinstance(at, bool) and step == at:
                found[name] = float(value)
            else:
                older[name] = f"logged at step {step}, and the checkpoint is of step {at}"
    return found, {name: why for name, why in older.items() if name not in found}


def _is_finite(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        return False
