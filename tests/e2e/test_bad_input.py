"""Every kind of bad input: one clear error, nothing lost, nothing half-done."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import dist_ckpt
from dist_ckpt import keep
from dist_ckpt.errors import (
    AlreadyExists,
    CheckpointError,
    FencedError,
    IncompatibleError,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)
from dist_ckpt.format.files import ALIGN_BYTES
from dist_ckpt.repository import Repository
from dist_ckpt.storage.local import LocalStore
from dist_ckpt.testing.stores import Fail, FaultyStore, Rule
from tests.e2e import guides


def parts(fill: float = 1.0) -> dict[str, Any]:
    return {"weights": {"w": torch.full((64, 1000), fill), "b": torch.full((7,), fill)}}


def save_steps(root: Path, *steps: int) -> None:
    for step in steps:
        dist_ckpt.save(parts(float(step)), root, step=step)


def restore(root: Path, state: Any) -> int:
    with dist_ckpt.Checkpointer(root, state) as ckpt:
        return ckpt.restore()


def only_file(root: Path, step: int, name: str) -> Path:
    (found,) = root.glob(f"step-{step:010d}/*/{name}")
    return found


def edit_manifest(root: Path, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    path = root / f"step-{step:010d}" / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


# ---------------------------------------------------------------- nothing there


def test_a_path_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="is no run"):
        dist_ckpt.load(parts(), tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_path_that_is_a_file(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("hello")
    with pytest.raises(UsageError, match="a file and no folder"):
        dist_ckpt.load(parts(), file)
    with pytest.raises(UsageError, match="not a directory"):
        dist_ckpt.save(parts(), file)
    assert file.read_text() == "hello"


def test_an_empty_run_is_a_new_one_for_restore_and_an_error_for_load(tmp_path: Path) -> None:
    state = dist_ckpt.TrainState(**parts(5.0))
    assert restore(tmp_path, state) == 0
    assert torch.equal(state["weights"]["b"], torch.full((7,), 5.0))
    with pytest.raises(NotFound, match="no committed checkpoint"):
        dist_ckpt.load(parts(), tmp_path)


def test_a_step_that_does_not_exist(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    with pytest.raises(NotFound, match=r"no checkpoint of step 4 .* nearest are 3"):
        dist_ckpt.load(parts(), tmp_path, step=4)
    with dist_ckpt.Checkpointer(tmp_path, parts()) as ckpt, pytest.raises(NotFound, match="step 4"):
        ckpt.restore(step=4)


# ---------------------------------------------------------------- damaged manifests


def test_a_manifest_cut_short(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    path = tmp_path / "step-0000000002" / "manifest.json"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(IntegrityError, match="manifest"):
        dist_ckpt.load(parts(), tmp_path)
    assert restore(tmp_path, dist_ckpt.TrainState(**parts())) == 1


def test_a_manifest_of_another_version_stops_a_restore(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    edit_manifest(tmp_path, 2, lambda manifest: manifest.update(format=99))
    for use in (lambda: dist_ckpt.load(parts(), tmp_path), lambda: restore(tmp_path, parts())):
        with pytest.raises(IncompatibleError, match="99"):
            use()


@pytest.mark.parametrize("key", ["../../outside", "/etc/passwd", "c000001-0/../../x"])
def test_a_manifest_with_a_key_that_leaves_the_checkpoint(key: str, tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    edit_manifest(tmp_path, 1, lambda manifest: manifest["index"].update(key=key))
    with pytest.raises(IntegrityError):
        dist_ckpt.load(parts(), tmp_path)


# ---------------------------------------------------------------- damaged data


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize("name", ["weights.r00000.safetensors", "extra.r00000.safetensors"])
@pytest.mark.parametrize("where", ["first", "middle", "last"])
def test_one_flipped_bit(
    name: str, where: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_steps(tmp_path, 1, 2)
    path = only_file(tmp_path, 2, name)
    # Of the data: no load looks at the header of a shard file, only `verify` does.
    flip(path, {"first": ALIGN_BYTES, "middle": path.stat().st_size // 2, "last": -1}[where])
    with pytest.raises(IntegrityError, match=name):
        dist_ckpt.load(parts(), tmp_path)
    assert not Repository(LocalStore(tmp_path)).verify(2).ok
    state = dist_ckpt.TrainState(**parts())
    with dist_ckpt.Checkpointer(tmp_path, state) as ckpt:
        assert ckpt.restore() == 1
        assert ckpt.restored is not None
        assert list(ckpt.restored.refused) == [2]
        assert name in ckpt.restored.refused[2]
    assert "step 2" in caplog.text
    assert "was passed over" in caplog.text
    assert torch.equal(state["weights"]["b"], torch.full((7,), 1.0))
    assert Repository(LocalStore(tmp_path)).steps() == [1, 2], "nothing is deleted or marked"


@pytest.mark.parametrize("damage", ["truncated", "missing", "index missing", "index flipped"])
def test_a_damaged_file(damage: str, tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    path = only_file(tmp_path, 2, "weights.r00000.safetensors")
    index = only_file(tmp_path, 2, "index.msgpack")
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-1])
    elif damage == "missing":
        path.unlink()
    elif damage == "index missing":
        index.unlink()
    else:
        flip(index, 100)
    with pytest.raises(IntegrityError):
        dist_ckpt.load(parts(), tmp_path)
    with pytest.raises(IntegrityError), dist_ckpt.Checkpointer(tmp_path, parts()) as ckpt:
        ckpt.restore(step=2)
    assert restore(tmp_path, parts()) == 1


def test_when_all_are_damaged_nothing_starts_from_zero(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    for step in (1, 2):
        flip(only_file(tmp_path, step, "weights.r00000.safetensors"), 5000)
    with pytest.raises(IntegrityError, match=r"step 1: .*step 2: "):
        restore(tmp_path, parts())
    assert Repository(LocalStore(tmp_path)).steps() == [1, 2]


# ---------------------------------------------------------------- states that do not fit


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("b"), "unexpected in the checkpoint: weights/b"),
        (lambda w: w.update(c=torch.ones(2)), "missing in the checkpoint: weights/c"),
        (lambda w: w.update(b=torch.ones(8)), r"weights/b: stored float32\[7\], wanted"),
        (lambda w: w.update(b=torch.ones(7).half()), r"stored float32\[7\], wanted float16\[7\]"),
    ],
    ids=["unexpected", "missing", "shape", "dtype"],
)
def test_a_model_that_does_not_fit(
    change: Callable[[dict[str, Any]], Any], says: str, tmp_path: Path
) -> None:
    def module(weights: dict[str, torch.Tensor]) -> torch.nn.Module:
        net = torch.nn.Module()
        for name, tensor in weights.items():
            net.register_buffer(name, tensor)
        return net

    dist_ckpt.save({"weights": module(parts()["weights"])}, tmp_path)
    weights = parts(9.0)["weights"]
    change(weights)
    net = module(weights)
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with pytest.raises(IncompatibleError, match=says):
        dist_ckpt.load({"weights": net}, tmp_path)
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name]), "a refused load changes nothing"


def test_parts_that_do_not_fit(tmp_path: Path) -> None:
    dist_ckpt.save(parts(), tmp_path)
    with pytest.raises(IncompatibleError, match="missing in the checkpoint: ema"):
        dist_ckpt.load(parts() | {"ema": {"decay": 0.9}}, tmp_path)
    with pytest.raises(IncompatibleError, match="unexpected in the checkpoint: weights"):
        dist_ckpt.load({"other": {"decay": 0.9}}, tmp_path)


@pytest.mark.parametrize(
    "value",
    [lambda: 0, object(), (i for i in range(3)), sys.stdout, torch.ones(2, device="meta")],
    ids=["lambda", "object", "generator", "file handle", "meta tensor"],
)
def test_a_value_that_cannot_be_stored(value: object, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"stats\.history\[1\]"):
        dist_ckpt.save({"stats": {"history": [1, value]}}, tmp_path)
    assert Repository(LocalStore(tmp_path)).steps() == []


def test_an_empty_state(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="empty"):
        dist_ckpt.save(dist_ckpt.TrainState(rng=None), tmp_path)


# ---------------------------------------------------------------- wrong calls


def test_a_step_is_never_overwritten(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    with pytest.raises(AlreadyExists, match="step 1 is already committed"):
        dist_ckpt.save(parts(2.0), tmp_path, step=1)
    state = dist_ckpt.TrainState(**parts(0.0))
    dist_ckpt.load(state, tmp_path)
    assert torch.equal(state["weights"]["b"], torch.full((7,), 1.0))


@pytest.mark.parametrize("step", [-1, 1.5, "3", True, 10**10])
def test_a_bad_step(step: Any, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="bad step"):
        dist_ckpt.save(parts(), tmp_path, step=step)


@pytest.mark.parametrize(
    "wrong",
    [
        lambda: keep.latest(0),
        lambda: keep.latest(True),
        lambda: dist_ckpt.Checkpointer("x", parts(), every_steps=0),
        lambda: dist_ckpt.Checkpointer("x", parts(), timeout_seconds=0),
        lambda: dist_ckpt.Checkpointer("x", parts(), metadata={"a": object()}),
        lambda: dist_ckpt.Checkpointer("", parts()),
        lambda: dist_ckpt.Checkpointer("gopher://x", parts()),
        lambda: dist_ckpt.Checkpointer("x", {"extra": {}}),
        lambda: dist_ckpt.Checkpointer("x", {"a/b": {}}),
    ],
)
def test_wrong_arguments(wrong: Callable[[], object]) -> None:
    with pytest.raises(UsageError):
        wrong()


def test_a_metric_that_is_no_number(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="metric 'loss'"):
        dist_ckpt.save(parts(), tmp_path, metrics={"loss": "low"})  # type: ignore[dict-item]


def test_a_closed_checkpointer(tmp_path: Path) -> None:
    ckpt = dist_ckpt.Checkpointer(tmp_path, parts())
    ckpt.close()
    ckpt.close()
    with pytest.raises(UsageError, match="closed"):
        ckpt.save(1)
    with pytest.raises(UsageError, match="closed"):
        ckpt.restore()


# ---------------------------------------------------------------- places that refuse

UNPRIVILEGED = """
import os, torch, dist_ckpt
dist_ckpt.save({"w": {"t": torch.ones(3)}}, "memory://warm")  # imports all it needs while it may
os.setgid(65534); os.setuid(65534)
try:
    dist_ckpt.save({"w": {"t": torch.ones(3)}}, place)
except dist_ckpt.errors.StorageError as error:
    print(error.kind, error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="another user can be tried only by root")
def test_an_unwritable_directory(tmp_path: Path) -> None:
    root = tmp_path / "locked"
    root.mkdir(mode=0o755)
    for directory in (tmp_path, *tmp_path.parents):
        if directory.stat().st_mode & 0o001 == 0 and directory.owner() == "root":
            directory.chmod(directory.stat().st_mode | 0o001)
    said = guides.run(f"place = {str(root)!r}\n{UNPRIVILEGED}", tmp_path)
    assert said.startswith("permission ")
    assert str(root) in said
    assert list(root.iterdir()) == []


FULL = """
import resource, signal, torch, dist_ckpt
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
dist_ckpt.save({"w": {"t": torch.ones(3)}}, place, step=1)
try:
    dist_ckpt.save({"w": {"t": torch.ones(1_000_000)}}, place, step=2)
except dist_ckpt.errors.StorageError as error:
    print("StorageError", error)
dist_ckpt.save({"w": {"t": torch.ones(3)}}, place, step=3)
"""


def test_a_file_that_the_place_cannot_take(tmp_path: Path) -> None:
    place = tmp_path / "run"
    said = guides.run(f"place = {str(place)!r}\n{FULL}", tmp_path)
    assert said.startswith("StorageError ")
    assert Repository(LocalStore(place)).steps() == [1, 3]
    assert not list(tmp_path.rglob(".tmp-*"))


# ---------------------------------------------------------------- two owners, failures told


def test_a_job_that_was_replaced_can_no_longer_commit(tmp_path: Path) -> None:
    old = dist_ckpt.Checkpointer(tmp_path, parts(1.0))
    old.save(1).wait()
    with dist_ckpt.Checkpointer(tmp_path, parts(0.0)) as new:
        assert new.restore() == 1
        with pytest.raises(FencedError, match=r"claim 1 .* superseded by claim 2"):
            old.save(2).wait()
        old.close()
        new.save(2).wait()
    assert Repository(LocalStore(tmp_path)).steps() == [1, 2]


def test_a_background_failure_is_raised_once_at_the_next_call(tmp_path: Path) -> None:
    store = FaultyStore(
        LocalStore(tmp_path), [Rule("put", Fail(StorageError("broken")), key="step-*", nth=1)]
    )
    with dist_ckpt.Checkpointer(store, parts()) as ckpt:
        ckpt.save(1)
        with pytest.raises(StorageError, match="broken"):
            ckpt.save(2)
        ckpt.save(3)
    assert Repository(LocalStore(tmp_path)).steps() == [2, 3], "it is made all the same"


def test_a_failure_at_close_does_not_hide_the_error_of_the_loop(tmp_path: Path) -> None:
    store = FaultyStore(
        LocalStore(tmp_path), [Rule("put", Fail(StorageError("broken")), key="step-*", nth=1)]
    )
    with pytest.raises(ZeroDivisionError) as caught, dist_ckpt.Checkpointer(store, parts()) as ckpt:
        ckpt.save(1)
        raise ZeroDivisionError("the loop")
    assert any("broken" in note for note in caught.value.__notes__)
    with pytest.raises(CheckpointError), dist_ckpt.Checkpointer(store, parts()) as ckpt:
        ckpt.restore(step=1)
