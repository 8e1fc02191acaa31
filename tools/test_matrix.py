"""Run a part of the tests with other versions of Python and torch, and say what was seen.

Each pair gets an environment in `build/matrix`, which the next run uses again. What else is in it
has the versions of `constraints.txt`, except where its torch asks for another one. What cannot be
had is named with the reason and is no failure; a pair that was had and fails is one.

The packages of torch for Linux want CUDA's libraries even where no GPU is. They do not depend on
the Python, so that they are installed once for each torch.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PYTHONS = ("3.11", "3.12", "3.13", "3.14")
# No part of an installation is worth more: a connection that hangs is no reason to wait for ever.
INSTALL_SECONDS, TEST_SECONDS = 600, 1800

# All rooms, ranks in real processes, the stored format, and the other programs' checkpoints. Not
# what says nothing about a version: the measurements, the services and the tools.
SELECTION = (
    *("tests/unit", "tests/distributed/test_reshard.py", "tests/distributed/test_optimizers.py"),
    *("tests/compat/test_golden.py", "tests/compat/test_stock_dcp.py"),
    *("tests/compat/test_weight_files.py", "tests/stateful/test_optimizers.py"),
    *(f"--ignore=tests/unit/{name}" for name in ("benchmarks", "examples", "services", "tools")),
    # Those are pinned, and the pins are made for the torch of `constraints.txt`.
    "--deselect=tests/stateful/test_optimizers.py::test_optimizers_of_others",
)

# Asks the environment it runs in for what its torch wants and does not have.
_WANTED = """
import json
from importlib.metadata import PackageNotFoundError, requires, version
from packaging.requirements import Requirement
cuda, rest = [], []
for each in map(Requirement, requires("torch")):
    if each.marker is not None and not each.marker.evaluate({"extra": ""}):
        continue
    each.marker = None
    if each.name.startswith(("nvidia-", "cuda-toolkit")):
        cuda.append(str(each))
    elif not each.name.startswith(("cuda-", "triton")):  # compilers, which no test uses
        try:
            fits = each.specifier.contains(version(each.name), prereleases=True)
        except PackageNotFoundError:
            fits = False
        rest += [] if fits else [str(each)]
print(json.dumps([cuda, rest]))
"""

_VERSIONS = "import platform, torch; print(platform.python_version(), torch.__version__)"


class Missing(Exception):
    """What was asked for cannot be had here; the message says why."""


@dataclass(frozen=True)
class Seen:
    """What was seen of one pair."""

    python: str
    torch: str
    result: str
    """`passed`, `failed`, or `not to be had`."""
    why: str
    """The last line of the tests, or the reason."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the pairs that are asked for, print the table; return 1 if one of them fails."""
    parser = argparse.ArgumentParser(description=__doc__, prog="make test-matrix")
    parser.add_argument(
        "pairs", nargs="*", help="like 3.12-2.8.0; otherwise every Python, oldest and newest torch"
    )
    parser.add_argument("--workers", default="2", help="how many tests run at once")
    options = parser.parse_args(arguments)
    folder = ROOT / "build" / "matrix"
    folder.mkdir(parents=True, exist_ok=True)
    seen = []
    for python, torch in pairs(options.pairs, oldest_torch(ROOT)):
        began = time.monotonic()
        print(f"Python {python}, torch {torch} ...", flush=True)
        seen.append(_try(folder, python, torch, options.workers))
        print(f"  {seen[-1].result} ({time.monotonic() - began:.0f} s)", flush=True)
    print("\n" + table(seen))
    return status(seen)


def pairs(asked: Sequence[str], oldest: str) -> list[tuple[str, str]]:
    """Return what is to be run, as versions of Python and torch; `newest` is no number yet."""
    if not asked:
        return [(python, torch) for python in PYTHONS for torch in (oldest, "newest")]
    found = [re.fullmatch(r"(\d+\.\d+)-([\w.+]+)", each) for each in asked]
    wrong = [each for each, match in zip(asked, found, strict=True) if match is None]
    if wrong:
        raise SystemExit(f"not a pair like 3.12-2.8.0: {', '.join(wrong)}")
    return [(match[1], match[2]) for match in found if match is not None]


def oldest_torch(root: Path) -> str:
    """Return the oldest release of torch that the checkout `root` allows."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    line = next(each for each in project["dependencies"] if each.startswith("torch>="))
    version = line.removeprefix("torch>=")
    return version if version.count(".") > 1 else f"{version}.0"


def pins(root: Path) -> list[str]:
    """Return what goes into each environment beside torch and what only torch asks for."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    peers = project["optional-dependencies"]["bench"]
    lines = (root / "constraints.txt").read_text().splitlines()
    named = [line for line in lines if not line.startswith("#")]
    unused = {"torch", "bitsandbytes", "import-linter", "grimp", "mypy", "ruff", "pip", *peers}
    unused |= {"mkdocs", "mkdocs-material", "mkdocstrings", "mkdocstrings-python"}
    return [line for line in named if line.partition("==")[0] not in unused]


def status(seen: Iterable[Seen]) -> int:
    """Return 1 if a pair that could be had failed, or if none could be had."""
    results = [each.result for each in seen]
    return int("failed" in results or "passed" not in results)


def table(seen: Iterable[Seen]) -> str:
    """Return what was seen as a table of plain text."""
    rows = [("Python", "torch", "result", "")]
    rows += [(each.python, each.torch, each.result, each.why) for each in seen]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row[:3], widths, strict=True)]
        lines.append("  ".join((*cells, row[3])).rstrip())
    return "\n".join(lines)


def interpreter(version: str, folders: Iterable[Path]) -> Path:
    """Return a Python of `version` that can build environments: on PATH, or below `folders`.

    Raises:
        Missing: there is none.
    """
    names = [sys.executable, shutil.which(f"python{version}") or ""]
    # The newest patch release last by number, not by letter.
    installed = (each for folder in folders for each in folder.glob(f"{version}.*/bin/python"))
    newest_first = sorted(installed, key=lambda path: _numbers(path.parts[-3]), reverse=True)
    for name in [*names, *map(str, newest_first)]:
        # A name on PATH may be pyenv's, which stands for no interpreter until one is chosen.
        if name and _version_of(name) == version:
            return Path(name)
    raise Missing(f"no python{version} that can build environments, on PATH or in pyenv")


def reason(error: str) -> str:
    """Return the one line of what pip said that tells why."""
    lines = [line.strip() for line in error.splitlines() if line.strip()]
    # Not the one that lists every version that there is.
    told = [each for each in lines if each.startswith("ERROR:") and "from versions" not in each]
    return (told or lines[-1:] or ["pip said nothing"])[0].removeprefix("ERROR: ")


def _try(folder: Path, python: str, torch: str, workers: str) -> Seen:
    try:
        base = interpreter(python, [_pyenv()])
        if torch == "newest":
            torch = _newest_torch(base)
        own = _environment(folder, base, python, torch)
        exact, torch = _say(own, _VERSIONS).split()
    except Missing as error:
        return Seen(python, torch, "not to be had", str(error))
    log = folder / f"{own.parents[1].name}.log"
    code = _tests(own, workers, log)
    last = (log.read_text().strip().splitlines() or ["nothing was printed"])[-1].strip("= ")
    result = "failed" if code else "passed"
    return Seen(exact, torch, result, f"{last}; {log.relative_to(ROOT)}" if code else last)


def _environment(folder: Path, base: Path, python: str, torch: str) -> Path:
    """Return the interpreter of the environment of the pair, which is built if it is not there."""
    place = folder / f"{python}-{torch}"
    own, stamp = place / "bin" / "python", place / "built-from"
    wanted = "\n".join([str(ROOT), *pins(ROOT)])
    if stamp.exists() and stamp.read_text() == wanted:
        return own
    _run([str(base), "-m", "venv", "--clear", str(place)])
    # torch first: most of what cannot be had is known then. By name, and without what it asks for.
    _install(own, "--no-deps", "--only-binary=:all:", f"torch=={torch}")
    _install(own, "--no-deps", *pins(ROOT))
    cuda, rest = json.loads(_say(own, _WANTED))
    if rest:
        _install(own, "--no-deps", *rest)
    if cuda:
        _link(_cuda(folder, own, torch, cuda), own)
    _say(own, "import torch.distributed")
    stamp.write_text(wanted)
    return own


def _cuda(folder: Path, own: Path, torch: str, wanted: list[str]) -> Path:
    """Return the folder with the libraries of CUDA that `torch` wants, once for all Pythons."""
    place = folder / f"cuda-{torch}"
    if not place.exists():
        unfinished = folder / f"cuda-{torch}.part"
        shutil.rmtree(unfinished, ignore_errors=True)
        _install(own, "--target", str(unfinished), *wanted)
        unfinished.rename(place)
    return place


def _link(cuda: Path, own: Path) -> None:
    """Make the libraries of `cuda` found from where torch looks for them: beside itself."""
    beside = Path(_say(own, "import sysconfig; print(sysconfig.get_path('purelib'))"))
    for each in cuda.iterdir():
        if not (beside / each.name).exists():
            (beside / each.name).symlink_to(each)


def _newest_torch(base: Path) -> str:
    """Return the newest torch that pip would install for this Python."""
    command = [str(base), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["-qq", "--only-binary=:all:", "--report=-", "torch"]
    (found,) = json.loads(_run(command))["install"]
    return str(found["metadata"]["version"]).partition("+")[0]


def _install(own: Path, *what: str) -> None:
    # Not kept by pip: the environments stay, and a second copy of gigabytes helps nobody.
    options = ["-qq", "--no-input", "--no-cache-dir", "--no-compile"]
    _run([str(own), "-m", "pip", "install", *options, "--disable-pip-version-check", *what])


def _run(command: list[str]) -> str:
    try:
        done = subprocess.run(
            command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=INSTALL_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise Missing(f"not there after {INSTALL_SECONDS} s: {command[-1]}") from None
    if done.returncode:
        raise Missing(reason(done.stderr))
    return done.stdout


def _say(own: Path, program: str) -> str:
    return _run([str(own), "-c", program]).strip()


def _tests(own: Path, workers: str, log: Path) -> int:
    """Run the selection; return the exit status. All that is printed goes to the file `log`."""
    command = [str(own), "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", workers]
    command += ["--dist", "loadscope", "--color=no", *SELECTION]
    with log.open("w") as file:
        try:
            return subprocess.run(
                command,
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=file,
                stderr=file,
                check=False,
                timeout=TEST_SECONDS,
            ).returncode
        except subprocess.TimeoutExpired:
            file.write(f"\nnot finished after {TEST_SECONDS} s\n")
            return 1


def _version_of(name: str) -> str:
    program = "import ensurepip, sys, venv; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run([name, "-c", program], capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def _numbers(version: str) -> list[int]:
    return [int(each) for each in re.findall(r"\d+", version)]


def _pyenv() -> Path:
    program = shutil.which("pyenv")
    if program is None:
        return Path.home() / ".pyenv" / "versions"
    done = subprocess.run([program, "root"], capture_output=True, text=True, check=False)
    return Path(done.stdout.strip() or Path.home() / ".pyenv") / "versions"


if __name__ == "__main__":
    sys.exit(main())
