"""What made a checkpoint, for the people who find it: program, hosts, how long it had trained."""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dist_ckpt.errors import without_secrets
from dist_ckpt.saving.git_files import commit_of

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


class Origin:
    """Gathers what is said of a job in its manifests. Nothing of it can fail a save.

    Args:
        command: whether the whole command line is said, with the secrets masked that can be
            recognized; else only the program and the names of its options, which hold none.

    Attributes:
        earlier_seconds: how long the run had trained before this start.
        started: when the run first started, as text; None until it is known.
    """

    def __init__(self, *, command: bool = False) -> None:
        self._begun = time.monotonic()
        self._now = datetime.now(UTC).isoformat(timespec="seconds")
        self._command = command
        self._commit: str | None = None
        self._looked = False
        self.earlier_seconds = 0.0
        self.started: str | None = None

    def go_on(self, started: str | None, elapsed_seconds: float | None) -> None:
        """Take over what the restored checkpoint said: a run has one start and one age."""
        self.started = started
        self.earlier_seconds = elapsed_seconds or 0.0

    def elapsed_seconds(self) -> float:
        """Return how long the run has trained, over all its starts; lost work is not counted."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def look(self) -> None:
        """Find out the commit of the program; further calls do nothing, for it runs already."""
        if not self._looked:
            self._looked = True
            self._commit = commit_of(_program_folder())

    def describe(self) -> dict[str, Any]:
        """Return what is known, as JSON."""
        self.look()
        said = masked(sys.orig_argv) if self._command else named(sys.orig_argv)
        return {
            "command": [_shortened(each) for each in said],
            "started": self.started or self._now,
            **({"git": {"commit": self._commit}} if self._commit else {}),
        }


def named(arguments: Sequence[str]) -> list[str]:
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
