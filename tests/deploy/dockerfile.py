"""The steps of a Dockerfile, and those of them that need no container engine, done in a folder."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path


@dataclass(frozen=True)
class Step:
    """One instruction: its name, its flags such as `from=build`, and the rest of the line."""

    name: str
    flags: Mapping[str, str]
    rest: str

    @property
    def words(self) -> list[str]:
        """The rest as a shell splits it."""
        return shlex.split(self.rest)


def read(file: Path) -> list[Step]:
    """Return the steps of `file`."""
    text = re.sub(r"^\s*#.*\n", "", file.read_text(), flags=re.MULTILINE)
    lines = re.sub(r"\\\n\s*", "", text).splitlines()
    return [_step(line) for line in lines if line.strip()]


def _step(line: str) -> Step:
    name, rest = line.split(None, 1)
    flags = {}
    while found := re.match(r"--([a-z]+)=(\S+)\s+", rest):
        flags[found[1]] = found[2]
        rest = rest[found.end() :]
    return Step(name, flags, rest)


def stages(steps: Sequence[Step]) -> list[list[Step]]:
    """Return the steps of each stage, which begins with its FROM; ARG before the first is left."""
    found: list[list[Step]] = []
    for step in steps:
        if step.name == "FROM":
            found.append([])
        if found:
            found[-1].append(step)
    return found


def let_through(ignore: Path, name: str) -> bool:
    """Return whether a .dockerignore whose rules are `*`, `!name` and `**/name` lets `name` in."""
    kept = True
    for line in ignore.read_text().splitlines():
        rule = line.strip()
        if not rule or rule.startswith("#"):
            continue
        pattern = rule.removeprefix("!").removeprefix("**/")
        parts = Path(name).parts
        whole = any(fnmatch(str(Path(*parts[:end])), pattern) for end in range(1, len(parts) + 1))
        if whole or (rule.startswith("**/") and any(fnmatch(part, pattern) for part in parts)):
            kept = rule.startswith("!")
    return kept


class Folder:
    """A stage without an engine: below `root` what would be below `/`, with this host's programs.

    Args:
        root: an empty folder.
        context: what COPY takes from.
        arguments: in place of the defaults of ARG.
    """

    def __init__(self, root: Path, context: Path, arguments: Mapping[str, str]) -> None:
        self._root = root
        self._context = context
        self._arguments = arguments
        self._variables = dict(os.environ)
        self._folder = root

    def do(self, step: Step) -> None:
        """Do one step.

        Raises:
            subprocess.CalledProcessError: a command failed.
            NotImplementedError: a step that is not known here.
        """
        if step.name == "FROM":
            return
        known = {"ARG": self._arg, "ENV": self._env, "RUN": self._run, "COPY": self._copy}
        known |= {"WORKDIR": self._enter}
        if step.name not in known:
            raise NotImplementedError(step.name)
        known[step.name](step)

    def _inside(self, text: str) -> str:
        """Put what the image would have in /opt and /src below the root."""
        return re.sub(r"(?<![\w/}.-])/(?=opt/|src\b)", f"{self._root}/", text)

    def _expanded(self, text: str) -> str:
        return re.sub(r"\$\{(\w+)\}", lambda found: self._variables[found[1]], text)

    def _arg(self, step: Step) -> None:
        name, _, default = step.rest.partition("=")
        self._variables[name] = self._arguments.get(name, shlex.split(default or '""')[0])

    def _env(self, step: Step) -> None:
        for word in shlex.split(self._expanded(self._inside(step.rest))):
            name, _, value = word.partition("=")
            self._variables[name] = value

    def _enter(self, step: Step) -> None:
        self._folder = Path(self._inside(step.rest))
        self._folder.mkdir(parents=True, exist_ok=True)

    def _copy(self, step: Step) -> None:
        *sources, target = step.words
        for source in sources:
            origin = self._context / source
            where = self._folder / target
            if origin.is_dir():
                shutil.copytree(origin, where, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(origin, where / origin.name if where.is_dir() else where)

    def _run(self, step: Step) -> None:
        command = ["sh", "-euc", self._inside(step.rest)]
        subprocess.run(command, check=True, cwd=self._folder, env=self._variables)

    def output(self, words: Sequence[str]) -> str:
        """Return what a command prints, run as the image would."""
        return subprocess.check_output(words, cwd=self._root, env=self._variables, text=True)
