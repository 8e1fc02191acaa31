"""Installing the test servers: only where it can work, and never a reason for tests not to run."""

from __future__ import annotations

import os
import shutil
import subprocess

import pytest

from tests.services.ceph import FILE_SYSTEM_PROGRAMS
from tools import install_services


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """No program is installed but apt-get, which only notes how it is called."""
    calls: list[list[str]] = []

    def run(command: list[str], limit_seconds: float) -> str:
        calls.append(command)
        return ""

    monkeypatch.setattr(shutil, "which", lambda name: name if name == "apt-get" else None)
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(install_services, "run", run)
    monkeypatch.delenv("DIST_CKPT_TEST_S3_URL", raising=False)
    return calls


def test_installs_what_is_missing(ran: list[list[str]]) -> None:
    assert install_services.main() == 0
    update, install = ran
    assert update[-1] == "update"
    assert install[-5:] == list(install_services.PACKAGES.values())


def test_nothing_to_do_where_all_is_there(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: name)
    assert install_services.main() == 0
    assert ran == []


@pytest.mark.parametrize("lacking", ["root", "apt-get"])
def test_says_so_where_it_cannot(
    ran: list[list[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    lacking: str,
) -> None:
    if lacking == "root":
        monkeypatch.setattr(os, "geteuid", lambda: 1000)
    else:
        monkeypatch.setattr(shutil, "which", lambda name: None)
    assert install_services.main() == 0
    assert ran == []
    assert "radosgw" in capsys.readouterr().out


def test_leaves_the_machine_alone_where_a_server_is_given(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_CKPT_TEST_S3_URL", "s3://bucket")
    assert install_services.main() == 0
    assert ran == []


def test_failure_is_told_and_is_no_failure(
    ran: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(install_services, "run", lambda command, limit_seconds: "no way there")
    assert install_services.main() == 0
    assert "no way there" in capsys.readouterr().out


def test_reason_is_the_last_line_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    def told(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
        return subprocess.CompletedProcess([], 100, "", "first\nE: no such mirror\n")

    monkeypatch.setattr(subprocess, "run", told)
    assert install_services.run(["apt-get"], 1.0) == "E: no such mirror"


def test_packages_have_the_programs_of_the_file_system() -> None:
    assert set(FILE_SYSTEM_PROGRAMS) <= set(install_services.PACKAGES)
