"""The file names under which a trainer of others knows the checkpoints of a run.

Such a trainer takes a checkpoint for a file, and calls it as it likes (`epoch=3-val_loss=0.2.ckpt`,
`last.ckpt`). In a run of ours that file is a few bytes, which say what step is meant: it can be
looked for, replaced and deleted as the trainer does that, and two names of one step cost one save.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec
from fsspec.core import url_to_fs

from dist_ckpt.decodable import decodable
from dist_ckpt.errors import ErrorKind, IntegrityError, NotFound, UsageError
from dist_ckpt.format.names import parse_step_dir
from dist_ckpt.repository.history import Record
from dist_ckpt.repository.keep import Keep
from dist_ckpt.repository.repository import Repository
from dist_ckpt.run import Run
from dist_ckpt.saving.handle import SaveHandle
from dist_ckpt.storage.base import Store, delete_exactly, read_all
from dist_ckpt.storage.resolve import resolve

_AT = re.compile(r"(?P<url>.+)@(?P<step>[0-9]+)", re.DOTALL)
# How a `StepName` begins, whose first field is `kind`: other files are told by one short read.
_BEGINS = b'{"kind":"dist_ckpt name"'


@decodable
class StepName(msgspec.Struct, frozen=True, kw_only=True):
    """What is in the file.

    Attributes:
        kind: tells it from the files of others.
        step: which checkpoint of the run that the file lies in.
        save_id: which save of that step.
        full: whether the trainer asked for all of it, and not for the model alone.
        values: encoded Python values by rank, where they are others than those of the checkpoint:
            it was given this name later, when no tensor had changed since. Empty for the same.
        random: states of the random number generators by rank, as `values`.
    """

    kind: Literal["dist_ckpt name"] = "dist_ckpt name"
    step: int
    save_id: str
    full: bool = True
    values: list[str] = []
    random: list[dict[str, str]] = []


class Names(Keep):
    """The names in one run, and what is kept because of them. Rank 0's; used by two threads.

    As a policy it keeps what a trainer has a name for, and whatever never had one. A name is
    replaced when its checkpoint is committed, so that until then it means the one before; a new
    name is there at once, since a trainer looks which names are taken.
    """

    __slots__ = ("_coming", "_leaving", "_lock", "_named", "_once", "_store")

    def __init__(self, store: Store) -> None:
        self._store = store
        # One that may be taken again: what holds it calls `settle`, which takes it.
        self._lock = threading.RLock()
        self._named: dict[str, StepName] | None = None
        # In the order in which they were begun: `drop` waits for the last one.
        self._coming: dict[str, tuple[StepName, SaveHandle]] = {}
        self._leaving: dict[str, SaveHandle] = {}
        # Steps that had a name: only these are ever given up.
        self._once: set[int] = set()

    def __repr__(self) -> str:
        return "the names that the trainer gave"  # the same on all ranks

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        """Return the reason to keep for each of `records`; see `KeepPolicy.kept`.

        Asked on the thread that deletes, after a commit: names are moved to what was committed
        before anything they meant until now goes.
        """
        with self._lock:
            self.settle()
            why = {each.step: "no trainer named it" for each in records}
            for step in why.keys() & self._once:
                del why[step]
            return why | {step: f"named {key}" for key, step in self._meant()}

    def find(self, key: str) -> StepName | None:
        """Return what `key` means; None where there is no such file, or it is none of ours."""
        try:
            data = read_all(self._store, key, likely_bytes=4096, begins=_BEGINS)
        except (NotFound, IntegrityError, UsageError):
            return None
        if not data.startswith(_BEGINS):
            return None
        try:
            return msgspec.json.decode(data, type=StepName)
        except msgspec.MsgspecError as error:
            raise IntegrityError(
                f"{key} in {self._store.url} is the damaged name of a checkpoint: {error}. The "
                "checkpoints are beside it: give the run itself, or one of its steps",
                kind=ErrorKind.MALFORMED,
            ) from error

    def latest_of(self, save_id: str) -> StepName | None:
        """Return a name that a save was given later, None where all were given with it."""
        keys = [key for key in self._store.list_children() if not key.endswith("/")]
        found = filter(None, map(self.find, keys))
        return next((e for e in found if e.save_id == save_id and e.values and e.full), None)

    def point(self, key: str, name: StepName, handle: SaveHandle) -> None:
        """Let `key` mean `name` as soon as its save is committed.

        Raises:
            StorageError: the name could not be written.
        """
        with self._lock:
            named = self._all()
            self._coming[key] = name, handle
            # Named anew before it could go.
            self._leaving.pop(key, None)
            self._once.add(name.step)
            if key not in named:
                self._put(key, name)
            self.settle()

    def drop(self, key: str) -> None:
        """Forget `key`; what it meant may go after a commit, if nothing else means it.

        A trainer drops what is not wanted any more when it has begun to save what is better: so
        long as that is not committed, it stays.
        """
        with self._lock:
            self.settle()
            if self._is_others(key):
                return  # nothing is deleted that dist_ckpt did not write
            if self._coming:
                *_, (_, self._leaving[key]) = self._coming.values()
            else:
                self._forget(key)

    def settle(self) -> None:
        """Move the names whose save is over: to its checkpoint, or nowhere where it failed."""
        with self._lock:
            named = self._all()
            for key, (name, handle) in list(self._coming.items()):
                if handle.outcome == "committed":
                    del self._coming[key]
                    if key in named:  # a new one is there already
                        self._put(key, name)
                    named[key] = name
                elif handle.done():
                    del self._coming[key]
                    if key not in named:
                        # Only the bytes that were put: the trainer may have written there since.
                        delete_exactly(self._store, key, msgspec.json.encode(name))
            for key in [key for key, handle in self._leaving.items() if handle.done()]:
                del self._leaving[key]
                self._forget(key)

    def unnamed(self) -> list[int]:
        """Return the steps that had a name and have none any more."""
        with self._lock:
            self._all()
            return sorted(self._once - {step for _, step in self._meant()})

    def forget_before(self, steps: Sequence[int]) -> None:
        """Take note of steps that lost their names in an earlier start, when they had to stay."""
        with self._lock:
            self._once.update(steps)

    def forget_after(self, step: int) -> None:
        """Forget the names of steps newer than `step`, all of which were given up."""
        with self._lock:
            for key in [key for key, name in self._all().items() if name.step > step]:
                self._forget(key)

    def remove_unnamed(self) -> None:
        """Delete what has no name any more, but what is protected: see `Run.remove`."""
        run = Run(self._store)
        for step in self.unnamed():
            try:
                run.remove(step)
            except NotFound:
                pass
            except UsageError as error:
                # What `Run.remove` protects stays, whatever the trainer has dropped.
                if error.kind is not ErrorKind.PROTECTED:
                    raise

    def _forget(self, key: str) -> None:
        self._all().pop(key, None)
        self._store.delete([key])

    def _is_others(self, key: str) -> bool:
        """Whether there is a file of this name that is none of ours.

        A link that the trainer made (`save_last="link"`) is ours, also when it leads nowhere.
        """
        try:
            self._store.size(key)
        except NotFound:
            return False
        return key not in self._all() and self.find(key) is None

    def _meant(self) -> list[tuple[str, int]]:
        found = [(key, name.step) for key, name in (self._named or {}).items()]
        return found + [(key, name.step) for key, (name, _) in self._coming.items()]

    def _all(self) -> dict[str, StepName]:
        """Return the names that are stored; looked up once, as nobody else gives any."""
        if self._named is None:
            keys = [key for key in self._store.list_children() if not key.endswith("/")]
            found = {key: self.find(key) for key in keys}
            self._named = {key: name for key, name in found.items() if name is not None}
            self._once |= {name.step for name in self._named.values()}
        return self._named

    def _put(self, key: str, name: StepName) -> None:
        self._store.put(key, [msgspec.json.encode(name)], mode="replace")


def place_and_key(path: str | os.PathLike[str]) -> tuple[str, str]:
    """Return the run and the name that `path` is made of; one run is always spelled alike."""
    place, key = os.path.split(os.fspath(path))
    return spelled(place or "."), key


def spelled(place: str) -> str:
    """Return a path without links and relative parts, and a URL as it is."""
    return place if "://" in place else os.path.realpath(os.path.expanduser(place))


def forget_listing(path: str | os.PathLike[str]) -> None:
    """Let the file system by which a trainer looks for names see what was written past it."""
    url_to_fs(os.fspath(path))[0].invalidate_cache()


@dataclass(frozen=True, slots=True)
class PointedAt:
    """The checkpoint that somebody points at.

    Attributes:
        place: its run.
        step: which one; None for the newest that is whole.
        name: what the file says that was pointed at, None for no such file.
    """

    place: str
    step: int | None
    name: StepName | None = None


def find(path: str | os.PathLike[str], *, newest: str) -> PointedAt | None:
    """Return what `path` is: a name, `run@step`, a step directory, or a run.

    Args:
        path: a path or a URL.
        newest: how names begin that mean the newest checkpoint, whatever that is by now.

    Returns:
        None where there is nothing of ours.
    """
    text = os.fspath(path).rstrip("/")
    if (at := _AT.fullmatch(text)) is not None:
        return PointedAt(spelled(at["url"]), int(at["step"]))
    place, key = place_and_key(text)
    if (step := parse_step_dir(key)) is not None:
        return PointedAt(place, step)
    name = Names(resolve(place)).find(key)
    if name is not None:
        return PointedAt(place, None if key.startswith(newest) else name.step, name)
    try:
        return PointedAt(spelled(text), None) if Repository(resolve(text)).candidates() else None
    except UsageError:  # a file
        return None
