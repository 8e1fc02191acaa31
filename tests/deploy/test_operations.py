"""The guide for operators is right: its figures, its commands, and what it says of files."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest
import torch

import dist_ckpt
from dist_ckpt import events
from dist_ckpt.errors import ErrorKind
from dist_ckpt.storage import resolve
from tests.arch.source import ROOT
from tests.e2e import guides
from tests.services.proxy import FaultProxy
from tests.services.s3 import S3Service

GUIDE = guides.guide("operations")
FIGURES, *_ = guides.blocks(GUIDE, "python")
PART_BYTES = 5 << 20


def test_each_command_prints_what_stands_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    said = guides.run(guides.program(GUIDE), tmp_path)
    assert [line for line in said.splitlines() if line not in GUIDE] == []
    assert said.count("\n") == 4, "the table of figures"
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("COLUMNS", raising=False)
    used = set()
    for command, code, out, err in guides.outcomes(GUIDE, capsys):
        used.add(command.words[0])
        assert code == command.code, command.line
        assert command.prints(out + err), (command.line, out, err)
    assert used >= {"latest", "show", "verify", "rm", "cp", "sweep", "ls", "keep"}


def test_a_save_makes_as_many_requests_as_the_formula_says(
    s3_service: S3Service, s3_name: str, wire: FaultProxy, tmp_path: Path
) -> None:
    (tmp_path / "figures.py").write_text(FIGURES)
    requests_of_file = runpy.run_path(str(tmp_path / "figures.py"))["requests_of_file"]
    state = {
        "model": {"weights": torch.ones(3 * PART_BYTES // 4)},
        "small": {"bias": torch.ones(3)},
    }
    options = {"default_block_size": PART_BYTES}
    store = resolve(s3_service.url(s3_name), storage_options=options)
    written: list[int] = []

    def count(event: events.Event) -> None:
        if isinstance(event, events.FileWritten):
            written.append(event.nbytes)

    forget = events.subscribe(count)
    with dist_ckpt.Checkpointer(store, state) as ckpt:
        ckpt.restore()
        ckpt.save(1).wait()  # its claim, and the test of the server, are not those of a save
        written.clear()
        wire.arm(None)
        ckpt.save(2).wait()
        changing = [request for request in wire.requests if request.startswith(("PUT", "POST"))]
        made = [request for request in changing if "/step-0000000002/" in request]
    forget()
    store.close()
    assert max(written) > PART_BYTES
    assert len(made) == sum(requests_of_file(each, preferred=PART_BYTES) for each in written) + 2


def test_it_names_what_there_is() -> None:
    told = set(re.findall(r"`([A-Z][a-z]+[A-Z]\w+)`", GUIDE))
    assert told >= {"SaveFailed", "SaveCommitted"}
    errors = {"FencedError", "IncompatibleError", "IntegrityError", "StorageError"}
    assert told - set(dir(events)) - errors - {"CronJob"} == set()
    alerts = GUIDE.partition("## What to be woken by")[2].partition("## When")[0]
    kinds = {"storage_full", "permission", "fenced"}
    assert kinds <= {kind.value for kind in ErrorKind}
    assert all(f"`{kind}`" in alerts for kind in kinds)
    guides.check_flags_exist(_flags_of_a_training())


def _flags_of_a_training() -> str:
    """Return the flags that the guide names and that no other program has."""
    of_others = {"--nnodes", "--rdzv-endpoint", "--all", "--force", "--json", "--quick", "--sort"}
    of_others |= {"--yes"}
    return " ".join(set(re.findall(r"--[a-z][a-z-]+", GUIDE)) - of_others)


def test_every_file_of_deploy_is_in_a_folder_that_the_readme_names() -> None:
    readme = (ROOT / "README.md").read_text()
    folders = {path.name for path in (ROOT / "deploy").iterdir() if path.is_dir()}
    assert set(re.findall(r"\| `deploy/(\w+)` \|", readme)) == folders - {"__pycache__"}
