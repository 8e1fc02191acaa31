"""How much memory an export takes has nothing to do with how large the model is."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch

import dist_ckpt

PROGRAM = r"""
import re, sys
from pathlib import Path
import torch
import dist_ckpt, dist_ckpt.doors.export, safetensors.torch

def peak():
    # Not ru_maxrss, which an exec hands on: it would be that of the tests.
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) << 10

run, out, kind, dtype = sys.argv[1], Path(sys.argv[2]), sys.argv[3], sys.argv[4] or None
# All that is imported late, and what a first call takes.
dist_ckpt.save({"model": {"w": torch.zeros(1 << 20)}}, out / "small", ranks="alone")
dist_ckpt.export(out / "small", out / "small-out", format=kind, dtype=dtype)
before = peak()
dist_ckpt.export(run, out / "whole", format=kind, dtype=dtype)
print(before, peak())
"""


def peaks(folder: Path, kind: str, dtype: str = "") -> tuple[int, int]:
    with tempfile.TemporaryDirectory(dir=folder) as out:
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", PROGRAM, str(folder / "run"), out, kind, dtype],
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
    before, after = map(int, done.stdout.split())
    return before, after


def save(folder: Path, mib: int) -> None:
    weights = {f"{number}": torch.rand(64, 1 << 18) for number in range(mib // 64)}
    dist_ckpt.save({"model": weights}, folder / "run", memory_limit_bytes=64 << 20)


# A window is made of what it is cast from, which is in memory beside it.
@pytest.mark.parametrize(("dtype", "mib"), [("", 128), ("bfloat16", 256)])
def test_a_quarter_of_a_gigabyte(dtype: str, mib: int, tmp_path: Path) -> None:
    save(tmp_path, 256)
    # How many windows are on their way at once is up to the threads; a leak is there each time.
    both = [peaks(tmp_path, "safetensors", dtype) for _ in range(3)]
    grown = [after - before for before, after in both]
    assert 0 < min(grown) < mib << 20


@pytest.mark.soak
@pytest.mark.parametrize("dtype", ["", "bfloat16"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "dcp", "hf"])
def test_four_gigabytes_in_less_than_one(kind: str, dtype: str, tmp_path: Path) -> None:
    save(tmp_path, 4096)
    _, after = peaks(tmp_path, kind, dtype)
    assert after < 1 << 30
