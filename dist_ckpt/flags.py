"""Checkpoint flags for training scripts: on the command line, in a YAML file, or in a dict.

```python
import argparse

import dist_ckpt
import torch

parser = argparse.ArgumentParser()
dist_ckpt.flags.add_arguments(parser)
args = parser.parse_args(["--checkpoint-dir", "runs/17", "--checkpoint-interval", "50"])
state = {"model": torch.nn.Linear(4, 1)}
with dist_ckpt.Checkpointer.from_args(args, state) as ckpt:
    for step in range(ckpt.restore() + 1, 121):  # starts as the flags say
        ckpt.step(step)
```

`add_arguments` gives each flag its meaning; underscores do as well as hyphens. What contradicts
itself is refused, with the reason, before anything is read.
"""

from __future__ import annotations

import argparse
import difflib
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any, TypeAlias

from dist_ckpt import policy
from dist_ckpt.errors import UsageError, describe
from dist_ckpt.policy import SavePolicy
from dist_ckpt.repository import keep
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.training.start import Start

Source: TypeAlias = "Flags | argparse.Namespace | Mapping[str, Any] | str | os.PathLike[str]"
"""Flags, parsed arguments, a dict, or the path of a YAML file."""

_log = logging.getLogger("dist_ckpt")

NEWEST = "newest"
"""What `--resume` without a value stands for."""

_SECTION = "checkpoint"
_SWITCHES = ("auto_resume", "reset_optimizer", "discard_newer", "no_save_last", "no_async")
_HELP: Mapping[str, tuple[dict[str, Any], str]] = {
    "checkpoint_dir": ({"metavar": "URL"}, "where the checkpoints of this run are: path or URL"),
    "checkpoint_interval": ({"metavar": "STEPS", "type": int}, "save every STEPS steps"),
    "checkpoint_every_seconds": (
        {"metavar": "SECONDS", "type": float},
        "save every SECONDS, by the clock of rank 0",
    ),
    "keep_last": ({"metavar": "N", "type": int}, "keep the newest N checkpoints"),
    "keep_best": ({"metavar": "N", "type": int}, "keep the best N by --best-metric"),
    "best_metric": (
        {"metavar": "NAME[:max]"},
        "the metric of the best; a save is made when it gets better, smaller unless :max follows",
    ),
    "resume": (
        {"metavar": "STEP|PATH", "nargs": "?", "const": NEWEST},
        "go on from the newest checkpoint, from STEP, or from PATH: a run or one of its steps",
    ),
    "auto_resume": (
        {"action": "store_true"},
        "go on from the newest good checkpoint, or begin when there is none",
    ),
    "pretrained_checkpoint": (
        {"metavar": "PATH"},
        "begin with the weights of the model in PATH, and nothing else of it",
    ),
    "reset_optimizer": (
        {"action": "store_true"},
        "with --resume: leave optimizer and scheduler as the script made them",
    ),
    "discard_newer": (
        {"action": "store_true"},
        "with --resume STEP: give up the newer checkpoints; without --resume: all of the run",
    ),
    "no_save_last": (
        {"action": "store_true"},
        "do not save the last step at the end, unless it is due",
    ),
    "no_async": ({"action": "store_true"}, "wait for each save until it is committed"),
}


@dataclass(frozen=True, slots=True)
class Flags:
    """What the flags say; see `add_arguments` for each.

    Raises:
        UsageError: a value is malformed, or two flags contradict each other.
    """

    checkpoint_dir: str = ""
    checkpoint_interval: int | None = None
    checkpoint_every_seconds: float | None = None
    keep_last: int | None = None
    keep_best: int | None = None
    best_metric: str | None = None
    resume: str | int | None = None
    auto_resume: bool = False
    pretrained_checkpoint: str | None = None
    reset_optimizer: bool = False
    discard_newer: bool = False
    no_save_last: bool = False
    no_async: bool = False

    def __post_init__(self) -> None:
        for name in _SWITCHES:
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{_flag(name)} is on or off, not {getattr(self, name)!r}")
        for name in ("checkpoint_dir", "pretrained_checkpoint", "best_metric"):
            value = getattr(self, name)
            if value not in (None, "") and (not isinstance(value, str) or not value.strip()):
                raise UsageError(f"{_flag(name)} takes text, not {value!r}")
        if not isinstance(self.resume, str | int | None) or isinstance(self.resume, bool):
            raise UsageError(f"--resume takes a step or a path, not {self.resume!r}")
        for reason in _contradictions(self):
            raise UsageError(reason)
        # What is malformed is found now, and not at the first save.
        self.when()
        self.keep()

    @property
    def resume_from(self) -> str | int | None:
        """What `--resume` names: a step, a path, `NEWEST`, or None without the flag."""
        text = self.resume
        if isinstance(text, str) and text.isascii() and text.isdecimal():
            return int(text)
        return text

    @property
    def criterion(self) -> Criterion | None:
        """What `--best-metric` says."""
        if self.best_metric is None:
            return None
        name, colon, mode = self.best_metric.rpartition(":")
        if colon and mode in ("min", "max"):
            return Criterion(name, "max" if mode == "max" else "min")
        return Criterion(self.best_metric)

    @property
    def start(self) -> Start:
        """How the training begins."""
        place = self.resume_from
        if place is None and self.auto_resume:
            return Start(weights=self.pretrained_checkpoint)
        if place is None:
            return Start(
                which="none",
                discard_newer=self.discard_newer,
                new_run="without --resume or --auto-resume this",
                weights=self.pretrained_checkpoint,
            )
        named = place if isinstance(place, str) and place != NEWEST else None
        return Start(
            step=place if isinstance(place, int) else None,
            place=named,
            discard_newer=self.discard_newer,
            must_exist=True,
            new_run="" if named is None else f"--resume {place}",
            reset_optimizer=self.reset_optimizer,
        )

    def when_besides(self, other: SavePolicy | None) -> SavePolicy | None:
        """Return when to save, by the flags or by `other`; None when neither says anything."""
        own = self.when()
        if other is not None:
            return own | other
        if policy.members(own):
            return own
        if self.auto_resume:
            _log.warning(
                "--auto-resume without --checkpoint-interval, --checkpoint-every-seconds or "
                "--best-metric: nothing is saved for a restart to go on from, unless the program "
                "itself calls save()"
            )
        return None

    def when(self) -> SavePolicy:
        """Return when to save."""
        policies = [policy.never()]
        if self.checkpoint_interval is not None:
            policies.append(_named("checkpoint_interval", policy.every, self.checkpoint_interval))
        if self.checkpoint_every_seconds is not None:
            seconds = self.checkpoint_every_seconds
            policies.append(
                _named("checkpoint_every_seconds", lambda each: policy.every(seconds=each), seconds)
            )
        if self.criterion is not None:
            policies.append(policy.better(self.criterion.metric, mode=self.criterion.mode))
        return reduce(or_, policies)

    def keep(self) -> KeepPolicy | None:
        """Return what to keep, None for everything."""
        policies = []
        if self.keep_last is not None:
            policies.append(_named("keep_last", keep.latest, self.keep_last))
        if self.keep_best is not None and self.criterion is not None:
            best = self.criterion
            policies.append(
                _named(
                    "keep_best",
                    lambda count: keep.best(best.metric, count, mode=best.mode),
                    self.keep_best,
                )
            )
        return reduce(keep.either, policies) if policies else None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags to `parser`, as a group of their own.

    Each is taken with underscores, too; the help shows hyphens.
    """
    group = parser.add_argument_group("checkpoints")
    for name, (options, text) in _HELP.items():
        group.add_argument(_flag(name), dest=name, help=text, **options)
        if "_" in name:
            # The default is set by the other spelling.
            group.add_argument(
                f"--{name}",
                dest=name,
                help=argparse.SUPPRESS,
                default=argparse.SUPPRESS,
                **options,
            )


def parse(source: Source) -> Flags:
    """Return what `source` says.

    Args:
        source: flags, which come back as they are; arguments parsed with `add_arguments` (others
            among them are passed over); a dict by the names of the flags; or the path of a YAML
            file, of which the section `checkpoint` counts if there is one.

    Raises:
        UsageError: an unknown name, a malformed value, or a contradiction; the reason is said.
    """
    if isinstance(source, Flags):
        return source
    if isinstance(source, argparse.Namespace):
        known = {field.name for field in fields(Flags)}
        given = {name: value for name, value in vars(source).items() if name in known}
        return Flags(**{name: value for name, value in given.items() if value is not None})
    if isinstance(source, Mapping):
        return _from_mapping(source, "the checkpoint flags")
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            "checkpoint flags are parsed arguments, a dict, or the path of a YAML file, not "
            f"{source!r}"
        )
    return _from_file(Path(source))


def _from_file(path: Path) -> Flags:
    try:
        # Of all that is here, only a file needs it.
        yaml = import_module("yaml")
    except ImportError as error:
        raise UsageError(
            f"{path} can be read where PyYAML is installed: pip install 'dist_ckpt[yaml]'; "
            "parsed arguments and dicts need nothing"
        ) from error
    try:
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {describe(error)}") from error
    section = content.get(_SECTION, content) if isinstance(content, Mapping) else content
    if not isinstance(section, Mapping):
        raise UsageError(f"{path} has no section {_SECTION!r} with flags in it")
    return _from_mapping(section, str(path))


def _from_mapping(section: Mapping[str, Any], where: str) -> Flags:
    known = [field.name for field in fields(Flags)]
    values: dict[str, Any] = {}
    for spelled, value in section.items():
        name = str(spelled).replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
            raise UsageError(f"{where}: unknown name {spelled!r}; {hint}")
        if name in values:
            raise UsageError(f"{where}: {name!r} is there in both spellings")
        if value is not None:  # an empty entry says nothing
            values[name] = value
    if values.get("resume") is True:
        values["resume"] = NEWEST  # what the flag is without a value
    if values.get("resume") is False:
        del values["resume"]
    return Flags(**values)


def _contradictions(flags: Flags) -> Iterator[str]:
    if not flags.checkpoint_dir:
        given = [_flag(name) for name in _HELP if getattr(flags, name) not in (None, False, "")]
        yield "--checkpoint-dir is missing: say where the checkpoints of this run go" + (
            f" ({', '.join(given)} without it would do nothing)" if given else ""
        )
    if flags.resume is not None and flags.auto_resume:
        yield (
            "--resume fails without a checkpoint and --auto-resume begins anew: they contradict "
            "each other, give one"
        )
    if flags.resume is not None and flags.pretrained_checkpoint is not None:
        yield (
            "--resume goes on with the weights of the run and --pretrained-checkpoint begins with "
            "others: they contradict each other, give one"
        )
    if flags.reset_optimizer and flags.resume is None:
        yield (
            "--reset-optimizer with --auto-resume would throw the optimizer away at every restart: "
            "give --resume"
            if flags.auto_resume
            else "--reset-optimizer does nothing without --resume: a new run has a new optimizer"
        )
    if flags.discard_newer and (flags.auto_resume or flags.resume == NEWEST):
        yield (
            "--discard-newer gives up what is newer than the step to go on from, and nothing is "
            "newer than the newest: give --resume STEP with it, or neither --resume nor "
            "--auto-resume to begin anew"
        )
    if flags.keep_best is not None and flags.best_metric is None:
        yield "--keep-best needs --best-metric: say by which metric the best is chosen"


def _named(name: str, make: Callable[[Any], Any], value: object) -> Any:
    try:
        return make(value)
    except UsageError as error:
        raise UsageError(f"{_flag(name)}: {error.message}") from error


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"
