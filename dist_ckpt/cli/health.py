"""Commands about a place itself: doctor, and bench."""

from __future__ import annotations

from dataclasses import asdict
from importlib import import_module
from statistics import median
from typing import Annotated, Any

import typer

from dist_ckpt.cli import places
from dist_ckpt.cli.measuring import measure
from dist_ckpt.cli.output import say, say_json, size, table
from dist_ckpt.cli.places import Json, Options
from dist_ckpt.cli.progress import showing_bytes
from dist_ckpt.cli.symptoms import examine
from dist_ckpt.errors import StorageError

Place = Annotated[
    str, typer.Argument(metavar="URL", envvar="DIST_CKPT_URL", help="any place: a path or a URL")
]


def add_health(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_doctor, _bench):
        app.command(command.__name__[1:])(command)


def _doctor(url: Place, *, storage_option: Options = None, json: Json = False) -> None:
    """Try what checkpoints need of a place, and say what to do about what fails (exit code 1).

    Some 32 MB are put there, read, and removed; nothing else is changed.

    Example: dist-ckpt doctor s3://bucket/runs
    """
    run = places.open_whole(url, storage_option)
    checks = examine(run, places.storage_options(storage_option))
    if json:
        say_json({"url": run.url, "checks": [asdict(each) for each in checks]})
    else:
        table(
            [("", "left"), ("", "left"), ("", "left")],
            [[each.state, each.name, each.said] for each in checks],
        )
        for each in checks:
            if each.remedy:
                say(f"{each.name}: {each.remedy}")
    # Saves work where it only warns, so the exit code says nothing of that.
    failed = [each.name for each in checks if each.state == "fail"]
    if failed:
        raise StorageError(f"{run.url} is not fit for checkpoints: {', '.join(failed)}")


def _bench(
    url: Place,
    *,
    megabytes: Annotated[
        int, typer.Option("--size", min=1, metavar="MB", help="of all files together")
    ] = 256,
    files: Annotated[int, typer.Option(min=1, max=64, help="how many, all at once")] = 4,
    repeat: Annotated[int, typer.Option(min=1, help="how often; medians are said")] = 3,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Measure how fast checkpoints could be written to a place, and read; nothing stays there.

    Example: dist-ckpt bench /scratch/runs --size 1024 --files 8
    """
    store = places.open_whole(url, storage_option).store
    nbytes = megabytes * 10**6
    scratch: Any = import_module("dist_ckpt.repository.scratch").scratch
    as_destination: Any = import_module("dist_ckpt.repository.destination").as_destination
    with (
        as_destination(),
        scratch(store) as folder,
        # Twice, as each round writes all and reads it back.
        showing_bytes("bench", 2 * nbytes * repeat) as more,
    ):
        found = [
            measure(store, folder, nbytes=nbytes, files=files, told=more) for _ in range(repeat)
        ]
    write, read = median(each.write for each in found), median(each.read for each in found)
    if json:
        say_json(
            {
                "url": store.url,
                "megabytes": megabytes,
                "files": files,
                "write_bytes_per_second": [each.write for each in found],
                "read_bytes_per_second": [each.read for each in found],
            }
        )
        return
    say(f"write {size(round(write))}/s, read {size(round(read))}/s")
    say(f"{files} files of {megabytes} MB together, medians of {repeat}")
