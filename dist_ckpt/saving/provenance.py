"""What is said of a checkpoint beside its state: metrics, and what made it."""

from __future__ import annotations

import logging
import math
import os
import re
import shlex
import stat
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, SupportsFloat, TypeAlias

import torch

from dist_ckpt import events
from dist_ckpt.errors import UsageError, describe, without_secrets
from dist_ckpt.format.names import is_text
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.ranking import Criterion
from dist_ckpt.saving.messages import Report

_log = logging.getLogger("dist_ckpt")

# A manifest is for people, and stays small however many hosts there were.
_MOST_HOSTS = 64
_MASK = "***"
_ARGUMENT_CHARS = 400
_OPTIONS = 200
_SECRET = re.compile(
    r"(?:^|[-_.])(?:api|access|secret|private|auth|signing|encryption)[-_.]?key(?:$|[-_.])"
    r"|(?:^|[-_.])key(?:$)"
    r"|token|password|passwd|passphrase|secret|credential|(?:^|[-_.])(?:pw|pwd|pat)$",
    re.IGNORECASE,
)
# What such words are part of, but which people set openly.
_OPEN = re.compile(
    r"tokens$|token[-_]?(?:count|ids?|s|budget|limit|length|per)|tokenizer|max[-_]token|pad[-_]token"
    r"|(?:bos|eos|unk|mask|special)[-_]token",
    re.IGNORECASE,
)
# As they are handed out: of GitHub, GitLab, Hugging Face, OpenAI, Slack, AWS, and JSON web tokens.
_KNOWN_SECRET = re.compile(
    r"\b(?:gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}"
    r"|xox[abpr]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
)
# The way programs name their options; a password that begins with two dashes seldom looks so.
_LONG = re.compile(r"--[A-Za-z][a-z0-9]*(?:[A-Z][a-z0-9]+|[-_.][a-z0-9]*)*", re.ASCII)
_SHORT = re.compile(r"-[A-Za-z]", re.ASCII)
_NAME_CHARS = 40
_NAME_DIGITS = 4
_MODULE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*(?:\.[A-Za-z_][A-Za-z0-9_]*)*", re.ASCII)
_INTERPRETER = re.compile(r"(?:python|pypy)[0-9.]*t?(?:\.exe)?")
_CODE = re.compile(r"-[A-Za-z]*c", re.ASCII)
_SCRIPT_SUFFIXES = (".py", ".pyz", ".ipynb")
# Of the interpreter itself: those that take the next word.
_TAKING = frozenset({"-W", "-X", "--check-hash-based-pycs"})


class Provenance:
    """Gathers what is said of a job in its manifests. Nothing of it can fail a save.

    Args:
        command: whether the whole command line is said, with the secrets masked that can be
            recognized; else only the program and the names of its options, which hold none.
        best: by which metrics the run has a best checkpoint.

    Attributes:
        resumed: what is known of the checkpoint that the run goes on from, as it has one start and
            one age; None where it begins.
    """

    def __init__(self, *, command: bool = False, best: Sequence[Criterion] = ()) -> None:
        self._begun = time.monotonic()
        self._now = datetime.now(UTC).isoformat(timespec="seconds")
        self._command = command
        self._best = best
        self._commit: str | None = None
        self._looked = False
        self.resumed: Record | None = None

    def elapsed_seconds(self) -> float:
        """Return how long the run has trained, over all its starts; lost work is not counted."""
        earlier = 0.0 if self.resumed is None else self.resumed.elapsed_seconds or 0.0
        return earlier + time.monotonic() - self._begun

    def look(self) -> None:
        """Find out the commit of the program; further calls do nothing, for it runs already."""
        if not self._looked:
            self._looked = True
            self._commit = commit_of(_program_folder())

    def describe(self) -> dict[str, Any]:
        """Return what is known, as JSON."""
        self.look()
        said = masked(sys.orig_argv) if self._command else option_names(sys.orig_argv)
        started = None if self.resumed is None else self.resumed.started
        best = [f"{each.metric}:{each.mode}" for each in self._best]
        return {
            "command": [_shortened(each) for each in said],
            "started": started or self._now,
            **({"git": {"commit": self._commit}} if self._commit else {}),
            **({"best": best} if best else {}),
        }


def option_names(arguments: Sequence[str]) -> list[str]:
    """Return the program of a command line and the names of its options, without any value.

    Nothing else of it can be told from a secret: a value may follow its option, an equals sign or
    a single letter, stand alone, or be JSON. An option that is no plain word is left out too.

    Args:
        arguments: the whole line, the interpreter first, as in `sys.orig_argv`.
    """
    rest = iter(arguments)
    interpreter = Path(next(rest, "")).name
    program = [interpreter] if _INTERPRETER.fullmatch(interpreter) else []
    program += _program(rest)
    names: dict[str, None] = {}
    for argument in rest:
        if argument == "--" or len(names) == _OPTIONS:
            break
        name, equals, _ = argument.partition("=")
        if _is_option(name):
            names[name] = None
            # What may be a password is not taken for an option because it begins like one.
            if not equals and _is_secret(name):
                next(rest, None)
        elif _SHORT.match(argument):
            # No more of it: -pSECRET is how some programs are given a password.
            names[argument[:2]] = None
    return [*program, *names]


def _is_option(name: str) -> bool:
    digits = sum(map(str.isdigit, name))
    return len(name) <= _NAME_CHARS and digits <= _NAME_DIGITS and _LONG.fullmatch(name) is not None


def _program(rest: Iterator[str]) -> list[str]:
    """Return the script or module that the interpreter runs; takes its words from `rest`."""
    for argument in rest:
        if argument == "-m":
            module = next(rest, "")
            return ["-m", module] if _MODULE.fullmatch(module) else ["-m"]
        if argument.startswith("-c") or _CODE.fullmatch(argument):
            if _CODE.fullmatch(argument):
                next(rest, None)  # the code, which may say anything
            return ["-c"]
        if argument in _TAKING:
            next(rest, None)
        elif not argument.startswith("-"):
            is_script = argument.endswith(_SCRIPT_SUFFIXES) or Path(argument).is_file()
            return [Path(argument).name] if is_script else []
    return []


def masked(arguments: Sequence[str]) -> list[str]:
    """Return a command line without the secrets that can be recognized.

    Masked are the values of options that are named like a key, a token or a password, credentials
    in URLs, and words that look like the tokens of well-known services.
    """
    shown: list[str] = []
    hide_next = False
    for argument in arguments:
        name, equals, _ = argument.partition("=")
        is_option = argument.startswith("-")
        if hide_next and not (is_option and _is_secret(name)):
            shown.append(_MASK)
            hide_next = False
            continue
        hide_next = is_option and not equals and _is_secret(name)
        if equals and _is_secret(name):
            shown.append(f"{name}={_MASK}")
        else:
            shown.append(_recognized(argument))
    return shown


def _shortened(argument: str) -> str:
    # A whole program may be an argument, of `python -c`.
    return argument if len(argument) <= _ARGUMENT_CHARS else f"{argument[:_ARGUMENT_CHARS]}..."


def _is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None and _OPEN.search(name) is None


def _recognized(text: str) -> str:
    """Return `text` without the secrets in it that can be recognized."""
    text = without_secrets(_KNOWN_SECRET.sub(_MASK, text))
    if " " in text:
        # A command inside an argument, as of `sh -c`.
        try:
            words = shlex.split(text)
        except ValueError:
            words = []
        if words and masked(words) != words:
            text = shlex.join(masked(words))
    return text


def _program_folder() -> Path:
    file = getattr(sys.modules.get("__main__"), "__file__", None)
    return Path(file).resolve().parent if file else Path.cwd()


# What is said of a save besides its content.


@dataclass(frozen=True, slots=True)
class SaveContext:
    """Why a save is made, and by what.

    Attributes:
        reason: why now, for people; "" when nobody said.
        epoch: the epoch that ends with the step, None in the middle of one.
        program: what made it; None leaves that out.
        elapsed_seconds: how long the run had trained when the save began.
        told: metrics of which was said already that they differ between ranks.
        metadata: what the manifest holds of this save besides what all of the run's hold.
        failed_saves: how many saves of this job failed since the checkpoint before.
    """

    reason: str = ""
    epoch: int | None = None
    program: Provenance | None = None
    elapsed_seconds: float | None = None
    told: set[str] = field(default_factory=set)
    metadata: Mapping[str, Any] = field(default_factory=dict)
    failed_saves: int = 0

    def origin(self, hosts: Sequence[str]) -> dict[str, Any]:
        """Return what the manifest says of it, given the host of each rank."""
        found = few_hosts(list(dict.fromkeys(hosts)))
        if self.reason:
            found["reason"] = self.reason
        if self.failed_saves:
            found["failed_saves"] = self.failed_saves
        if self.elapsed_seconds is not None:
            found["elapsed_seconds"] = round(self.elapsed_seconds, 3)
        if self.program is not None:
            found |= self.program.describe()
        return found


def few_hosts(hosts: Sequence[str]) -> dict[str, Any]:
    """Return what a manifest says of the hosts: the first ones, and how many there were if more."""
    if len(hosts) <= _MOST_HOSTS:
        return {"hosts": list(hosts)}
    return {"hosts": list(hosts[:_MOST_HOSTS]), "host_count": len(hosts)}


# Metrics as callers give them: numbers, tensors on any device, different on each rank.


Metrics: TypeAlias = Mapping[str, SupportsFloat]
"""Numbers by name: floats, integers, numpy scalars, tensors of one element on any device."""


def as_given(metrics: Metrics | None) -> Metrics:
    """Return what was given as `metrics`, none for None.

    Raises:
        UsageError: they are not by name.
    """
    if metrics is None:
        return {}
    given: object = metrics
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise UsageError(f"metrics are a dict of numbers by name, not a {kind}")
    return metrics


def as_numbers(metrics: Metrics) -> dict[str, float]:
    """Return `metrics` as floats; of a tensor its one element, wherever it is.

    Raises:
        UsageError: a name that is no text, or a value that is not one number.
    """
    numbers: dict[str, float] = {}
    for name, value in metrics.items():
        if not is_text(name):
            kind = "half of a surrogate pair" if isinstance(name, str) else type(name).__name__
            raise UsageError(f"metric {name!r} must be named by text, not {kind}")
        try:
            # A loss is given as it is: torch warns of numbers taken from what has a gradient.
            numbers[name] = float(value.detach() if isinstance(value, torch.Tensor) else value)
        except Exception as error:  # a foreign __float__ may do anything
            raise UsageError(
                f"metric {name!r} is {type(value).__name__}, not a number ({describe(error)})"
            ) from error
    return numbers


def tell_differing(url: str, step: int, reports: Sequence[Report], told: set[str]) -> None:
    """Rank 0: say which metrics other ranks gave another value for; that of rank 0 is stored.

    Args:
        url: where the run is.
        step: what is saved.
        reports: of each rank.
        told: names that were told of before, and now: what differs does so at every save.
    """
    first = reports[0].metrics
    for rank, report in enumerate(reports):
        for name, value in report.metrics.items():
            same = name in first and _same(value, first[name])
            if same or name in told:
                continue
            told.add(name)
            stored = first.get(name)
            events.emit(events.MetricsDiffer(url, step, 0, name, stored, rank, value))
            _log.warning(
                "metric %r differs between ranks at step %d (rank 0: %s, rank %d: %s): that of "
                "rank 0 counts; average it over the ranks, or give it on rank 0 only",
                name,
                step,
                "not given" if stored is None else stored,
                rank,
                value,
            )


def _same(one: float, other: float) -> bool:
    return one == other or (math.isnan(one) and math.isnan(other))


# The commit of a checkout, read from its files.
#
# `git` is not run: what it runs in turn is said by the files of the checkout (monitors of the file
# system, filters, hooks, configuration that is included), and those may be anybody's. So it is not
# known either whether the program was changed since the commit.


_LIMIT_BYTES = 1 << 24
_COMMIT = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")
# No part of it begins with a dot, so it leads nowhere else.
_REF = re.compile(r"refs(?:/[A-Za-z0-9_@+=#%{}~,-][A-Za-z0-9_@+=#%{}~,.-]*)+")
_MAX_LINKS = 5


def commit_of(folder: Path) -> str | None:
    """Return the commit that the checkout around `folder` is at, None if that cannot be told."""
    try:
        for parent in (folder, *folder.parents):
            if os.path.lexists(parent / ".git"):
                return _head(_directory(parent))
    # A broken or unreadable checkout is no reason for anything to fail.
    except (OSError, ValueError):
        return None
    return None


def _directory(checkout: Path) -> Path:
    """Return where git keeps what belongs to `checkout`: worktrees and submodules say it."""
    place = checkout / ".git"
    if place.is_dir():
        return place
    said = _text(place).removeprefix("gitdir: ")
    return checkout / said


def _head(directory: Path) -> str | None:
    common = directory
    if (directory / "commondir").exists():
        common = directory / _text(directory / "commondir")
    said = _text(directory / "HEAD")
    for _ in range(_MAX_LINKS):
        if _COMMIT.fullmatch(said):
            return said
        name = said.removeprefix("ref: ")
        if name == said or _REF.fullmatch(name) is None:
            return None
        for place in (directory, common):
            if (place / name).is_file():
                said = _text(place / name)
                break
        else:
            return _packed(common, name)
    return None


def _packed(common: Path, name: str) -> str | None:
    if not (common / "packed-refs").exists():
        return None
    for line in _lines(common / "packed-refs"):
        commit, _, ref = line.partition(" ")
        if ref == name and _COMMIT.fullmatch(commit):
            return commit
    return None


def _text(path: Path) -> str:
    return next(_lines(path), "").strip()


def _lines(path: Path) -> Iterator[str]:
    # Opened without waiting: a pipe in its place would never say anything.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(f"{path} is no file")
        yield from file.read(_LIMIT_BYTES).decode(errors="replace").splitlines()
