"""What made a checkpoint, for the people who find it: program, hosts, how long it had trained."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

_GIT_SECONDS = 5.0
_MASK = "***"
_ARGUMENT_CHARS = 400
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
_URL_USER = re.compile(r"(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)[^/@\s?#]+@")
_URL_QUERY = re.compile(r"(?P<name>[?&;][^=&;#\s]+=)(?P<value>[^&;#\s]+)")
# As they are handed out: of GitHub, GitLab, Hugging Face, OpenAI, Slack, AWS, and JSON web tokens.
_KNOWN_SECRET = re.compile(
    r"\b(?:gh[pousr]_\w{16,}|github_pat_\w{16,}|glpat-[\w-]{16,}|hf_\w{16,}|sk-[\w-]{16,}"
    r"|xox[abpr]-[\w-]{10,}|(?:AKIA|ASIA)[A-Z0-9]{12,}|eyJ[\w-]{10,}\.[\w-]+\.[\w-]+)"
)


class Origin:
    """Gathers what is said of a job in its manifests. Nothing of it can fail a save.

    Attributes:
        earlier_seconds: how long the run had trained before this start.
        started: when the run first started, as text; None until it is known.
    """

    def __init__(self) -> None:
        self._begun = time.monotonic()
        self._now = datetime.now(UTC).isoformat(timespec="seconds")
        self.earlier_seconds = 0.0
        self.started: str | None = None
        self._git: dict[str, Any] = {}
        self._asking: threading.Thread | None = None

    def look(self) -> None:
        """Begin to find out what takes a while, on a thread; further calls do nothing."""
        if self._asking is None:
            self._asking = threading.Thread(
                target=self._ask_git, name="dist_ckpt-origin", daemon=True
            )
            self._asking.start()

    def go_on(self, started: str | None, elapsed_seconds: float | None) -> None:
        """Take over what the restored checkpoint said: a run has one start and one age."""
        self.started = started
        self.earlier_seconds = elapsed_seconds or 0.0

    def elapsed_seconds(self) -> float:
        """Return how long the run has trained, over all its starts; lost work is not counted."""
        return self.earlier_seconds + time.monotonic() - self._begun

    def describe(self) -> dict[str, Any]:
        """Return what is known, as JSON; waits a moment for the commit of the program."""
        self.look()
        assert self._asking is not None
        self._asking.join(2 * _GIT_SECONDS)
        return {
            "command": [_shortened(each) for each in masked(sys.orig_argv)],
            "started": self.started or self._now,
            **self._git,
        }

    def _ask_git(self) -> None:
        found = git_state(_program_folder())
        if found is not None:
            self._git = {"git": found}


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return commit and dirty flag of the checkout around `folder`, None where there is none."""
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return None
    # Files that git does not know are no change of the program: logs and runs lie around too.
    status = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return {"commit": commit, "dirty": None if status is None else bool(status)}


def masked(arguments: Sequence[str]) -> list[str]:
    """Return a command line without what should stay secret.

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
            shown.append(_without_secrets(argument))
    return shown


def _shortened(argument: str) -> str:
    # A whole program may be an argument, of `python -c`.
    return argument if len(argument) <= _ARGUMENT_CHARS else f"{argument[:_ARGUMENT_CHARS]}..."


def _is_secret(name: str) -> bool:
    return _SECRET.search(name) is not None and _OPEN.search(name) is None


def _without_secrets(text: str) -> str:
    text = _KNOWN_SECRET.sub(_MASK, text)
    text = _URL_USER.sub(rf"\g<scheme>{_MASK}@", text)
    if "://" in text:
        # What a URL is signed with: any of its arguments may be a key.
        text = _URL_QUERY.sub(rf"\g<name>{_MASK}", text)
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


def _git(folder: Path, *arguments: str) -> str | None:
    # No lock is taken and no helper of the repository is run: this only looks.
    command = ["git", "--no-optional-locks", "-c", "core.fsmonitor=false", "-C", str(folder)]
    try:
        done = subprocess.run(
            [*command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            timeout=_GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None  # no git, or one that does not come back
    return done.stdout.decode(errors="replace").strip() if done.returncode == 0 else None
