"""What a program does not use it does not load, and what a platform lacks is named."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

CLIENTS = ("s3fs", "aiobotocore", "botocore", "aiohttp", "boto3")

LOCAL = """
import sys
import dist_ckpt
assert "torch" not in sys.modules
import torch
net = torch.nn.Linear(2, 2)
dist_ckpt.save({"model": net}, sys.argv[1])
dist_ckpt.load({"model": net}, sys.argv[1])
print([name for name in sys.argv[2:] if name in sys.modules])
from dist_ckpt.storage import S3Store
print([name for name in sys.argv[2:] if name in sys.modules])
"""

# As where there is no such module: the finder that would find it says that there is none.
ELSEWHERE = """
import sys
sys.modules.pop("fcntl", None)
class Without:
    def find_spec(self, name, path=None, target=None):
        if name == "fcntl":
            raise ModuleNotFoundError(name)
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == "fcntl" else found(name, *rest)
sys.meta_path.insert(0, Without())
try:
    import dist_ckpt
except ImportError as error:
    print(error)
"""


def run(program: str, *arguments: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        check=True,
        timeout=240,
    )
    return done.stdout


def test_a_local_run_loads_no_client_for_s3(tmp_path: Path) -> None:
    before, after = run(LOCAL, str(tmp_path), *CLIENTS).splitlines()
    assert before == "[]"
    assert "s3fs" in after, "and it is there for who asks"


def test_a_platform_without_file_locks_is_named() -> None:
    message = run(ELSEWHERE)
    assert "needs a POSIX system" in message
    assert "fcntl" in message
