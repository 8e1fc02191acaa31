"""Staging of one save after another: caches, memory limits, and copies beside the training."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence

import pytest
import torch
from safetensors.torch import load as load_safetensors

from dist_ckpt.format.names import parse_shard_name
from dist_ckpt.options import SaveOptions, Staging
from dist_ckpt.planning.describe import Describer, LocalBox
from dist_ckpt.planning.files import StagedFile
from dist_ckpt.planning.owners import Owned, decide
from dist_ckpt.saving.snapshot import Staged, Stager
from dist_ckpt.state.train_state import SPARE_BYTES, TrainState, estimate
from tests.unit.planning.saved import content, same_bits

MIB = 1 << 20
Tensors = Mapping[str, torch.Tensor]


class Rank:
    """One rank that stages its tensors save after save, as a job without an engine would."""

    def __init__(
        self, tensors: Tensors, *, mode: Staging = "blocking", limit: int | None = None
    ) -> None:
        self.options = SaveOptions(staging=mode, memory_limit_bytes=limit)
        self.stager = Stager(mode=mode, memory_limit_bytes=limit)
        self.arena_bytes: list[int] = []
        self.plan(tensors)

    def plan(self, tensors: Tensors) -> None:
        self.tensors = tensors
        held = [box.held for box in self.local()]
        (self.owned,) = decide([held], max_piece_bytes=self.options.max_piece_bytes)

    def local(self, stepped: Sequence[str] = ()) -> list[LocalBox]:
        boxes = Describer().describe({"model": self.tensors})
        return [LocalBox(box.held, box.memory, box.held.name in stepped) for box in boxes]

    def stage(self, *, stepped: Sequence[str] = ()) -> tuple[Staged, dict[str, bytes]]:
        """Return what stays in the arena, and the files that had to leave it."""
        out: dict[str, bytes] = {}

        def write_out(files: Sequence[StagedFile]) -> None:
            self.arena_bytes.append(sum(len(file.image) for file in files))
            out.update((file.name, bytes(file.image)) for file in files)

        staged = self.stager.stage(
            rank=0,
            local=self.local(stepped),
            owned=self.owned,
            documents={"notes": b"{}"},
            write_out=write_out,
        )
        return staged, out

    def save(self, *, stepped: Sequence[str] = ()) -> dict[str, bytes]:
        """Stage, wait, and return every file."""
        staged, files = self.stage(stepped=stepped)
        staged.wait()
        files.update((file.name, bytes(file.image)) for file in staged.files)
        assert sum(map(len, files.values())) == staged.nbytes
        return files


def whole(files: Mapping[str, bytes], tensors: Tensors) -> dict[str, torch.Tensor]:
    """Put the tensors together again from files that any safetensors reader opens."""
    found = {name: torch.zeros(like.shape, dtype=like.dtype) for name, like in tensors.items()}
    for file, data in files.items():
        if file.startswith("extra"):
            continue
        for chunk, values in load_safetensors(data).items():
            name, _, offsets = chunk.partition("#")
            view = found[name]
            for dim, offset in enumerate(int(each) for each in offsets.split(",") if each):
                view = view.narrow(dim, offset, values.shape[dim])
            view.copy_(values.reshape(view.shape))
    return found


def check(files: Mapping[str, bytes], tensors: Tensors) -> None:
    found = whole(files, tensors)
    for name, tensor in tensors.items():
        assert same_bits(found[name], tensor), name


def mixed() -> dict[str, torch.Tensor]:
    base = content((40, 30), torch.float32)
    return {
        "whole": content((50, 7), torch.bfloat16, seed=1),
        "strided": base[::2, 1::3],
        "transposed": base.t(),
        "expanded": base[:, :1].expand(40, 6),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(3.5, dtype=torch.float64),
        "flags": content((5,), torch.bool),
    }


def test_saves_that_follow_one_plan_store_what_is_there_each_time() -> None:
    tensors = mixed()
    rank = Rank(tensors)
    first = rank.save()
    check(first, tensors)
    assert set(first) == {"model.r00000.safetensors", "extra.r00000.safetensors"}
    for each in ("whole", "strided", "flags"):
        tensors[each].zero_()
    # Another memory under an old name must not be read from where the old one was.
    tensors["scalar"] = torch.tensor(-1.0, dtype=torch.float64)
    check(rank.save(), tensors)
    rank.stager.release()
    check(rank.save(), tensors)


def test_a_new_plan_moves_everything_to_its_new_place() -> None:
    rank = Rank(mixed())
    rank.save()
    for tensors in (
        {"a": content((300, 9), torch.float32)},
        {"a": content((300, 9), torch.float32), **mixed()},
        {"a": content((9, 300), torch.float16)},
        {},
        mixed(),
    ):
        rank.plan(tensors)
        check(rank.save(), tensors)


def test_an_arena_that_was_given_up_is_left_to_who_reads_it() -> None:
    tensors = {"w": content((1000,), torch.float32)}
    rank = Rank(tensors)
    staged, _ = rank.stage()
    before = bytes(staged.files[0].image)
    rank.stager.abandon()
    tensors["w"].zero_()
    check(rank.save(), tensors)
    assert bytes(staged.files[0].image) == before


@pytest.mark.parametrize(
    "tensors",
    [
        {f"layer{i}": content((64, 1024), torch.float32, seed=i) for i in range(30)},
        {"wide rows": content((3, MIB), torch.float32)},
        {"one row": content((MIB + 7,), torch.float64), "small": torch.ones(3)},
        {"bytes": content((5 * MIB + 1,), torch.uint8)},
    ],
    ids=["many tensors", "rows over the limit", "one dimension", "odd bytes"],
)
@pytest.mark.parametrize("mode", ["blocking", "overlapped"])
def test_a_share_over_the_limit_goes_through_a_small_arena_in_turns(
    tensors: dict[str, torch.Tensor], mode: Staging
) -> None:
    rank = Rank(tensors, mode=mode, limit=MIB)
    for _ in range(2):
        files = rank.save(stepped=list(tensors))
        check(files, tensors)
        shards = [parse_shard_name(name) for name in files if name.startswith("model")]
        assert shards == [("model", 0, number) for number in range(len(shards))]
        assert len(shards) > 4
    assert max(rank.arena_bytes) <= MIB
    assert rank.stager.arena.capacity_bytes <= MIB


def test_turns_are_filled_up_with_files_of_several_parts() -> None:
    parts = {f"part{i}": {"w": content((100,), torch.float32, seed=i)} for i in range(12)}
    local = Describer().describe(parts)
    (owned,) = decide([[box.held for box in local]])
    written: list[int] = []
    Stager(mode="blocking", memory_limit_bytes=MIB).stage(
        rank=0,
        local=local,
        owned=owned,
        documents={},
        write_out=lambda files: written.append(len(files)),
    )
    assert not written, "twelve small files fit one turn"


def test_a_write_that_fails_between_turns_ends_the_staging_and_not_the_stager() -> None:
    tensors = {"w": content((MIB,), torch.float32)}
    rank = Rank(tensors, limit=MIB)

    def broken(files: Sequence[StagedFile]) -> None:
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        rank.stager.stage(
            rank=0, local=rank.local(), owned=rank.owned, documents={}, write_out=broken
        )
    check(rank.save(), tensors)


@pytest.fixture
def held_back(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """Hold back every copy that is not made by the thread that asked for it."""
    go_on = threading.Event()
    original: Callable[..., None] = torch._foreach_copy_

    def copy(*args: object, **kwargs: object) -> None:
        if threading.current_thread().name == "dist_ckpt-copy":
            go_on.wait()
        original(*args, **kwargs)

    monkeypatch.setattr(torch, "_foreach_copy_", copy)
    yield go_on
    go_on.set()


def test_only_what_steps_change_is_copied_beside_the_training(held_back: threading.Event) -> None:
    tensors = {"weight": torch.ones(1000), "mean": torch.ones(1000)}
    rank = Rank(tensors, mode="overlapped")
    staged, _ = rank.stage(stepped=["weight"])
    # A forward pass may change a buffer at once, and no step is there to wait.
    tensors["mean"].fill_(9)
    held_back.set()
    staged.wait()
    tensors["weight"].fill_(9)
    files = {file.name: bytes(file.image) for file in staged.files}
    check(files, {"weight": torch.ones(1000), "mean": torch.ones(1000)})


def test_nothing_is_copied_later_when_staging_blocks(held_back: threading.Event) -> None:
    tensors = {"weight": torch.ones(1000)}
    rank = Rank(tensors)
    staged, _ = rank.stage(stepped=["weight"])
    tensors["weight"].fill_(9)
    staged.wait()
    check({file.name: bytes(file.image) for file in staged.files}, {"weight": torch.ones(1000)})


def test_a_copy_that_fails_is_the_failure_of_its_save_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tensors = {"weight": torch.ones(1000)}
    rank = Rank(tensors, mode="overlapped")

    def broken(*args: object, **kwargs: object) -> None:
        raise RuntimeError("the device is gone")

    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", broken)
        staged, _ = rank.stage(stepped=["weight"])
        with pytest.raises(RuntimeError, match="device is gone"):
            staged.wait()
    check(rank.save(stepped=["weight"]), tensors)
    rank.stager.release()


def test_a_second_save_waits_for_the_copies_of_the_first(held_back: threading.Event) -> None:
    tensors = {"weight": torch.ones(1000)}
    rank = Rank(tensors, mode="overlapped")
    rank.stage(stepped=["weight"])  # nobody waits for this one: its save was given up
    opener = threading.Thread(target=held_back.set)
    opener.start()
    check(rank.save(stepped=["weight"]), tensors)
    opener.join()
    rank.stager.release()


def test_the_first_save_finds_its_memory_touched() -> None:
    layer = torch.nn.Linear(1024, 1024)
    optimizer = torch.optim.AdamW(layer.parameters())
    state = TrainState(model=layer, optimizer=optimizer, rng=None)
    stager = Stager(mode="blocking", memory_limit_bytes=None)
    stager.arena.prewarm(estimate(state, world_size=1).nbytes)
    guessed = stager.arena.capacity_bytes
    layer(torch.ones(2, 1024)).sum().backward()
    optimizer.step()
    parts = {name: part.capture().tensors for name, part in state.parts.items()}
    local = Describer().describe(parts)
    (owned,) = decide([[box.held for box in local]])
    staged = stager.stage(rank=0, local=local, owned=owned, documents={}, write_out=_unused)
    assert staged.nbytes <= guessed <= 1.01 * staged.nbytes + SPARE_BYTES
    small = Stager(mode="blocking", memory_limit_bytes=MIB)
    small.arena.prewarm(estimate(state, world_size=1, limit_bytes=MIB).nbytes)
    assert small.arena.capacity_bytes == MIB
    for each in (stager, small):
        each.release()


def _unused(files: Sequence[StagedFile]) -> None:
    raise AssertionError("everything fits")


def test_owned_is_compared_by_identity() -> None:
    # An equal plan of another number may belong to other boxes.
    rank = Rank({"a": torch.ones(4)})
    rank.save()
    same: list[Owned] = list(rank.owned)
    rank.tensors = {"b": torch.zeros(4)}
    rank.owned = same
    check(rank.save(), {"b": torch.zeros(4)})
