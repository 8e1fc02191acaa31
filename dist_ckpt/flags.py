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
import logging
import os
import signal
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields
from functools import reduce
from importlib import import_module
from operator import or_
from pathlib import Path
from typing import Any, TypeAlias

from dist_ckpt import policy
from dist_ckpt.errors import UsageError, describe, near
from dist_ckpt.policy import SavePolicy
from dist_ckpt.repository import keep
from dist_ckpt.repository.keep import KeepPolicy
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.training.start import Start

__all__ = ["ALIASES", "BEST", "NEWEST", "PRESETS", "Flags", "Source", "add_arguments", "parse"]

_log = logging.getLogger("dist_ckpt")

NEWEST = "newest"
"""What `--resume` without a value stands for."""

BEST = "best"
"""The value of `--resume` for the best checkpoint; a folder of that name is `./best`."""

DEFAULT_SECONDS = 1800
"""How often is saved where neither a flag nor the program says when."""

PRESETS: Mapping[str, Mapping[str, Any]] = {
    "standard": {"checkpoint_every_seconds": 1800, "keep_last": 3},
    "preemptible": {
        "checkpoint_every_seconds": 600,
        "checkpoint_on_signal": "SIGTERM",
        "keep_last": 2,
    },
    "archive": {"checkpoint_every_seconds": 3600, "keep_last": -1},
}
"""What `--checkpoint-preset` stands for; a flag that is given itself counts instead."""

_SWITCHES = (
    "auto_resume",
    "reset_optimizer",
    "discard_newer",
    "no_save_last",
    "no_async",
    "checkpoint_exclusive",
    "checkpoint_node_local",
)
# What a Checkpointer is given as an option, by the flag.
_OPTIONS = {
    "checkpoint_when_failed": "when_failed",
    "checkpoint_max_failures": "max_failures",
    "checkpoint_exclusive": "exclusive",
    "checkpoint_node_local": "node_local",
}
_TEXTS = (
    "checkpoint_dir",
    "pretrained_checkpoint",
    "best_metric",
    "checkpoint_on_signal",
    "checkpoint_on_notice",
    "checkpoint_when_failed",
    "checkpoint_preset",
)


@dataclass(frozen=True, slots=True)
class Flags:
    """What the flags say; see `add_arguments` for each.

    Raises:
        UsageError: a value is malformed, or two flags contradict each other.
    """

    checkpoint_dir: str = ""
    checkpoint_interval: int | None = None
    checkpoint_every_seconds: float | None = None
    checkpoint_every_epochs: int | None = None
    checkpoint_last_step: int | None = None
    checkpoint_on_signal: str | None = None
    checkpoint_on_notice: str | None = None
    checkpoint_grace_seconds: float | None = None
    checkpoint_exit_code: int | None = None
    checkpoint_when_failed: str | None = None
    checkpoint_max_failures: int | None = None
    checkpoint_exclusive: bool = False
    checkpoint_node_local: bool = False
    checkpoint_preset: str | None = None
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
            # A text such as "false" is true to Python.
            if not isinstance(getattr(self, name), bool):
                raise UsageError(f"{flag_of(name)} is on or off, not {getattr(self, name)!r}")
        for name in _TEXTS:
            value = getattr(self, name)
            if value not in (None, "") and (not isinstance(value, str) or not value.strip()):
                raise UsageError(f"{flag_of(name)} takes text, not {value!r}")
        # `resume: true` of a file is the newest by now, see `_of_mapping`.
        if not isinstance(self.resume, str | int | None) or isinstance(self.resume, bool):
            raise UsageError(f"--resume takes a step or a path, not {self.resume!r}")
        if self.checkpoint_preset not in (None, *PRESETS):
            raise UsageError(
                f"--checkpoint-preset is one of {', '.join(PRESETS)}, not "
                f"{self.checkpoint_preset!r}"
            )
        # The first alone: what is wrong besides may be gone with it.
        for reason in _contradictions(self):
            raise UsageError(reason)
        # What is malformed is found now, and not at the first save.
        self.when()
        self.keep()

    @property
    def resume_from(self) -> str | int | None:
        """What `--resume` names: a step, a path, `NEWEST`, `BEST`, or None without the flag."""
        text = self.resume
        # As `dist-ckpt` calls it.
        if text == "latest":
            return NEWEST
        # `isdecimal` alone takes the digits of every script.
        if isinstance(text, str) and text.isascii() and text.isdecimal():
            return int(text)
        return text

    @property
    def criterion(self) -> Criterion | None:
        """What `--best-metric` says."""
        return None if self.best_metric is None else Criterion.parse(self.best_metric)

    @property
    def start(self) -> Start:
        """How the training begins."""
        place = self.resume_from
        if place is None and self.auto_resume:
            return Start(weights=self.pretrained_checkpoint)
        if place is None:
            # Neither was said: it begins, and a run that has checkpoints is refused,
            # so that no forgotten flag starts over in it.
            return Start(
                which="none",
                discard_newer=self.discard_newer,
                new_run="without --resume or --auto-resume this",
                weights=self.pretrained_checkpoint,
            )
        named = place if isinstance(place, str) and place not in (NEWEST, BEST) else None
        return Start(
            which="best" if place == BEST else "newest",
            step=place if isinstance(place, int) else None,
            place=named,
            discard_newer=self.discard_newer,
            # Who says --resume means to go on: a mistyped place must not begin a new run.
            must_exist=True,
            new_run="" if named is None else f"--resume {place}",
            reset_optimizer=self.reset_optimizer,
        )

    def when_besides(self, other: SavePolicy | None) -> SavePolicy:
        """Return when to save, by the flags or by `other`, or by a default that is said once."""
        own = self.when()
        if other is not None:
            return own | other
        if policy.members(own):
            return own
        # A training of a day without a save, for want of a flag, is what nobody means.
        _log.warning(
            "no flag says when to save (--checkpoint-interval STEPS is the most common): every %d "
            "minutes by the clock, and the last step; a program that saves by itself says so by "
            "when=policy.never()",
            DEFAULT_SECONDS // 60,
        )
        return policy.every(seconds=DEFAULT_SECONDS)

    def when(self) -> SavePolicy:
        """Return when to save."""
        ending: dict[str, Any] = {
            "grace_seconds": self.checkpoint_grace_seconds,
            "exit_code": self.checkpoint_exit_code,
        }
        makers: dict[str, Callable[[Any], SavePolicy]] = {
            "checkpoint_interval": policy.every,
            "checkpoint_every_seconds": lambda seconds: policy.every(seconds=seconds),
            "checkpoint_every_epochs": lambda epochs: policy.every(epochs=epochs),
            "checkpoint_last_step": policy.last,
            "checkpoint_on_signal": lambda names: policy.on_signal(*_signals(names), **ending),
            "checkpoint_on_notice": lambda place: policy.on_notice(place, **ending),
        }
        # Nothing beside others, and the answer where no flag says when.
        policies = [policy.never()]
        for name, make in makers.items():
            value = self._said(name)
            if value is not None:
                policies.append(_named(name, make, value))
        if self.criterion is not None:
            policies.append(policy.better(self.criterion.metric, mode=self.criterion.mode))
        return reduce(or_, policies)

    def options(self) -> dict[str, Any]:
        """Return the options of a Checkpointer that a flag names, and no others."""
        given = {option: getattr(self, name) for name, option in _OPTIONS.items()}
        # By identity: 0 is a value that was given, and one that may be refused.
        return {
            option: value
            for option, value in given.items()
            if value is not None and value is not False
        }

    def keep(self) -> KeepPolicy | None:
        """Return what to keep, None for everything."""
        policies = []
        last = self._said("keep_last")
        # All are kept, so whatever the best are adds nothing.
        if last == -1:
            return None
        if last is not None:
            policies.append(_named("keep_last", keep.latest, last))
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

    def _said(self, name: str) -> Any:
        """Return the value of a flag, or what the preset says in its place."""
        own = getattr(self, name)
        # A flag counts before the preset, also with a value that is refused.
        if own is not None or self.checkpoint_preset is None:
            return own
        # Of two ways to say how often, the one that was given counts.
        if name.startswith("checkpoint_every") and self._says_how_often:
            return None
        return PRESETS[self.checkpoint_preset].get(name)

    @property
    def _says_how_often(self) -> bool:
        often = ("checkpoint_interval", "checkpoint_every_seconds", "checkpoint_every_epochs")
        return any(getattr(self, name) is not None for name in often)


def _contradictions(flags: Flags) -> Iterator[str]:
    if not flags.checkpoint_dir:
        names = (field.name for field in fields(flags))
        given = [flag_of(name) for name in names if getattr(flags, name) not in (None, False, "")]
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
    says_end = (flags.checkpoint_grace_seconds, flags.checkpoint_exit_code) != (None, None)
    # The preset may be what heeds a signal.
    preset = PRESETS.get(flags.checkpoint_preset or "", {})
    if says_end and not (
        flags.checkpoint_on_signal or flags.checkpoint_on_notice or "checkpoint_on_signal" in preset
    ):
        yield (
            "--checkpoint-grace-seconds and --checkpoint-exit-code say what follows a signal or a "
            "notice: give --checkpoint-on-signal or --checkpoint-on-notice with them"
        )
    if flags.checkpoint_max_failures is not None and flags.checkpoint_when_failed != "warn":
        yield "--checkpoint-max-failures does nothing without --checkpoint-when-failed warn"
    if flags.keep_best is not None and flags.best_metric is None:
        yield "--keep-best needs --best-metric: say by which metric the best is chosen"


def _named(name: str, make: Callable[[Any], Any], value: object) -> Any:
    try:
        return make(value)
    except UsageError as error:
        # The policy speaks of its own arguments, and who reads this has typed a flag.
        raise UsageError(f"{flag_of(name)}: {error.message}") from error


def _signals(names: str) -> Iterator[signal.Signals]:
    """Yield the signals of a list such as `SIGTERM,USR1`."""
    for name in names.split(","):
        wanted = name.strip().upper()
        # With the prefix or without, as `kill` takes them.
        full = wanted if wanted.startswith("SIG") else f"SIG{wanted}"
        known = signal.Signals.__members__
        if full not in known:
            raise UsageError(f"{name.strip()!r} is no signal{near(full, known)}")
        yield known[full]


def flag_of(name: str) -> str:
    """Return a flag as the help shows it."""
    return f"--{name.replace('_', '-')}"


# The flags as they are read: from a command line, a YAML file or a dict.


Source: TypeAlias = "Flags | argparse.Namespace | Mapping[str, Any] | str | os.PathLike[str]"
"""Flags, parsed arguments, a dict, or the path of a YAML file."""

_SECTION = "checkpoint"
_HELP: Mapping[str, tuple[dict[str, Any], str]] = {
    "checkpoint_dir": ({"metavar": "URL"}, "where the checkpoints of this run are: path or URL"),
    "checkpoint_interval": ({"metavar": "STEPS", "type": int}, "save every STEPS steps"),
    "checkpoint_every_seconds": (
        {"metavar": "SECONDS", "type": float},
        "save every SECONDS, by the clock of rank 0",
    ),
    "checkpoint_every_epochs": (
        {"metavar": "N", "type": int},
        "save at the end of every N epochs",
    ),
    "checkpoint_last_step": ({"metavar": "STEP", "type": int}, "save after STEP, the last one"),
    "checkpoint_on_signal": (
        {"metavar": "SIGNALS", "nargs": "?", "const": "SIGTERM"},
        "save at the next step when a signal arrives: SIGTERM, or those named, joined by commas",
    ),
    "checkpoint_on_notice": (
        {"metavar": "PLACE"},
        "save at the next step when PLACE, a file or a URL of a cloud, says that this machine goes",
    ),
    "checkpoint_grace_seconds": (
        {"metavar": "SECONDS", "type": float},
        "how long after the signal or notice the job is ended by force",
    ),
    "checkpoint_exit_code": (
        {"metavar": "STATUS", "type": int},
        "ckpt.exit_code after a signal or notice, in place of 128 and the number of the signal",
    ),
    "checkpoint_when_failed": (
        {"metavar": "raise|warn", "choices": ["raise", "warn"]},
        "whether a save that failed ends the training, or is warned of",
    ),
    "checkpoint_max_failures": (
        {"metavar": "N", "type": int},
        "with --checkpoint-when-failed warn: how many failures in a row end it all the same",
    ),
    "checkpoint_exclusive": (
        {"action": "store_true"},
        "start only where no other job is at work on the run",
    ),
    "checkpoint_node_local": (
        {"action": "store_true"},
        "each host has a disk of its own at the place of the checkpoints, that no other host sees",
    ),
    "checkpoint_preset": (
        {"metavar": "NAME", "choices": list(PRESETS)},
        "when to save and what to keep, where no other flag says it",
    ),
    "checkpoint_config": (
        {"metavar": "FILE"},
        "a YAML file with these flags, of which those on the command line come first",
    ),
    "keep_last": (
        {"metavar": "N", "type": int},
        "keep the newest N checkpoints, with -1 all of them",
    ),
    "keep_best": ({"metavar": "N", "type": int}, "keep the best N by --best-metric"),
    "best_metric": (
        {"metavar": "NAME[:max]"},
        "the metric of the best; a save is made when it gets better, smaller unless :max follows",
    ),
    "resume": (
        {"metavar": "STEP|best|PATH", "nargs": "?", "const": NEWEST},
        "go on from the newest checkpoint, STEP, the best, or PATH: a run or one of its steps",
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

ALIASES: Mapping[str, str] = {
    "checkpoint_path": "checkpoint_dir",
    "resume_from": "resume",
    "resume_from_checkpoint": "resume",
    "save_steps": "checkpoint_interval",
    "save_total_limit": "keep_last",
    "keep_last_n_checkpoints": "keep_last",
}
"""What other trainers call a flag, and the flag."""


def add_arguments(parser: argparse.ArgumentParser, *, aliases: bool = True) -> None:
    """Add the flags to `parser`, as a group of their own.

    Each is taken with underscores, too; the help shows hyphens.

    Args:
        parser: which.
        aliases: whether the names of other trainers (`ALIASES`) are taken as well, but for those
            that `parser` has already. False for a script that adds such a flag of its own later.
    """
    group = parser.add_argument_group("checkpoints")
    # Asked before ours are added, among which an alias may be, too.
    taken = set(parser._option_string_actions)  # noqa: SLF001  argparse has no other way to ask
    spelled = {name: name for name in _HELP} | (dict(ALIASES) if aliases else {})
    for spelling, name in spelled.items():
        options, text = _HELP[name]
        shown = spelling == name
        # Where a name has no underscore both are the same, which argparse refuses twice.
        for flag in dict.fromkeys((flag_of(spelling), f"--{spelling}")):
            # An alias gives way to a flag of the script; for one of ours argparse fails.
            if not shown and flag in taken:
                continue
            if shown and flag == flag_of(name):
                group.add_argument(flag, dest=name, help=text, **options)
            else:
                # The default is set by the first spelling.
                hidden = {**options, "help": argparse.SUPPRESS, "default": argparse.SUPPRESS}
                group.add_argument(flag, dest=name, **hidden)


def parse(source: Source) -> Flags:
    """Return what `source` says.

    Args:
        source: flags, which come back as they are; arguments parsed with `add_arguments` (others
            among them are passed over), above the file that `--checkpoint-config` names; a dict by
            the names of the flags; or the path of a YAML file, of which the section `checkpoint`
            counts if there is one.

    Raises:
        UsageError: an unknown name, a malformed value, or a contradiction; the reason is said.
    """
    if isinstance(source, Flags):
        return source
    if isinstance(source, argparse.Namespace):
        known = {field.name for field in fields(Flags)}
        given = {
            name: value
            for name, value in vars(source).items()
            # What is left at its default is left out, or a file could never say anything.
            if name in known and value is not None and value is not False
        }
        file = getattr(source, "checkpoint_config", None)
        return Flags(**(_under(given, _of_file(Path(file))) if file else given))
    if isinstance(source, Mapping):
        return Flags(**_of_mapping(source, "the checkpoint flags"))
    if not isinstance(source, str | os.PathLike):
        raise UsageError(
            "checkpoint flags are parsed arguments, a dict, or the path of a YAML file, not "
            f"{source!r}"
        )
    return Flags(**_of_file(Path(source)))


def _under(given: dict[str, Any], file: dict[str, Any]) -> dict[str, Any]:
    """Return what was given, and what the file says besides."""
    # These say one thing together, how to begin, and may contradict one another.
    begin = {"resume", "auto_resume", "pretrained_checkpoint"}
    passed_over = begin if given.keys() & begin else set()
    return {name: each for name, each in file.items() if name not in passed_over} | given


def _of_file(path: Path) -> dict[str, Any]:
    try:
        # Of all that is here, only a file needs it.
        yaml = import_module("yaml")
    except ImportError as error:
        raise UsageError(
            f"{path} can be read where PyYAML is installed: pip install 'dist_ckpt[yaml]'; "
            "parsed arguments and dicts need nothing"
        ) from error
    try:
        # Plain values alone: no tag in the file makes an object.
        content = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"{path} cannot be read as YAML: {describe(error)}") from error
    section = content.get(_SECTION, content) if isinstance(content, Mapping) else content
    if not isinstance(section, Mapping):
        raise UsageError(f"{path} has no section {_SECTION!r} with flags in it")
    return _of_mapping(section, str(path))


def _of_mapping(section: Mapping[str, Any], where: str) -> dict[str, Any]:
    known = [field.name for field in fields(Flags)]
    values: dict[str, Any] = {}
    for spelled, value in section.items():
        name = str(spelled).replace("-", "_")
        name = ALIASES.get(name, name)
        if name not in known:
            hint = near(name, known) or f"; known are {', '.join(known)}"
            raise UsageError(f"{where}: unknown name {spelled!r}{hint}")
        # Which of the two is meant nobody knows.
        if name in values:
            raise UsageError(f"{where}: {name!r} is there in two spellings")
        if value is not None:  # an empty entry says nothing
            values[name] = value
    if values.get("resume") is True:
        values["resume"] = NEWEST  # what the flag is without a value
    # As a switch that is off.
    if values.get("resume") is False:
        del values["resume"]
    return values
