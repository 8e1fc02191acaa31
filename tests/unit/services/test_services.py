"""How the services of the tests are found and started, and what is said when they cannot be."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.services import s3
from tests.services.ceph import CephCluster, ServiceFailed, answers, free_port, spawn, wait_for


def test_given_server_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(s3.URL_VARIABLE, "s3://somebodys-bucket/a/folder/")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:1")
    service = s3.given_service()
    again = s3.given_service()
    assert service is not None
    assert again is not None
    assert service.url("x").startswith("s3://somebodys-bucket/a/folder/")
    assert service.url("x") != again.url("x"), "what an earlier session left is not met again"
    assert service.endpoint == "http://127.0.0.1:1"


def test_nothing_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(s3.URL_VARIABLE, raising=False)
    assert s3.given_service() is None


def test_command_finds_the_server_and_its_exit_code_counts() -> None:
    given = {s3.URL_VARIABLE: "s3://somebodys-bucket/folder"}
    code = f"import os, sys; print(os.environ['{s3.URL_VARIABLE}']); sys.exit(3)"
    done = subprocess.run(
        [sys.executable, "-m", "tests.services", sys.executable, "-c", code],
        env={**os.environ, **given},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 3
    assert done.stdout.startswith("s3://somebodys-bucket/folder/")


def test_missing_ceph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    assert CephCluster.missing() != []
    cluster, reason = s3.start_ceph()
    assert cluster is None
    line = s3.moto_line(reason)
    assert "ceph is not installed" in line
    assert "CephFS" in line


def test_moto_takes_its_place() -> None:
    with s3.moto_service() as service:
        assert service.kind == "moto"
        service.client().put_object(Bucket=service.bucket, Key="place/a/b", Body=b".")
        service.client().create_multipart_upload(Bucket=service.bucket, Key="place/c")
        assert service.keys("place") == ["a/b"]
        assert service.uploads("place") == ["c"]
    assert not answers(service.endpoint), "what was started is stopped"


def test_daemon_that_ends_is_not_waited_for() -> None:
    daemon = spawn([sys.executable, "-c", "raise SystemExit(5)"], subprocess.DEVNULL)
    with pytest.raises(ServiceFailed, match="exit code 5"):
        wait_for(daemon, lambda: False)


def test_nothing_listens_on_a_free_port() -> None:
    assert not answers(f"http://127.0.0.1:{free_port()}")
