"""What a failed save wrote goes at once, and nothing that may be of a checkpoint goes with it."""

from __future__ import annotations

import errno
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

import dist_ckpt
from dist_ckpt.errors import AlreadyExists, CheckpointError, ErrorKind, FencedError, StorageError
from dist_ckpt.repository import Repository
from dist_ckpt.storage import FsspecStore, LocalStore, MemoryStore, SingleWriterStore, Store
from dist_ckpt.storage.base import Buffer
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

FULL = Fail(StorageError("no space", kind=ErrorKind.STORAGE_FULL))


def state() -> dict[str, Any]:
    return {"model": {"w": torch.ones(50_000)}, "weights": {"w": torch.ones(50_000)}}


def folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.iterdir())


def left(store: Store) -> list[str]:
    return [entry.key for entry in store.list_entries() if not entry.key.startswith("claims/")]


def fail(store: Store, fault: Fail, key: str) -> CheckpointError:
    """Save step 1 into `store`, in which the put of `key` fails; return the error."""
    broken = FaultyStore(store, [Rule("put", fault, key=key)])
    with dist_ckpt.Checkpointer(broken, state()) as ckpt:
        with pytest.raises(CheckpointError) as caught:
            ckpt.save(1).wait()
        ckpt.wait()  # also for what is removed
    return caught.value


@pytest.mark.parametrize(
    "key", ["*/weights.*", "*/model.*", "*/extra.*", "*/index.*", "*/manifest.*"]
)
def test_nothing_of_it_stays_and_no_empty_folder(key: str, tmp_path: Path) -> None:
    assert fail(LocalStore(tmp_path), FULL, key).kind is ErrorKind.STORAGE_FULL
    assert folders(tmp_path) == ["claims"]
    with dist_ckpt.Checkpointer(str(tmp_path), state()) as ckpt:
        ckpt.save(1).wait()
    assert Repository(LocalStore(tmp_path)).verify(1).ok


def test_nothing_of_it_stays_through_any_file_system(tmp_path: Path) -> None:
    store = SingleWriterStore(FsspecStore(f"local://{tmp_path}"))
    fail(store, FULL, "*/weights.*")
    assert left(store) == []


class HalfDone(MemoryStore):
    """A store in which a put that fails leaves an object behind, as some do."""

    def put(self, key: str, buffers: Sequence[Buffer], **how: Any) -> None:
        super().put(key, buffers, **how)
        if "weights" in key:
            raise StorageError("cut short")


def test_what_a_put_that_failed_left_goes_too() -> None:
    store = HalfDone("unit-leftovers-half")
    with dist_ckpt.Checkpointer(store, state()) as ckpt:
        with pytest.raises(StorageError, match="cut short"):
            ckpt.save(1).wait()
        ckpt.wait()
    assert left(store) == []


def test_the_checkpoint_that_was_in_the_way_stays() -> None:
    inner = MemoryStore("unit-leftovers-beside")
    claimed = Repository(inner)

    class Beaten(FaultyStore):
        def put(self, key: str, buffers: Sequence[Buffer], **how: Any) -> None:
            if key.endswith("manifest.json"):
                with dist_ckpt.Checkpointer(inner, state()) as other:
                    other.save(1).wait()
            super().put(key, buffers, **how)

    with dist_ckpt.Checkpointer(Beaten(inner, []), state()) as ckpt:
        with pytest.raises((AlreadyExists, FencedError)):
            ckpt.save(1).wait()
        ckpt.wait()
    assert claimed.verify(1).ok
    save_id = claimed.open(1).manifest.save_id
    assert {key.split("/")[1] for key in left(inner)} == {save_id, "manifest.json"}


def test_a_commit_that_nobody_can_tell_of_takes_nothing_away() -> None:
    """The server may do what it was asked for long after its answer was lost."""
    inner = MemoryStore("unit-leftovers-doubt")
    kept: list[tuple[str, bytes]] = []

    class Late(FaultyStore):
        def put(self, key: str, buffers: Sequence[Buffer], **how: Any) -> None:
            if key.endswith("manifest.json"):
                kept.append((key, b"".join(bytes(buffer) for buffer in buffers)))
                raise StorageError("no answer")
            super().put(key, buffers, **how)

    with dist_ckpt.Checkpointer(Late(inner, []), state()) as ckpt:
        with pytest.raises(StorageError, match="is not known") as caught:
            ckpt.save(1).wait()
        ckpt.wait()
    assert caught.value.kind is ErrorKind.IN_DOUBT
    ((key, data),) = kept
    inner.put(key, [data])
    assert Repository(inner).verify(1).ok


def one_rank_fails(root: str, failing: int) -> list[str]:
    store: Store = LocalStore(root)
    if dist.get_rank() == failing:
        fault = Fail(OSError(errno.ENOSPC, "No space left on device"))
        store = FaultyStore(store, [Rule("put", fault, key="*.safetensors")])
    with dist_ckpt.Checkpointer(store, state(), timeout_seconds=600) as ckpt:
        with pytest.raises(CheckpointError, match="No space left"):
            ckpt.save(1).wait()
        ckpt.wait()
        dist.barrier()
        return folders(Path(root))


@pytest.mark.parametrize("failing", [0, 1])
def test_every_rank_takes_back_what_it_wrote(failing: int, tmp_path: Path) -> None:
    assert run_ranks(2, one_rank_fails, str(tmp_path), failing) == [["claims"]] * 2


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this user may not mount a file system")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk_does_not_stay_full(small_disk: Path) -> None:
    small = {"weights": {"w": torch.ones(300_000)}}
    large = {"a": {"w": torch.ones(300_000)}, "b": {"w": torch.ones(1_500_000)}}
    with dist_ckpt.Checkpointer(str(small_disk), large) as ckpt:
        for step in (1, 2):
            with pytest.raises(StorageError, match="make room"):
                ckpt.save(step).wait()
    assert folders(small_disk) == ["claims"]
    with dist_ckpt.Checkpointer(str(small_disk), small) as ckpt:
        for step in (3, 4):
            ckpt.save(step).wait()
    assert Repository(LocalStore(small_disk)).steps() == [3, 4]
