"""Names that share memory in the state, and different values for them in the checkpoint."""

from __future__ import annotations

import copy
import itertools
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

import dist_ckpt
from dist_ckpt.errors import IncompatibleError, UsageError
from dist_ckpt.testing.ranks import ranks

ROWS, COLUMNS = 1500, 512  # three MiB
BOTH = r"different values for model/inner\.weight and model/outer\.weight"


class Net(nn.Module):
    def __init__(self, *, tied: bool, rows: int = 40, columns: int = 16) -> None:
        super().__init__()
        self.inner = nn.Linear(columns, rows, bias=False)
        self.outer = nn.Linear(columns, rows, bias=False)
        if tied:
            self.outer.weight = self.inner.weight


def apart(*, same: bool = False, rows: int = 40, columns: int = 16, seed: int = 1) -> Net:
    """Return a model with two weights, which differ in the last element if not `same`."""
    torch.manual_seed(seed)
    model = Net(tied=False, rows=rows, columns=columns)
    with torch.no_grad():
        model.outer.weight.copy_(model.inner.weight)
        if not same:
            model.outer.weight[-1, -1] += 1
    return model


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([tensor.detach().reshape(-1).clone() for tensor in model.parameters()])


def written(kind: str, model: nn.Module, root: Path) -> Path:
    """Save the state dict of `model` as one of many kinds of checkpoint does; return where."""
    place = root / kind
    if kind == "ours":
        dist_ckpt.save({"model": model}, place)
    elif kind == "safetensors":
        place = root / "model.safetensors"
        save_file(model.state_dict(), place)
    elif kind == "torch":
        place = root / "model.pt"
        torch.save(model.state_dict(), place)
    else:
        save({"model": model.state_dict()}, checkpoint_id=place, no_dist=True)
    return place


@pytest.mark.filterwarnings("ignore:torch.distributed is")
@pytest.mark.parametrize("kind", ["ours", "safetensors", "torch", "stock"])
def test_two_values_for_one_memory_are_refused_or_the_last_one_wins(
    kind: str, tmp_path: Path
) -> None:
    saved = apart()
    place = written(kind, saved, tmp_path)
    live = Net(tied=True)
    before = flat(live)
    with pytest.raises(IncompatibleError, match=BOTH):
        dist_ckpt.load_weights(live, place)
    assert torch.equal(flat(live), before), "nothing was changed"
    report = dist_ckpt.load_weights(live, place, ties="last")
    assert torch.equal(live.inner.weight, saved.outer.weight)
    assert live.outer.weight is live.inner.weight
    assert report.nbytes_wanted == live.inner.weight.nbytes
    dist_ckpt.load_weights(live, place, skip=["model/outer.weight"])
    assert torch.equal(live.inner.weight, saved.inner.weight), "one of the two can be left out"


@pytest.mark.parametrize("in_flight_bytes", [256 << 20, 1 << 20], ids=["at once", "by windows"])
def test_equal_values_load_and_a_difference_is_found_wherever_it_is(
    in_flight_bytes: int, tmp_path: Path
) -> None:
    same = apart(same=True, rows=ROWS, columns=COLUMNS)
    dist_ckpt.save({"model": same}, tmp_path / "same")
    live = Net(tied=True, rows=ROWS, columns=COLUMNS)
    report = dist_ckpt.load_weights(live, tmp_path / "same", in_flight_bytes=in_flight_bytes)
    assert torch.equal(live.inner.weight, same.inner.weight)
    stored = sum(file.stat().st_size for file in (tmp_path / "same").rglob("*.safetensors"))
    if in_flight_bytes > stored:
        assert report.nbytes_read <= stored, "each byte once"
    for row in (0, ROWS // 2, ROWS - 1):
        other = copy.deepcopy(same)
        with torch.no_grad():
            other.outer.weight[row, 3] += 1
        dist_ckpt.save({"model": other}, tmp_path / f"{row}")
        with pytest.raises(IncompatibleError, match=BOTH):
            dist_ckpt.load_weights(live, tmp_path / f"{row}", in_flight_bytes=in_flight_bytes)
        assert torch.equal(live.inner.weight, same.inner.weight), "nothing was changed"


def test_a_tie_that_was_saved_as_one_is_read_once(tmp_path: Path) -> None:
    saved = Net(tied=True, rows=ROWS, columns=COLUMNS)
    dist_ckpt.save({"model": saved}, tmp_path)
    live = Net(tied=True, rows=ROWS, columns=COLUMNS)
    report = dist_ckpt.load_weights(live, tmp_path)
    assert torch.equal(live.inner.weight, saved.inner.weight)
    assert report.nbytes_read < 1.5 * saved.inner.weight.nbytes
    loose = Net(tied=False, rows=ROWS, columns=COLUMNS)
    dist_ckpt.load_weights(loose, tmp_path)
    assert torch.equal(loose.outer.weight, saved.inner.weight)


def test_a_healthy_checkpoint_that_does_not_fit_is_not_passed_over(tmp_path: Path) -> None:
    with dist_ckpt.Checkpointer(tmp_path, {"model": apart(same=True)}) as ckpt:
        ckpt.save(1).wait()
    model = apart()
    with dist_ckpt.Checkpointer(tmp_path, {"model": model}) as ckpt:
        ckpt.restore()
        model.outer.weight.data += 1
        ckpt.save(2).wait()
    with (
        dist_ckpt.Checkpointer(tmp_path, {"model": Net(tied=True)}) as ckpt,
        pytest.raises(IncompatibleError, match=BOTH),
    ):
        ckpt.restore()


def test_two_parts_with_one_memory(tmp_path: Path) -> None:
    model, ema = apart(same=True), apart(same=True)
    dist_ckpt.save({"model": model, "ema": ema}, tmp_path / "same")
    with torch.no_grad():
        ema.inner.weight[3, 3] += 1
    dist_ckpt.save({"model": model, "ema": ema}, tmp_path / "other")
    live = Net(tied=False)
    before = flat(live)
    with pytest.raises(IncompatibleError, match=r"for model/inner\.weight and ema/inner\.weight"):
        dist_ckpt.load({"model": live, "ema": live}, tmp_path / "other")
    assert torch.equal(flat(live), before)
    dist_ckpt.load({"model": live, "ema": live}, tmp_path / "same")
    assert torch.equal(flat(live), flat(model))
    dist_ckpt.load({"model": live, "ema": live}, tmp_path / "other", ties="last")
    assert torch.equal(flat(live), flat(ema))


def test_on_the_meta_device_too(tmp_path: Path) -> None:
    model, ema = apart(), apart(seed=2)
    dist_ckpt.save({"model": model, "ema": ema}, tmp_path)

    def on_meta(*, tied: bool) -> Net:
        with torch.device("meta"):
            return Net(tied=tied)

    live = on_meta(tied=True)
    with pytest.raises(IncompatibleError, match=BOTH):
        dist_ckpt.load_weights(live, tmp_path)
    assert live.inner.weight.device.type == "meta"
    dist_ckpt.load_weights(live, tmp_path, ties="last")
    assert torch.equal(live.inner.weight, model.outer.weight)
    live = on_meta(tied=False)
    with pytest.raises(IncompatibleError, match=r"model/inner\.weight and ema/inner\.weight"):
        dist_ckpt.load({"model": live, "ema": live}, tmp_path)
    dist_ckpt.load({"model": live, "ema": live}, tmp_path, ties="last")
    assert torch.equal(flat(live), flat(ema))


def test_optimizer_state_that_shares_memory(tmp_path: Path) -> None:
    def trained(model: Net) -> torch.optim.Optimizer:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        (model.inner(torch.ones(16)) - 2 * model.outer(torch.ones(16))).sum().backward()
        optimizer.step()
        return optimizer

    model = apart()
    state = {"model": model, "optimizer": trained(model)}
    dist_ckpt.save(state, tmp_path)
    live = apart()
    optimizer = trained(live)
    shared = optimizer.state[live.inner.weight]["momentum_buffer"]
    optimizer.state[live.outer.weight]["momentum_buffer"] = shared
    before = shared.clone()
    with pytest.raises(IncompatibleError, match=r"optimizer/state\.inner.*optimizer/state\.outer"):
        dist_ckpt.load({"model": live, "optimizer": optimizer}, tmp_path)
    assert torch.equal(shared, before)


def test_another_dtype_is_compared_as_it_would_be_loaded(tmp_path: Path) -> None:
    whole = torch.arange(6.0)
    dist_ckpt.save({"model": torch.nn.ParameterDict({"a": whole, "b": whole})}, tmp_path / "x")
    stored = {"a": whole, "b": whole.bfloat16()}
    save_file(stored, tmp_path / "model.safetensors")
    live = torch.zeros(6)
    dist_ckpt.load_weights({"a": live, "b": live}, tmp_path / "model.safetensors", cast=True)
    assert torch.equal(live, whole)
    save_file({**stored, "a": whole + 0.001}, tmp_path / "model.safetensors")
    with pytest.raises(IncompatibleError, match="model/a and model/b"):
        dist_ckpt.load_weights({"a": live, "b": live}, tmp_path / "model.safetensors", cast=True)
    assert torch.equal(live, whole)


VIEWS: dict[str, Any] = {
    "all": lambda base: base,
    "upper half": lambda base: base[:4],
    "middle": lambda base: base[2:6],
    "left columns": lambda base: base[:, :3],
    "right columns": lambda base: base[:, 3:],
    "every second": lambda base: base[::2],
    "turned": lambda base: base.t(),
    "one": lambda base: base[5, 5],
    "bytes": lambda base: base.view(torch.uint8),
}


def test_memory_that_overlaps_in_any_way(tmp_path: Path) -> None:
    """The rule: what torch makes of it by copying one after another, if no order matters."""
    rng = random.Random(3)
    torch.manual_seed(3)
    for number in range(40):
        names = rng.sample(list(VIEWS), rng.randint(2, 4))
        source = torch.randint(0, 256, (8, 24), dtype=torch.uint8).view(torch.float32)
        stored = {name: VIEWS[name](source).clone() for name in names}
        for name in names if rng.random() < 0.5 else ():
            raw = stored[name].reshape(-1).view(torch.uint8).clone()
            raw[rng.randrange(len(raw))] ^= 1
            stored[name] = raw.view(stored[name].dtype).reshape(stored[name].shape)
        save_file(
            {k: v.contiguous() for k, v in stored.items()}, tmp_path / f"{number}.safetensors"
        )
        results = {_one_after_another(order, stored) for order in itertools.permutations(names)}
        expected = _one_after_another(names, stored)
        live = torch.zeros(8, 6)
        targets = {name: VIEWS[name](live) for name in names}
        place = tmp_path / f"{number}.safetensors"
        if len(results) == 1:
            dist_ckpt.load_weights(targets, place)
            assert live.numpy().tobytes() == expected
        else:
            with pytest.raises(IncompatibleError, match="different values for model/"):
                dist_ckpt.load_weights(targets, place)
            assert not live.any()
        dist_ckpt.load_weights(targets, place, ties="last")
        assert live.numpy().tobytes() == expected


def _one_after_another(order: Sequence[str], stored: Mapping[str, torch.Tensor]) -> bytes:
    base = torch.zeros(8, 6)
    for name in order:
        VIEWS[name](base).copy_(stored[name])
    return base.numpy().tobytes()


def test_a_conjugate_shares_memory_too(tmp_path: Path) -> None:
    whole = torch.arange(4).to(torch.complex64) * (1 + 2j)
    live = torch.zeros(4, dtype=torch.complex64)
    targets = {"a": live, "b": live.conj()}
    save_file({"a": whole, "b": whole.conj().resolve_conj()}, tmp_path / "1.safetensors")
    dist_ckpt.load_weights(targets, tmp_path / "1.safetensors")
    assert torch.equal(live, whole)
    save_file({"a": whole, "b": whole.clone()}, tmp_path / "2.safetensors")
    with pytest.raises(IncompatibleError, match="model/a and model/b"):
        dist_ckpt.load_weights(targets, tmp_path / "2.safetensors")
    assert torch.equal(live, whole)


def test_columns_of_one_matrix_share_nothing_and_cost_nothing(tmp_path: Path) -> None:
    whole = torch.rand(600, 1000)
    saved = {"left": whole[:, :300].clone(), "right": whole[:, 300:].clone()}
    save_file(saved, tmp_path / "model.safetensors")
    live = torch.zeros(600, 1000)
    targets = {"left": live[:, :300], "right": live[:, 300:]}
    report = dist_ckpt.load_weights(targets, tmp_path / "model.safetensors")
    assert torch.equal(live, whole)
    assert report.nbytes_read <= whole.nbytes + 4096


def test_an_expanded_target_is_refused_before_anything_changes(tmp_path: Path) -> None:
    dist_ckpt.save(
        {"model": nn.ParameterDict({"a": torch.ones(3), "b": torch.ones(4, 3)})}, tmp_path
    )
    live = {"a": torch.zeros(3), "b": torch.zeros(1, 3).expand(4, 3)}
    with pytest.raises(IncompatibleError, match=r"model/b: .*expanded.*clone"):
        dist_ckpt.load_weights(live, tmp_path)
    assert not live["a"].any()
    # One row of nothing in particular is no expansion.
    ids = torch.arange(3.0).expand(1, -1)
    dist_ckpt.save({"model": nn.ParameterDict({"ids": ids})}, tmp_path, step=1)
    dist_ckpt.load_weights({"ids": torch.zeros(3).expand(1, -1)}, tmp_path)


@pytest.mark.filterwarnings("ignore:The given NumPy array is not writable")
def test_a_target_in_a_file_that_was_mapped_for_reading_is_refused(tmp_path: Path) -> None:
    saved = {"a": torch.ones(3), "table": torch.full((4, 3), 2.0)}
    dist_ckpt.save({"model": nn.ParameterDict(saved)}, tmp_path / "run")
    np.zeros((4, 3), np.float32).tofile(tmp_path / "table.bin")
    for mode in ("r", "c", "r+"):
        table = np.memmap(tmp_path / "table.bin", np.float32, mode, shape=(4, 3))
        live = {"a": torch.zeros(3), "table": torch.from_numpy(table)}
        if mode == "r":
            with pytest.raises(IncompatibleError, match=r"model/table: .*mapped for reading"):
                dist_ckpt.load_weights(live, tmp_path / "run")
            assert not live["a"].any()
            assert not live["table"].any()
            assert dist_ckpt.load_weights(live, tmp_path / "run", skip="model/table").step == 0
            continue
        dist_ckpt.load_weights(live, tmp_path / "run")
        assert torch.equal(live["table"], saved["table"])


def test_the_rule_is_one_of_two(tmp_path: Path) -> None:
    dist_ckpt.save({"model": apart()}, tmp_path)
    with pytest.raises(UsageError, match="ties is one of refuse, last, not 'first'"):
        dist_ckpt.load_weights(Net(tied=True), tmp_path, ties="first")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="ties is one of refuse, last, not 'first'"):
        dist_ckpt.dcp.Reader(tmp_path, ties="first")  # type: ignore[arg-type]


@pytest.mark.filterwarnings("ignore:torch.distributed is")
def test_under_the_load_of_torch_itself(tmp_path: Path) -> None:
    saved = apart()
    save({"model": saved.state_dict()}, storage_writer=dist_ckpt.dcp.Writer(tmp_path), no_dist=True)
    live = Net(tied=True)
    before = flat(live)
    state = {"model": live.state_dict()}
    with pytest.raises(CheckpointException) as caught:
        load(state, storage_reader=dist_ckpt.dcp.Reader(tmp_path), no_dist=True)
    error = caught.value.failures[0][0]
    assert isinstance(error, IncompatibleError)
    assert "inner.weight" in str(error)
    assert "outer.weight" in str(error)
    assert torch.equal(flat(live), before)
    reader = dist_ckpt.dcp.Reader(tmp_path, ties="last")
    load(state, storage_reader=reader, no_dist=True)
    assert torch.equal(live.inner.weight, saved.outer.weight)


@ranks(2)
def test_shards_that_differ_on_one_rank_alone(tmp_path: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    for kind, rules in (("fsdp", (True, False)), ("plain", (True,))):
        for same in rules:
            saved = apart(same=same, rows=41)
            place = tmp_path / f"{kind}-{same}"
            dist_ckpt.save({"model": saved}, place)
            torch.manual_seed(9)
            # Where only one rank has ties, the other takes part in comparing nothing of its own.
            live = Net(tied=kind == "fsdp" or mesh.get_rank() == 1, rows=41)
            if kind == "fsdp":
                fully_shard(live, mesh=mesh)
            weight = live.inner.weight
            local = weight.to_local() if isinstance(weight, DTensor) else weight
            before = local.detach().clone()
            if same:
                dist_ckpt.load_weights(live, place, exchange="always")
                rows = slice(None)
                if kind == "fsdp":
                    rows = slice(21) if mesh.get_rank() == 0 else slice(21, None)
                assert torch.equal(local, saved.inner.weight[rows])
            else:
                with pytest.raises(IncompatibleError, match=BOTH):
                    dist_ckpt.load_weights(live, place, exchange="always")
                assert torch.equal(local, before)
