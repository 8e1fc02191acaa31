"""What the program, its store or its machine raises keeps its class where it happened."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fsspec.implementations.local import LocalFileSystem

import dist_ckpt
from dist_ckpt import events, policy
from dist_ckpt.errors import CheckpointError, CoordinationError, ErrorKind, StorageError
from dist_ckpt.policy import Moment, SavePolicy, Scope
from dist_ckpt.repository import Record, Repository
from dist_ckpt.storage import FsspecStore, LocalStore, MemoryStore, SingleWriterStore, Store
from dist_ckpt.testing.ranks import run_ranks
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

_names = itertools.count()


class Own(Exception):
    """An error of the program; its constructor is its own business."""

    def __init__(self, reason: str, *, code: int) -> None:
        super().__init__(f"{reason} ({code})")


class OwnStorageError(StorageError):
    """One that a backend made for itself of a class of ours."""

    def __init__(self, bucket: str) -> None:
        super().__init__(f"{bucket} is over its quota")


FOREIGN = [Own("mine", code=7), MemoryError("no memory"), KeyboardInterrupt(), SystemExit(3)]
IDS = [type(each).__name__ for each in FOREIGN]


def new_store() -> MemoryStore:
    return MemoryStore(f"unit-foreign-{next(_names)}")


class Stateful:
    """A part that fails when it is told to."""

    def __init__(self) -> None:
        self.saves: BaseException | None = None
        self.loads: BaseException | None = None

    def state_dict(self) -> dict[str, Any]:
        if self.saves is not None:
            raise self.saves
        return {"w": torch.ones(3), "n": 1}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if self.loads is not None:
            raise self.loads


@pytest.mark.parametrize("error", FOREIGN, ids=IDS)
def test_what_state_dict_raises(error: BaseException) -> None:
    part = Stateful()
    store = new_store()
    with dist_ckpt.Checkpointer(store, {"part": part}) as ckpt:
        part.saves = error
        with pytest.raises(type(error)) as caught:
            ckpt.save(1)
        assert caught.value is error
        part.saves = None
        ckpt.save(2).wait()
    part.saves = error
    for call in (dist_ckpt.save, dist_ckpt.async_save):
        with pytest.raises(type(error)):
            call({"part": part}, store, step=3)
    assert Repository(store).steps() == [2]


@pytest.mark.parametrize("error", FOREIGN, ids=IDS)
def test_what_load_state_dict_raises(error: BaseException) -> None:
    part = Stateful()
    store = new_store()
    dist_ckpt.save({"part": part}, store, step=1)
    part.loads = error
    ckpt = dist_ckpt.Checkpointer(store, {"part": part})
    for load in (lambda: dist_ckpt.load({"part": part}, store), ckpt.restore):
        with pytest.raises(type(error)) as caught:
            load()
        assert caught.value is error
    assert any("partly restored" in note for note in error.__notes__)
    part.loads = None
    assert ckpt.restore() == 1
    ckpt.close()


class Odd:
    """A value that only a registered encoder can store."""


def test_what_an_encoder_raises() -> None:
    def encode(value: Odd) -> object:
        raise Own("no way", code=1)

    dist_ckpt.register_type(Odd, name="unit-foreign-odd", encode=encode, decode=lambda plain: Odd())
    with pytest.raises(Own, match="no way") as caught:
        dist_ckpt.save({"stats": {"odd": Odd()}}, new_store())
    assert any("stats.odd" in note for note in caught.value.__notes__)


class Mistaken:
    """A policy with a mistake in it."""

    scope = Scope.AT_ONCE

    def due(self, moment: Moment) -> str | None:
        raise Own("a policy", code=2)

    def kept(self, records: Sequence[Record]) -> Mapping[int, str]:
        raise Own("a policy", code=2)

    def __or__(self, other: SavePolicy) -> SavePolicy:
        return policy.never() | self | other


def test_what_a_policy_raises() -> None:
    with dist_ckpt.Checkpointer(new_store(), {"n": {"v": 1}}, when=Mistaken()) as ckpt:
        with pytest.raises(Own, match="a policy"):
            ckpt.step(1)
        ckpt.save(1).wait()


def test_what_a_retention_policy_raises_is_told_as_the_cause() -> None:
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    with dist_ckpt.Checkpointer(new_store(), {"n": {"v": 1}}, keep=Mistaken()) as ckpt:
        ckpt.save(1).wait()
    leave()
    (failed,) = [each for each in heard if isinstance(each, events.RetentionFailed)]
    assert not isinstance(failed.error, CoordinationError)
    assert isinstance(failed.error.__cause__, Own)


def broken(inner: Store, operation: Any, error: BaseException, key: str = "*") -> FaultyStore:
    return FaultyStore(inner, [Rule(operation, Fail(error), key=key, nth=None)])


def test_a_lack_of_memory_in_the_background() -> None:
    error = MemoryError("no memory")
    heard: list[events.Event] = []
    leave = events.subscribe(heard.append)
    store = broken(new_store(), "put", error, "*.safetensors")
    with dist_ckpt.Checkpointer(store, {"weights": {"w": torch.ones(3)}}) as ckpt:
        handle = ckpt.save(1)
        for _ in range(2):
            with pytest.raises(type(error)) as caught:
                handle.wait()
            assert caught.value is error
        assert handle.outcome == "failed"
    leave()
    (failed,) = [each for each in heard if isinstance(each, events.SaveFailed)]
    assert failed.error.kind is ErrorKind.FOREIGN
    assert failed.error.__cause__ is error


@pytest.mark.parametrize("error", FOREIGN[2:], ids=IDS[2:])
def test_what_ends_a_thread_does_not_end_the_program(error: BaseException) -> None:
    store = broken(new_store(), "put", error, "*.safetensors")
    with pytest.raises(StorageError, match=type(error).__name__) as caught:
        dist_ckpt.save({"weights": {"w": torch.ones(3)}}, store)
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("key", ["*.safetensors", "*/index.msgpack"])
def test_what_a_store_does_not_map_is_one_of_storage(key: str) -> None:
    own = Own("a mistake", code=3)
    with pytest.raises(StorageError, match="Own: a mistake") as told:
        dist_ckpt.save({"n": {"v": 1}}, broken(new_store(), "put", own, key))
    assert told.value.__cause__ is own
    error = OSError(28, "No space left on device")
    with pytest.raises(StorageError, match="No space left") as caught:
        dist_ckpt.save({"n": {"v": 1}}, broken(new_store(), "put", error, key))
    assert caught.value.kind is ErrorKind.STORAGE_FULL
    assert caught.value.__cause__ is error


@pytest.mark.parametrize("operation", ["read_into", "list_children"])
@pytest.mark.parametrize(
    "error", [*FOREIGN[:3], OwnStorageError("this")], ids=[*IDS[:3], "OwnStorageError"]
)
def test_what_a_store_raises_while_it_is_read(error: BaseException, operation: str) -> None:
    inner = new_store()
    state = {"weights": {"w": torch.ones(300_000)}}
    dist_ckpt.save(state, inner, step=1)
    with pytest.raises(type(error)):
        dist_ckpt.load(state, broken(inner, operation, error))


def test_a_lack_of_memory_is_no_error_of_a_file_system(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = SingleWriterStore(FsspecStore(f"local://{tmp_path}"))

    def fail(*args: Any, **kwargs: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(LocalFileSystem, "pipe_file", fail)
    with pytest.raises(MemoryError):
        store.put("a/b", [b"c"])


def on_rank_1(root: str, where: str) -> tuple[str, str, dict[int, str]]:
    part = Stateful()
    store: Store = LocalStore(root)
    rank = dist.get_rank()
    error: Exception = Own("on one", code=rank)
    if rank == 1 and where == "store":
        error = MemoryError("on one")
        store = broken(store, "put", error, "step-0000000002/*.safetensors")
    state = {"part": part, "weights": {"w": torch.ones(100_000)}}
    with dist_ckpt.Checkpointer(store, state, timeout_seconds=600) as ckpt:
        ckpt.save(1).wait()
        if rank == 1 and where == "save":
            part.saves = error
        if rank == 1 and where == "load":
            part.loads = error
        use: Callable[[], object] = ckpt.restore if where == "load" else lambda: ckpt.save(2).wait()
        with pytest.raises(Exception) as caught:  # noqa: PT011
            use()
    found: BaseException = caught.value
    ranks = found.ranks if isinstance(found, CheckpointError) else {}
    return type(found).__name__, str(found), ranks


@pytest.mark.parametrize(
    ("where", "name", "says"),
    [
        ("save", "Own", "Own: on one (1)"),
        ("load", "Own", "Own: on one (1)"),
        ("store", "MemoryError", "MemoryError: on one"),
    ],
)
def test_the_other_ranks_hear_of_a_peer(where: str, name: str, says: str, tmp_path: Path) -> None:
    other, own = run_ranks(2, on_rank_1, str(tmp_path), where)
    assert own[0] == name
    assert other[0] == "CoordinationError"
    assert f"failed on rank 1: {says}" in other[1]
    assert other[2] == {1: says}
    assert Repository(LocalStore(tmp_path)).steps() == [1]
