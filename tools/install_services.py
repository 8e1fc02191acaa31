"""Install the servers that the tests run against, where that can be done without asking.

On Debian and Ubuntu as root: Ceph's object gateway and file system, with apt. Anywhere else, or
when it fails, nothing is changed and the tests fall back to an imitation of S3; either way the
exit status is 0. Needs nothing but the standard library.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time

PACKAGES = {
    "radosgw": "radosgw",
    "ceph-mon": "ceph-mon",
    "ceph-osd": "ceph-osd",
    "ceph-mds": "ceph-mds",
    "ceph-fuse": "ceph-fuse",
}
"""Package by program."""

LIMIT_SECONDS = 300.0
# A machine without a way to the package mirror finds that out once, in seconds.
_APT = ["apt-get", "-qq", "-o", "Acquire::Retries=0", "-o", "Acquire::http::Timeout=10"]


def main() -> int:
    """Install what is missing and can be installed; return 0."""
    packages = missing()
    if not packages or os.environ.get("DIST_CKPT_TEST_S3_URL"):
        return 0
    if shutil.which("apt-get") is None or os.geteuid() != 0:
        print(f"Not installed, and only root on Debian can here: {', '.join(packages)}.")
        return 0
    print(f"Installing {', '.join(packages)} for the tests (once, about a minute) ...")
    sys.stdout.flush()
    began = time.monotonic()
    for command in commands(packages):
        reason = run(command, LIMIT_SECONDS - (time.monotonic() - began))
        if reason:
            print(f"They could not be installed ({' '.join(command[:1] + command[-1:])}): {reason}")
            return 0
    print(f"Installed them in {time.monotonic() - began:.0f} s.")
    return 0


def missing() -> list[str]:
    """Return the packages whose programs are not there."""
    return [package for program, package in PACKAGES.items() if shutil.which(program) is None]


def commands(packages: list[str]) -> list[list[str]]:
    """Return the commands that install `packages`, in order."""
    return [[*_APT, "update"], [*_APT, "install", "-y", "--no-install-recommends", *packages]]


def run(command: list[str], limit_seconds: float) -> str:
    """Run `command` quietly; return why it failed, "" when it did not."""
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "DEBIAN_FRONTEND": "noninteractive"},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=limit_seconds,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return f"not done within {LIMIT_SECONDS:.0f} s"
    lines = (done.stderr or done.stdout).strip().splitlines()
    return "" if done.returncode == 0 else (lines[-1] if lines else f"exit {done.returncode}")


if __name__ == "__main__":
    sys.exit(main())
