"""What a manifest says of the program, and what it never says."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt.errors import UsageError
from dist_ckpt.repository import Record
from dist_ckpt.saving.provenance import Provenance, SaveContext, commit_of, masked, option_names
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.memory import MemoryStore

SECRET = "s3cr3t-value"
BASE64 = "aGVsbG8td29ybGQ="

LINES = [
    ["--api-key", SECRET],
    [f"--api-key={SECRET}"],
    [f"--api_key={SECRET}"],
    [f"--wandb.token={SECRET}"],
    ["--hf-token", SECRET],
    ["--hf", SECRET],
    ["--auth", f"Bearer {SECRET}"],
    ["--header", f"Authorization: Bearer {SECRET}"],
    ["--password", f"-{SECRET}"],
    ["--password", f"--{SECRET}"],
    ["--secret-access-key", SECRET],
    ["--key", SECRET],
    ["--wandb", SECRET],
    ["--login", f"me:{SECRET}"],
    ["-p", SECRET],
    [f"-p{SECRET}"],
    [f"-p={SECRET}"],
    [f"-u{SECRET}", "-x"],
    ["-token", SECRET],
    [f"-token={SECRET}"],
    [SECRET],
    [f"me:{SECRET}@host"],
    [f"AWS_SECRET_ACCESS_KEY={SECRET}"],
    [f"{SECRET}=1"],
    [f"wandb.api_key={SECRET}"],
    [f"+logger.key={SECRET}"],
    [f"~{SECRET}"],
    [f"s3://user:{SECRET}@host/bucket"],
    [f"--dir=https://{SECRET}@host/run"],
    ["--dir", f"https://{SECRET}@host/run"],
    [f"https://host/run?X-Amz-Signature={SECRET}&x=1"],
    ["--config", json.dumps({"token": SECRET})],
    ["--config=" + json.dumps({"a": {"b": [SECRET]}})],
    [json.dumps({"token": SECRET})],
    ["--set", f"db.password={SECRET}"],
    [f"--set=db.password={SECRET}"],
    ["--env", f"TOKEN={SECRET}"],
    [f"/srv/secrets/{SECRET}"],
    ["--file", f"/run/{SECRET}.json"],
    [f"@{SECRET}"],
    ["--", f"--{SECRET}"],
    ["--", SECRET],
    ["sh", "-c", f"train --token {SECRET} --steps 5"],
    [f"--token {SECRET}"],
    [f"--token:{SECRET}"],
    [f"--token\n{SECRET}"],
    [f"-----BEGIN PRIVATE KEY-----{SECRET}"],
    ["--tags", SECRET, SECRET],
    [""],
]
PROGRAMS = [
    ["python", "train.py"],
    ["/opt/venv/bin/python3", "-u", "-W", f"ignore:{SECRET}", "/srv/train.py"],
    ["python", "-X", f"x={SECRET}", "-m", "pkg.train"],
    ["python", "-c", f"token = '{SECRET}'"],
    ["python", "-uc", f"token = '{SECRET}'"],
    ["python", f"-ctoken='{SECRET}'"],
    ["python", "-m", f"{SECRET} x"],
    ["python"],
    [],
]


@pytest.mark.parametrize("program", PROGRAMS, ids=range(len(PROGRAMS)))
def test_no_value_of_a_command_line_is_said(program: list[str]) -> None:
    for line in LINES:
        said = json.dumps(option_names([*program, *line, "--steps", "5", "--lr=0.1"]))
        assert SECRET not in said, line
        assert "0.1" not in said


def test_program_and_names_of_options_are_said() -> None:
    line = "/opt/bin/python3 -u -m pkg.train --lr 0.1 --use-amp --optim.betaTwo=0.9 -v model=gpt"
    found = ["python3", "-m", "pkg.train", "--lr", "--use-amp", "--optim.betaTwo", "-v"]
    assert option_names(line.split()) == found
    assert option_names(["python", "/srv/train.py", "--lr=1", "--lr", "--", "--more"]) == [
        *("python", "train.py", "--lr"),
    ]
    # However long, and whatever it looks like: a name is looked at once.
    odd = "--a" + "-b" * 5000 + "!"
    assert option_names(["python", "train.py", odd, "--" + BASE64]) == ["python", "train.py"]


def manifest_of(store: MemoryStore) -> dict[str, object]:
    key = next(each.key for each in store.list_entries() if each.key.endswith("manifest.json"))
    found: dict[str, object] = json.loads(read_all(store, key))["origin"]
    return found


def test_the_whole_line_is_stored_on_request_only(monkeypatch: pytest.MonkeyPatch) -> None:
    line = ["python", "train.py", "--lr", "0.1", "--token", SECRET]
    monkeypatch.setattr(sys, "orig_argv", line)
    found = []
    for number, command in enumerate((False, True)):
        store = MemoryStore(f"origin-{number}")
        with dist_ckpt.Checkpointer(store, {"a": 1}, command=command) as ckpt:
            ckpt.save(1)
        found.append(manifest_of(store)["command"])
    short = ["python", "train.py", "--lr", "--token"]
    assert found == [short, ["python", "train.py", "--lr", "0.1", "--token", "***"]]
    dist_ckpt.save({"a": 1}, MemoryStore("origin-3"), command=True)
    assert manifest_of(MemoryStore("origin-3"))["command"] == found[1]
    with pytest.raises(UsageError, match="command must be"):
        dist_ckpt.save({"a": 1}, MemoryStore("origin-4"), command="yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--api-key", SECRET],
        [f"--api_key={SECRET}"],
        [f"--wandb.token={SECRET}"],
        ["--hf-token", SECRET],
        ["--password", f"-{SECRET}"],
        ["--secret-access-key", SECRET],
        ["--key", SECRET],
        [f"AWS_SECRET_ACCESS_KEY={SECRET}"],
        [f"s3://user:{SECRET}@host/bucket"],
        [f"--dir=https://{SECRET}@host/run"],
        [f"https://host/run?X-Amz-Signature={SECRET}&x=1"],
        ["sh", "-c", f"train --token {SECRET} --steps 5"],
    ],
)
def test_secrets_that_can_be_recognized_are_masked(arguments: list[str]) -> None:
    shown = masked(["python", "train.py", *arguments, "--steps", "5"])
    assert SECRET not in " ".join(shown)
    assert "***" in " ".join(shown)
    assert shown[:2] == ["python", "train.py"]
    assert shown[-2:] == ["--steps", "5"]


@pytest.mark.parametrize("token", ["hf_" + 20 * "a", "ghp_" + 36 * "b", "AKIA" + 16 * "C"])
def test_what_looks_like_a_known_token_is_masked_anywhere(token: str) -> None:
    assert masked(["train.py", token, f"--note=use {token}"]) == [
        "train.py",
        "***",
        "--note=use ***",
    ]


@pytest.mark.parametrize(
    "argument",
    [
        "--max-tokens=512",
        "--tokenizer=gpt2",
        "--keyboard=us",
        "--pad-token-id=0",
        "s3://bucket/run",
        "--key-dim=64",
        "--monkey=1",
        "lr=0.1",
        "--keep-last=3",
        "--tokens-per-batch=9",
        "a b=c",
    ],
)
def test_what_is_no_secret_stays(argument: str) -> None:
    assert masked(["train.py", argument]) == ["train.py", argument]
    name, _, value = argument.partition("=")
    assert masked([name, value or "x"]) == [name, value or "x"]


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "protocol.file.allow=always"]
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )
    return done.stdout.decode().strip()


def checkout(folder: Path) -> Path:
    folder.mkdir(parents=True)
    git(folder, "init")
    (folder / "train.py").write_text("1")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "first")
    return folder


def test_the_commit_is_read_whatever_form_the_checkout_has(tmp_path: Path) -> None:
    root = checkout(tmp_path / "plain")
    head = git(root, "rev-parse", "HEAD")
    assert commit_of(root) == head
    (root / "deep" / "er").mkdir(parents=True)
    assert commit_of(root / "deep" / "er") == head
    git(root, "pack-refs", "--all")
    assert commit_of(root) == head, "packed"
    git(root, "checkout", "-b", "topic/one")
    git(root, "commit", "--allow-empty", "-m", "second")
    assert commit_of(root) == git(root, "rev-parse", "HEAD")
    git(root, "worktree", "add", "-b", "other", str(tmp_path / "worktree"), head)
    assert commit_of(tmp_path / "worktree") == head
    git(root, "checkout", "--detach", head)
    assert commit_of(root) == head, "detached"
    outer = checkout(tmp_path / "outer")
    git(outer, "submodule", "add", str(root), "inner")
    assert commit_of(outer / "inner") == git(outer / "inner", "rev-parse", "HEAD")


def test_nothing_that_a_checkout_configures_is_run(tmp_path: Path) -> None:
    root, witness = checkout(tmp_path / "repo"), tmp_path / "witness"
    script = tmp_path / "script"
    script.write_text(f"#!/bin/sh\ntouch {witness}\n")
    script.chmod(0o755)
    git(root, "config", "core.fsmonitor", str(script))
    git(root, "config", "filter.evil.clean", str(script))
    (root / ".gitattributes").write_text("* filter=evil\n")
    (root / "train.py").write_text("2")
    program = (
        "import sys, dist_ckpt\n"
        "from dist_ckpt.storage.memory import MemoryStore\n"
        "with dist_ckpt.Checkpointer(MemoryStore('x'), {'a': 1}) as ckpt:\n"
        "    ckpt.save(1)\n"
    )
    (root / "run.py").write_text(program)
    subprocess.run([sys.executable, root / "run.py"], cwd=root, check=True, timeout=240)
    assert not witness.exists()
    assert commit_of(root) == git(root, "-c", "core.fsmonitor=false", "rev-parse", "HEAD")


def test_a_checkout_that_is_no_good_says_nothing(tmp_path: Path) -> None:
    assert commit_of(tmp_path) is None
    folder = tmp_path / "empty"
    folder.mkdir()
    git(folder, "init")
    assert commit_of(folder) is None, "no commit yet"
    secret = tmp_path / "secret"
    secret.write_text("a" * 40)
    head = folder / ".git" / "HEAD"
    for said in ("ref: ../../secret", "ref: refs/../../../secret", "ref: /etc/passwd", "", "\x00"):
        head.write_text(said)
        assert commit_of(folder) is None, said
    (folder / ".git" / "refs" / "loop").write_text("ref: refs/loop")
    head.write_text("ref: refs/loop")
    assert commit_of(folder) is None
    head.unlink()
    os.mkfifo(head)
    assert commit_of(folder) is None
    described = Provenance().describe()
    assert described["command"]


def test_a_run_has_one_start_and_one_age() -> None:
    first, second = Provenance(), Provenance()
    begun = datetime(2026, 1, 1, tzinfo=UTC)
    second.resumed = Record(7, begun, elapsed_seconds=5000.0, started=begun.isoformat())
    assert second.elapsed_seconds() > 5000.0 > first.elapsed_seconds()
    assert second.describe()["started"] == "2026-01-01T00:00:00+00:00"


def test_hosts_are_named_once() -> None:
    said = SaveContext("end of epoch 1", elapsed_seconds=1.23456).origin(["a", "a", "b", "a"])
    assert said == {"hosts": ["a", "b"], "reason": "end of epoch 1", "elapsed_seconds": 1.235}
