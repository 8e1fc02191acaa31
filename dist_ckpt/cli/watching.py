"""Commands that go on until they are stopped: how they do, and mirror."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from dist_ckpt.cli import places
from dist_ckpt.cli.output import complain, say, say_json, size, write
from dist_ckpt.cli.places import FirstUrl, Json, Options
from dist_ckpt.cli.progress import showing_work
from dist_ckpt.errors import CheckpointError, UsageError

if TYPE_CHECKING:
    from dist_ckpt.run import Mirrored, Run

Watch = Annotated[bool, typer.Option("--watch", help="go on until it is stopped, by Ctrl-C")]
Every = Annotated[float, typer.Option(metavar="SECONDS", help="with --watch: between two looks")]


def add_watching(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    app.command("mirror")(_mirror)


def repeat(look: Callable[[], None], *, watch: bool, every: float) -> None:
    """Call `look` once, or with `watch` until an interrupt, which is then no error.

    Raises:
        UsageError: the time between two looks is none.
    """
    # NaN fails it, too, and `time.sleep` refuses what is far beyond.
    if not 0 < every < 1e9:
        raise UsageError(f"--every takes seconds, more than 0, not {every}")
    if not watch:
        look()
        return
    with suppress(KeyboardInterrupt):
        while True:
            look()
            # A pipe would hold it back for long, and who watches wants it now.
            write("", flush=True)
            time.sleep(every)


def _mirror(
    source: FirstUrl,
    destination: Annotated[
        str | None, typer.Argument(metavar="DST", help="the run to copy into")
    ] = None,
    *,
    watch: Watch = False,
    every: Every = 60.0,
    best: Annotated[
        str | None, typer.Option(metavar="METRIC[:max]", help="copy the best by it, too")
    ] = None,
    keep: Annotated[
        int | None, typer.Option(metavar="N", help="delete there all but the newest N and the best")
    ] = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Keep the newest checkpoint of a run, and the best, copied to another place.

    With --watch as the training goes on: what fails then is told, and tried again at the next look.

    Example: dist-ckpt mirror runs/17 s3://bucket/kept/17 --watch --best val/loss --keep 3
    """
    source, destination = places.or_environment(source, destination, "the run to copy into")
    here, there = places.share_options(storage_option, source, destination)
    # Neither need be there yet: a mirror may be started before the training.
    run, target = places.open_whole(source, here), places.open_target(destination, there)
    criterion = None if best is None else places.criterion(best)

    if criterion is not None and not watch:
        # What goes on waits for one to have it.
        places.find_named(run, "best", best)

    def look() -> None:
        try:
            with showing_work():
                done = run.mirror(target, best=criterion, keep=keep)
        except CheckpointError as error:
            # A call that is wrong will not be right at the next look.
            if not watch or type(error) is UsageError:
                raise
            complain(error.message)
        else:
            _tell(target, done, json=json, watch=watch)

    repeat(look, watch=watch, every=every)


def _tell(target: Run, done: Mirrored, *, json: bool, watch: bool) -> None:
    if json:
        rows = [{"step": e.step, "files": e.files, "nbytes": e.nbytes} for e in done.copied]
        found: dict[str, Any] = {"url": target.url, "copied": rows, "removed": list(done.removed)}
        # A look that changed nothing is no event.
        if rows or done.removed or not watch:
            # While it goes on, one line each: what reads it need not find out where one ends.
            say_json(found, lines=watch)
        return
    for each in done.copied:
        say(f"step {each.step}: {each.files} files, {size(each.nbytes)} copied")
    for step in done.removed:
        say(f"step {step}: deleted there")
    if not watch and not (done.copied or done.removed):
        say("all of it was there")
