"""Which store each url means, and which urls mean none."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import LocalStore, MemoryStore, resolve


@pytest.mark.parametrize(
    ("url", "path"),
    [
        ("/data/run", "/data/run"),
        ("/data//x/../run/", "/data/run"),
        ("file:///data/run", "/data/run"),
        ("FILE:///data/run/", "/data/run"),
        ("file://localhost/data/run", "/data/run"),
        ("file:///data/a%20b%3F/%C3%BC", "/data/a b?/ü"),
        ("/data/a%20b?#", "/data/a%20b?#"),
        ("/data/with://inside", "/data/with:/inside"),
        (Path("/data/run"), "/data/run"),
    ],
)
def test_paths_and_file_urls(url: str | Path, path: str) -> None:
    store = resolve(url)
    assert isinstance(store, LocalStore)
    assert store.url == path


def test_relative_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/someone")
    assert resolve("runs/7").url == f"{tmp_path}/runs/7"
    assert resolve(".").url == str(tmp_path)
    assert resolve("~/runs").url == "/home/someone/runs"
    assert resolve("a:b").url == f"{tmp_path}/a:b"
    assert resolve("./s3:/bucket").url == f"{tmp_path}/s3:/bucket"
    assert list(tmp_path.iterdir()) == []


def test_memory_urls_name_a_space() -> None:
    store = resolve("memory://resolve-test/run/")
    assert isinstance(store, MemoryStore)
    assert store.url == "memory://resolve-test/run"
    store.put("key", [b"."])
    assert resolve(store.url).size("key") == 1
    store.delete(["key"])


def test_url_of_a_store_leads_back_to_it(tmp_path: Path) -> None:
    for url in (str(tmp_path / "a b"), (tmp_path / "ü?").as_uri(), "memory://back"):
        assert resolve(resolve(url).url).url == resolve(url).url


@pytest.mark.parametrize("url", ["s3://bucket/run", "S3://bucket", "http://host/x", "x+y://"])
def test_unknown_scheme_is_named_with_the_known_ones(url: str) -> None:
    with pytest.raises(UsageError, match=r"unknown scheme '(s3|http|x\+y)'.*file://, memory://"):
        resolve(url)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "give a path"),
        ("  ", "give a path"),
        ("s3:/bucket/run", r"\./s3:/bucket"),
        ("file:/data", "write scheme"),
        ("://bucket", "write scheme"),
        ("file://", "three slashes"),
        ("file://host/data", "three slashes"),
        ("file://data", "three slashes"),
        ("file:///data?x=1", "%3F"),
        ("file:///data#x", "%23"),
        ("file:///data/%00", "null"),
        ("memory://", "names its space"),
        ("memory:///", "names its space"),
        ("memory://../x", "bad key"),
        ("/data/\n", "control character"),
    ],
)
def test_malformed_urls_are_refused(url: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        resolve(url)


def test_storage_needs_no_torch() -> None:
    script = (
        "import sys\n"
        "import dist_ckpt.storage, dist_ckpt.testing.stores\n"
        "sys.exit(sum(name in sys.modules for name in ('torch', 'pytest')))\n"
    )
    subprocess.run([sys.executable, "-c", script], cwd=Path(__file__).parents[3], check=True)
