"""Build `.venv` in the checkout with every pinned version, unless it is current.

Needs nothing but the standard library. What the environment was built from is kept in a stamp
inside it, as a digest of contents: a touched file rebuilds nothing, and an install that failed or
was interrupted leaves no stamp, so the next call starts over.
"""

from __future__ import annotations

import hashlib
import importlib.util
import subprocess
import sys
import time
from pathlib import Path

INPUTS = ("constraints.txt", "pyproject.toml")


def main() -> int:
    """Build the environment of the checkout that this file is in; return the exit status."""
    root = Path(__file__).resolve().parent.parent
    stamp = root / ".venv" / "built-from"
    wanted = fingerprint(root)
    if stamp.exists() and stamp.read_text() == wanted:
        return 0
    if importlib.util.find_spec("ensurepip") is None or importlib.util.find_spec("venv") is None:
        print("This python3 cannot build virtual environments.", file=sys.stderr)
        print("On Debian and Ubuntu: apt install python3-venv", file=sys.stderr)
        return 1
    print("Building .venv with the versions of constraints.txt (once, a few minutes) ...")
    sys.stdout.flush()
    began = time.monotonic()
    stamp.unlink(missing_ok=True)
    for command in commands(root):
        status = subprocess.run(command, cwd=root, check=False).returncode
        if status:
            print(f"Building .venv failed at: {' '.join(command)}", file=sys.stderr)
            return status
    stamp.write_text(wanted)
    print(f"Built .venv in {time.monotonic() - began:.0f} s.")
    return 0


def fingerprint(root: Path) -> str:
    """Return a digest of all that the environment of the checkout `root` depends on."""
    digest = hashlib.sha256()
    # Programs in .venv/bin hold the path of the environment, and it holds the interpreter's.
    for text in (str(root), sys.base_prefix, sys.version):
        digest.update(text.encode() + b"\0")
    for name in INPUTS:
        digest.update((root / name).read_bytes() + b"\0")
    return digest.hexdigest()


def torch_requirement(root: Path) -> str:
    """Return the line of the constraints that pins torch."""
    lines = (root / "constraints.txt").read_text().splitlines()
    return next(line for line in lines if line.startswith("torch=="))


def commands(root: Path) -> list[list[str]]:
    """Return the commands that build the environment, in order."""
    python = str(root / ".venv" / "bin" / "python")
    install = [python, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    install += ["--no-input", "--constraint", "constraints.txt"]
    return [
        [sys.executable, "-m", "venv", "--clear", ".venv"],
        [*install, "pip", "setuptools"],
        # torch by its exact name and first: no resolver then looks for a newer or larger build.
        [*install, torch_requirement(root)],
        # The build backend is the pinned setuptools of the line before last.
        [*install, "--no-build-isolation", "--editable", ".[dev]"],
    ]


if __name__ == "__main__":
    sys.exit(main())
