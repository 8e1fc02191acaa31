"""What a long run of a large job asks of S3: `python -m benchmarks.scale.requests`.

The real repository, on a run of whose checkpoints only the newest has files: names without bytes.
Requests are counted as S3 has them: a page of a listing has 1,000 names, a deletion 1,000 keys.
With `--s3` the run lies on the S3 server of the tests, and what its client sends is counted.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import msgspec

from benchmarks.measure import say
from benchmarks.s3 import environment_of
from benchmarks.scale.index import described
from dist_ckpt import keep
from dist_ckpt.format import manifest as manifest_format
from dist_ckpt.format.files import bytes_digest
from dist_ckpt.format.manifest import ManifestFile
from dist_ckpt.format.names import (
    INDEX,
    claim_key,
    file_key,
    index_key,
    manifest_key,
    new_save_id,
    step_dir,
)
from dist_ckpt.loading.choosing import choose
from dist_ckpt.repository import Repository
from dist_ckpt.repository.history import History, delete_checkpoint
from dist_ckpt.storage import resolve
from dist_ckpt.storage.base import Entry, Store
from dist_ckpt.storage.memory import MemoryStore
from dist_ckpt.storage.s3_client import Client
from dist_ckpt.storage.wrapper import Operation, StoreWrapper
from tests.services.s3 import s3_service

CHECKPOINTS, RANKS = 2000, 16_384
BOUNDS = {"latest": 5, "retention after a commit": 10, "restore choice": 10, "deletion": 120}

_PAGE = 1000
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class Row:
    """How often a store was asked.

    Attributes:
        what: for what.
        checkpoints: of the run.
        files: of its newest checkpoint.
        requests: how often.
    """

    what: str
    checkpoints: int
    files: int
    requests: int

    @property
    def is_met(self) -> bool:
        """Whether that is within its bound."""
        return self.requests <= BOUNDS[self.what]


class AsS3(StoreWrapper):
    """Counts the requests that S3 would be sent.

    Attributes:
        requests: how many they were.
    """

    def __init__(self, inner: Store) -> None:
        super().__init__(inner)
        self.requests = 0

    def asked(self) -> int:
        """Return how many requests there were so far."""
        return self.requests

    def list_children(self, prefix: str = "") -> list[str]:
        """Return the names, by the page. See `Store.list_children`."""
        names = self.inner.list_children(prefix)
        self.requests += max(1, -(-len(names) // _PAGE))
        return names

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        """Yield the objects, page by page. See `Store.list_entries`."""
        entries = self.inner.list_entries(prefix)
        while page := list(islice(entries, _PAGE)):
            self.requests += 1
            yield from page

    def around(self, operation: Operation, key: str, run: Callable[[], _T]) -> _T:
        """See `StoreWrapper.around`."""
        self.requests += 1
        return run()


def fill(store: Store, checkpoints: int, ranks: int) -> int:
    """Make a run of so many checkpoints; return the step of the newest, which has files."""
    store.put(claim_key(1), [b'{"claim": 1}'])
    draft, root, names = described(ranks)
    for step in range(1, checkpoints + 1):
        commit(store, step, draft, root if step == checkpoints else b"another root")
    folder = file_key(checkpoints, _save_id(step=checkpoints), INDEX).removesuffix(INDEX)
    for name in names:
        store.put(folder + name, [])
    return checkpoints


def commit(store: Store, step: int, draft: manifest_format.Manifest, root: bytes) -> None:
    """Put root and manifest of a checkpoint without files."""
    save_id = _save_id(step)
    key = index_key(step, save_id)
    index = ManifestFile(key.removeprefix(f"{step_dir(step)}/"), len(root), bytes_digest(root))
    manifest = msgspec.structs.replace(draft, step=step, save_id=save_id, index=index)
    store.put(key, [root])
    store.put(manifest_key(step), [manifest_format.encode(manifest)])


def _save_id(step: int) -> str:
    return f"{new_save_id(1).rpartition('-')[0]}-{step:016x}"


def measure(store: Store, asked: Callable[[], int], checkpoints: int, ranks: int) -> Iterator[Row]:
    """Yield what each thing asks for, on an empty store.

    Args:
        store: where the run will be.
        asked: how many requests there were so far.
        checkpoints: how many.
        ranks: how many saved each, and load it.
    """
    newest = fill(store, checkpoints, ranks)
    draft, root, names = described(ranks)
    run, history = Repository(store), History(store)
    policy = keep.latest(checkpoints)
    run.retain(policy, claim=1, history=history)  # as after a restart: everything is read once

    def counted(what: str, work: Callable[[], object]) -> Row:
        before = asked()
        work()
        return Row(what, checkpoints, len(names), asked() - before)

    yield counted("latest", run.latest)
    yield counted("restore choice", lambda: choose(run, None, {}, fall_back=True, ranks=ranks).step)
    commit(store, newest + 1, draft, root)
    retained = counted(
        "retention after a commit", lambda: run.retain(policy, claim=1, history=history)
    )
    # The deletion in it is a row of its own; that of the next one, as small, costs as much.
    deleted = counted("deletion", lambda: delete_checkpoint(store, 2))
    yield replace(retained, requests=retained.requests - deleted.requests)
    yield counted("deletion", lambda: delete_checkpoint(store, newest))


@contextmanager
def counting() -> Iterator[Callable[[], int]]:
    """Count what clients of S3 send."""
    send, count = Client.send, 0

    async def counted(client: Client, name: str, parameters: Mapping[str, Any]) -> Any:
        nonlocal count
        count += 1
        return await send(client, name, parameters)

    Client.send = counted  # type: ignore[method-assign, assignment]
    try:
        yield lambda: count
    finally:
        Client.send = send  # type: ignore[method-assign]


def rows(arguments: Sequence[str]) -> list[Row]:
    """Measure, print a row for each, and return them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoints", type=int, default=CHECKPOINTS)
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--s3", action="store_true")
    chosen = parser.parse_args(arguments)
    size = chosen.checkpoints, chosen.ranks
    if chosen.s3:
        with s3_service() as service, environment_of(service), counting() as asked:
            say(f"S3 server: {service.kind}")
            found = list(measure(resolve(service.url("requests")), asked, *size))
    else:
        store = AsS3(MemoryStore("bench-requests"))
        found = list(measure(store, store.asked, *size))
    say("| what | checkpoints | files | requests | bound | |\n|---|---|---|---|---|---|")
    for row in found:
        say(
            f"| {row.what} | {row.checkpoints} | {row.files} | {row.requests} | "
            f"{BOUNDS[row.what]} | {'met' if row.is_met else 'MISSED'} |"
        )
    return found


if __name__ == "__main__":
    sys.exit(sum(not row.is_met for row in rows(sys.argv[1:])))
