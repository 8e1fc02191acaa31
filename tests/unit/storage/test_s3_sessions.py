"""What connections to S3 share, and what each has of its own."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from aiobotocore.session import AioSession

from dist_ckpt.storage.s3_client import Client


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """Keep the files and the metadata service of this machine out of it."""
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, "/dev/null")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    return monkeypatch


def connected(options: dict[str, Any] | None = None) -> AioSession:
    """Return the session that a new client makes for its first request."""
    client = Client({"endpoint_url": "http://127.0.0.1:1", **(options or {})})

    async def connect() -> AioSession:
        session = client.session()
        await session.connected(None, "head_object")
        found: AioSession = session.system.session
        return found

    try:
        return client.run(connect)
    finally:
        client.close()


def key_of(session: AioSession) -> str:
    async def found() -> str:
        return str((await session.get_credentials()).access_key)

    return asyncio.run(found())


def test_the_description_of_s3_is_parsed_once(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("AWS_ACCESS_KEY_ID", "key")
    alone.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    first, second = connected(), connected()
    assert first is not second
    assert first.get_component("data_loader") is second.get_component("data_loader")


def test_credentials_are_found_anew_for_each_connection(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    found = []
    for key in ("first", "second"):
        alone.setenv("AWS_ACCESS_KEY_ID", key)
        found.append(key_of(connected()))
    assert found == ["first", "second"]


def test_a_session_that_was_given_is_used_as_it_is(alone: pytest.MonkeyPatch) -> None:
    alone.setenv("AWS_ACCESS_KEY_ID", "key")
    alone.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    given = AioSession()
    loader = given.get_component("data_loader")
    assert connected({"session": given}) is given
    assert given.get_component("data_loader") is loader
