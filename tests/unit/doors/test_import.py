"""What other programs saved becomes a checkpoint of a run, by the names that they commonly use."""

from __future__ import annotations

import json
import warnings
from collections import namedtuple
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

import dist_ckpt
from dist_ckpt.doors import spool
from dist_ckpt.doors.export import ExportKeywords, Format
from dist_ckpt.errors import (
    AlreadyExists,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from tests.unit.doors.models import check_equal


def build() -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)


def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    model, optimizer = build()
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    return model, optimizer


def named(model: nn.Module, prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in model.state_dict().items()}


def conventions(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {
        "bare": {"model": named(model, ""), "optimizer": state, "step": 7},
        "tutorial": {
            "model_state_dict": named(model, ""),
            "optimizer_state_dict": state,
            "epoch": 7,
            "loss": 0.25,
        },
        "ddp": {"state_dict": named(model, "module."), "optimizer": state, "epoch": 7},
        "compiled": {
            "model": named(model, "_orig_mod.module."),
            "optimizer": state,
            "global_step": 7,
            "step": 2,
            "epoch": 1,
            "metrics": {"loss": 0.25, "name": "run"},
        },
        "lightning": {
            "pytorch-lightning_version": "2.4.0",
            "state_dict": named(model, "model._orig_mod."),
            "optimizer_states": [state],
            "epoch": 1,
            "global_step": 7,
            "loops": {},
        },
    }


def check_loads(run: Path, *, step: int = 7) -> None:
    """Check that a training finds model and optimizer in `run` as they were."""
    model, optimizer = build()
    for parameter in model.parameters():
        parameter.data.zero_()
    state = {"model": model, "optimizer": optimizer, "rng": None}
    with dist_ckpt.Checkpointer(run, state) as ckpt:
        assert ckpt.restore(only=["model", "optimizer"]) == step
    wanted, stepped = trained()
    check_equal(model.state_dict(), wanted.state_dict())
    assert str(optimizer.state_dict()) == str(stepped.state_dict())


@pytest.mark.parametrize("name", ["bare", "tutorial", "ddp", "compiled", "lightning"])
def test_what_torch_saved_goes_on_as_a_run(name: str, tmp_path: Path) -> None:
    content = conventions(*trained())[name]
    torch.save(content, tmp_path / "old.ckpt")
    report = dist_ckpt.import_(tmp_path / "old.ckpt", tmp_path / "run")
    assert report.step == 7
    assert {"model", "optimizer"} <= set(report.parts.values())
    assert report.metrics == ({"loss": 0.25} if name in ("tutorial", "compiled") else {})
    assert Repository(LocalStore(tmp_path / "run")).verify(7).ok
    with dist_ckpt.open_checkpoint(tmp_path / "run") as opened:
        names = [info.name for info in opened.info.values() if info.part == "model"]
        assert names == ["0.weight", "0.bias", "1.weight", "1.bias"]
        assert opened.manifest is not None
        assert opened.manifest.metrics == report.metrics
        if name == "ddp":
            assert opened.read_values("epoch") == {"value": 7}
    check_loads(tmp_path / "run")


def test_stock_dcp(tmp_path: Path) -> None:
    model, optimizer = trained()
    state, moments = get_state_dict(model, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save({"model": state, "optim": moments}, checkpoint_id=tmp_path / "stock")
    report = dist_ckpt.import_(tmp_path / "stock", tmp_path / "run", step=7, metrics={"loss": 1.0})
    assert report.parts == {"model": "model", "optim": "optimizer"}
    assert "optimizer, called 'optim' there" in str(report)
    check_loads(tmp_path / "run")


def test_safetensors_and_folders_of_hugging_face(tmp_path: Path) -> None:
    wanted = named(trained()[0], "")
    save_file(wanted, tmp_path / "a.safetensors")
    dist_ckpt.export(tmp_path / "a.safetensors", tmp_path / "hf", format="hf", max_shard=200)
    for source, step in ((tmp_path / "a.safetensors", 1), (tmp_path / "hf", 2)):
        dist_ckpt.import_(source, tmp_path / "run", step=step)
        model = build()[0]
        dist_ckpt.load_weights(model, tmp_path / "run", step=step)
        check_equal(model.state_dict(), wanted)


@pytest.mark.parametrize(
    ("kind", "options"),
    [("safetensors", {}), ("torch", {}), ("dcp", {}), ("hf", {"max_shard": 200})],
)
def test_out_in_and_out_again_is_the_same_in_every_byte(
    kind: Format, options: ExportKeywords, tmp_path: Path
) -> None:
    dist_ckpt.save({"model": build()[0]}, tmp_path / "run", step=1)
    dist_ckpt.export(tmp_path / "run", tmp_path / "first", format=kind, **options)
    dist_ckpt.import_(tmp_path / "first", tmp_path / "again", step=1)
    dist_ckpt.export(tmp_path / "again", tmp_path / "second", format=kind, **options)
    first, second = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("first", "second")
    )
    assert first == second


def test_ties_are_stored_once(tmp_path: Path) -> None:
    shared = torch.randn(1000)
    torch.save({"model": {"a": shared, "b": shared}}, tmp_path / "old.pt")
    dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    with dist_ckpt.open_checkpoint(tmp_path / "run") as opened:
        assert opened.ties("model") == [("a", "b")]
        assert torch.equal(opened["model/b"].read(), shared)


Unknown = namedtuple("Unknown", "value")


def test_what_cannot_be_read_is_left_out_and_told(tmp_path: Path) -> None:
    model, _ = trained()
    torch.save({"model": named(model, ""), "args": Unknown(3)}, tmp_path / "old.pt")
    report = dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    assert list(report.left_out) == ["args"]
    assert "Unknown" in report.left_out["args"], "a reason says what it is"
    assert report.parts == {"model": "model"}


@pytest.mark.parametrize(
    "value",
    [7, 7.0, torch.tensor(7), torch.tensor([7.0]), np.int64(7), np.float32(7), np.array(7)],
    ids=repr,
)
def test_a_step_of_any_integral_number_is_taken(value: object, tmp_path: Path) -> None:
    torch.save({"model": named(trained()[0], ""), "global_step": value}, tmp_path / "old.pt")
    report = dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    assert (report.step, report.metrics) == (7, {})


@pytest.mark.parametrize(
    "value", [-1, 2.5, "seven", 10**20, float("nan"), torch.tensor(-1), np.float32(2.5)], ids=repr
)
def test_a_step_that_is_none_is_told_and_no_other_taken(value: object, tmp_path: Path) -> None:
    content = {"model": named(trained()[0], ""), "global_step": value, "epoch": 3}
    torch.save(content, tmp_path / "old.pt")
    with pytest.raises(UsageError, match=r"global_step of .* no step: give it by step="):
        dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run", step=7).step == 7


@pytest.mark.parametrize("value", [None, True, [1], {"a": 1}, torch.ones(2)], ids=repr)
def test_what_is_no_number_says_nothing_of_the_step(value: object, tmp_path: Path) -> None:
    content = {"model": named(trained()[0], ""), "global_step": value, "epoch": 3}
    torch.save(content, tmp_path / "old.pt")
    assert dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run").step == 3


def test_numbers_in_tensors_and_of_numpy_are_metrics(tmp_path: Path) -> None:
    content = {"loss": torch.tensor(0.25), "f1": np.float32(0.5), "lrs": torch.ones(2)}
    torch.save({"model": named(trained()[0], ""), **content}, tmp_path / "old.pt")
    report = dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    assert report.metrics == {"loss": 0.25, "f1": 0.5}


def trainer_folder(folder: Path, suffix: str = ".pt") -> Path:
    """Write what the Trainer of transformers, or accelerate, leaves in a folder."""
    model, optimizer = trained()
    folder.mkdir(parents=True)
    save_file(named(model, ""), folder / "model.safetensors")
    torch.save(optimizer.state_dict(), folder / f"optimizer{suffix}")
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    torch.save(scheduler.state_dict(), folder / f"scheduler{suffix}")
    torch.save({"cpu": torch.get_rng_state()}, folder / "rng_state.pth")
    (folder / "config.json").write_text("{}")
    return folder


LOGGED = [
    {"loss": 1.5, "eval_loss": 0.5, "f1": 0.25, "epoch": 0.5, "step": 3},
    {"eval_loss": 0.75, "epoch": 0.75, "step": 5},
    {"loss": 1.25, "grad_norm": float("nan"), "note": "text", "epoch": 1.0, "step": 7},
]


@pytest.mark.parametrize("suffix", [".pt", ".bin"])
def test_a_folder_of_a_trainer_goes_on_as_a_run(suffix: str, tmp_path: Path) -> None:
    source = trainer_folder(tmp_path / "checkpoint-9", suffix)
    # As the trainer writes it, with numbers that JSON lacks.
    state = json.dumps({"global_step": 7, "epoch": 1.0, "log_history": LOGGED})
    (source / "trainer_state.json").write_text(state)
    report = dist_ckpt.import_(source, tmp_path / "run", metrics={"f1": 0.5})
    assert list(report.parts) == ["model", "optimizer", "scheduler"]
    # By a loss of another step it would be the best in the place of that one.
    assert (report.step, report.metrics) == (7, {"loss": 1.25, "f1": 0.5})
    assert list(report.left_out) == ["rng_state.pth", "metric eval_loss"]
    assert report.left_out["metric eval_loss"].startswith("logged at step 5")
    assert "left out: rng_state.pth: beside the weights" in str(report)
    with dist_ckpt.open_checkpoint(tmp_path / "run") as opened:
        assert opened.read_values("scheduler")["value"]["last_epoch"] == 0
    check_loads(tmp_path / "run")
    assert dist_ckpt.import_(source, tmp_path / "run", metrics={"f1": 0.5}).was_there
    # One file is that one file.
    alone = dist_ckpt.import_(source / "model.safetensors", tmp_path / "alone")
    assert (alone.step, dict(alone.parts), alone.left_out) == (0, {"model": "model"}, {})


@pytest.mark.parametrize(
    ("name", "step"),
    [("checkpoint-7", 7), ("checkpoint_7", 7), ("global_step7", 7), ("llama-7", 0), ("v7-3", 0)],
)
def test_the_number_of_a_folder_is_the_step_where_nothing_else_is(
    name: str, step: int, tmp_path: Path
) -> None:
    source = trainer_folder(tmp_path / name)
    assert dist_ckpt.import_(source, tmp_path / "run").step == step
    store = LocalStore(source)
    assert dist_ckpt.import_(store, tmp_path / "other", step=2).step == 2
    assert store.list_children(), "a store that was given stays open"


def test_what_is_not_read_of_a_folder_is_named(tmp_path: Path) -> None:
    source = trainer_folder(tmp_path / "checkpoint-7")
    torch.save({"args": Unknown(3), "a": 1}, source / "optimizer_1.bin")
    torch.save({"unlike": torch.ones(2)}, source / "optimizer.bin")
    (source / "global_step7").mkdir()
    (source / "global_step7" / "part").write_bytes(b"0")
    report = dist_ckpt.import_(source, tmp_path / "run")
    assert list(report.parts) == ["model", "scheduler"]
    optimizers = ["optimizer.bin", "optimizer.pt", "optimizer_1.bin"]
    assert list(report.left_out) == ["global_step7/", *optimizers, "rng_state.pth"]
    for name in optimizers[:2]:
        assert report.left_out[name] == "optimizer.bin and optimizer.pt are two of one meaning"
    (source / "optimizer.pt").unlink()
    again = dist_ckpt.import_(source, tmp_path / "run")
    assert again.left_out["optimizer.bin"] == "it holds model, and no optimizer alone"


@pytest.mark.parametrize("text", ["{", "[]", '{"global_step": ' + "[" * 100_000])
def test_a_damaged_state_of_a_trainer_is_told(text: str, tmp_path: Path) -> None:
    source = trainer_folder(tmp_path / "checkpoint-7")
    (source / "trainer_state.json").write_text(text)
    with pytest.raises(IntegrityError, match=r"trainer_state\.json in .* no JSON"):
        dist_ckpt.import_(source, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_the_same_again_is_no_error_and_another_is(tmp_path: Path) -> None:
    model, optimizer = trained()
    torch.save(conventions(model, optimizer)["ddp"], tmp_path / "old.pt")
    first = dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    again = dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    assert (first.was_there, again.was_there) == (False, True)
    with pytest.raises(AlreadyExists, match="is another checkpoint"):
        dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run", metrics={"f1": 0.5})
    model[0].weight.data[0, 0] += 1  # type: ignore[index]
    torch.save(conventions(model, optimizer)["ddp"], tmp_path / "old.pt")
    with pytest.raises(AlreadyExists, match=r"step 7 is committed in .* is another checkpoint"):
        dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run", step=8)
    assert Repository(LocalStore(tmp_path / "run")).steps() == [7, 8]


def test_what_is_no_checkpoint_of_others_is_refused(tmp_path: Path) -> None:
    dist_ckpt.save({"model": build()[0]}, tmp_path / "run")
    with pytest.raises(UsageError, match="committed by dist_ckpt already"):
        dist_ckpt.import_(tmp_path / "run", tmp_path / "other")
    with pytest.raises(NotFound):
        dist_ckpt.import_(tmp_path / "nowhere", tmp_path / "other")
    torch.save({"model": build()[0].state_dict()}, tmp_path / "model.pt")
    bad: list[Any] = [[0.5], {"loss": "low"}, {1: 0.5}]
    for metrics in bad:
        with pytest.raises(UsageError, match="metric"):
            dist_ckpt.import_(tmp_path / "model.pt", tmp_path / "other", metrics=metrics)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "held", [{}, 3, [1, 2], {"epoch": 3, "lr": 0.1}, {"state_dict": None, "epoch": 3}], ids=repr
)
def test_what_holds_no_tensor_does_not_become_the_newest(held: object, tmp_path: Path) -> None:
    torch.save({"model": build()[0].state_dict()}, tmp_path / "old.pt")
    dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run", step=1)
    torch.save(held, tmp_path / "none.pt")
    with pytest.raises(UsageError, match=r"none\.pt holds no tensor.*name what holds the weights"):
        dist_ckpt.import_(tmp_path / "none.pt", tmp_path / "run", step=2)
    assert dist_ckpt.Run(tmp_path / "run").steps() == [1]


def test_other_kinds_without_a_tensor_are_refused_in_the_same_words(tmp_path: Path) -> None:
    save_file({}, tmp_path / "none.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcp_save({"epoch": 3}, checkpoint_id=tmp_path / "stock", no_dist=True)
    for name in ("none.safetensors", "stock"):
        with pytest.raises(UsageError, match=f"{name} holds no tensor"):
            dist_ckpt.import_(tmp_path / name, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_large_ones_go_through_a_file_of_which_no_room_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool, "IN_MEMORY_BYTES", 100)
    monkeypatch.setattr(spool, "BATCH_BYTES", 64)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    torch.save(conventions(*trained())["bare"], tmp_path / "old.pt")
    before = sorted(tmp_path.iterdir())
    dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "run")
    check_loads(tmp_path / "run")
    assert sorted(tmp_path.iterdir()) == sorted([*before, tmp_path / "run"]), "no file is left"

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(StorageError, match="TMPDIR") as failed:
        dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "other")
    assert failed.value.kind is ErrorKind.STORAGE_FULL
    missing = str(tmp_path / "missing")
    monkeypatch.setenv("TMPDIR", missing)
    with pytest.raises(StorageError, match=rf"into {missing}, the folder .* by TMPDIR"):
        dist_ckpt.import_(tmp_path / "old.pt", tmp_path / "other")
    assert not (tmp_path / "other").exists()
