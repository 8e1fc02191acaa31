"""What the tables of the guide to debugging say of errors is what happens, and nothing is lost."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash

import dist_ckpt
from dist_ckpt import errors
from dist_ckpt.errors import CheckpointError, ErrorKind
from dist_ckpt.repository import Repository
from dist_ckpt.storage import resolve

NEWEST = "step-0000000030"


def training(width: int = 4) -> dict[str, Any]:
    model = torch.nn.Linear(width, 1)
    return {"model": model, "optimizer": torch.optim.AdamW(model.parameters())}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    with dist_ckpt.Checkpointer(tmp_path / "run", training(), every_steps=10) as ckpt:
        for step in range(1, 31):
            ckpt.step(step)
    return tmp_path / "run"


def load(run: Path) -> None:
    dist_ckpt.load(training(), run)


def shorten(run: Path) -> None:
    (file,) = (run / NEWEST).glob("*/model.*")
    os.truncate(file, file.stat().st_size - 16)
    load(run)


def flip(run: Path) -> None:
    (file,) = (run / NEWEST).glob("*/model.*")
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    load(run)


def lose(run: Path) -> None:
    next((run / NEWEST).glob("*/model.*")).unlink()
    load(run)


def edit_manifest(run: Path) -> None:
    manifest = run / NEWEST / "manifest.json"
    manifest.write_text(manifest.read_text().replace("every 10 steps", "every 11 steps"))
    load(run)


def lose_all(run: Path) -> None:
    for file in run.glob("step-*/*/model.*"):
        file.unlink()
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as ckpt:
        ckpt.restore()


def write_as_later(run: Path) -> None:
    manifest = run / NEWEST / "manifest.json"
    body = manifest.read_bytes()[:-35].replace(b'"format": 2', b'"format": 3')
    digest = xxhash.xxh3_64_hexdigest(body).encode()
    manifest.write_bytes(body + b',\n  "digest": "' + digest + b'"\n}\n')
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as ckpt:
        ckpt.restore()


def spoil_discard(run: Path) -> None:
    (run / "discards").mkdir()
    (run / "discards" / "000001.json").write_text("{}")
    load(run)


def be_replaced(run: Path) -> None:
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as old:
        old.restore()
        with dist_ckpt.Checkpointer(run, training(), every_steps=10) as new:
            new.restore()
        old.save(40).wait()


def begin_anew(run: Path, *, at: int) -> None:
    with dist_ckpt.Checkpointer(run, training(), every_steps=1) as ckpt:
        ckpt.step(at)


def go_back(run: Path) -> None:
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as ckpt:
        ckpt.restore(step=10)


def want_another_tensor(run: Path) -> None:
    with dist_ckpt.open_checkpoint(run) as stored:
        stored["model/wieght"]


CASES: list[tuple[Callable[[Path], object], type[CheckpointError], str]] = [
    (lambda run: load(run / "nowhere"), errors.NotFound, "no_run"),
    (lambda run: dist_ckpt.load(training(), run, step=7), errors.NotFound, "no_checkpoint"),
    (want_another_tensor, errors.NotFound, "no_key"),
    (lambda run: dist_ckpt.save({"x": 1}, run, step=30), errors.AlreadyExists, "step_exists"),
    (
        lambda run: resolve(run).put("claims/000001.json", [b"."]),
        errors.AlreadyExists,
        "key_exists",
    ),
    (shorten, errors.IntegrityError, "truncated"),
    (flip, errors.IntegrityError, "digest"),
    (edit_manifest, errors.IntegrityError, "digest"),
    (lose, errors.IntegrityError, "missing_file"),
    (lose_all, errors.IntegrityError, "malformed"),
    (spoil_discard, errors.IntegrityError, "malformed"),
    (write_as_later, errors.IncompatibleError, "version"),
    (lambda run: dist_ckpt.load(training(5), run), errors.IncompatibleError, "state_mismatch"),
    (
        lambda run: dist_ckpt.save({"x": 1}, resolve(run, read_only=True), step=40),
        errors.StorageError,
        "permission",
    ),
    (be_replaced, errors.FencedError, "fenced"),
    (lambda run: dist_ckpt.load(training(), run, stpe=1), errors.UsageError, "usage"),  # type: ignore[call-arg]
    (lambda run: dist_ckpt.save({"x": [print]}, run, step=40), errors.UsageError, "unencodable"),
    (lambda run: dist_ckpt.save({"x": 1}, run, step=7), errors.UsageError, "step_behind"),
    (go_back, errors.UsageError, "step_behind"),
    (lambda run: begin_anew(run, at=1), errors.UsageError, "step_behind"),
    (lambda run: begin_anew(run, at=40), errors.UsageError, "not_restored"),
]


@pytest.mark.parametrize(
    ("case", "cls", "kind"), CASES, ids=[f"{i}-{kind}" for i, (_, _, kind) in enumerate(CASES)]
)
def test_an_error_is_of_its_class_and_kind(
    run: Path, case: Callable[[Path], object], cls: type[CheckpointError], kind: str
) -> None:
    with pytest.raises(cls) as caught:
        case(run)
    assert caught.value.kind is ErrorKind(kind)
    # Whatever was wrong: what may be good is still there, and loads.
    assert [path.parent.name for path in sorted(run.glob("step-*/manifest.json"))] == [
        "step-0000000010",
        "step-0000000020",
        NEWEST,
    ]
    if case not in (lose_all, spoil_discard):
        assert dist_ckpt.load(training(), run, step=20).step == 20


def test_a_damaged_discard_taken_away_shows_all_steps(run: Path, tmp_path: Path) -> None:
    with pytest.raises(errors.IntegrityError, match="delete it, and all that are there count"):
        spoil_discard(run)
    shutil.move(run / "discards" / "000001.json", tmp_path / "kept.json")
    assert Repository(resolve(run)).steps() == [10, 20, 30]


def test_what_was_given_up_comes_back_without_its_discard(run: Path) -> None:
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as ckpt:
        ckpt.restore(step=10, discard_newer=True)
    looked = Repository(resolve(run))
    assert (looked.steps(), sorted(looked.hidden())) == ([10], [20, 30])
    (discard,) = (run / "discards").iterdir()
    said = json.loads(discard.read_text())
    assert said["after"] == 10
    assert discard.name == f"{said['claim']:06}.json"
    discard.unlink()
    assert looked.steps() == [10, 20, 30]


def test_a_directory_without_a_manifest_is_no_checkpoint_and_goes_after_the_next_commit(
    run: Path,
) -> None:
    (run / NEWEST / "manifest.json").unlink()
    (left,) = (run / NEWEST).iterdir()
    assert Repository(resolve(run)).steps() == [10, 20]
    with dist_ckpt.Checkpointer(run, training(), every_steps=10) as ckpt:
        assert ckpt.restore() == 20
        assert left.exists(), "nothing goes before a commit"
        ckpt.save(40).wait()
    assert not left.exists()
    assert Repository(resolve(run)).steps() == [10, 20, 40]
