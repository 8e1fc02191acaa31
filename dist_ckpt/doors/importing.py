"""Checkpoints of other programs into a run, under the names that a state here has."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, SupportsIndex

from dist_ckpt.doors.content import StoredContent
from dist_ckpt.doors.export import open_at
from dist_ckpt.doors.spool import is_saved, save_parts
from dist_ckpt.errors import CheckpointError, UsageError
from dist_ckpt.format.names import plain_step
from dist_ckpt.loading.called_alike import ALIKE
from dist_ckpt.loading.opened import OpenedCheckpoint, place_name
from dist_ckpt.ranks.job import Place
from dist_ckpt.state.decoding import decode, references
from dist_ckpt.state.module_state import wrapper_prefix
from dist_ckpt.state.value_fit import VALUE
from dist_ckpt.storage.resolve import check_options_taken, options_for

_MODEL = "model"
_METRICS = "metrics"
# What says how far a training was, the best first.
# A step is finer than an epoch: where both are there, the step says more.
# Of the two that are called a step, the other one may count those of an epoch.
_STEPS = ("global_step", "step", "iteration", "iter", "epoch")
_LIGHTNING = "pytorch-lightning_version"


@dataclass(frozen=True, slots=True)
class ImportReport:
    """What became of a checkpoint of another program.

    Attributes:
        url: the run.
        step: under which step it is committed.
        parts: the new name of each part by the one that it had.
        tensors: how many names there are.
        metrics: those that are stored with it.
        left_out: values that cannot be read without executing what is in the file.
        was_there: whether it had been committed before, bit for bit the same.
    """

    url: str
    step: int
    parts: Mapping[str, str]
    tensors: int
    metrics: Mapping[str, float]
    left_out: tuple[str, ...] = ()
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
        lines += [f"  left out, as it cannot be read: {name}" for name in self.left_out]
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
    lose what DDP, `torch.compile` and Lightning put before them. The call takes the run over. If it
    is cut off the same call does the rest.

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
            `iteration` or `epoch`, and 0 where it says nothing.
        metrics: numbers by name, besides those that are found: floats at the top, and a dict
            `metrics`.
        storage_options: for each of the two places that takes any, as for `export`.

    Returns:
        What was committed.

    Raises:
        NotFound: there is nothing that can be read.
        AlreadyExists: the step is committed, and is something else.
        IntegrityError: what is there is malformed.
        UsageError: it is a checkpoint of dist_ckpt, or an argument is malformed.
        StorageError: the run, or the folder for temporary files, is full or failed.
    """
    check_options_taken(storage_options, source, url)
    with open_at(source, None, {"storage_options": storage_options}) as opened:
        # What it had besides (who wrote it, its digests) would be lost by being brought in anew.
        if opened.manifest is not None:
            raise UsageError(
                f"{opened.where} was committed by dist_ckpt already: there is nothing to import"
            )
        to = options_for(url, storage_options)
        return _import(_Reading(opened), url, step, metrics or {}, storage_options=to)


def _import(
    reading: _Reading,
    url: Place,
    step: SupportsIndex | None,
    metrics: Mapping[str, float],
    *,
    storage_options: Mapping[str, Any] | None,
) -> ImportReport:
    given = storage_options
    number = reading.step() if step is None else plain_step(step)
    numbers = {**reading.metrics(), **metrics}
    contents = {new: reading.content(old, new) for old, new in reading.parts.items()}
    objects = {new: reading.objects[old] for old, new in reading.parts.items()}
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
    tensors = sum(len(content.items) for content in contents.values() if content is not None)
    left_out = tuple(reading.left_out)
    return ImportReport(
        place_name(url, given), number, reading.parts, tensors, numbers, left_out, was_there
    )


class _Reading:
    """What there is of a checkpoint of another program, and what it is called here.

    Attributes:
        parts: the name here of each part.
        objects: the encoded values of each part that can be read.
        left_out: those that cannot.
    """

    def __init__(self, opened: OpenedCheckpoint) -> None:
        self._opened = opened
        self.left_out: list[str] = []
        self.objects = {part: self._readable(part) for part in opened.parts}
        self._with_tensors = {info.part for info in opened.info.values()}
        # A part whose one value cannot be read, and without tensors, leaves nothing to save.
        kept = [p for p in opened.parts if self.objects[p] or p in self._with_tensors]
        self.parts = {part: _name_here(part, kept) for part in kept}

    def content(self, old: str, new: str) -> StoredContent | None:
        """Return the tensors of a part, those of a model under the names of the bare model."""
        if old not in self._with_tensors:
            return None
        # Only a model: who wrapped it put this before names of weights alone.
        rename = self._without_wrappers(old) if new == _MODEL else {}
        return StoredContent(self._opened, old, rename=rename)

    def step(self) -> int:
        """Return how far the training was, 0 where nothing says it."""
        if self._opened.step:
            return self._opened.step
        for name in _STEPS:
            value = self._value(name)
            # A flag is an int to Python too, and says nothing of how far a training was.
            if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
                return value
        return 0

    def metrics(self) -> dict[str, float]:
        """Return the numbers that are no counters: floats at the top, and those of `metrics`."""
        found = self._value(_METRICS)
        named = dict(found) if isinstance(found, dict) else {}
        for part in self.parts:
            value = self._value(part)
            if isinstance(value, float):
                named[part] = value
        return {
            name: float(value)
            for name, value in named.items()
            # A manifest has texts as names, and no checkpoint is the best by NaN.
            if isinstance(name, str) and isinstance(value, float) and math.isfinite(value)
        }

    def _value(self, part: str) -> Any:
        data = self.objects.get(part, {}).get(VALUE)
        # A value with a tensor in it is no number, and decoding it would need the tensor.
        if data is None or references(data, path=part):
            return None
        return decode(data, tensors={}, path=part)

    def _readable(self, part: str) -> dict[str, bytes]:
        found = {}
        for name, data in self._opened.read_encoded(part).items():
            try:
                # Decoded for a try: what fails here would fail at each load.
                if not references(data, path=part):
                    decode(data, tensors={}, path=part)
            # What only a program that executes pickles could read takes nothing else along.
            except CheckpointError:
                self.left_out.append(part if name == VALUE else f"{part}/{name}")
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
