"""Each command by its screen and by its JSON, on a disk and on S3; exit codes; what is refused."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import load_file

import dist_ckpt
from dist_ckpt import Checkpointer, Run, policy
from dist_ckpt.format.names import manifest_key, step_dir
from dist_ckpt.storage import resolve
from dist_ckpt.storage.base import read_all
from tests.services.s3 import S3Service
from tests.unit.cli.shell import LOSSES, Shell, fill

NOBODY = 65534


@pytest.fixture
def s3_url(s3_service: S3Service, s3_name: str) -> str:
    return fill(s3_service.url(s3_name))


def check_each_command(shell: Shell, url: str, copy: str) -> None:
    """Use every command once on a run of steps 10, 20 and 30."""
    rows = shell.json("ls", url)["checkpoints"]
    assert [each["step"] for each in rows] == [10, 20, 30]
    assert rows[1]["metrics"] == {"val/loss": 1.0}
    assert rows[2]["marks"] == ["latest"]
    screen = shell.screen("ls", url)
    assert all(f"{step}" in screen for step in LOSSES)
    assert "least val/loss" in screen
    shown = shell.json("show", f"{url}@20")
    assert (shown["step"], shown["world_size"], shown["slowest_rank"]) == (20, 1, 0)
    assert "parts" in shell.screen("show", f"{url}@latest")
    names = {each["name"] for each in shell.json("tensors", url, "--part", "model")["tensors"]}
    assert names == {f"{n}.{kind}" for n in range(3) for kind in ("weight", "bias")}
    assert "{0..2}.weight" in shell.screen("tensors", url)
    assert shell.screen("latest", url) == f"{url}@30\n"
    assert shell.screen("best", url, "--metric", "val/loss") == f"{url}@20\n"
    assert shell.screen("best", url, "--metric", "val/loss:max") == f"{url}@10\n"
    whole = shell.json("verify", url, "--all")["checkpoints"]
    assert [each["ok"] for each in whole] == [True] * 3
    assert "whole" in shell.screen("verify", f"{url}@10", "--quick")
    assert shell.json("verify", url, "--sample", "1/2")["checkpoints"][0]["ok"]
    differences = shell.json("diff", f"{url}@10", "20")
    assert "0.weight" in {each["name"] for each in differences["tensors"]}
    assert differences["facts"]["metrics"] == [{"val/loss": 3.0}, {"val/loss": 1.0}]
    assert "values" in shell.screen("diff", f"{url}@10", f"{url}@20")
    assert shell.json("compare", url)["metrics"]["val/loss"] == [[10, 3.0], [20, 1.0], [30, 2.0]]
    assert "█" in shell.screen("compare", url)
    check_numbers(shell, url)
    check_health(shell, url)
    check_mirror(shell, url, f"{copy}-mirror")
    check_parts(shell, url, f"{copy}-model")
    assert shell.json("cp", f"{url}@best", copy, "--metric", "val/loss")["checkpoints"][0]["files"]
    assert "2 were there" in shell.screen("cp", f"{url}@20", copy)
    assert Run(copy).verify(20).ok
    assert shell.json("pin", f"{url}@10", "--reason", "first") == {"url": url, "pinned": 10}
    plan = shell.json("keep", url, "latest(1)")
    assert [each["kept"] for each in plan["checkpoints"]] == [True, False, True]
    assert not plan["done"]
    assert "nothing was done" in shell.screen("keep", url, "keep.latest(1)")
    assert Run(url).steps() == [10, 20, 30]
    assert "deleted 1 checkpoints" in shell.screen("keep", url, "latest(1)", "--yes")
    assert Run(url).steps() == [10, 30]
    code, _, said = shell.code("rm", f"{url}@10")
    assert (code, "it is pinned" in said) == (13, True)
    shell.screen("unpin", f"{url}@10")
    assert shell.json("rm", f"{url}@10") == {"url": url, "removed": 10}
    code, _, said = shell.code("rm", f"{url}@30")
    assert (code, "it is the newest" in said) == (13, True)
    assert "removed 0 folders" in shell.screen("sweep", url)


def check_numbers(shell: Shell, url: str) -> None:
    rows = {each["name"]: each for each in shell.json("stats", f"{url}@20", "*.weight")["tensors"]}
    assert list(rows) == [f"model/{n}.weight" for n in range(3)]
    first = rows["model/0.weight"]
    assert (first["least"], first["most"], first["mean"]) == (20, 20, 20)
    assert (first["nans"], first["infs"], first["shape"]) == (0, 0, [4, 4])
    assert "model/0.weight" in shell.screen("stats", url, "model/0.*")
    assert shell.json("plot", url, "val/loss")["metrics"]["val/loss"][0] == [10, 3.0]
    assert "val/loss (3 values)" in shell.screen("plot", url)
    differing = shell.json("diff", f"{url}@10", "20", "--values")["tensors"]
    assert [(each["name"], each["absolute"]) for each in differing if each["part"] == "model"] == [
        ("0.weight", 10.0)
    ]
    assert "0.5" in shell.screen("diff", f"{url}@10", "20", "--values")
    assert shell.json("diff", f"{url}@10", f"{url}@10", "--values") == {
        "equal": True,
        "tensors": [],
        "values": [],
        "facts": {},
    }
    assert "are equal" in shell.screen("diff", url, url)


def check_health(shell: Shell, url: str) -> None:
    before = [entry.key for entry in resolve(url).list_entries()]
    checks = {each["name"]: each["state"] for each in shell.json("doctor", url)["checks"]}
    assert checks.keys() >= {"list", "put", "create-only", "read after write", "delete", "clock"}
    assert "fail" not in checks.values()
    assert "throughput" in shell.screen("doctor", url)
    found = shell.json("bench", url, "--size", "8", "--files", "2", "--repeat", "2")
    assert len(found["write_bytes_per_second"]) == len(found["read_bytes_per_second"]) == 2
    assert "medians of 1" in shell.screen("bench", url, "--size", "1", "--repeat", "1")
    assert [entry.key for entry in resolve(url).list_entries()] == before, "nothing is left"


def check_mirror(shell: Shell, url: str, place: str) -> None:
    done = shell.json("mirror", url, place, "--best", "val/loss")
    assert [each["step"] for each in done["copied"]] == [20, 30]
    assert "all of it was there" in shell.screen("mirror", url, place)
    assert "step 20: deleted there" in shell.screen("mirror", url, place, "--keep", "1")
    assert Run(place).steps() == [30]
    assert Run(place).verify(30).ok


def check_parts(shell: Shell, url: str, place: str) -> None:
    done = shell.json("cp", f"{url}@20", place, "--parts", "model")["checkpoints"][0]
    assert (done["parts"], done["tensors"], done["was_there"]) == (["model"], 6, False)
    assert "was there already" in shell.screen("cp", f"{url}@20", place, "--parts", "model")
    shown = shell.json("show", f"{place}@20")
    assert (shown["parts"], shown["metrics"]) == (["model"], {"val/loss": 1.0})
    assert shown["metadata"]["copied_from"]["parts"] == ["model", "rng"]
    assert Run(place).verify(20).ok
    left = shell.json("diff", f"{url}@20", place)
    assert (left["equal"], left["tensors"]) == (False, []), "every tensor is equal"
    assert {each["part"] for each in left["values"]} == {"rng"}
    code, _, said = shell.code("cp", f"{url}@20", place, "--parts", "rng")
    assert (code, "each rank has values of its own" in said) == (2, True)


def test_each_command_on_a_disk(shell: Shell, url: str, tmp_path: Path) -> None:
    check_each_command(shell, url, str(tmp_path / "copy"))


def test_each_command_on_s3(shell: Shell, s3_url: str) -> None:
    check_each_command(shell, s3_url, f"{s3_url}-copy")


def test_out_in_and_the_average(shell: Shell, url: str, tmp_path: Path) -> None:
    out, run = str(tmp_path / "w.safetensors"), str(tmp_path / "imported")
    said = shell.json(
        "export", f"{url}@best", out, "--metric", "val/loss", "--rename", "0.*=first.*"
    )
    assert (said["step"], said["tensors"]) == (20, 6)
    assert "first.weight" in load_file(out)
    assert shell.code("export", url, out)[0] == 1, "it is there already"
    assert shell.json("import", out, run, "--step", "7", "--metric", "f1=0.5")["step"] == 7
    assert Run(run).records()[0].metrics == {"f1": 0.5}
    mean = str(tmp_path / "mean.safetensors")
    said = shell.json(
        *("average", f"{url}@10", f"{url}@20", "--weights", "1,3", "--format", "safetensors"),
        *("--out", mean),
    )
    assert load_file(mean)["0.weight"][0, 0] == (10 + 3 * 20) / 4
    same = str(tmp_path / "same.safetensors")
    places = (f"{url}@10", f"{url}@20", same)
    shell.json("average", *places, "--weights", "1,3", "--format", "safetensors")
    assert Path(same).read_bytes() == Path(mean).read_bytes(), "what comes last is where it goes"
    for arguments, says in (
        (("average", out), "name what it is the average of"),
        (("average", f"{url}@10", f"{url}@20"), "a checkpoint keeps its step"),
        (("export", url, out, "--format", "onnx"), "one of safetensors"),
        (("export", url, out, "--rename", "a"), "PATTERN=NAME"),
        (("import", out, run, "--metric", "f1=x"), "a number"),
        (("average", url, f"{url}@10", "--weights", "a", "--out", mean), "numbers such as"),
    ):
        code, _, error = shell.code(*arguments)
        assert (code, says in error) == (2, True)


def test_what_differs_besides_tensors_stands_side_by_side(shell: Shell, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    same = {"lr": 0.1, "layers": 2}
    for step, more in ((1, {"note": None}), (2, {"seed": 7})):
        metadata = {**same, **more}
        dist_ckpt.save({"n": 1}, url, step=step, metadata=metadata, metrics={"l": step})
    lines = [line.split() for line in shell.screen("diff", f"{url}@1", "2").splitlines()]
    assert lines == [
        ["here", "there"],
        ["metrics", "l", "1.0", "2.0"],
        ["metadata", "seed", "7"],
        ["all", "tensors", "and", "values", "are", "equal"],
    ]


def test_damage_is_12_and_the_rest_is_shown(shell: Shell, url: str) -> None:
    store = resolve(url)
    store.put(manifest_key(30), [read_all(store, manifest_key(30))[:-7]], mode="replace")
    rows = {each["step"]: each["state"] for each in shell.json("ls", url)["checkpoints"]}
    assert rows == {10: "committed", 20: "committed", 30: "damaged"}
    code, out, said = shell.code("verify", url, "--all", "--json")
    assert code == 12
    assert [each["ok"] for each in json.loads(out)["checkpoints"]] == [True, True, False]
    assert "step 30" in said
    file = next(Path(url).rglob("step-0000000020/*/model.*"))
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    code, out, _ = shell.code("verify", f"{url}@20")
    assert (code, file.name in out) == (12, True)


def test_damage_is_12_beside_one_of_a_newer_format(shell: Shell, url: str) -> None:
    cut_short(url, 10)
    resolve(url).put(manifest_key(30), [b'{"format": 999}'], mode="replace")
    for command in (("cp", url, f"{url}-copy", "--all"), ("verify", url, "--all")):
        code, out, said = shell.code(*command)
        assert (code, "step 10" in said, "newer format" in out) == (12, True, True)


def test_one_of_a_newer_format_keeps_no_other_from_being_verified(shell: Shell, url: str) -> None:
    resolve(url).put(manifest_key(20), [b'{"format": 999}'], mode="replace")
    code, out, said = shell.code("verify", url, "--all")
    assert (code, "step 20" in said) == (1, True)
    assert [line.split("(")[0].strip() for line in out.splitlines()[:3]] == [
        "step 10: whole",
        "step 30: whole",
        "step 20: NOT VERIFIED, newer format",
    ]
    code, out, _ = shell.code("verify", url, "--all", "--json")
    assert [each["ok"] for each in json.loads(out)["checkpoints"]] == [True, None, True]


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["ls", "{}-not"], 10, "is no run"),
        (["show", "{}@21"], 11, "the nearest are 10, 20, 30"),
        (["verify", "{}@21"], 11, "no checkpoint of step 21"),
        (["best", "{}", "--metric", "val/los"], 11, "did you mean 'val/loss'"),
        (["mirror", "{}", "{}-copy", "--best", "val/los"], 11, "did you mean 'val/loss'"),
        (["keep", "{}", "best('val/los')"], 2, "did you mean 'val/loss'"),
        (["keep", "{}", "every(epochs=2)"], 2, "at the end of an epoch"),
        (["sweep", "{}-not"], 10, "did you mean 'run'"),
        (["show", "{}@latets"], 10, "did you mean 'run'? 'latets' is no step, as 100, latest"),
        (["show", "{}@-1"], 10, "did you mean 'run'? '-1' is no step"),
        (["latest", "{}@1e3"], 10, "did you mean 'run'? '1e3' is no step"),
        (["export", "{}@", "{}-out"], 10, "did you mean 'run'? '' is no step"),
        (["export", "{}", "{}-out", "--format", "hf", "--like", "{}-not"], 2, "no config.json"),
        (["average", "{}@best", "{}", "--out", "{}-out"], 2, "--metric"),
        (["verify", "{}@10", "--all"], 2, "--all is every"),
        (["verify", "{}", "--quick", "--sample", "5%"], 2, "give one of them"),
        (["cp", "{}@10", "{}-copy", "--all"], 2, "--all is every"),
        (["cp", "{}@10", "{}-copy@20"], 2, "a checkpoint keeps its step"),
        (["mirror", "{}", "{}-copy@latest"], 2, "a checkpoint keeps its step"),
        (["cp", "{}@10", "{}/.."], 2, "is a folder of runs"),
        (["cp", "{}@10", "{}/..", "--parts", "model"], 2, "is a folder of runs"),
        (["cp", "{}", "{}/..", "--all"], 2, "no run itself: name one in it"),
        (["mirror", "{}", "{}/.."], 2, "is a folder of runs"),
        (["average", "{}@10", "{}@20", "{}/.."], 2, "is a folder of runs"),
        (["import", "{}.pt", "{}/.."], 2, "is a folder of runs"),
        (["import", "{}/step-0000000010/manifest.json", "{}-in"], 2, ".safetensors, .pt"),
        (["ls", "{}@10"], 2, "run, not @10"),
        (["latest", "{}@latest"], 2, "run, not @latest"),
        (["best", "{}@best"], 2, "run, not @best"),
        (["compare", "{}@10"], 2, "run, not @10"),
        (["plot", "{}@10"], 2, "run, not @10"),
        (["keep", "{}@10", "latest(1)"], 2, "run, not @10"),
        (["sweep", "{}@10"], 2, "run, not @10"),
        (["mirror", "{}@10", "{}-copy"], 2, "run, not @10"),
        (["doctor", "{}@10"], 2, "run, not @10"),
        (["bench", "{}@10"], 2, "run, not @10"),
        (["export", "{}", "{}"], 2, "is a run: name a file"),
        (["average", "{}@10", "{}@20", "{}", "--format", "dcp"], 2, "is a run: name a file"),
        (["export", "{}", "{}/step-0000000010"], 2, "among the files of the run {}"),
        (["export", "{}", "{}/step-0000000010/w.safetensors"], 2, "among the files of the run {}"),
        (["export", "{}", "{}/step-0000000010/new/hf", "--format", "hf"], 2, "files of the run {}"),
        (["export", "{}", "{}/claims/w.safetensors"], 2, "among the files of the run {}"),
        (["average", "{}@10", "{}@20", "{}/step-0000000010"], 2, "among the files of the run {}"),
        (["import", "{}.pt", "{}/step-0000000010/new"], 2, "among the files of the run {}"),
        (["cp", "{}@10", "{}/step-0000000020"], 2, "among the files of the run {}"),
        (["mirror", "{}", "{}/claims/new"], 2, "among the files of the run {}"),
        (["plot", "{}", "-o", "{}/step-0000000010/loss.png"], 2, "among the files of the run {}"),
        (["best", "{}"], 2, "--metric"),
        (["rm", "{}"], 2, "name the checkpoint"),
        (["ls", "{}", "--sort", "colour"], 2, "one of step, age, size"),
        (["verify", "{}", "--sample", "often"], 2, "such as 5%"),
        (["keep", "{}", "lastest(3)"], 2, "did you mean 'latest'"),
        (["keep", "{}", "__import__('os')"], 2, "no policy is called"),
        (["keep", "{}", "latest(open('x'))"], 2, "is no policy"),
        (["keep", "{}", "latest("], 2, "is no policy such as"),
        (["keep", "{}", "best(val/loss)"], 2, "neither a number nor a text in quotes"),
        (["keep", "{}", "best(**dict())"], 2, "is no policy"),
        (["rm", "{}@best", "--metric", "val/loss"], 13, "name it as @20, or give --force"),
        (["export", "{}", "{}-out", "--rename", "a=b", "--rename", "a=c"], 2, "'a' twice"),
        (["import", "{}", "{}-in", "--metric", "a=1", "--metric", "a=2"], 2, "'a' twice"),
        (["average", "{}", "{}@10", "{}-out", "--weights", ""], 2, "--weights takes"),
        (["keep", "{}", "latest(0)"], 2, "positive"),
        (["ls", "{}", "--storage-option", "key"], 2, "KEY=VALUE"),
        (["frobnicate"], 2, "No such command"),
        (["stats", "{}", "0.wieght"], 2, "did you mean '0.weight'"),
        (["plot", "{}", "val/los"], 2, "did you mean 'val/loss'"),
        (["plot", "{}", "-o", "loss.txt"], 2, "ends in one of .png"),
        (["cp", "{}", "{}-copy", "--parts", "modle"], 2, "did you mean 'model'"),
        (["sweep", "{}", "--older-than", "2w"], 2, "such as 2d"),
        (["ls", "{}", "--watch", "--every", "0"], 2, "more than 0"),
        (["mirror", "{}-not", "{}-copy"], 10, "did you mean 'run'"),
        (["bench", "{}", "--size", "0"], 2, "--size"),
        (["cp", "{}@10", "{}-copy", "--storage-option", "a=1"], 2, "storage"),
    ],
)
def test_what_is_wrong_is_said_with_a_code(
    shell: Shell, url: str, arguments: list[str], code: int, says: str
) -> None:
    found, out, said = shell.code(*(each.format(url) for each in arguments))
    assert (found, out) == (code, "")
    assert says.format(url) in said
    assert "Traceback" not in said


CHECKPOINT_COMMANDS = {
    **dict.fromkeys(("show", "tensors", "verify", "stats", "rm", "pin", "unpin"), ()),
    "diff": ("{}@10",),
    "cp": ("{}-copy",),
    "export": ("{}-out",),
    "average": ("{}@10", "--out", "{}-out"),
}
"""Commands that begin with a checkpoint, and what else they need."""

RUN_COMMANDS = {
    **dict.fromkeys(("ls", "latest", "compare", "plot", "sweep"), ()),
    "best": ("--metric", "val/loss"),
    "keep": ("latest(3)",),
    "mirror": ("{}-copy",),
}
"""Commands that begin with a run, and what else they need."""

WRONG_FOR_EACH = (
    *((name, "{}@21", (), 11, "the nearest are 10, 20, 30") for name in CHECKPOINT_COMMANDS),
    *((name, "{}-not@20", (), 10, "did you mean 'run'") for name in CHECKPOINT_COMMANDS),
    *((name, "{}-not", (), 10, "did you mean 'run'") for name in RUN_COMMANDS),
    *((name, "s4://b/r@1", (), 2, "unknown scheme") for name in CHECKPOINT_COMMANDS),
    *((name, "s4://b/r", (), 2, "unknown scheme") for name in RUN_COMMANDS),
    *(
        (name, "{}@best", ("--metric", "val/los"), 11, "did you mean 'val/loss'")
        for name in CHECKPOINT_COMMANDS
    ),
    *(
        (name, "{}@20", ("--metric", "val/loss"), 2, "which one @best is")
        for name in CHECKPOINT_COMMANDS
        if name != "diff"  # of which the other one may be the best
    ),
    *(
        (name, "{}@20", ("--part", "modle"), 2, "did you mean 'model'")
        for name in ("tensors", "export", "average")
    ),
    ("cp", "{}@20", ("--parts", "modle"), 2, "did you mean 'model'"),
    *((name, "{}@20", ("--nonsense",), 2, "No such option") for name in CHECKPOINT_COMMANDS),
    *((name, "{}", ("--nonsense",), 2, "No such option") for name in RUN_COMMANDS),
)


# The others take it: an export and an average read it, rm wants a step, and a sweep finds nothing.
@pytest.mark.parametrize(
    "command", sorted({*CHECKPOINT_COMMANDS, *RUN_COMMANDS} - {"export", "average", "rm", "sweep"})
)
def test_the_directory_of_a_step_is_named_as_the_checkpoint_of_its_run(
    shell: Shell, url: str, command: str
) -> None:
    more = {**CHECKPOINT_COMMANDS, **RUN_COMMANDS}[command]
    arguments = [f"{url}/step-0000000010", *(each.format(url) for each in more)]
    code, _, said = shell.code(command, *arguments)
    assert code == 11
    assert f"{url}@10" in said


def test_a_step_that_was_copied_by_itself_is_of_no_run(shell: Shell, url: str) -> None:
    shutil.copytree(f"{url}/step-0000000010", f"{url}-kept")
    code, _, said = shell.code("show", f"{url}-kept")
    assert code == 11
    assert "the checkpoint of step 10 by itself" in said
    assert "@" not in said


def test_a_run_that_has_runs_below_it_is_one_all_the_same(shell: Shell, url: str) -> None:
    shell.screen("cp", f"{url}@10", f"{url}-copy")
    shutil.copytree(f"{url}-copy", f"{url}/nested/other")
    shutil.copytree(f"{url}/claims", f"{url}/nested/claims")
    # With a claim and nothing committed it is a run, and so is one with a checkpoint.
    for place in (f"{url}/nested", url):
        assert shell.code("cp", f"{url}@10", place)[0] == 0


@pytest.mark.parametrize(("command", "place", "options", "code", "says"), WRONG_FOR_EACH)
def test_what_is_wrong_has_one_code_whatever_the_command(
    shell: Shell,
    url: str,
    command: str,
    place: str,
    options: tuple[str, ...],
    code: int,
    says: str,
) -> None:
    more = (CHECKPOINT_COMMANDS | RUN_COMMANDS)[command]
    found, out, said = shell.code(command, *(each.format(url) for each in (place, *more, *options)))
    assert (found, out) == (code, "")
    assert says in said
    assert Run(url).steps() == [10, 20, 30]


def cut_short(url: str, *steps: int) -> None:
    """Damage the manifests of some steps."""
    store = resolve(url)
    for step in steps:
        data = read_all(store, manifest_key(step))
        store.put(manifest_key(step), [data[:-7]], mode="replace")


@pytest.mark.parametrize("command", [name for name in CHECKPOINT_COMMANDS if name != "rm"])
def test_the_latest_is_the_newest_that_can_be_read_for_each_command(
    shell: Shell, url: str, command: str
) -> None:
    cut_short(url, 30)
    more = [each.format(url) for each in CHECKPOINT_COMMANDS[command]]
    code, out, said = shell.code(command, url, *more, *["--json"] * (command != "average"))
    if command == "verify":
        assert code == 12, "whether what was saved last is whole is the question"
        rows = json.loads(out)["checkpoints"]
        assert [(each["step"], each["ok"]) for each in rows] == [(20, True), (30, False)]
        return
    assert code == 0
    assert said.count("step 30 in") == 1
    assert "was passed over" in said
    if command == "show":
        assert json.loads(out)["step"] == 20


def test_all_name_the_same_checkpoint_as_the_latest(shell: Shell, url: str) -> None:
    cut_short(url, 30)
    assert Run(url).latest() == Run(url).newest().step == 20
    marked = [each for each in shell.json("ls", url)["checkpoints"] if "latest" in each["marks"]]
    assert [each["step"] for each in marked] == [20]
    code, out, said = shell.code("latest", url)
    assert (code, out, "step 30" in said) == (0, f"{url}@20\n", True)
    code, out, said = shell.code("best", url, "--metric", "val/loss")
    assert (code, out, "step 30" in said) == (0, f"{url}@20\n", True)
    kept = shell.json("keep", url, "latest(1)")["checkpoints"]
    assert [(each["step"], each["kept"]) for each in kept] == [(10, False), (20, True), (30, True)]
    code, out, said = shell.code("rm", f"{url}@latest")
    assert (code, out, "step 20" in said) == (13, "", True)
    code, out, said = shell.code("mirror", url, f"{url}-mirror")
    assert (code, "step 20" in out, "step 30" in said) == (0, True, True)
    code, out, said = shell.code("cp", url, f"{url}-all", "--all")
    assert (code, "step 30: NOT COPIED, damaged" in out) == (12, True)
    assert Run(f"{url}-all").steps() == [10, 20]


@pytest.mark.parametrize(
    "command", [name for name in CHECKPOINT_COMMANDS | RUN_COMMANDS if name != "rm"]
)
def test_a_run_in_which_nothing_can_be_read_is_no_empty_one(
    shell: Shell, url: str, command: str
) -> None:
    cut_short(url, 10, 20, 30)
    more = (CHECKPOINT_COMMANDS | RUN_COMMANDS)[command]
    code, _, said = shell.code(command, url, *(each.format(url) for each in more))
    # These list what is there, and remove what never was a checkpoint.
    assert code == (0 if command in ("ls", "keep", "sweep") else 12)
    assert "Traceback" not in said


@pytest.mark.parametrize(
    ("command", "more"),
    [
        *(("verify", each) for each in ((), ("--all",), ("--quick",))),
        *(("cp", ("{}-copy", *each)) for each in ((), ("--all",))),
        *(("keep", ("latest(1)", *each)) for each in ((), ("--yes",))),
        *((name, ()) for name in ("show", "latest", "compare", "plot")),
        ("mirror", ("{}-copy",)),
    ],
)
def test_a_run_in_which_nothing_was_committed_has_no_checkpoint(
    shell: Shell, url: str, command: str, more: tuple[str, ...]
) -> None:
    resolve(url).delete([manifest_key(step) for step in (10, 20, 30)])
    code, out, said = shell.code(command, url, *(each.format(url) for each in more), "--json")
    assert (code, out) == (11, "")
    assert "no committed checkpoint" in said


def files_of(url: str, step: int) -> list[Path]:
    return sorted((Path(url) / step_dir(step)).glob("*/*.safetensors"))


def test_one_that_is_damaged_inside_keeps_no_other_from_being_copied(
    shell: Shell, url: str
) -> None:
    os.truncate(files_of(url, 10)[0], 100)
    code, out, said = shell.code("cp", url, f"{url}-copy", "--all")
    assert (code, "ends at byte 100" in said) == (12, True)
    assert out.splitlines()[-2] == "step 10: NOT COPIED, damaged"
    assert Run(f"{url}-copy").steps() == [20, 30]
    cut_short(url, 20)
    code, out, _ = shell.code("cp", url, f"{url}-again", "--all", "--json")
    found = json.loads(out)
    assert [each["step"] for each in found["checkpoints"]] == [30]
    assert [(each["step"], each["state"]) for each in found["not_copied"]] == [
        (10, "damaged"),
        (20, "damaged"),
    ]


def test_a_file_that_cannot_be_read_keeps_no_other_from_being_verified(
    shell: Shell, url: str
) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place = shutil.copytree(url, f"{folder}/run")
        os.chmod(folder, 0o755)
        shell.screen("verify", place, "--all")  # imports what nobody else may read
        files_of(place, 20)[0].chmod(0)
        if os.geteuid() == 0:
            stack.callback(os.seteuid, 0)
            os.seteuid(NOBODY)
        code, out, said = shell.code("verify", place, "--all")
    assert (code, "not verified" in said) == (1, True)
    lines = [line for line in out.splitlines() if line.startswith("step")]
    assert [line.partition(" (")[0] for line in lines] == [
        "step 10: whole",
        "step 30: whole",
        "step 20: NOT VERIFIED, unreadable",
    ]


@pytest.mark.parametrize("more", [(), ("--parts", "model")])
def test_a_file_that_cannot_be_read_keeps_no_other_from_being_copied(
    shell: Shell, url: str, more: tuple[str, ...]
) -> None:
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        place, target = shutil.copytree(url, f"{folder}/run"), f"{folder}/copies"
        os.chmod(folder, 0o777)
        shell.screen("cp", place, f"{folder}/first", *more)  # imports what nobody else may read
        model = next(each for each in files_of(place, 10) if each.name.startswith("model"))
        model.chmod(0)
        if os.geteuid() == 0:
            stack.callback(os.seteuid, 0)
            os.seteuid(NOBODY)
        code, out, said = shell.code("cp", place, target, "--all", *more)
        assert (code, model.name in said) == (1, True)
        assert "step 10: NOT COPIED, unreadable" in out
        assert Run(target).steps() == [20, 30]
        code, out, _ = shell.code("cp", place, target, "--all", "--json", *more)
        assert (code, [each["state"] for each in json.loads(out)["not_copied"]]) == (
            1,
            ["unreadable"],
        )


@pytest.mark.parametrize("command", ["show", "verify", "rm", "pin"])
def test_digits_of_other_scripts_are_no_step(shell: Shell, url: str, command: str) -> None:
    code, out, said = shell.code(command, f"{url}@\u0662\u0660")
    assert (code, out) == (2 if command == "rm" else 10, "")
    assert "Traceback" not in said
    assert Run(url).steps() == [10, 20, 30]


def test_nan_is_neither_the_least_nor_the_most(shell: Shell, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    for step, loss in enumerate((math.nan, 2.0, 1.0, math.inf)):
        dist_ckpt.save({"n": 1}, url, step=step, metrics={"loss": loss})
    lines = [line for line in shell.screen("ls", url).splitlines() if "least loss" in line]
    assert [line.split()[0] for line in lines] == ["2"]
    assert shell.screen("compare", url).splitlines()[-1].split()[-3:] == ["1", "inf", "inf"]


def test_a_run_without_metrics_says_so(shell: Shell, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    dist_ckpt.save({"n": 1}, url, step=1)
    for command in ("compare", "plot"):
        assert "has a metric" in shell.screen(command, url)
        assert shell.json(command, url)["metrics"] == {}


def test_runs_below_a_place_are_listed(shell: Shell, url: str) -> None:
    parent = str(Path(url).parent)
    assert shell.screen("ls", parent) == f"{url}\n"
    assert shell.json("ls", parent)["runs"] == [url]


def test_names_from_storage_cannot_command_the_terminal(shell: Shell, url: str) -> None:
    screen = shell.screen("show", url)
    assert "\x1b" not in screen
    assert "\\x1b[31mred" in screen


def test_the_place_may_come_from_the_environment(
    shell: Shell, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DIST_CKPT_URL", url)
    assert shell.screen("latest") == f"{url}@30\n"


def test_where_more_must_be_given_the_environment_is_the_place_of_one_argument(
    shell: Shell, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other, out = str(tmp_path / "other"), str(tmp_path / "w.safetensors")
    commands = [("keep", "latest(1)"), ("cp", other), ("mirror", other), ("export", out)]
    monkeypatch.delenv("DIST_CKPT_URL", raising=False)
    for command, argument in commands:
        code, _, said = shell.code(command, argument)
        assert code == 2
        assert f"only {argument!r} was given" in said
        assert "DIST_CKPT_URL" in shell.screen(command, "--help")
    monkeypatch.setenv("DIST_CKPT_URL", url)
    for command, argument in commands:
        shell.screen(command, argument)
        assert shell.code(command)[0] == 2, "there is nothing that could be meant"
    assert shell.screen("latest", other) == f"{other}@30\n"
    monkeypatch.setenv("DIST_CKPT_URL", str(tmp_path / "third"))
    shell.screen("import", out, "--step", "7")
    assert shell.screen("latest") == f"{tmp_path / 'third'}@7\n"


def test_60_columns_are_enough(shell: Shell, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    for command in ("ls", "show", "tensors", "compare", "stats", "plot", "doctor"):
        assert max(map(len, shell.screen(command, url).splitlines())) <= 60
    differing = shell.screen("diff", f"{url}@10", "20", "--values")
    assert max(map(len, differing.splitlines())) <= 60
    assert "name       0.weight" in differing, "what has no room for its columns is shown by lines"
    for word in ("committed", "val/loss"):
        assert word in shell.screen("ls", url), "no word is cut"


def test_a_name_with_a_line_break_makes_no_line_of_its_own(shell: Shell, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(
        url, {"n": 1}, when=policy.never(), metadata={"note": "one\nstep 99: whole"}
    ) as ckpt:
        ckpt.restore()
        ckpt.save(1, metrics={"a\nb": 1.0}).wait()
    for command in ("show", "ls", "compare", "plot"):
        assert "\\n" in shell.screen(command, url)
        assert not any(
            line.startswith(("b", "step 99")) for line in shell.screen(command, url).splitlines()
        )


@pytest.mark.parametrize("closed", [True, False])
def test_output_that_cannot_be_written_is_an_error_without_a_trace(
    url: str, *, closed: bool
) -> None:
    program = "from dist_ckpt.cli import main; main()"
    where = ">&-" if closed else ">/dev/full"
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {where}', "sh", sys.executable, "-c", program, "ls", url],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert done.returncode == (0 if closed else 1)
    said = done.stderr.removeprefix("dist-ckpt: cannot write to standard output: ")
    assert said == ("" if closed else "OSError: [Errno 28] No space left on device\n")


def test_a_folder_whose_name_ends_as_a_step_is_named_with_a_step_of_its_own(
    shell: Shell, url: str, tmp_path: Path
) -> None:
    place = shutil.move(url, tmp_path / "tuned@30")
    code, _, said = shell.code("show", str(place))
    assert (code, "that is 'tuned@30@latest'" in said) == (10, True)
    for end in ("@latest", "@30", "@latest/"):
        assert shell.json("show", f"{place}{end}")["step"] == 30
    assert shell.json("ls", str(place))["url"] == str(place)


def test_names_that_the_output_cannot_show_are_escaped(url: str, tmp_path: Path) -> None:
    place = shutil.move(url, tmp_path / "l\xe4uft-\u8d70")
    asked = (["latest"], ["latest", "--json"], ["plot", "val/loss"], ["ls"], ["verify", "--all"])
    for encoding in ("ascii", "latin-1", "utf-8"):
        for command, *rest in asked:
            done = subprocess.run(
                [sys.executable, "-m", "dist_ckpt", command, str(place), *rest],
                capture_output=True,
                env={
                    **os.environ,
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "PYTHONIOENCODING": encoding,
                    "PYTHONUTF8": "1",
                },
                check=False,
            )
            assert (done.returncode, done.stderr) == (0, b""), command
            shown = done.stdout.decode(encoding)
            if rest == ["--json"]:
                assert json.loads(shown)["url"] == str(place)
            elif command == "latest":
                assert "\u8d70" in shown if encoding == "utf-8" else "\\u8d70" in shown


# Each command in a copy of a process that has the command line imported; the copy ends as a program
# does. Who would read its output, or its errors, has gone before it begins.
UNREAD = """
import json, os, sys
from dist_ckpt.cli import main
codes = []
for arguments, code in json.loads(sys.argv[1]):
    child = os.fork()
    if child == 0:
        reads, writes = os.pipe()
        os.close(reads)
        os.dup2(writes, 2 if code else 1)
        os.dup2(writes, 1)
        sys.argv[1:] = arguments
        main()
        sys.exit()
    codes.append(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
print(json.dumps(codes))
"""


def test_a_reader_that_has_seen_enough_is_no_error(url: str) -> None:
    expected = [
        (["tensors", url, "--flat"], 0),
        (["ls", url, "--json"], 0),
        (["--help"], 0),
        (["export", "--help"], 0),
        (["show", f"{url}@21"], 11),
        (["frobnicate"], 2),
    ]
    # Each line is written at once, so that the very first one finds nobody.
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONUNBUFFERED": "1"}
    done = subprocess.run(
        [sys.executable, "-c", UNREAD, json.dumps(expected)],
        capture_output=True,
        env=environment,
        check=True,
    )
    assert json.loads(done.stdout) == [code for _, code in expected]
    assert done.stderr == b""


def test_each_command_has_an_example(shell: Shell) -> None:
    listed = shell.screen("--help")
    commands = [
        *("ls", "show", "tensors", "verify", "diff", "compare", "latest", "best", "stats", "plot"),
        *("keep", "rm", "pin", "unpin", "sweep", "cp", "mirror", "doctor", "bench"),
        *("export", "import", "average"),
    ]
    for command in commands:
        assert command in listed
        example = " ".join(shell.screen(command, "--help").partition("Example:")[2].split())
        assert example.startswith("dist-ckpt")
        assert command in example


def test_what_a_job_does_is_shown_before_its_first_checkpoint(shell: Shell, tmp_path: Path) -> None:
    url = str(tmp_path / "run")
    with Checkpointer(url, {"n": 1}, every_steps=100, exclusive=True, status_seconds=60) as ckpt:
        ckpt.restore()
        while Run(url).status() is None:
            pass
        assert f"job: claim 1, process {os.getpid()} on " in shell.screen("ls", url)
        assert shell.json("ls", url)["checkpoints"] == []
        ckpt.save(1).wait()
    job = shell.json("ls", url)["job"]
    assert (job["phase"], job["step"], job["commit"], job["lag_steps"]) == ("ended", 1, 1, 0)
    assert shell.json("show", url)["job"] == job
    assert ", ended, step 1, newest checkpoint 1" in shell.screen("show", url)
