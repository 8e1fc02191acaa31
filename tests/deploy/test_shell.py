"""The scripts for hosts without an orchestrator: they parse, and do what they say at a signal."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sysconfig
from collections.abc import Mapping
from pathlib import Path

import pytest

import dist_ckpt
from examples import train_gpt
from tests.arch.source import ROOT
from tests.deploy import commands
from tests.services.ceph import wait_for

DEPLOY = ROOT / "deploy"
SBATCH = DEPLOY / "slurm" / "train.sbatch"
START = DEPLOY / "torchrun" / "start.sh"
UNIT = DEPLOY / "torchrun" / "dist-ckpt-training.service"
VARIABLES = DEPLOY / "torchrun" / "training.env.example"
TRAINING = ["/app/examples/train_gpt.py", "--checkpoint-dir", "runs/17", "--auto-resume"]
# Those of sbatch 24.05 that a script of ours may use.
SBATCH_OPTIONS = {
    *("account", "array", "begin", "chdir", "comment", "constraint", "cpus-per-gpu"),
    *("cpus-per-task", "deadline", "dependency", "error", "exclude", "exclusive", "export"),
    *("export-file", "gpus", "gpus-per-node", "gpus-per-task", "gres", "hint", "job-name"),
    *("kill-on-invalid-dep", "mail-type", "mail-user", "mem", "mem-per-cpu", "mem-per-gpu"),
    *("network", "nice", "no-kill", "no-requeue", "nodelist", "nodes", "ntasks"),
    *("ntasks-per-node", "open-mode", "output", "partition", "priority", "qos", "requeue"),
    *("reservation", "signal", "switches", "time", "time-min", "tmp", "wckey"),
}


@pytest.mark.parametrize("script", [SBATCH, START], ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    program = Path(sysconfig.get_path("scripts")) / "shellcheck"
    said = subprocess.run([program, "--norc", script], capture_output=True, text=True, check=False)
    assert (said.returncode, said.stdout) == (0, "")
    assert os.access(script, os.X_OK)


def options() -> dict[str, str]:
    """Return what the script asks of sbatch: the lines before its first command."""
    head = SBATCH.read_text().partition("\nset ")[0]
    found = re.findall(r"^#SBATCH --([a-z-]+)(?:=(\S+))?$", head, re.MULTILINE)
    assert len(found) == len(re.findall(r"^#SBATCH", SBATCH.read_text(), re.MULTILINE))
    return dict(found)


def test_sbatch_knows_the_options() -> None:
    asked = options()
    assert set(asked) <= SBATCH_OPTIONS
    assert (asked["nodes"], asked["ntasks-per-node"], asked["requeue"]) == ("2", "1", "")
    assert asked["open-mode"] == "append", "a log goes on behind what it had before the restart"
    # To the script alone, which then has that long for the last save of the workers.
    warned = re.fullmatch(r"B:USR1@(\d+)", asked["signal"])
    (for_workers,) = re.findall(r"SHUTDOWN_TIMEOUT:-(\d+)", SBATCH.read_text())
    assert warned
    assert int(for_workers) + 20 <= int(warned[1])


class Cluster:
    """Programs called like those of Slurm, which write down how they are called.

    `srun` runs until it is told, or ends at once with the status that the test gave.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._calls = folder / "calls"
        self._calls.touch()
        os.mkfifo(folder / "told")
        for name, body in _PROGRAMS.items():
            program = folder / name
            program.write_text(f'#!/bin/sh\necho "{name} $*" >> "$CALLS"\n{body}\n')
            program.chmod(0o755)

    def submit(self, *words: str, **variables: str) -> subprocess.Popen[str]:
        """Run the script as Slurm would."""
        environment = {
            "PATH": f"{self._folder}:{os.environ['PATH']}",
            "CALLS": str(self._calls),
            "TOLD": str(self._folder / "told"),
            "SLURM_JOB_ID": "7",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_NNODES": "2",
            **variables,
        }
        command = ["bash", str(SBATCH), *words]
        return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)

    def calls(self) -> list[str]:
        """Return all calls so far."""
        return self._calls.read_text().splitlines()


_PROGRAMS: Mapping[str, str] = {
    "scontrol": '[ "$1" = show ] && printf "node1\\nnode2\\n"; exit 0',
    # Without a status it says that it runs, and ends with the one that is told through the pipe.
    "srun": """
if [ -z "$STATUS" ]; then echo running >&2; read -r STATUS < "$TOLD"; fi
exit "$STATUS"
""",
    "scancel": 'echo 1 > "$TOLD"',
}


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


def test_a_job_starts_one_torchrun_on_each_node(cluster: Cluster) -> None:
    job = cluster.submit(*TRAINING, STATUS="0", SLURM_RESTART_COUNT="3", SLURM_GPUS_ON_NODE="8")
    assert job.communicate(timeout=600)[1] == ""
    assert job.returncode == 0
    show, run = cluster.calls()
    assert show == "scontrol show hostnames node[1-2]"
    words = run.split()
    assert words[:2] == ["srun", "torchrun"]
    asked, training = commands.torchrun(words[2:])
    assert (asked.nnodes, asked.nproc_per_node) == ("2", "8")
    # Not that of the job before, whose meeting may still be remembered.
    assert (asked.rdzv_endpoint, asked.rdzv_id) == ("node1:29400", "7-3")
    assert training.checkpoint.checkpoint_dir == "runs/17"


@pytest.mark.parametrize("name", ["USR1", "TERM"])
def test_a_job_that_is_asked_to_end_saves_and_is_requeued(cluster: Cluster, name: str) -> None:
    job = cluster.submit(*TRAINING, STATUS="")
    assert job.stderr is not None
    assert job.stderr.readline() == "running\n"
    job.send_signal(getattr(signal, f"SIG{name}"))
    said = job.communicate(timeout=600)[1]
    assert said.startswith(f"asked to end by {name}")
    assert job.returncode == 0
    assert cluster.calls()[2:] == ["scancel --signal=TERM 7.0", "scontrol requeue 7"]


def test_a_job_that_fails_is_requeued_but_not_for_ever(cluster: Cluster) -> None:
    job = cluster.submit(*TRAINING, STATUS="3")
    job.communicate(timeout=600)
    assert cluster.calls()[-1] == "scontrol requeue 7"
    again = cluster.submit(*TRAINING, STATUS="3", SLURM_RESTART_COUNT="2", MAX_RESTARTS="2")
    said = again.communicate(timeout=600)[1]
    assert (again.returncode, "not put back" in said) == (3, True)
    assert cluster.calls()[-1].startswith("srun")


def test_start_hands_all_to_torchrun(tmp_path: Path) -> None:
    echo = tmp_path / "torchrun"
    echo.write_text('#!/bin/sh\nprintf "%s\\n" "$TORCH_DISABLE_SHARE_RDZV_TCP_STORE" "$@"\n')
    echo.chmod(0o755)
    variables = {**_from_file(), "TORCHRUN": str(echo), "PATH": os.environ["PATH"]}
    said = subprocess.check_output([START, *TRAINING], env=variables, text=True)
    shared, *words = said.splitlines()
    assert shared == "1"
    asked, training = commands.torchrun(words)
    assert (asked.nnodes, asked.rdzv_endpoint) == ("1:2", variables["RDZV_ENDPOINT"])
    assert asked.max_restarts == int(variables["MAX_RESTARTS"])
    assert training.checkpoint.auto_resume


@pytest.mark.parametrize("script", [SBATCH, START], ids=lambda path: path.name)
def test_without_a_program_the_use_is_shown(script: Path) -> None:
    variables = {"PATH": os.environ["PATH"], "RDZV_ENDPOINT": "node-a:29400"}
    said = subprocess.run([script], env=variables, capture_output=True, text=True, check=False)
    assert (said.returncode, "usage:" in said.stderr) == (2, True)


def _from_file() -> dict[str, str]:
    lines = VARIABLES.read_text().splitlines()
    return dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))


def test_the_unit_runs_the_training_of_its_variables() -> None:
    unit = UNIT.read_text()
    (start,) = re.findall(r"^ExecStart=(\S+) \$TRAINING$", unit, re.MULTILINE)
    assert start.endswith(str(START.relative_to(ROOT)))
    variables = _from_file()
    (for_torchrun,) = re.findall(r"^TimeoutStopSec=(\d+)$", unit, re.MULTILINE)
    assert int(variables["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"]) + 20 <= int(for_torchrun)
    assert "KillMode=mixed" in unit, "workers get their signal from torchrun"
    _, training = commands.torchrun(variables["TRAINING"].split())
    assert training.checkpoint.auto_resume


def test_systemd_takes_the_unit(tmp_path: Path) -> None:
    analyze = shutil.which("systemd-analyze")
    if analyze is None:
        pytest.skip("no systemd")
    # Where it says that the checkout is there is none here.
    here = UNIT.read_text().replace("/opt/dist-ckpt/src", str(ROOT))
    (tmp_path / UNIT.name).write_text(here)
    command = [analyze, "verify", str(tmp_path / UNIT.name)]
    said = subprocess.run(command, capture_output=True, text=True, check=False)
    about_it = [line for line in said.stderr.splitlines() if UNIT.name in line]
    assert (said.returncode, about_it) == (0, [])


@pytest.mark.soak
def test_a_training_that_is_asked_to_end_saves_and_goes_on(tmp_path: Path) -> None:
    """By the script and the real torchrun, as systemd would end and start it."""
    place = tmp_path / "run"
    torchrun = Path(sysconfig.get_path("scripts")) / "torchrun"
    variables = {
        **os.environ,
        "TORCHRUN": str(torchrun),
        "RDZV_ENDPOINT": "localhost:0",
        "NPROC_PER_NODE": "2",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }
    command = [str(START), str(ROOT / "examples" / "train_gpt.py"), "--parallel", "fsdp"]
    command += ["--checkpoint-dir", str(place), "--auto-resume", "--checkpoint-interval", "4"]
    command += ["--device", "cpu", "--losses", str(tmp_path / "losses.jsonl")]
    run = dist_ckpt.Run(str(place))
    first = subprocess.Popen(command, env=variables)
    try:
        wait_for(first, lambda: bool(run.steps()))
        first.send_signal(signal.SIGTERM)
        first.wait(300)
    finally:
        first.kill()
    saved = run.latest()
    assert saved is not None
    assert "signal SIGTERM" in str(run.manifest(saved).origin)
    subprocess.run(command, env=variables, check=True, timeout=600)
    assert run.latest() == train_gpt.EPOCH_STEPS
    lines = map(json.loads, (tmp_path / "losses.jsonl").read_text().splitlines())
    assert [line["resumed"] for line in lines if "resumed" in line] == [0, saved]
