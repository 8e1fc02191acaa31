"""What checkpoints need of a place, tried one by one: each with what to do where it is missing."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from dist_ckpt.cli.measuring import measure
from dist_ckpt.cli.output import size
from dist_ckpt.errors import AlreadyExists, CheckpointError, UsageError

if TYPE_CHECKING:
    from dist_ckpt.run import Run
    from dist_ckpt.storage import Store

State: TypeAlias = Literal["ok", "warn", "fail"]

_TRIAL_BYTES = 32 << 20
_SKEW_SECONDS = 5.0
_FEW_INODES = 10_000
_LITTLE_BYTES = 10 * 10**9

# Keys: `Credentials.method` of botocore, which says how it found them.
_CREDENTIALS: Mapping[str, str] = {
    "env": "the variables of the environment (AWS_ACCESS_KEY_ID and others)",
    "shared-credentials-file": "the shared file of credentials (~/.aws/credentials)",
    "config-file": "the configuration of AWS (~/.aws/config)",
    "iam-role": "the role of this instance",
    "container-role": "the role of this container",
    "assume-role-with-web-identity": "the role of this pod",
}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was tried.

    Attributes:
        name: what.
        state: how it is: "warn" where saves work, and something may yet go wrong.
        said: what was found.
        remedy: what to do; "" where all is well.
    """

    name: str
    state: State
    said: str
    remedy: str = ""


@dataclass
class _Place:
    """Where it is tried: a store, a folder in it, and what was learned so far."""

    run: Run
    options: Mapping[str, Any]
    folder: str = ""
    removed: list[str] = field(default_factory=list)
    put_at: tuple[float, float] = (0.0, 0.0)
    data: bytes = field(default=b"dist_ckpt was here\n" * 50)

    @property
    def store(self) -> Store:
        return self.run.store

    @property
    def path(self) -> str:
        """That of a disk; "" for other storage."""
        return "" if "://" in self.store.url else self.store.url

    @property
    def key(self) -> str:
        return f"{self.folder}object"


Found = tuple[State, str, str]
Trial = Callable[[_Place], Found | None]


def examine(run: Run, options: Mapping[str, Any]) -> list[Check]:
    """Try everything at the place of `run`, in order, and leave nothing behind.

    Args:
        run: the place; there need not be a run.
        options: of the storage, as they were given.

    Raises:
        UsageError: it is a file, or what no place is called: there is nothing to examine.
    """
    place = _Place(run, options)
    checks = list(_tried(_BEFORE, place))
    # Where nothing can be listed, all that follows would fail for the same reason.
    if any(each.state == "fail" for each in checks):
        return checks
    try:
        scratches: Any = import_module("dist_ckpt.repository.scratch")
        # Before our own is there; what was found is named at the end.
        place.removed = scratches.remove_leftovers(place.store)
        with scratches.scratch(place.store) as place.folder:
            for check in _tried(_INSIDE, place):
                checks.append(check)
                if check.name == "put" and check.state == "fail":
                    return checks  # without an object there is nothing more to try
        # Behind the removal, as only now it shows whether that took effect.
        checks += _tried(_AFTER, place)
    # Trials that fail are told by `_tried`: what comes here failed to be removed.
    except CheckpointError as error:
        checks.append(Check("delete", "fail", error.message, "let this user delete what it put"))
    return checks


def _tried(trials: Mapping[str, tuple[Trial, str]], place: _Place) -> Iterator[Check]:
    for name, (trial, remedy) in trials.items():
        # One that fails keeps no other from being tried.
        try:
            found = trial(place)
        except CheckpointError as error:
            # A file, or what no place is called: that is no place with a fault.
            if isinstance(error, UsageError) and trials is _BEFORE:
                raise
            yield Check(name, "fail", error.message, remedy)
            continue
        # None says that it makes no sense here, as hard links on S3.
        if found is not None:
            yield Check(name, *found)


def _credentials(place: _Place) -> Found | None:
    if not place.store.url.startswith("s3"):
        return None
    # Where they come from is all that is said: their values are secrets.
    if {"key", "secret", "token", "profile"} & place.options.keys():
        return "ok", "from the storage options", ""
    # By botocore's own chain, as the requests will look for them.
    session: Any = import_module("botocore.session").Session()
    found = session.get_credentials()
    if found is None:
        return (
            "warn",
            "none: requests are anonymous",
            "set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give --storage-option key=...",
        )
    return "ok", f"from {_CREDENTIALS.get(found.method, found.method)}", ""


def _list(place: _Place) -> Found:
    began = time.perf_counter()
    names = place.store.list_children()
    return "ok", f"{len(names)} names in {_milliseconds(began)}", ""


def _put(place: _Place) -> Found:
    began, clock = time.perf_counter(), time.time()
    place.store.put(place.key, [place.data])
    # The time that the storage notes has to lie between the two, see `_clock`.
    place.put_at = clock, time.time()
    return "ok", f"{len(place.data)} bytes in {_milliseconds(began)}", ""


def _create_only(place: _Place) -> Found:
    if not place.store.capabilities.atomic_create:
        return (
            "fail",
            "this storage cannot create an object atomically",
            "two jobs could commit one step: choose another place, or promise a single_writer",
        )
    # What is declared is tried all the same: some servers ignore conditions.
    try:
        place.store.put(place.key, [b"another"])
    except AlreadyExists:
        return "ok", "a second create is refused", ""
    return (
        "fail",
        "an object that exists was created again",
        "two jobs could commit one step: the server ignores conditions; choose another one",
    )


def _read(place: _Place) -> Found:
    # One byte more: an object that is longer is not what was put, either.
    buffer = memoryview(bytearray(len(place.data) + 1))
    count = place.store.read_into(place.key, 0, buffer)
    # Section 1 of commit-v1: a read, and a listing, that begin later must find it.
    listed = [entry.key for entry in place.store.list_entries(place.folder)]
    if buffer[:count] != place.data or place.key not in listed:
        return (
            "fail",
            "what was put is not read or listed as it is",
            "no cache may stand between this host and the storage",
        )
    return "ok", "what was put is read and listed at once", ""


def _hard_links(place: _Place) -> Found | None:
    if not place.path:
        return None
    path = os.path.join(place.path, place.key)
    try:
        os.link(path, f"{path}-link")
    # Without links, one winner is certain only among writers of one host (commit-v1, section 1).
    except OSError as error:
        return (
            "warn",
            f"there are none ({error.strerror}), so the create is slower or not atomic",
            "choose a file system with hard links where several hosts save to one run",
        )
    return "ok", "there are, and a create by them is atomic", ""


def _clock(place: _Place) -> Found:
    entries = place.store.list_entries(place.folder)
    times = [entry.modified for entry in entries if entry.key == place.key]
    if not times or times[0] is None:
        return "ok", "this storage does not say when an object was put", ""
    before, after = place.put_at
    # Many servers say whole seconds.
    skew = max(times[0] - after, before - times[0] - 1, 0.0)
    if skew > _SKEW_SECONDS:
        return (
            "warn",
            f"the clock of the storage differs from that of this host by {skew:.0f} s",
            "set both by NTP: requests to S3 are refused from 15 minutes on, and ages are wrong",
        )
    return "ok", f"the clock of the storage differs by less than {_SKEW_SECONDS:.0f} s", ""


def _throughput(place: _Place) -> Found:
    found = measure(place.store, place.folder, nbytes=_TRIAL_BYTES, files=2)
    return "ok", f"write {size(round(found.write))}/s, read {size(round(found.read))}/s", ""


def _direct(place: _Place) -> Found | None:
    # Told by the store once the trial of throughput has written to it.
    if not place.path:
        return None
    if place.store.capabilities.direct_io:
        return "ok", "files go past the page cache", ""
    return (
        "warn",
        "this mount takes no O_DIRECT: files go through the page cache",
        "saves are slower, and take memory from the training; a local disk does without",
    )


def _free(place: _Place) -> Found | None:
    if not place.path:
        return None
    status = os.statvfs(place.path)
    # f_bavail: what this user may take; f_bfree has what is reserved for root, too.
    free = status.f_bavail * status.f_frsize
    try:
        newest = place.run.newest().nbytes
    except CheckpointError:
        newest = 0  # which `verify` tells
    said = f"{size(free)} free" + (f", the newest checkpoint has {size(newest)}" if newest else "")
    if free < newest:
        return "fail", said, "make room: the next checkpoint does not fit"
    # Twice: the one before is deleted only when the next is committed.
    if free < max(2 * newest, _LITTLE_BYTES):
        return "warn", said, "make room, or keep fewer: dist-ckpt keep"
    return "ok", said, ""


def _inodes(place: _Place) -> Found | None:
    if not place.path:
        return None
    status = os.statvfs(place.path)
    # btrfs makes them as it goes, and says 0.
    if not status.f_files:
        return "ok", "this file system does not count them", ""
    said = f"{status.f_favail} left"
    if status.f_favail < _FEW_INODES:
        return "warn", said, "each rank writes a file for each part: remove small files"
    return "ok", said, ""


def _delete(place: _Place) -> Found:
    left = [entry.key for entry in place.store.list_entries(place.folder)]
    if left:
        return (
            "fail",
            f"{left[0]} is there after it was deleted",
            "no cache may stand between this host and the storage",
        )
    return "ok", "what was put is gone", ""


def _leftovers(place: _Place) -> Found | None:
    left = place.run.leftovers()
    besides = "".join(f"; {name} of one that was killed is gone" for name in place.removed)
    if left:
        return (
            "warn",
            f"{len(left)} folders of jobs that were killed, such as {left[0]}{besides}",
            f"dist-ckpt sweep {place.run.url}",
        )
    return "ok", f"nothing that killed jobs left{besides}", ""


def _milliseconds(began: float) -> str:
    return f"{(time.perf_counter() - began) * 1000:.0f} ms"


_RIGHTS = "let this user list, put and delete there, or choose another place"
# In this order: each trial relies on what those above it have shown.
_BEFORE: Mapping[str, tuple[Trial, str]] = {
    "credentials": (_credentials, "check the configuration of AWS"),
    "list": (_list, "check the URL, the network, and that this user may list there"),
}
_INSIDE: Mapping[str, tuple[Trial, str]] = {
    "put": (_put, _RIGHTS),
    "create-only": (_create_only, _RIGHTS),
    "read after write": (_read, _RIGHTS),
    "hard links": (_hard_links, _RIGHTS),
    "clock": (_clock, _RIGHTS),
    "throughput": (_throughput, "make room, or check the disk or the server"),
    "O_DIRECT": (_direct, _RIGHTS),
    "free space": (_free, _RIGHTS),
    "inodes": (_inodes, _RIGHTS),
}
_AFTER: Mapping[str, tuple[Trial, str]] = {
    "delete": (_delete, _RIGHTS),
    "leftovers": (_leftovers, "look at what is there: dist-ckpt ls"),
}
