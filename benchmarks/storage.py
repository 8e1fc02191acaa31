"""Storage against its limits: `python -m benchmarks.storage`, or `make bench-storage`."""

from __future__ import annotations

import argparse
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from benchmarks import local, s3
from benchmarks.measure import say
from dist_ckpt.storage.disk import aligned_buffer

_MIB = 1 << 20


def main(arguments: list[str]) -> int:
    """Run what `arguments` choose; return 0 when all targets are met."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", nargs="*", default=["local", "s3"], help="local, s3, or both")
    parser.add_argument("--place", type=Path, default=Path("build/bench-storage"))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--local-mib", type=int, default=1536, help="a multiple of 64")
    parser.add_argument("--s3-mib", type=int, default=512)
    chosen = parser.parse_args(arguments)
    if not set(chosen.what) <= {"local", "s3"} or chosen.local_mib % 64:
        parser.error("choose from local and s3; --local-mib must be a multiple of 64")
    say(f"{datetime.now(UTC):%Y-%m-%d}, {platform.machine()}, Linux {platform.release()}\n")
    met = True
    if "local" in chosen.what:
        met &= local.run(chosen.place, _data(chosen.local_mib * _MIB), repeats=chosen.repeats)
    if "s3" in chosen.what:
        met &= s3.run(_data(chosen.s3_mib * _MIB), repeats=chosen.repeats)
    return 0 if met else 1


def _data(nbytes: int) -> memoryview:
    """Return bytes that no disk and no server can make smaller."""
    data = aligned_buffer(nbytes)
    words = np.frombuffer(data, dtype=np.uint64)
    words[:] = np.random.default_rng(0).integers(0, 1 << 63, words.size, dtype=np.uint64)
    return data


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
