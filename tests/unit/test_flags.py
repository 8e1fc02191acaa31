"""Flags: every spelling and source says the same; contradictions are refused with the reason."""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from dist_ckpt import flags, keep, policy
from dist_ckpt.errors import UsageError
from dist_ckpt.repository.ranking import Criterion


def parse(*arguments: str) -> flags.Flags:
    parser = argparse.ArgumentParser()
    parser.add_argument("--epochs", type=int, default=3)
    flags.add_arguments(parser)
    return flags.parse(parser.parse_args(arguments))


def test_the_least_that_can_be_said() -> None:
    said = parse("--checkpoint-dir", "runs/a")
    assert said == flags.Flags("runs/a")
    assert (said.when(), said.keep(), said.resume_from) == (policy.never(), None, None)


def test_all_of_it_in_each_spelling_and_source(tmp_path: Path) -> None:
    given = {
        "checkpoint-dir": "s3://bucket/run",
        "checkpoint-interval": 500,
        "checkpoint-every-seconds": 900.0,
        "keep-last": 3,
        "keep-best": 2,
        "best-metric": "val/f1:max",
        "resume": 1000,
        "reset-optimizer": True,
        "no-async": True,
    }
    line = [f"--{name}" + ("" if value is True else f"={value}") for name, value in given.items()]
    said = parse(*line)
    assert said == parse(*(each.replace("-", "_").replace("__", "--", 1) for each in line))
    file = tmp_path / "train.yaml"
    rows = [f"  {name}: {str(value).lower()}" for name, value in given.items()]
    file.write_text("\n".join(["lr: 0.1", "checkpoint:", *rows]))
    from_dict = flags.parse({name.replace("-", "_"): value for name, value in given.items()})
    for other in (flags.parse(file), flags.parse(str(file)), from_dict):
        assert other.resume_from == said.resume_from == 1000
        assert (
            other.when()
            == said.when()
            == (
                policy.never()
                | policy.every(500)
                | policy.every(seconds=900)
                | policy.better("val/f1", mode="max")
            )
        )
        assert other.keep() == said.keep() == keep.latest(3) | keep.best("val/f1", 2, mode="max")
        assert (other.reset_optimizer, other.no_async) == (True, True)


def test_a_file_of_nothing_but_flags(tmp_path: Path) -> None:
    file = tmp_path / "checkpoint.yaml"
    file.write_text("checkpoint-dir: runs/a\nauto_resume: yes\nkeep-last:\n")
    assert flags.parse(file) == flags.Flags("runs/a", auto_resume=True)


@pytest.mark.parametrize(
    ("value", "means"),
    [
        ("--resume", flags.NEWEST),
        ("--resume=latest", flags.NEWEST),
        ("--resume=best", flags.BEST),
        ("--resume=7", 7),
        ("--resume=runs/b", "runs/b"),
        ("--resume=./best", "./best"),
        ("--resume-from=runs/b", "runs/b"),
        ("--resume_from_checkpoint=7", 7),
    ],
)
def test_where_to_resume_from(value: str, means: object) -> None:
    assert parse("--checkpoint-dir=a", value).resume_from == means


@pytest.mark.parametrize(
    ("value", "criterion"),
    [
        ("loss", Criterion("loss")),
        ("loss:min", Criterion("loss", "min")),
        ("f1:max", Criterion("f1", "max")),
        ("val:loss", Criterion("val:loss")),
    ],
)
def test_best_metric(value: str, criterion: Criterion) -> None:
    assert flags.Flags("a", best_metric=value).criterion == criterion


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "--checkpoint-dir is missing"),
        (["--auto-resume", "--keep-last=3"], "--keep-last, --auto-resume without it"),
        (["--checkpoint-dir=a", "--resume", "--auto-resume"], "contradict"),
        (["--checkpoint-dir=a", "--resume", "--pretrained-checkpoint=b"], "contradict"),
        (["--checkpoint-dir=a", "--reset-optimizer"], "without --resume"),
        (["--checkpoint-dir=a", "--auto-resume", "--reset-optimizer"], "at every restart"),
        (["--checkpoint-dir=a", "--keep-best=2"], "--keep-best needs --best-metric"),
        (["--checkpoint-dir=a", "--keep-last=0"], "--keep-last: .*positive"),
        (["--checkpoint-dir=a", "--checkpoint-interval=0"], "--checkpoint-interval: .*positive"),
        (["--checkpoint-dir=a", "--checkpoint-every-seconds=-1"], "--checkpoint-every-seconds: "),
        (["--checkpoint-dir=a", "--best-metric=:max"], "has a name"),
        (["--checkpoint-dir= "], "takes text"),
        (["--checkpoint-dir=a", "--checkpoint-every-epochs=0"], "--checkpoint-every-epochs: .*pos"),
        (["--checkpoint-dir=a", "--checkpoint-last-step=-1"], "--checkpoint-last-step: .*from 0"),
        (["--checkpoint-dir=a", "--checkpoint-on-signal=TREM"], "no signal.*SIGTERM"),
        (["--checkpoint-dir=a", "--checkpoint-on-signal=KILL"], "nobody can catch"),
        (["--checkpoint-dir=a", "--keep-last=-2"], "--keep-last: .*positive"),
    ],
)
def test_contradictions_and_nonsense_are_refused(arguments: list[str], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        parse(*arguments)


@pytest.mark.parametrize(
    ("section", "reason"),
    [
        ({"checkpoint-dri": "a"}, "did you mean 'checkpoint_dir'"),
        ({"zzz": 1}, "known are checkpoint_dir"),
        ({"checkpoint-dir": "a", "checkpoint_dir": "b"}, "two spellings"),
        ({"checkpoint-dir": 5}, "takes text"),
        ({"checkpoint-dir": "a", "keep-last": "3"}, "--keep-last: .*positive"),
        ({"checkpoint-dir": "a", "auto-resume": "yes"}, "on or off"),
        ({"checkpoint-dir": "a", "resume": 1.5}, "a step or a path"),
        ({"checkpoint-dir": "a", "keep-last": 1, "save_total_limit": 2}, "two spellings"),
        ({"checkpoint-dir": "a", "checkpoint-preset": "standrad"}, "one of standard"),
    ],
)
def test_bad_sections(section: dict[str, Any], reason: str) -> None:
    with pytest.raises(UsageError, match=reason):
        flags.parse(section)


@pytest.mark.parametrize("text", ["[1, 2]", "checkpoint: 5", "{", "!!python/object:os.system {}"])
def test_bad_files(tmp_path: Path, text: str) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(text)
    with pytest.raises(UsageError, match=r"train\.yaml"):
        flags.parse(file)
    with pytest.raises(UsageError, match="cannot be read"):
        flags.parse(tmp_path / "absent.yaml")


def test_a_file_needs_a_package_that_nothing_else_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "train.yaml"
    file.write_text("checkpoint_dir: runs/7\n")
    monkeypatch.setitem(sys.modules, "yaml", None)  # as where it is not installed
    with pytest.raises(UsageError, match=r"pip install 'dist_ckpt\[yaml\]'"):
        flags.parse(file)
    assert flags.parse({"checkpoint_dir": "runs/7"}).checkpoint_dir == "runs/7"


def test_help_shows_each_flag_once() -> None:
    parser = argparse.ArgumentParser()
    flags.add_arguments(parser)
    text = parser.format_help()
    assert "--checkpoint-dir" in text
    assert "--checkpoint_dir" not in text


def test_names_of_other_trainers_are_taken() -> None:
    said = parse(
        "--checkpoint_path=a", "--save_steps=5", "--save-total-limit=3", "--resume-from=best"
    )
    assert said == flags.Flags("a", 5, keep_last=3, resume="best")
    assert parse("--checkpoint-dir=a", "--keep_last_n_checkpoints=2").keep_last == 2
    assert flags.parse({"checkpoint_path": "a", "save-steps": 5}) == flags.Flags("a", 5)


def test_a_name_that_the_script_has_already_stays_its_own() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--save-steps", dest="own", type=int)
    flags.add_arguments(parser)
    args = parser.parse_args(["--checkpoint-dir=a", "--save-steps=7"])
    assert (args.own, flags.parse(args)) == (7, flags.Flags("a"))
    later = argparse.ArgumentParser()
    flags.add_arguments(later, aliases=False)
    later.add_argument("--save-steps")


def test_when_to_save_by_epochs_signals_and_the_last_step() -> None:
    said = parse(
        "--checkpoint-dir=a",
        "--checkpoint-every-epochs=2",
        "--checkpoint-last-step=1000",
        "--checkpoint-on-signal=term,SIGUSR1",
    )
    signals = policy.on_signal(signal.SIGTERM, signal.SIGUSR1)
    wanted = policy.never() | policy.every(epochs=2) | policy.last(1000) | signals
    assert said.when() == wanted
    only = parse("--checkpoint-dir=a", "--checkpoint-on-signal")
    assert only.when() == policy.never() | policy.on_signal()


def test_the_end_from_outside_and_saves_that_fail() -> None:
    said = parse(
        "--checkpoint-dir=a",
        "--checkpoint-on-signal=USR1",
        "--checkpoint-on-notice=/run/notice",
        "--checkpoint-grace-seconds=90",
        "--checkpoint-exit-code=75",
        "--checkpoint-when-failed=warn",
        "--checkpoint-max-failures=5",
        "--checkpoint-exclusive",
    )
    assert parse("--checkpoint-dir=a", "--checkpoint-node-local").options() == {"node_local": True}
    signals = policy.on_signal(signal.SIGUSR1, grace_seconds=90, exit_code=75)
    notice = policy.on_notice("/run/notice", grace_seconds=90, exit_code=75)
    assert said.when() == policy.never() | signals | notice
    assert said.options() == {"when_failed": "warn", "max_failures": 5, "exclusive": True}
    assert parse("--checkpoint-dir=a").options() == {}
    preset = parse(
        "--checkpoint-dir=a", "--checkpoint-preset=preemptible", "--checkpoint-grace-seconds=25"
    )
    clock = policy.never() | policy.every(seconds=600)
    assert preset.when() == clock | policy.on_signal(grace_seconds=25)


def test_a_number_that_is_nothing_is_not_left_out() -> None:
    said = parse(
        "--checkpoint-dir=a", "--checkpoint-when-failed=warn", "--checkpoint-max-failures=0"
    )
    assert said.options() == {"when_failed": "warn", "max_failures": 0}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"checkpoint_grace_seconds": 5}, "give --checkpoint-on-signal"),
        ({"checkpoint_exit_code": 5}, "give --checkpoint-on-signal"),
        ({"checkpoint_max_failures": 5}, "does nothing without"),
        ({"checkpoint_exclusive": "yes"}, "is on or off"),
        ({"checkpoint_on_signal": "TERM", "checkpoint_exit_code": 999}, "from 0 to 255"),
    ],
)
def test_flags_that_say_nothing_alone(given: dict[str, object], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        flags.parse({"checkpoint_dir": "a", **given})


def test_a_preset_says_what_no_flag_says() -> None:
    said = parse("--checkpoint-dir=a", "--checkpoint-preset=preemptible")
    by_clock = policy.never() | policy.every(seconds=600)
    assert said.when() == by_clock | policy.on_signal()
    assert said.keep() == keep.latest(2)
    own = parse(
        "--checkpoint-dir=a",
        "--checkpoint-preset=preemptible",
        "--checkpoint-interval=50",
        "--keep-last=-1",
    )
    assert own.when() == policy.never() | policy.every(50) | policy.on_signal()
    assert own.keep() is None


def test_the_command_line_comes_before_the_file(tmp_path: Path) -> None:
    file = tmp_path / "train.yaml"
    file.write_text(
        "checkpoint:\n  checkpoint-dir: a\n  checkpoint-interval: 50\n  keep-last: 3\n"
        "  auto-resume: yes\n"
    )
    assert parse(f"--checkpoint-config={file}") == flags.Flags(
        "a", 50, keep_last=3, auto_resume=True
    )
    said = parse(f"--checkpoint-config={file}", "--checkpoint-interval=7", "--resume=3")
    assert said == flags.Flags("a", 7, keep_last=3, resume="3")
    with pytest.raises(UsageError, match="cannot be read"):
        parse(f"--checkpoint-config={tmp_path / 'absent.yaml'}")
