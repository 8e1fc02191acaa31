"""Settings that hold for every test, and the servers that some of them need."""

from __future__ import annotations

import gc
import itertools
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from xdist.scheduler import LoadScopeScheduling

from tests.services.ceph import FILE_SYSTEM_PROGRAMS, CephCluster, ServiceFailed
from tests.services.hosts import Hosts, two_hosts
from tests.services.linkless import linkless_mount
from tests.services.s3 import (
    S3Service,
    ceph_service,
    given_service,
    moto_line,
    moto_service,
    start_ceph,
)

# The same examples in every run, and no limit in time: the machine may be busy.
settings.register_profile("repeatable", derandomize=True, deadline=None)
settings.load_profile("repeatable")

# A shell that starts a command in the background has it ignore interrupts, and all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

_places = itertools.count()

_LONG_SECONDS = 1000
_SERVERS = re.compile(r"\b(ceph|cephfs|linkless_folder|s3_name|s3_service|shared_folder)\s*[:,)]")


_SOURCE = re.compile(r"^from tests\.arch\.source import [^)]*\bmodules\b", re.MULTILINE)


class TogetherWhatShares(LoadScopeScheduling):  # type: ignore[misc]
    """Shares tests out to workers one by one, except for those that share what is slow to make.

    All files that need a server go to one worker, so that each server is started once; so do those
    that look at the source, which is parsed once, and a file with fixtures of its own for all its
    tests. (The groups of pytest-xdist 3.8 have no effect
    under pytest 9.2.)
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return _scope_of(self.config.rootpath / file) or nodeid


def pytest_collection() -> None:
    """Collect without a look for garbage: what is collected is some million objects that stay."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Leave what was collected out of every later look, in this process and its children."""
    gc.freeze()
    gc.enable()


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> TogetherWhatShares:
    return TogetherWhatShares(config, log)


@cache
def _scope_of(file: Path) -> str:
    text = file.read_text()
    if _SERVERS.search(text):
        return "servers"
    if _SOURCE.search(text):
        return "source"
    return str(file) if 'scope="module"' in text else ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Put the longest ones first: no worker is left alone with one of them at the end."""
    items.sort(key=_is_short)


def _is_short(item: pytest.Item) -> bool:
    own = item.get_closest_marker("timeout")
    return own is None or own.args[0] < _LONG_SECONDS


@pytest.fixture(scope="session")
def ceph() -> Iterator[tuple[CephCluster | None, str]]:
    """A Ceph cluster of this session, or None and why there is none."""
    cluster, reason = start_ceph()
    yield cluster, reason
    if cluster is not None:
        cluster.stop()


@pytest.fixture(scope="session")
def s3_service(request: pytest.FixtureRequest) -> Iterator[S3Service]:
    """The S3 server of this session, reachable through the variables of the environment."""
    with ExitStack() as stack:
        service = given_service()
        if service is None:
            cluster, reason = request.getfixturevalue("ceph")
            if cluster is not None:
                service = ceph_service(cluster)
            else:
                # Past the capture; a worker has no terminal of its own.
                os.write(2, f"\n{moto_line(reason)}\n".encode())
                service = stack.enter_context(moto_service())
        environment = stack.enter_context(pytest.MonkeyPatch.context())
        for name, value in service.environment.items():
            environment.setenv(name, value)
        yield service


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    """Two hosts, with cables between them; loopback addresses where there can be none."""
    with two_hosts() as found:
        yield found


@pytest.fixture
def cables(hosts: Hosts) -> Hosts:
    """Two hosts whose cables can be pulled."""
    if not hosts.is_real:
        pytest.skip("network namespaces are not allowed here")
    return hosts


@pytest.fixture
def s3_name(s3_service: S3Service) -> str:
    """A place of the S3 server that no other test uses; see `S3Service.url`."""
    return f"place-{next(_places)}"


@pytest.fixture(scope="session")
def linkless_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A mounted file system that has no hard links; only root can make one."""
    with ExitStack() as stack:
        try:
            yield stack.enter_context(linkless_mount(tmp_path_factory.mktemp("linkless")))
        except PermissionError as error:
            pytest.skip(str(error))


@pytest.fixture(scope="session")
def cephfs(ceph: tuple[CephCluster | None, str]) -> list[Path]:
    """One network file system as two hosts see it: two mounts."""
    cluster, reason = ceph
    missing = CephCluster.missing(FILE_SYSTEM_PROGRAMS)
    if cluster is None or missing:
        pytest.skip(f"no CephFS: {reason or f'{missing[0]} is not installed'}")
    try:
        return cluster.mount(2)
    except ServiceFailed as error:
        pytest.skip(f"no CephFS: {error}")


@pytest.fixture
def shared_folder(cephfs: list[Path]) -> Callable[[int], Path]:
    """A new folder of the network file system, as the host of that number sees it."""
    name = f"place-{next(_places)}"
    return lambda host: cephfs[host] / name
