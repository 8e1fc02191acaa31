"""Loading a part of what is stored, under other names, in other dtypes, from elsewhere."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import dist_ckpt
from dist_ckpt.errors import (
    CheckpointError,
    IncompatibleError,
    IntegrityError,
    NotFound,
    UsageError,
)
from dist_ckpt.format.segments import Root, decode_root
from dist_ckpt.repository import Repository, checkpoint
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule

STEP = 100


def net(**layers: nn.Module) -> Any:
    layers = layers or {"body": nn.Linear(4, 8), "head": nn.Linear(8, 2)}
    return nn.Sequential(OrderedDict(layers))


def trained() -> dict[str, Any]:
    torch.manual_seed(5)
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    scheduler.step()
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def fresh() -> dict[str, Any]:
    model = net()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.25)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    return {"model": model, "optimizer": optimizer, "scheduler": scheduler}


def equal(left: nn.Module, right: nn.Module) -> bool:
    pairs = zip(left.state_dict().values(), right.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in pairs)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    dist_ckpt.save(trained(), tmp_path / "run", step=STEP)
    return tmp_path / "run"


def unreadable(run: Path, *keys: str) -> FaultyStore:
    """Return the run as a store that fails when a byte of `keys` is read."""
    fault = Fail(OSError("these bytes cannot be had"))
    rules = [Rule("read_into", fault, key=key, nth=None) for key in keys]
    return FaultyStore(LocalStore(run), rules)


# ---------------------------------------------------------------- a part of it


def test_weights_alone_never_touch_the_optimizer(run: Path) -> None:
    model = net()
    report = dist_ckpt.load_weights(model, unreadable(run, "*/optimizer*", "*/extra*"))
    assert equal(model, trained()["model"])
    assert report.parts == ("model",)
    assert sorted(report.loaded) == sorted(f"model/{name}" for name in model.state_dict())
    assert report.nbytes_wanted == sum(t.nbytes for t in model.state_dict().values())
    assert (report.step, report.verified, report.missing) == (STEP, True, ())


def test_a_new_start_on_a_restored_model(run: Path) -> None:
    for options in ({"skip": ["optimizer", "scheduler"]}, {"only": "model"}):
        state = dist_ckpt.TrainState(**fresh())
        with dist_ckpt.Checkpointer(unreadable(run, "*/optimizer*"), state) as ckpt:
            assert ckpt.restore(**options) == STEP
        assert equal(state["model"], trained()["model"])
        assert state["optimizer"].state == {}
        assert state["scheduler"].last_epoch == 0


def test_names_of_a_part_may_be_left_out(run: Path) -> None:
    state = fresh()
    before = state["model"].head.weight.detach().clone()
    model, optimizer = state["model"], state["optimizer"]
    mine = torch.full_like(model.head.weight, 7)
    optimizer.state[model.head.weight] = {"exp_avg": mine}
    dist_ckpt.load(state, run, skip=["model/head.*", "optimizer/state.head.*"])
    assert torch.equal(model.head.weight, before)
    assert torch.equal(model.body.weight, trained()["model"].body.weight)
    assert optimizer.state[model.head.weight] == {"exp_avg": mine}, "left as it was"
    assert len(optimizer.state[model.body.weight]) == 3


def test_the_report_reads_well(run: Path) -> None:
    text = str(dist_ckpt.load_weights(net(), run))
    assert text.startswith(f"loaded step {STEP} of {run}")
    assert "4 tensors of model: 232 B, verified" in text
    assert "NOT verified" in str(dist_ckpt.load_weights(net(), run, verify=False))


def test_files_that_are_read_whole_are_read_apart(tmp_path: Path) -> None:
    sizes = (300, 256, 1000)
    state = {f"net{size}": nn.Linear(size, 1000) for size in sizes}  # a file of 1 MB and more each
    dist_ckpt.save(state, tmp_path)
    for verify in (False, True):
        loaded = {f"net{size}": nn.Linear(size, 1000) for size in sizes}
        dist_ckpt.load(loaded, tmp_path, verify=verify)
        assert all(equal(state[name], loaded[name]) for name in state)


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("layers", "says"),
    [
        (
            {"body": (4, 8), "head": (8, 2), "more": (2, 2)},
            ["missing.*: model/more.bias, model/mor"],
        ),
        ({"body": (4, 8)}, ["unexpected.*: model/head.bias, model/head.weight$"]),
        ({"body": (4, 8), "top": (8, 2)}, ["missing.*: model/top", "unexpected.*: model/head"]),
        ({"body": (4, 9), "head": (9, 2)}, [r"model/head.weight: stored float32\[2, 8\], wanted"]),
    ],
    ids=["one more", "one fewer", "renamed", "wider"],
)
@pytest.mark.parametrize("strict", [True, False])
def test_a_model_that_does_not_fit(
    layers: dict[str, tuple[int, int]], says: list[str], strict: bool, run: Path
) -> None:
    model = net(**{name: nn.Linear(*sizes) for name, sizes in layers.items()})
    before = [tensor.clone() for tensor in model.state_dict().values()]
    if strict or ("head" in layers and layers["head"][0] == 9):
        for expected in says:
            with pytest.raises(IncompatibleError, match=f"(?m){expected}"):
                dist_ckpt.load_weights(model, unreadable(run, "*.safetensors"), strict=strict)
        for tensor, old in zip(model.state_dict().values(), before, strict=True):
            assert torch.equal(tensor, old), "nothing was changed"
    else:
        report = dist_ckpt.load_weights(model, run, strict=False)
        assert torch.equal(model.body.weight, trained()["model"].body.weight)
        assert bool(report.missing) is bool({"more", "top"} & layers.keys())
        assert bool(report.unexpected) is ("head" not in layers)


def test_a_dtype_is_cast_only_when_asked_to(run: Path) -> None:
    model = net().bfloat16()
    with pytest.raises(IncompatibleError, match=r"cast=True.*\n.*wanted bfloat16"):
        dist_ckpt.load_weights(model, run, strict=False)
    report = dist_ckpt.load_weights(model, run, cast=True)
    assert equal(model, trained()["model"].bfloat16())
    assert len(report.casts) == 4
    with pytest.raises(IncompatibleError, match="never cast"):
        dist_ckpt.load_weights({"body.bias": torch.zeros(8, dtype=torch.int64)}, run, cast=True)


def test_other_parameter_groups_are_named(run: Path) -> None:
    state = fresh()
    model = state["model"]
    groups = [{"params": model.body.parameters()}, {"params": model.head.parameters(), "lr": 1.0}]
    state["optimizer"] = torch.optim.AdamW(groups)
    with pytest.raises(IncompatibleError) as caught:
        dist_ckpt.load(state, unreadable(run, "*/model*", "*/optim*"))
    assert "missing in the checkpoint: optimizer/param_groups.head.weight" in str(caught.value)
    assert "optimizer/param_groups.body.weight[head.bias]" in str(caught.value)


def test_a_slip_of_the_pen_does_not_load_nothing(run: Path) -> None:
    for option in ({"only": "modle"}, {"skip": ["model/haed.*"]}, {"rename": {"model/haed": "x"}}):
        with pytest.raises(UsageError, match=r"matches no name.*did you mean 'model"):
            dist_ckpt.load_weights(net(), run, **option)
    with pytest.raises(UsageError, match="unknown option 'stric'"):
        dist_ckpt.load(fresh(), run, stric=False)  # type: ignore[call-arg]
    with pytest.raises(UsageError, match="bad step '3'"):
        dist_ckpt.load(fresh(), run, step="3")  # type: ignore[arg-type]


# ---------------------------------------------------------------- under other names


def test_a_model_inside_another(run: Path) -> None:
    outer = nn.ModuleDict({"inner": net()})
    for rename in ({"model": "model/inner"}, lambda name: name.replace("/", "/inner.", 1)):
        for parameter in outer.parameters():
            nn.init.zeros_(parameter)
        dist_ckpt.load_weights(outer, run, rename=rename)
        assert equal(outer["inner"], trained()["model"])
    inner = net()
    dist_ckpt.save({"ema": outer}, run, step=STEP + 1)
    dist_ckpt.load_weights(inner, run, part="ema", rename={"ema/inner": "ema"})
    assert equal(inner, trained()["model"])
    # The averaged weights in the place of the others: nothing of a part `model` is stored.
    inner = net()
    dist_ckpt.load({"model": inner}, run, rename={"ema/inner": "model"}, only="model")
    assert equal(inner, trained()["model"])


def test_two_names_may_not_become_one(run: Path) -> None:
    with pytest.raises(UsageError, match=r"both 'model/body\.weight' and 'model/head\.weight'"):
        dist_ckpt.load_weights(
            net(), run, rename={"model/body": "model/x", "model/head": "model/x"}
        )
    with pytest.raises(UsageError, match="a name is a part"):
        dist_ckpt.load_weights(net(), run, rename=lambda name: "nothing")


def test_values_keep_the_tensors_inside_them_when_their_part_is_renamed(tmp_path: Path) -> None:
    dist_ckpt.save({"old": {"history": [torch.arange(3)]}}, tmp_path)
    state = dist_ckpt.TrainState(new={}, rng=None)
    dist_ckpt.load(state, tmp_path, rename={"old": "new"}, skip=["rng"])
    assert torch.equal(state["new"]["history"][0], torch.arange(3))


# ---------------------------------------------------------------- from elsewhere


def test_a_start_from_another_run_takes_over_its_own(run: Path, tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    state = dist_ckpt.TrainState(**fresh())
    with dist_ckpt.Checkpointer(mine, state) as ckpt:
        assert ckpt.restore(url=run / f"step-{STEP:010d}") == STEP
        assert ckpt.restored is not None
        assert ckpt.restored.url.startswith(str(run))
        ckpt.save(1).wait()
    assert equal(state["model"], trained()["model"])
    assert len(list((run / "claims").iterdir())) == 1, "the other run still belongs to its owner"
    assert Repository(LocalStore(mine)).steps() == [1]


def test_a_place_that_was_asked_for_is_never_exchanged(run: Path, tmp_path: Path) -> None:
    dist_ckpt.save(trained(), run, step=STEP + 1)
    (path,) = run.glob(f"step-{STEP + 1:010d}/*/model*")
    path.write_bytes(path.read_bytes()[:-1])
    with dist_ckpt.Checkpointer(tmp_path / "mine", fresh()) as ckpt:
        with pytest.raises(IntegrityError, match="holds"):
            ckpt.restore(url=run)
        assert ckpt.restore(url=run, step=STEP) == STEP
        with pytest.raises(NotFound, match="is no run"):
            ckpt.restore(url=tmp_path / "nowhere")
        with pytest.raises(UsageError, match="is the checkpoint of step 100, not of step 7"):
            ckpt.restore(url=run / f"step-{STEP:010d}", step=7)


def test_a_load_that_fails_late_says_so(run: Path) -> None:
    with pytest.raises(CheckpointError, match=r"cannot be had.* may be partly restored"):
        dist_ckpt.load_weights(net(), unreadable(run, "*/model*"))


# ---------------------------------------------------------------- onto meta


def test_a_model_on_meta_stays_there_when_its_load_fails(run: Path) -> None:
    with torch.device("meta"):
        model = net()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(CheckpointError, match="cannot be had"):
        dist_ckpt.load_weights(model, unreadable(run, "*/model*"))
    assert all(parameter.is_meta for parameter in model.parameters())
    state = {"model": model, "optimizer": optimizer}
    dist_ckpt.load(state, run, skip=["scheduler", "rng"])
    assert equal(model, trained()["model"])
    held = optimizer.param_groups[0]["params"]
    assert all(mine is its for mine, its in zip(held, model.parameters(), strict=True))
    moment = optimizer.state[model.body.weight]["exp_avg"]
    its = trained()
    assert torch.equal(moment, its["optimizer"].state[its["model"].body.weight]["exp_avg"])


# ---------------------------------------------------------------- falling back


def test_what_a_damaged_checkpoint_filled_by_half_is_not_kept(tmp_path: Path) -> None:
    dist_ckpt.save({"model": net(body=nn.Linear(4, 8))}, tmp_path, step=1)
    dist_ckpt.save({"model": net()}, tmp_path, step=2)
    (path,) = tmp_path.glob("step-0000000002/*/model*")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    # Step 1 has no head: step 2, which is damaged, may have left its bytes in the live one.
    says = r"has no model/head\.bias, which another checkpoint that was given up half-way may have"
    with (
        dist_ckpt.Checkpointer(tmp_path, {"model": net()}) as ckpt,
        pytest.raises(IncompatibleError, match=says),
    ):
        ckpt.restore(strict=False)
    with dist_ckpt.Checkpointer(tmp_path, {"model": net()}) as ckpt:
        assert ckpt.restore(step=1, strict=False) == 1


def test_the_index_is_decoded_once(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    original = decode_root

    def decode(data: bytes) -> Root:
        decoded.append(data)
        return original(data)

    monkeypatch.setattr(checkpoint, "decode_root", decode)
    dist_ckpt.load(fresh(), run)
    assert len(decoded) == 1
