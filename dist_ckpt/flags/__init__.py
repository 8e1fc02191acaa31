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
import os
from collections.abc import Mapping
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any, TypeAlias

from dist_ckpt.errors import UsageError, describe, near
from dist_ckpt.flags.values import BEST, NEWEST, PRESETS, Flags, flag_of

__all__ = ["ALIASES", "BEST", "NEWEST", "PRESETS", "Flags", "Source", "add_arguments", "parse"]

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
    taken = set(parser._option_string_actions)  # noqa: SLF001  argparse has no other way to ask
    spelled = {name: name for name in _HELP} | (dict(ALIASES) if aliases else {})
    for spelling, name in spelled.items():
        options, text = _HELP[name]
        shown = spelling == name
        for flag in dict.fromkeys((flag_of(spelling), f"--{spelling}")):
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
        if name in values:
            raise UsageError(f"{where}: {name!r} is there in two spellings")
        if value is not None:  # an empty entry says nothing
            values[name] = value
    if values.get("resume") is True:
        values["resume"] = NEWEST  # what the flag is without a value
    if values.get("resume") is False:
        del values["resume"]
    return values
