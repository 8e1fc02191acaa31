"""What a manifest says of the program, and what it never says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from dist_ckpt.engine.about import About
from dist_ckpt.engine.origin import Origin, git_state, masked

SECRET = "s3cr3t-value"


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
def test_secrets_are_masked(arguments: list[str]) -> None:
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


def git(folder: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments], check=True, capture_output=True
    )


def test_the_commit_and_whether_something_changed_since(tmp_path: Path) -> None:
    git(tmp_path, "init")
    (tmp_path / "train.py").write_text("1")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-m", "first")
    (tmp_path / "run.log").write_text("not a change of the program")
    found = git_state(tmp_path)
    assert found is not None
    assert len(found["commit"]) == 40
    assert found["dirty"] is False
    (tmp_path / "train.py").write_text("2")
    changed = git_state(tmp_path)
    assert changed == {"commit": found["commit"], "dirty": True}


def test_without_git_nothing_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert git_state(tmp_path) is None
    git(tmp_path, "init")
    assert git_state(tmp_path) is None, "no commit yet"
    monkeypatch.setenv("PATH", str(tmp_path))
    assert git_state(tmp_path) is None
    described = Origin().describe()
    assert "git" not in described
    assert described["command"]


def test_a_run_has_one_start_and_one_age() -> None:
    first, second = Origin(), Origin()
    second.go_on(started="2026-01-01T00:00:00+00:00", elapsed_seconds=5000.0)
    assert second.elapsed_seconds() > 5000.0 > first.elapsed_seconds()
    assert second.describe()["started"] == "2026-01-01T00:00:00+00:00"


def test_hosts_are_named_once() -> None:
    said = About("end of epoch 1", elapsed_seconds=1.23456).origin(["a", "a", "b", "a"])
    assert said == {"hosts": ["a", "b"], "reason": "end of epoch 1", "elapsed_seconds": 1.235}
