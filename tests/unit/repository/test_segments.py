"""Segments of ranks: which of them are read, and what becomes of one that is damaged."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt import TrainState
from dist_ckpt.errors import ErrorKind, IntegrityError
from dist_ckpt.format.names import segment_name
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.ranks import run_ranks
from tests.compat.golden import shard

WORLD = 3
ROWS = 12


class Watched(LocalStore):
    """Notes the names of the files that are asked for."""

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self.read: list[str] = []
        self.sized: list[str] = []

    def read_into(self, key: str, offset: int, *buffers: memoryview) -> int:
        self.read.append(key.rpartition("/")[2])
        return super().read_into(key, offset, *buffers)

    def size(self, key: str) -> int:
        self.sized.append(key.rpartition("/")[2])
        return super().size(key)


def tensor() -> torch.Tensor:
    return torch.arange(ROWS * 1024, dtype=torch.float32).reshape(ROWS, 1024)


def net() -> nn.Module:
    module = nn.Module()
    module.register_buffer("rows", shard(tensor()))
    return module


def save(root: str) -> None:
    for step in (1, 2):
        own = dist_ckpt.PerRank({"step": step})
        dist_ckpt.save(TrainState(model=net(), own=own, notes={"a": 1}, rng=None), root, step=step)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    root = str(tmp_path_factory.mktemp("segments") / "run")
    run_ranks(WORLD, save, root)
    return root


@pytest.fixture
def run(saved: str, tmp_path: Path) -> Path:
    """A copy, to be damaged."""
    store = LocalStore(saved)
    for entry in store.list_entries():
        path = tmp_path / entry.key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes((Path(saved) / entry.key).read_bytes())
    return tmp_path


def segment_of(run: Path, step: int, rank: int) -> Path:
    (path,) = run.glob(f"step-{step:010d}/*/{segment_name(rank)}")
    return path


def names(store: Watched, kind: str) -> list[str]:
    return sorted(name for name in store.read if name.endswith(kind))


def test_a_slice_is_read_by_the_segments_that_hold_it(saved: str) -> None:
    store = Watched(saved)
    with dist_ckpt.open_checkpoint(store, step=1) as opened:
        assert torch.equal(opened["model/rows"][5:7], tensor()[5:7])
    assert names(store, ".msgpack") == ["index.msgpack", segment_name(1)]
    assert names(store, ".safetensors") == ["model.r00001.safetensors"]


def test_the_segment_of_rank_0_is_in_the_root(saved: str) -> None:
    store = Watched(saved)
    with dist_ckpt.open_checkpoint(store, step=2) as opened:
        assert torch.equal(opened["model/rows"][0], tensor()[0])
        assert opened.read_encoded("notes")
    assert names(store, ".msgpack") == ["index.msgpack"]


def test_a_load_of_one_process_asks_for_each_object_once(tmp_path: Path) -> None:
    root = str(tmp_path / "run")

    def state() -> TrainState:
        return TrainState(model=nn.Linear(64, 64), values={"x": 1}, other={"y": 2}, rng=None)

    dist_ckpt.save(state(), root, step=1)
    store = Watched(root)
    dist_ckpt.load(state(), store)
    expected = ["manifest.json", "index.msgpack"]
    files = ["extra.r00000.safetensors", "model.r00000.safetensors"]
    # Sizes are asked for while the values are read, so these are five turns with the listing.
    assert store.read == [*expected, *files]
    assert sorted(store.sized) == files


def test_all_of_it_comes_back(saved: str) -> None:
    module = nn.Module()
    module.register_buffer("rows", torch.zeros(ROWS, 1024))
    report = dist_ckpt.load(TrainState(model=module), saved, strict=False)
    assert torch.equal(dict(module.named_buffers())["rows"], tensor())
    assert report.step == 2
    assert report.nbytes_read == report.nbytes_wanted == tensor().nbytes


def wanted_by(root: str, world: Sequence[int]) -> tuple[int, int]:
    module = net()
    for buffer in module.buffers():
        buffer.zero_()
    report = dist_ckpt.load(TrainState(model=module), root, strict=False, exchange="never")
    return report.nbytes_read, report.nbytes_wanted


def test_other_ranks_read_little_more_than_they_want(saved: str) -> None:
    found = run_ranks(2, wanted_by, saved, ())
    assert sum(wanted for _, wanted in found) == tensor().nbytes
    assert sum(read for read, _ in found) <= 1.10 * tensor().nbytes


@pytest.mark.parametrize("how", ["missing", "short", "flipped", "of another save", "swapped"])
def test_a_damaged_segment_is_found(run: Path, how: str) -> None:
    path = segment_of(run, 2, 2)
    data = bytearray(path.read_bytes())
    if how == "missing":
        path.unlink()
    elif how == "short":
        path.write_bytes(data[:-1])
    elif how == "flipped":
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
    elif how == "swapped":
        path.write_bytes(segment_of(run, 2, 1).read_bytes())
    else:
        path.write_bytes(segment_of(run, 1, 2).read_bytes())
    repository = Repository(LocalStore(str(run)))
    with pytest.raises(IntegrityError, match=segment_name(2)) as caught:
        _ = repository.open(2).index
    assert caught.value.kind in (
        ErrorKind.MISSING_FILE,
        ErrorKind.TRUNCATED,
        ErrorKind.DIGEST,
    )
    problems = repository.verify(2).problems
    assert [problem for problem in problems if segment_name(2) not in problem] == []
    assert len(problems) == 2, "its two files"
    # Who wants nothing of it reads on.
    with dist_ckpt.open_checkpoint(str(run), step=2) as opened:
        assert torch.equal(opened["model/rows"][:8], tensor()[:8])


def test_a_restore_passes_a_damaged_segment_over(run: Path) -> None:
    segment_of(run, 2, 2).unlink()
    module = nn.Module()
    module.register_buffer("rows", torch.zeros(ROWS, 1024))
    with dist_ckpt.Checkpointer(str(run), {"model": module}) as ckpt:
        assert ckpt.restore(strict=False) == 1
    assert torch.equal(dict(module.named_buffers())["rows"], tensor())


def test_a_copy_has_the_segments(saved: str, tmp_path: Path) -> None:
    target = tmp_path / "copy"
    dist_ckpt.Run(saved).copy(2, str(target))
    assert Repository(LocalStore(str(target))).verify(2).ok
    assert segment_of(target, 2, 2).exists()


def test_a_deleted_checkpoint_leaves_no_segment(run: Path) -> None:
    repository = Repository(LocalStore(str(run)))
    repository.retain(dist_ckpt.keep.latest(1), claim=repository.claim())
    assert not list(run.glob("step-0000000001/*/*"))
