"""What is needed to reach a server is given with the call, and the environment knows nothing."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

import dist_ckpt
from dist_ckpt import Run
from dist_ckpt.errors import NotFound, UsageError
from dist_ckpt.storage import resolve
from tests.services.s3 import S3Service
from tests.unit.cli.shell import Shell

Options = dict[str, str]


@pytest.fixture
def options(s3_service: S3Service, monkeypatch: pytest.MonkeyPatch) -> Options:
    """What reaches the server; every variable that does is gone."""
    if s3_service.kind == "given":
        pytest.skip("given: credentials may come from elsewhere than the environment")
    given = s3_service.environment
    found = {
        "endpoint_url": given["AWS_ENDPOINT_URL"],
        "key": given["AWS_ACCESS_KEY_ID"],
        "secret": given["AWS_SECRET_ACCESS_KEY"],
    }
    for name in ("AWS_ENDPOINT_URL", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    return found


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def model(value: float) -> torch.nn.Module:
    layer = torch.nn.Linear(4, 4, bias=False)
    torch.nn.init.constant_(layer.weight, value)
    return layer


def fill(url: str, options: Options) -> str:
    """Save steps 1 and 2, of weights that are the step, of which 1 is the better."""
    store = resolve(url, storage_options=options)
    for step in (1, 2):
        state = {"model": model(step)}
        dist_ckpt.save(state, store, step=step, metrics={"loss": float(step)})
    store.close()
    return url


def weight(url: str, options: Options | None = None) -> float:
    with dist_ckpt.open_checkpoint(url, storage_options=options) as opened:
        return float(opened["model/weight"].read()[0, 0])


def as_words(options: Options) -> Sequence[str]:
    return [word for pair in options.items() for word in ("--storage-option", "=".join(pair))]


def test_commands_take_what_reaches_the_server(
    s3_service: S3Service, s3_name: str, options: Options, shell: Shell, tmp_path: Path
) -> None:
    """Between a bucket and a disk, which takes no options, either way."""
    there, words = fill(s3_service.url(f"{s3_name}/run"), options), as_words(options)
    best, out = ("--metric", "loss"), str(tmp_path / "out.pt")

    shell.screen("export", f"{there}@best", out, "--format", "torch", *best, *words)
    assert weight(out) == 1
    shell.screen("export", there, f"{there}-hf", "--format", "hf", *words)
    assert "model.safetensors" in s3_service.keys(f"{s3_name}/run-hf")

    torch.save({"model": model(7).state_dict()}, tmp_path / "old.pt")
    arguments = ("import", str(tmp_path / "old.pt"), f"{there}-in", *words)
    found = [shell.json(*arguments) for _ in range(2)]
    assert [each["url"] for each in found] == [f"{there}-in"] * 2
    assert [each["was_there"] for each in found] == [False, True]
    assert weight(f"{there}-in", options) == 7
    shell.screen("import", f"{there}-hf/model.safetensors", str(tmp_path / "in"), *words)

    shell.screen(
        "average", f"{there}@1", f"{there}@best", there, "--out", f"{there}-av", *best, *words
    )
    assert weight(f"{there}-av", options) == pytest.approx(4 / 3)
    shell.screen("average", f"{there}@1", there, "--out", str(tmp_path / "av"), *words)
    assert weight(str(tmp_path / "av")) == 1.5

    for command in ("cp", "mirror"):
        shell.screen(command, there, str(tmp_path / command), *words)
        assert Run(str(tmp_path / command)).steps() == [2]
    shell.screen("cp", str(tmp_path / "cp"), f"{there}-back", *words)
    assert "equal" in shell.screen("diff", f"{tmp_path / 'cp'}@2", f"{there}-back@2", *words)


def test_calls_take_what_reaches_the_server(
    s3_service: S3Service, s3_name: str, options: Options, tmp_path: Path
) -> None:
    there = fill(s3_service.url(f"{s3_name}/run"), options)
    (tmp_path / "like").mkdir()
    (tmp_path / "like" / "config.json").write_text("{}")
    like = str(tmp_path / "like")
    done = dist_ckpt.export(there, f"{there}-hf", format="hf", like=like, storage_options=options)
    assert "config.json" in done.files
    # Another storage that needs others is a store of its own.
    target = resolve(f"{there}-to", storage_options=options)
    dist_ckpt.average([(there, 1), there], target, storage_options=options)
    target.close()
    assert weight(f"{there}-to", options) == 1.5
    report = dist_ckpt.average(
        [(there, 1), (there, 2)], f"{there}-pt", format="torch", storage_options=options
    )
    assert report.url == f"{there}-pt/model.pt"
    dist_ckpt.import_(report.url, str(tmp_path / "in"), storage_options=options)
    assert weight(str(tmp_path / "in")) == 1.5
    with dist_ckpt.open_checkpoint(f"{there}/step-0000000001", storage_options=options) as opened:
        assert opened.step == 1
    # Looked for with the same options: the names beside one that is not there.
    with pytest.raises(NotFound, match="did you mean 'run'"):
        dist_ckpt.export(f"{there}n", str(tmp_path / "none"), storage_options=options)


def test_options_that_go_nowhere_are_refused(tmp_path: Path) -> None:
    one, other = str(tmp_path / "one"), str(tmp_path / "other")
    dist_ckpt.save({"model": model(1)}, one)
    given = {"key": "x"}
    for call in (
        lambda: dist_ckpt.export(one, other, storage_options=given),
        lambda: dist_ckpt.import_(one, other, storage_options=given),
        lambda: dist_ckpt.average([one, one], other, storage_options=given),
        lambda: dist_ckpt.open_checkpoint(one, storage_options=given),
    ):
        with pytest.raises(UsageError, match="no place of this call takes storage_options"):
            call()
    with pytest.raises(UsageError, match="a mapping"):
        dist_ckpt.export(one, other, storage_options="key=x")  # type: ignore[arg-type]
    assert not Path(other).exists()
