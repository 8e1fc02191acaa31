"""Run a command beside an S3 server: `python -m tests.services COMMAND...`.

The command finds the server through the usual AWS variables, and its place in it through
`DIST_CKPT_TEST_S3_URL`. Ends with the exit code of the command.
"""

from __future__ import annotations

import os
import subprocess
import sys

from tests.services.s3 import URL_VARIABLE, s3_service


def main(command: list[str]) -> int:
    """Run `command`; return its exit code."""
    with s3_service() as service:
        place = {URL_VARIABLE: service.url("").rstrip("/")}
        return subprocess.run(
            command, env={**os.environ, **service.environment, **place}, check=False
        ).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
