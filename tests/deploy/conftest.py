"""What the tests of deploy/ share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.services.proxy import FaultProxy
from tests.services.s3 import S3Service


@pytest.fixture
def wire(s3_service: S3Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[FaultProxy]:
    """All that goes to the server, written down: nothing is spoilt."""
    with FaultProxy(s3_service.endpoint) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint)
        yield proxy
