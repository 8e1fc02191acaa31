"""No URL tells a secret, wherever it is said: messages, events, reports, logs, manifests."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import (
    CheckpointError,
    IntegrityError,
    NotFound,
    StorageError,
    describe,
    from_wire,
    to_wire,
    without_secrets,
)
from dist_ckpt.storage.base import read_all
from dist_ckpt.storage.fsspec import FsspecStore
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.resolve import resolve

SECRET = "s3cr3tVALUE"

URLS = [
    f"s3://key:{SECRET}@bucket/run",
    f"s3://{SECRET}@bucket/run",
    f"s3://key:a/{SECRET}/b@bucket/run",
    f"s3://key:a+{SECRET}=@bucket",
    f"s3://key:a?{SECRET}@bucket",
    f"s3://key:a?b/{SECRET}@bucket",
    f"https://host?a=b@{SECRET}",
    f"https://one/a,https://me:{SECRET}@two/b",
    f"https://host/run?X-Amz-Signature={SECRET}&X-Amz-Date=1",
    f"https://host/run?a=1&token={SECRET}",
    f"https://host/run?{SECRET}",
    f"https://host/run#access_token={SECRET}",
    f"https://account.blob.core.windows.net/c/run?sv=1&sig={SECRET}%3D",
    f"https://{SECRET}@github.com/me/repo.git",
    f"https://me:{SECRET}@github.com/me/repo.git",
    f"https://oauth2:{SECRET}@gitlab.com/me/repo.git",
    f"git+https://{SECRET}@host/me/repo.git@main",
    f"ssh://me:{SECRET}@host:22/run",
    f"sftp://me:{SECRET}@host/run",
    f"ftp://me:p@{SECRET}@host/run",
    f"redis://:{SECRET}@host:6379/0",
    f"postgres://me:{SECRET}@host/db?sslmode=off",
    f"http://proxy:{SECRET}@proxy.local:8080",
    f"abfs://container:{SECRET}@account.dfs.core.windows.net/run",
    f"gs://bucket/run?userProject=x&key={SECRET}",
    f"hf://datasets/me/repo?token={SECRET}",
    f"HTTPS://me:{SECRET}@HOST/run",
    f"s3:/key:{SECRET}@bucket/run",
    f"s3:///key:{SECRET}@bucket/run",
    f"simplecache::https://me:{SECRET}@host/run",
    f"memory://run?password={SECRET}",
    f"file:///run?password={SECRET}",
]
FRAMES = [
    "{}",
    "cannot put a/b in {}: denied",
    "'{}'",
    '"{}"',
    "<{}>",
    "({})",
    "a {} b {} c",
    "x={}\n",
]

PLAIN = [
    "s3://bucket/run-17",
    "/data/runs/17",
    "step 3 in s3://bucket/run: file a/b is missing; which step? ask",
    "https://host:9000/bucket",
    "abfss://container@account.dfs.core.windows.net/run",
    "hf://datasets/me/repo@main/run",
    "memory://test-3",
    "sftp://host:22/run",
    "a@b",
    "what? nothing",
    "",
]


@pytest.mark.parametrize("url", URLS)
def test_no_text_tells_what_a_url_keeps_secret(url: str) -> None:
    for frame in FRAMES:
        text = frame.format(*[url] * frame.count("{}"))
        assert SECRET not in without_secrets(text), text
        errors: list[BaseException] = [
            StorageError(text, ranks={0: text}),
            from_wire(to_wire(OSError(text))),
            from_wire({"class": "IntegrityError", "message": text, "ranks": {"1": text}}),
        ]
        for error in errors:
            assert SECRET not in f"{error} {error!r} {error.args} {vars(error)}"
        assert SECRET not in describe(ValueError(text))


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text: str) -> None:
    assert without_secrets(text) == text


def test_no_store_and_no_policy_shows_what_its_url_keeps_secret() -> None:
    shown = [
        MemoryStore(f"run?token={SECRET}"),
        resolve(f"s3://bucket/run?token={SECRET}"),
        dist_ckpt.policy.on_notice(f"https://me:{SECRET}@host/notice"),
    ]
    assert SECRET not in repr(shown) + str(shown)


def test_what_is_left_of_a_url_says_where_it_is() -> None:
    assert without_secrets("s3://key:secret@bucket/run: full") == "s3://***@bucket/run: full"
    assert without_secrets("get https://host/run?a=1&b=2 now") == "get https://host/run?*** now"


@pytest.mark.parametrize("url", URLS)
def test_a_place_that_is_refused_is_named_without_them(url: str) -> None:
    refusal: CheckpointError | None = None
    try:
        said = repr(events.SaveSkipped(resolve(url).url, 1, 0))
    except CheckpointError as error:
        refusal, said = error, ""
    assert SECRET not in f"{refusal!r} {said}"


def test_long_texts_take_no_long_time() -> None:
    for text in ("a" * 200_000 + "://", "a:/" * 70_000, "a://" + "b:" * 100_000, "://@" * 50_000):
        assert len(without_secrets(text)) <= 2 * len(text)


def test_a_run_whose_url_holds_one_never_tells_it(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = f"memory://secrets?token={SECRET}"
    store = MemoryStore(f"secrets?token={SECRET}")
    heard: list[object] = []
    stop = events.subscribe(heard.append)
    try:
        with caplog.at_level(logging.DEBUG, logger="dist_ckpt"):
            with dist_ckpt.Checkpointer(url, {"a": 1}, every_steps=1) as ckpt:
                ckpt.step(1)
                ckpt.step(2)
            newest = next(e.key for e in store.list_entries() if "0002/manifest" in e.key)
            store.put(newest, [b"damaged"], mode="replace")
            with dist_ckpt.Checkpointer(url, {"a": 0}, every_steps=1) as ckpt:
                assert ckpt.restore() == 1
                assert ckpt.restored is not None
                said = f"{ckpt.restored} {ckpt.restored!r}"
            with pytest.raises(NotFound) as missing:
                dist_ckpt.load({"a": 0}, url, step=7)
            with pytest.raises(IntegrityError) as damaged:
                dist_ckpt.load({"a": 0}, url, step=2)
    finally:
        stop()
    told = "".join(each.getMessage() for each in caplog.records if each.name == "dist_ckpt")
    assert "passed over" in told
    assert heard
    assert SECRET not in f"{told} {said} {heard} {missing.value} {damaged.value}"
    first = next(e.key for e in store.list_entries() if "0001/manifest" in e.key)
    assert SECRET.encode() not in read_all(store, first)


def test_options_of_a_store_are_in_no_text(tmp_path: Path) -> None:
    options = {"key": SECRET, "secret": SECRET, "token": SECRET, "password": SECRET}
    for url in ("gs://bucket/run", "s3://bucket/run", str(tmp_path), "memory://x"):
        refusal: CheckpointError | None = None
        try:
            store = resolve(url, storage_options=options)
            said = f"{store!r} {store.url}"
        except CheckpointError as error:
            refusal, said = error, ""
        assert SECRET not in f"{refusal!r} {said}"
    with pytest.raises(CheckpointError) as caught:
        FsspecStore("memory://a", storage_options={"nonsense": SECRET}).size("x")
    assert SECRET not in f"{caught.value!r}"
