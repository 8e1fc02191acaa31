"""Commands that lead out and in: export, import, average. Alone of all they need torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.cli import places
from dist_ckpt.cli.output import say, say_json
from dist_ckpt.cli.places import FirstPlace, Json, Metric, Options, Url
from dist_ckpt.cli.progress import showing_work
from dist_ckpt.errors import UsageError

# Once more, since `doors.export` needs torch, and neither --help nor a typo should wait for it.
_FORMATS = ("safetensors", "hf", "torch", "dcp")

MaxShard = Annotated[
    str | None, typer.Option(metavar="SIZE", help="of hf: how large a file may be, such as 5GB")
]
Like = Annotated[
    str | None,
    typer.Option(metavar="FOLDER", help="of hf: where config.json and the tokenizer come from"),
]


def add_doors(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_export, _import, _average):
        app.command(command.__name__[1:])(command)


def _export(
    source: FirstPlace,
    out: Annotated[
        str | None, typer.Argument(metavar="OUT", help="a path or URL, not there yet")
    ] = None,
    *,
    form: Annotated[
        str, typer.Option("--format", metavar="|".join(_FORMATS), help="what is written")
    ] = "safetensors",
    part: Annotated[str, typer.Option(help="which part of the state")] = "model",
    dtype: Annotated[str | None, typer.Option(help="what floats become, such as bfloat16")] = None,
    rename: Annotated[
        list[str] | None,
        typer.Option(metavar="PATTERN=NAME", help="names, with * for what stays; repeatable"),
    ] = None,
    max_shard: MaxShard = None,
    like: Like = None,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Write weights for other programs: read back, verified, there as a whole or not at all.

    Example: dist-ckpt export runs/17@best hf-model --format hf --metric val/loss --like gpt2
    """
    if form not in _FORMATS:
        raise UsageError(f"--format is one of {', '.join(_FORMATS)}, not {form!r}")
    source, out = places.or_environment(source, out, "where to write")
    # What is wrong in the call is told before torch is imported.
    places.check_metric(metric, source)
    named = [source, out, *([like] if like else [])]
    here, *_ = places.share_options(storage_option, *named)
    url, step = places.opened_at(source, here, metric)
    chosen: dict[str, Any] = {"max_shard": max_shard, "like": like, "step": step}
    names = _pairs(rename, "--rename takes PATTERN=NAME")
    with showing_work():
        report = dist_ckpt.export(
            url,
            out,
            format=form,  # type: ignore[arg-type]  # looked at above
            part=part,
            dtype=dtype,
            rename=names or None,
            storage_options=places.storage_options(storage_option),
            **{name: value for name, value in chosen.items() if value is not None},
        )
    _tell(report, json=json)


def _import(
    source: Annotated[str, typer.Argument(metavar="SRC", help="a file or folder of others")],
    url: Url,
    *,
    step: Annotated[int | None, typer.Option(help="under which step; by default its own")] = None,
    metric: Annotated[
        list[str] | None, typer.Option(metavar="NAME=VALUE", help="stored with it; repeatable")
    ] = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Make a checkpoint of a run from another program's: torch.save, DCP, safetensors, HF.

    Example: dist-ckpt import old.pt runs/18 --step 1000
    """
    _, there = places.share_options(storage_option, source, url)
    places.open_target(url, there)
    options = places.storage_options(storage_option)
    metrics = {}
    for name, value in _pairs(metric, "--metric takes NAME=VALUE").items():
        try:
            metrics[name] = float(value)
        except ValueError as error:
            raise UsageError(f"--metric takes a number, not {value!r}") from error
    with showing_work():
        report = dist_ckpt.import_(
            source, url, step=step, metrics=metrics or None, storage_options=options
        )
    _tell(report, json=json)


def _average(
    named: Annotated[
        list[str],
        typer.Argument(metavar="URL[@STEP]... OUT", help="two or more, and a run or a file"),
    ],
    out: Annotated[
        str | None, typer.Option("--out", "-o", metavar="OUT", help="OUT, where all are sources")
    ] = None,
    *,
    weights: Annotated[
        str | None, typer.Option(metavar="W,W,...", help="of each; equal ones by default")
    ] = None,
    part: Annotated[str, typer.Option(help="which part of the state")] = "model",
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="|".join(_FORMATS), help="an export, not a checkpoint"),
    ] = None,
    step: Annotated[int | None, typer.Option(help="under which step of the run")] = None,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Average the weights of several checkpoints.

    Example: dist-ckpt average runs/17@100 runs/17@200 runs/averaged
    """
    if form not in (None, *_FORMATS):
        raise UsageError(f"--format is one of {', '.join(_FORMATS)}, not {form!r}")
    # Without --out the last place is where it goes, as for cp and export.
    sources = named if out is not None else named[:-1]
    out = named[-1] if out is None else out
    if not sources:
        raise UsageError(f"{out} is where the average goes: name what it is the average of")
    places.check_metric(metric, *sources)
    numbers = _numbers(weights)
    *given, there = places.share_options(storage_option, *sources, out)
    # A run alone: the file of an export may be called as it likes.
    if form is None:
        places.open_target(out, there)
    pairs = zip(sources, given, strict=True)
    opened = [places.opened_at(each, options, metric) for each, options in pairs]
    # Without a step a place is given as it is: it may be a file of others.
    wanted: list[Any] = [url if which is None else (url, which) for url, which in opened]
    with showing_work():
        report = dist_ckpt.average(
            wanted,
            out,
            weights=numbers,
            part=part,
            format=form,  # type: ignore[arg-type]  # looked at above
            step=step,
            storage_options=places.storage_options(storage_option),
        )
    _tell(report, json=json)


def _numbers(weights: str | None) -> list[float] | None:
    try:
        return None if weights is None else [float(each) for each in weights.split(",")]
    except ValueError as error:
        raise UsageError(f"--weights takes numbers such as 1,1,2, not {weights!r}") from error


def _pairs(texts: Sequence[str] | None, says: str) -> dict[str, str]:
    """Return what an option that is repeatable said."""
    found: dict[str, str] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals and value):
            raise UsageError(f"{says}, not {text!r}")
        # Of two one would be passed over.
        if name in found:
            raise UsageError(f"{says}, and has {name!r} twice: {found[name]!r} and {value!r}")
        found[name] = value
    return found


def _tell(report: Any, *, json: bool) -> None:
    if json:
        say_json(asdict(report))
    else:
        for line in str(report).splitlines():
            say(line)
