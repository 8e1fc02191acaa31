"""Install the libraries that saves are measured against, into the environment of this python.

By name and without what they ask for: no peer may exchange the torch that is measured. Where they
cannot be installed the benchmark says that they were not measured.
"""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path


def main() -> int:
    """Install them; return 0 in any case, for the rest can be measured without."""
    root = Path(__file__).resolve().parent.parent
    if subprocess.run(command(root), cwd=root, check=False).returncode:
        print("The libraries to compare with could not be installed.", file=sys.stderr)
    return 0


def command(root: Path) -> list[str]:
    """Return the command that installs what the checkout `root` names as its extra `bench`."""
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    install = [sys.executable, "-m", "pip", "install", "-qq", "--disable-pip-version-check"]
    install += ["--no-input", "--no-deps", "--constraint", "constraints.txt"]
    return [*install, *project["optional-dependencies"]["bench"]]


if __name__ == "__main__":
    sys.exit(main())
