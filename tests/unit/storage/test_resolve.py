"""Which store each url means, and which urls mean none."""

from __future__ import annotations

import copy
import subprocess
import sys
from pathlib import Path
from typing import Any

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from dist_ckpt.errors import UsageError
from dist_ckpt.storage import LocalStore, MemoryStore, StoreWrapper, resolve
from dist_ckpt.storage.fsspec import FsspecStore
from dist_ckpt.storage.retry import RetryStore


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
    for name in ("$HOME/run", "~nobody-is-called-so", "a$b", "$", "1~"):
        assert resolve(f"./{name}").url == f"{tmp_path}/{name}"
    assert resolve("a$b/~c").url == f"{tmp_path}/a$b/~c"
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


@pytest.mark.parametrize("url", ["foo://bucket/run", "FOO://bucket", "http://host/x", "x+y://"])
def test_unknown_scheme_is_named_with_the_known_ones(url: str) -> None:
    with pytest.raises(UsageError, match=r"unknown scheme '(foo|http|x\+y)'.*file://, memory://"):
        resolve(url)


@pytest.mark.parametrize(
    ("url", "package"),
    [("gs://bucket/run", "gcsfs"), ("az://container/run", "adlfs"), ("oci://b@n/r", "ocifs")],
)
def test_missing_package_is_named(url: str, package: str) -> None:
    with pytest.raises(UsageError, match=f"pip install {package}"):
        resolve(url)


@pytest.mark.parametrize(
    ("url", "back"),
    [
        ("s3://bucket/run/7/", "s3://bucket/run/7"),
        ("S3://bucket", "s3://bucket"),
        ("s3a://bucket/a?b#c%20", "s3://bucket/a?b#c%20"),
    ],
)
def test_s3_urls(url: str, back: str) -> None:
    # Nothing is contacted: no credentials are needed to say where something is.
    store = resolve(url, storage_options={"endpoint_url": "http://127.0.0.1:1"})
    assert store.url == back
    assert store.capabilities.atomic_create
    assert store.capabilities.max_object_bytes == 5 << 40
    assert resolve(store.url).url == back


class TestWrappers:
    """Which wrappers stand around what: `resolve` is the one place that decides."""

    def layers(self, store: object) -> list[str]:
        names = [type(store).__name__]
        while isinstance(store, StoreWrapper):
            store = store.inner
            names.append(type(store).__name__)
        return names

    def test_local_places_stand_alone(self, tmp_path: Path) -> None:
        assert self.layers(resolve(tmp_path)) == ["LocalStore"]
        assert self.layers(resolve(tmp_path, single_writer=True)) == ["LocalStore"]

    def test_s3_repeats_requests_itself(self) -> None:
        assert self.layers(resolve("s3://bucket/run")) == ["MeterStore", "S3Store"]

    def test_single_writer_makes_s3_ask_no_condition(self) -> None:
        store = resolve("s3://bucket/run", single_writer=True)
        assert self.layers(store) == ["MeterStore", "SingleWriterStore", "S3Store"]
        assert store.capabilities.atomic_create

    def test_others_are_repeated(self, other_scheme: str) -> None:
        store = resolve(f"{other_scheme}://run")
        assert self.layers(store) == ["MeterStore", "RetryStore", "FsspecStore"]
        assert not store.capabilities.atomic_create

    def test_everything_asked_for(self, other_scheme: str) -> None:
        store = resolve(
            f"{other_scheme}://run",
            storage_options={"anything": 1},
            single_writer=True,
            read_only=True,
            max_concurrent=2,
            max_bytes_per_second=1e6,
        )
        assert self.layers(store) == [
            "ReadOnlyStore",
            "MeterStore",
            "LimitStore",
            "SingleWriterStore",
            "RetryStore",
            "FsspecStore",
        ]

    @pytest.fixture
    def other_scheme(self) -> str:
        # Another name of a file system that needs no package and no server.
        fsspec.register_implementation("resolvetest", MemoryFileSystem, clobber=True)
        return "resolvetest"


@pytest.mark.parametrize("url", ["/data/run", "file:///data", "memory://x"])
def test_options_that_go_nowhere_are_refused(url: str) -> None:
    with pytest.raises(UsageError, match=r"takes no storage_options.*'key'"):
        resolve(url, storage_options={"key": "x"})


@pytest.mark.parametrize("url", ["s3://key:hunter2@bucket/run", "hdfs://me:hunter2@host/run"])
def test_secret_in_a_url_is_refused_and_not_shown(url: str) -> None:
    with pytest.raises(UsageError, match="storage_options") as caught:
        resolve(url)
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("", "give a path"),
        ("  ", "give a path"),
        ("s3:/bucket/run", r"\./s3:/bucket"),
        ("file:/data", "write scheme"),
        ("$HOME/run", r"\$HOME is for a shell to replace.*\./\$HOME/run"),
        ("${DATA}/run", r"\$\{DATA\} is for a shell"),
        ("$SCRATCH", "is for a shell"),
        ("~nobody-is-called-so/run", r"no home folder of ~nobody-is-called-so.*\./~nobody"),
        ("://bucket", "write scheme"),
        ("file://", "three slashes"),
        ("file://host/data", "three slashes"),
        ("file://data", "three slashes"),
        ("file:///data?x=1", "%3F"),
        ("file:///data#x", "%23"),
        ("file:///data/%00", "null"),
        ("s3://", "names its bucket"),
        ("s3:///run", "names its bucket"),
        ("s3://buc ket/run", "bad bucket name"),
        ("s3://bucket//run", "bad key"),
        ("s3://bucket/../run", "bad key"),
        ("simplecache::s3://bucket/run", "write scheme"),
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


@pytest.mark.parametrize("url", ["/data/run", "s3://bucket/run"])
def test_stores_go_to_another_process_without_what_is_of_this_one(url: str) -> None:
    options: dict[str, Any] = {"max_concurrent": 2, "max_bytes_per_second": 1e6}
    for store in (resolve(url), resolve(url, read_only=True), resolve(url, **options)):
        there = copy.deepcopy(store)  # by way of what a pickle would hold
        assert (repr(there), there.url) == (repr(store), store.url)
        assert there.capabilities == store.capabilities
    place = RetryStore(FsspecStore("memory://place"))
    there = copy.deepcopy(place)
    there.put("key", [b"x"])
    assert there.size("key") == 1
    place.delete(["key"])
    with pytest.raises(UsageError, match="in the memory of this process"):
        copy.deepcopy(resolve("memory://place"))


def test_limits_of_a_copy_are_its_own(tmp_path: Path) -> None:
    there = copy.deepcopy(resolve(tmp_path, max_concurrent=1))
    there.put("key", [b"x"])
    assert there.list_children() == ["key"]


def test_a_path_from_a_directory_that_was_deleted_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    with pytest.raises(UsageError, match="was deleted, so the path 'run' leads nowhere"):
        resolve("run")
    assert resolve(tmp_path / "run").url == str(tmp_path / "run")


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"max_concurrent": "8"}, "max_concurrent must be at least 1, a whole number, not '8'"),
        ({"max_concurrent": 1.5}, "max_concurrent must be at least 1, a whole number, not 1.5"),
        ({"max_concurrent": True}, "max_concurrent must be at least 1, a whole number, not True"),
        ({"max_bytes_per_second": "1MB"}, "max_bytes_per_second must be a number above 0"),
        ({"max_bytes_per_second": float("nan")}, "max_bytes_per_second must be a number above 0"),
        ({"single_writer": "no"}, "single_writer is True or False, not 'no'"),
        ({"read_only": None}, "read_only is True or False, not None"),
    ],
)
def test_options_of_another_kind_are_named(options: dict[str, Any], match: str) -> None:
    with pytest.raises(UsageError, match=match):
        resolve("unused", **options)
