"""The contract notices a store that breaks it: one broken store for each kind of promise."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import pytest

from dist_ckpt.errors import AlreadyExists, CheckpointError, CoordinationError, UsageError
from dist_ckpt.storage import (
    Buffer,
    Capabilities,
    Entry,
    LocalStore,
    MemoryStore,
    PutMode,
    Store,
    Watch,
)
from dist_ckpt.testing import StoreContract
from dist_ckpt.testing.contract_names import BAD_KEYS

_numbers = itertools.count()
contract = StoreContract()


class Broken(MemoryStore):
    """A good store of its own, until a subclass breaks it."""

    def __init__(self) -> None:
        super().__init__(f"contract-test/{next(_numbers)}")


class ExistsThenWrites(Broken):
    """Its create asks first and writes then, as the default of fsspec does."""

    def __init__(self) -> None:
        super().__init__()
        self._asked = threading.Barrier(StoreContract.writers)

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        exists = key in [entry.key for entry in self.list_entries()]
        self._asked.wait()
        if exists:
            raise AlreadyExists(key)
        super().put(key, buffers, mode="replace", watch=watch)


class SilentCreate(Broken):
    """Its create leaves an existing object alone, and says nothing."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        try:
            super().put(key, buffers, mode=mode, watch=watch)
        except AlreadyExists:
            return


class OverwritingCreate(Broken):
    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key, buffers, mode="replace", watch=watch)


class WritesInPlace(LocalStore):
    """Writes straight under the final name, and lets somebody look when half is there."""

    def __init__(self, path: Path, *, readers: bool) -> None:
        super().__init__(path)
        self._readers = readers
        self._first_half = threading.Lock()
        self._half = threading.Event()
        self._looked = threading.Event()

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        path = Path(self.url) / key
        path.parent.mkdir(parents=True, exist_ok=True)
        middle = len(buffers) // 2
        replaces = path.exists()
        # Nobody reads before half is there, so that whoever reads then is alive to let this go on.
        with self._first_half:
            path.write_bytes(b"".join(buffers[number] for number in range(middle)))
            if replaces:
                self._half.set()
        if self._readers and replaces:
            self._looked.wait()
        with path.open("ab") as file:
            for buffer in buffers[middle:]:
                file.write(buffer)

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        with self._first_half:
            count = super().read_into(key, offset, *buffers)
            self._note_look()
        return count

    def size(self, key: str) -> int:
        found = super().size(key)
        self._note_look()  # a reader that notices it by the size reads nothing any more
        return found

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        yield from super().list_entries(prefix)
        self._note_look()

    def _note_look(self) -> None:
        if self._half.is_set():
            self._looked.set()


class ForgetsTheRest(Broken):
    """Stores no more than 1024 buffers."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key, buffers[:1024], mode=mode, watch=watch)


class IsNotWatched(Broken):
    """Takes a watch, and never looks at it."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key, buffers, mode=mode)


class IsWatchedTooLate(Broken):
    """Shows the bytes when they have gone."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key, buffers, mode=mode)
        if watch is not None:
            watch(sum(map(len, buffers)))


class HidesWhoEndedThePut(Broken):
    """Raises an error of its own in the place of the watch's."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        try:
            super().put(key, buffers, mode=mode, watch=watch)
        except CheckpointError as error:
            raise CoordinationError("the put was ended") from error


class FillsTheWholeBuffer(Broken):
    """Clears what is behind the end of the object."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        count = super().read_into(key, offset, *buffers)
        (buffer,) = buffers
        buffer[count:] = b"\0" * (len(buffer) - count)
        return count


class FillsOneBuffer(Broken):
    """Has no eyes for the others."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        return super().read_into(key, offset, *buffers[:1])


class FillsEachFromTheOffset(Broken):
    """Takes each buffer for the only one."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        return sum(
            super(FillsEachFromTheOffset, self).read_into(key, offset, each) for each in buffers
        )


class CountsItems(Broken):
    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        return super().read_into(key, offset, *buffers) // buffers[0].itemsize


class OverwritesLarge(Broken):
    """Its create looks only where the object is small."""

    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        large = sum(len(buffer) for buffer in buffers) > 1 << 20
        super().put(key, buffers, mode="replace" if large else mode, watch=watch)


class LosesThePiece(Broken):
    """Leaves out the second of the pieces in which it reads."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        (buffer,) = buffers
        whole = bytearray(len(buffer))
        count = super().read_into(key, offset, memoryview(whole))
        buffer[: 4 << 20] = whole[: 4 << 20]
        buffer[5 << 20 :] = whole[5 << 20 :]
        return count


class ReadsToTheEndOfThePage(Broken):
    """Fills a little more than it was given, where there is more memory behind."""

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        count = super().read_into(key, offset, *buffers)
        behind = memoryview(buffers[0].obj)[-1:]
        behind[0] = 1
        return count


class SweepsAll(Broken):
    def sweep(self, prefix: str = "") -> int:
        keys = [entry.key for entry in self.list_entries(prefix)]
        self.delete(keys)
        return len(keys)


class Boundless(Broken):
    @property
    def capabilities(self) -> Capabilities:
        return Capabilities(atomic_create=True, strong_list=True, durable=False, max_object_bytes=0)


class Unsorted(Broken):
    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        return reversed(list(super().list_entries(prefix)))


class SortsByFolder(Broken):
    """As a walk over directories does that sorts names without their slash."""

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        return iter(sorted(super().list_entries(prefix), key=lambda entry: entry.key.split("/")))


class TakesAnyPrefix(Broken):
    """Its prefixes are beginnings of keys, as those of S3 are."""

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        return (entry for entry in super().list_entries() if entry.key.startswith(prefix))


class ListsEmptyFolders(LocalStore):
    """Leaves the folders of deleted objects, and shows them."""

    def list_children(self, prefix: str = "") -> list[str]:
        folder = Path(self.url) / prefix
        names = [path.name + "/" * path.is_dir() for path in folder.glob("*")]
        return sorted(names)

    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            (Path(self.url) / key).unlink(missing_ok=True)


class StaleListing(Broken):
    """Shows a new key in the second listing after its put."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: set[str] = set()

    def list_entries(self, prefix: str = "") -> Iterator[Entry]:
        entries = list(super().list_entries(prefix))
        known, self._seen = self._seen, {entry.key for entry in entries}
        return (entry for entry in entries if entry.key in known)


class DeletesBelow(Broken):
    def delete(self, keys: Iterable[str]) -> None:
        for key in keys:
            below = [entry.key for entry in self.list_entries() if entry.key.startswith(key)]
            super().delete(below)


class FoldsCase(Broken):
    def put(
        self,
        key: str,
        buffers: Sequence[Buffer],
        *,
        mode: PutMode = "create",
        watch: Watch | None = None,
    ) -> None:
        super().put(key.lower(), buffers, mode="replace", watch=watch)


class TakesAnyKey(Broken):
    def size(self, key: str) -> int:
        try:
            return super().size(key)
        except UsageError:
            return 0


@pytest.mark.parametrize(
    ("broken", "notices"),
    [
        (ExistsThenWrites, lambda s: contract.test_racing_creators_have_one_winner(s, s)),
        (SilentCreate, lambda s: contract.test_create_never_touches_what_exists(s, s)),
        (OverwritingCreate, lambda s: contract.test_create_never_touches_what_exists(s, s)),
        (OverwritingCreate, lambda s: contract.test_racing_creators_have_one_winner(s, s)),
        (
            ForgetsTheRest,
            lambda s: contract.test_put_stores_the_concatenation(s, [b"a"] * 2000),
        ),
        (IsNotWatched, lambda s: contract.test_watch_sees_every_byte(s, "create")),
        (
            IsNotWatched,
            lambda s: contract.test_watch_that_raises_ends_the_put(s, "first of one", None),
        ),
        (IsWatchedTooLate, lambda s: contract.test_watch_sees_every_byte(s, "create")),
        (
            IsWatchedTooLate,
            lambda s: contract.test_watch_that_raises_ends_the_put(s, "first of many", b"old"),
        ),
        (
            HidesWhoEndedThePut,
            lambda s: contract.test_watch_that_raises_ends_the_put(s, "second", None),
        ),
        (FillsTheWholeBuffer, lambda s: contract.test_reads_at_offsets(s, 6, 10, b"6789")),
        (FillsOneBuffer, lambda s: contract.test_reads_to_several_buffers(s, 0)),
        (FillsEachFromTheOffset, lambda s: contract.test_reads_to_several_buffers(s, 0)),
        (
            FillsOneBuffer,
            lambda s: contract.test_large_object_to_several_buffers(s, 1 << 20),
        ),
        (CountsItems, lambda s: contract.test_read_fills_items_of_any_size(s)),
        (OverwritesLarge, lambda s: contract.test_large_object_that_exists(s, s, "create")),
        (LosesThePiece, lambda s: contract.test_ranges_of_a_large_object(s, 1, 9 << 20)),
        (LosesThePiece, lambda s: contract.test_large_object_from_page_aligned_memory(s, "whole")),
        (
            ReadsToTheEndOfThePage,
            lambda s: contract.test_large_object_from_page_aligned_memory(s, "aligned"),
        ),
        (ReadsToTheEndOfThePage, lambda s: contract.test_ranges_of_a_large_object(s, -9, 9)),
        (SweepsAll, lambda s: contract.test_sweep_leaves_what_is_listed(s)),
        (Boundless, lambda s: contract.test_capabilities_are_sound(s)),
        (Unsorted, lambda s: contract.test_entries_are_those_below_the_prefix_in_order(s)),
        (SortsByFolder, lambda s: contract.test_entries_are_those_below_the_prefix_in_order(s)),
        (TakesAnyPrefix, lambda s: contract.test_lone_key_and_open_prefix_are_refused(s)),
        (StaleListing, lambda s: contract.test_listing_contains_what_was_put_before(s, s)),
        (DeletesBelow, lambda s: contract.test_delete_removes_the_given_keys_only(s, s)),
        (FoldsCase, lambda s: contract.test_good_keys_do_not_collide(s)),
        *(
            (
                TakesAnyKey,
                lambda s, key=key: contract.test_bad_key_is_refused_by_every_method(s, key),
            )
            for key in BAD_KEYS
        ),
    ],
)
def test_broken_store_is_noticed(
    broken: Callable[[], Store], notices: Callable[[Store], None]
) -> None:
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        notices(broken())


def test_store_that_writes_in_place_is_noticed(tmp_path: Path) -> None:
    with pytest.raises(AssertionError):
        contract.test_failing_source_leaves_nothing(WritesInPlace(tmp_path, readers=False), b"old")


def test_store_that_shows_parts_is_noticed(tmp_path: Path) -> None:
    store = WritesInPlace(tmp_path, readers=True)
    with pytest.raises(AssertionError):
        contract.test_no_part_of_an_object_is_ever_seen(store, store)


def test_store_that_lists_empty_folders_is_noticed(tmp_path: Path) -> None:
    store = ListsEmptyFolders(tmp_path)
    with pytest.raises(AssertionError):
        contract.test_folder_without_objects_is_not_listed(store, store)


@pytest.mark.parametrize("missing", ["atomic_create", "strong_list"])
def test_what_a_store_declares_not_to_do_is_not_asked_of_it(
    monkeypatch: pytest.MonkeyPatch, missing: str
) -> None:
    flags = {"atomic_create": True, "strong_list": True, "durable": True} | {missing: False}
    monkeypatch.setattr(MemoryStore, "capabilities", Capabilities(**flags))
    store = MemoryStore(f"contract-test/{next(_numbers)}")
    test = {
        "atomic_create": contract.test_racing_creators_have_one_winner,
        "strong_list": contract.test_listing_contains_what_was_put_before,
    }[missing]
    with pytest.raises(pytest.skip.Exception):
        test(store, store)


def test_store_fixture_must_be_given() -> None:
    with pytest.raises(NotImplementedError, match="defines the fixture 'store'"):
        StoreContract.store.__wrapped__(contract)  # type: ignore[attr-defined]
