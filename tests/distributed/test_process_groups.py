"""Process groups come and go; a save belongs to the one that is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore

GROUPS = 3

# Under torchrun one store outlives every process group of a process, and with it whatever an
# earlier group left there: only the real thing shows whether that is mistaken for this group's.
SCRIPT = f"""
import sys, torch, torch.distributed as dist, dist_ckpt
for number in range({GROUPS}):
    dist.init_process_group("gloo")
    dist_ckpt.save({{"x": {{"t": torch.ones(4)}}}}, f"{{sys.argv[1]}}/run-{{number}}", step=number)
    dist.barrier()
    dist.destroy_process_group()
"""


def test_each_group_of_a_process_has_its_own_saves(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--local-addr", "127.0.0.1", "--nproc-per-node", "2", str(script), str(tmp_path)]
    environment = os.environ | {
        "GLOO_SOCKET_IFNAME": "lo" if sys.platform == "linux" else "lo0",
        "RES_OPTIONS": "timeout:1 attempts:1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    for number in range(GROUPS):
        assert Repository(LocalStore(tmp_path / f"run-{number}")).steps() == [number]
