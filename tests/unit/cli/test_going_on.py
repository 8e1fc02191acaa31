"""What goes on while somebody looks: a list, a mirror, and the bytes of long work."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt import Run
from tests.unit.cli.shell import Shell, fill

PROGRAM = "from dist_ckpt.cli import main; main()"


def start(*arguments: str, stderr: int = subprocess.PIPE) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TERM": "xterm"},
    )


def test_a_list_and_a_mirror_go_on_until_they_are_interrupted(url: str, tmp_path: Path) -> None:
    place = str(tmp_path / "mirror")
    looking = start("ls", url, "--watch", "--every", "0.01", "--json")
    copying = start("mirror", url, place, "--watch", "--every", "0.01", "--json")
    with looking, copying:
        assert looking.stdout is not None
        assert copying.stdout is not None
        for _ in range(3):
            rows = json.loads(looking.stdout.readline())["checkpoints"]
            assert [each["step"] for each in rows] == [10, 20, 30]
        assert json.loads(copying.stdout.readline())["copied"][0]["step"] == 30
        Run(url).copy(30, place)  # does nothing; and while it goes on there is one more step
        fill(url, first=40)
        assert json.loads(copying.stdout.readline())["copied"][0]["step"] >= 40
        looking.send_signal(signal.SIGINT)
        copying.send_signal(signal.SIGINT)
        looking.communicate()
        copying.communicate()
    assert (looking.returncode, copying.returncode) == (0, 0), "so they are meant to end"
    assert all(Run(place).verify(step).ok for step in Run(place).steps())


def test_a_mirror_waits_for_a_run_that_is_not_there_yet(tmp_path: Path) -> None:
    url, place = str(tmp_path / "run"), str(tmp_path / "mirror")
    with start("mirror", url, place, "--watch", "--every", "0.01") as copying:
        assert copying.stdout is not None
        assert copying.stderr is not None
        assert "is no run" in copying.stderr.readline()
        fill(url)
        said = copying.stdout.readline()
        assert "files" in said, copying.stderr.read()
        copying.kill()
        copying.communicate()


def on_terminal(*arguments: str) -> tuple[str, bytes]:
    """Return standard output, and what a terminal got on standard error."""
    ours, theirs = pty.openpty()
    with start(*arguments, stderr=theirs) as working:
        out, _ = working.communicate()
    os.close(theirs)
    shown = b""
    try:
        while part := os.read(ours, 1 << 16):
            shown += part
    except OSError:
        pass  # so ends what nobody writes to any more
    finally:
        os.close(ours)
    assert working.returncode == 0, shown
    return out, shown


def test_long_work_shows_its_bytes_on_a_terminal_alone(url: str, shell: Shell) -> None:
    out, shown = on_terminal("verify", url, "--all")
    assert out == shell.screen("verify", url, "--all")
    assert b"step 30" in shown
    assert b"bytes" in shown or b"kB" in shown


@pytest.mark.parametrize(
    ("arguments", "says", "doing"),
    [
        (("cp", "{}@20", "{}-cp"), "step 20: 2 files", b"copying step 20"),
        *(
            pytest.param(*each, marks=pytest.mark.soak)
            for each in (
                (("export", "{}@20", "{}.safetensors"), "exported step 20", b"reading back"),
                (("import", "{}.safetensors", "{}-in"), "step 0 of", b"reading"),
                (("average", "{}@10", "{}@20", "--out", "{}-av"), "step 20 of", b"reading"),
                (("cp", "{}@20", "{}-cp", "--parts", "model"), "step 20: model", b"reading"),
                (("mirror", "{}", "{}-mirror"), "step 30: 2 files", b"copying step 30"),
                (("bench", "{}-b", "--size", "1", "--repeat", "1"), "medians of 1", b"bench"),
            )
        ),
    ],
    ids=lambda value: " ".join(value).replace("{}", "") if isinstance(value, tuple) else "",
)
def test_all_that_takes_long_shows_its_bytes(
    url: str, arguments: tuple[str, ...], says: str, doing: bytes
) -> None:
    if arguments[0] == "import":
        dist_ckpt.export(url, f"{url}.safetensors", step=20)
    out, shown = on_terminal(*(each.format(url) for each in arguments))
    assert says in out
    assert doing in shown
    assert b"bytes" in shown or b"kB" in shown or b"MB" in shown


def test_a_mirror_goes_on_when_a_checkpoint_is_damaged(url: str, tmp_path: Path) -> None:
    (file,) = Path(url).glob("step-0000000030/*/model.*")
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    place = str(tmp_path / "mirror")
    with start("mirror", url, place, "--watch", "--every", "0.01") as copying:
        assert copying.stdout is not None
        assert copying.stderr is not None
        assert "differs from its digest" in copying.stderr.readline()
        file.write_bytes(whole)
        assert "step 30" in copying.stdout.readline()
        copying.kill()
        copying.communicate()


def test_a_mirror_copies_the_latest_while_no_checkpoint_has_the_metric(
    url: str, tmp_path: Path
) -> None:
    place = str(tmp_path / "mirror")
    with start(
        *("mirror", url, place, "--watch", "--every", "0.01", "--best", "val/los")
    ) as copying:
        assert copying.stdout is not None
        assert copying.stderr is not None
        assert "did you mean 'val/loss'" in copying.stderr.readline()
        assert "step 30" in copying.stdout.readline()
        copying.kill()
        copying.communicate()
