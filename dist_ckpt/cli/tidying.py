"""Commands that change a run, or make one: keep, rm, pin, unpin, sweep, cp."""

from __future__ import annotations

import ast
import re
from dataclasses import asdict
from datetime import timedelta
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

import dist_ckpt
from dist_ckpt.cli import places
from dist_ckpt.cli.every import Left, work_on
from dist_ckpt.cli.output import say, say_json, size, table
from dist_ckpt.cli.places import FirstPlace, FirstUrl, Json, Metric, Options, Place, Url
from dist_ckpt.cli.progress import showing_work
from dist_ckpt.errors import CheckpointError, ErrorKind, IntegrityError, UsageError, near

if TYPE_CHECKING:
    from dist_ckpt.repository.keep import KeepPolicy
    from dist_ckpt.run import Run

_SECONDS = {"d": 86400, "h": 3600, "min": 60, "s": 1}
# All that a text may call: no other attribute of `dist_ckpt.keep` is ever looked up.
_POLICIES = ("latest", "best", "every", "newer_than", "all", "preset")


def add_tidying(app: typer.Typer) -> None:
    """Add the commands to `app`."""
    for command in (_keep, _rm, _pin, _unpin, _sweep, _cp):
        app.command(command.__name__[1:])(command)


def _keep(
    url: FirstUrl,
    policy: Annotated[
        str | None,
        typer.Argument(metavar="POLICY", help="such as 'latest(3) | best(\"val/loss\", 2)'"),
    ] = None,
    *,
    yes: Annotated[bool, typer.Option("--yes", help="delete; without it nothing is done")] = False,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Say which checkpoints a policy keeps and why, and with --yes delete the others.

    Safe beside a training: the newest, the best by what the run itself keeps it by, pinned ones,
    and the one that it went on from stay.

    Example: dist-ckpt keep runs/17 'latest(3) | best("val/loss")' --yes
    """
    url, policy = places.or_environment(url, policy, "a policy")
    wanted = parse_policy(policy)
    run = places.open_whole(url, storage_option)
    decisions = run.keep(wanted) if yes else run.plan_keep(wanted)
    if not decisions:
        run.newest()  # which says why there is none
    gone = [each for each in decisions if not each.kept]
    freed = sum(each.nbytes for each in gone)
    if json:
        rows = [
            {
                "step": each.step,
                "kept": each.kept,
                "reasons": list(each.reasons),
                "nbytes": each.nbytes,
            }
            for each in decisions
        ]
        say_json({"url": run.url, "done": yes, "nbytes_freed": freed, "checkpoints": rows})
        return
    table(
        [("step", "right"), ("size", "right"), ("", "left"), ("reasons", "left")],
        [
            [
                f"{each.step}",
                size(each.nbytes),
                "keep" if each.kept else "deleted" if yes else "delete",
                ", ".join(each.reasons),
            ]
            for each in decisions
        ],
    )
    if yes:
        say(f"deleted {len(gone)} checkpoints, {size(freed)}")
    elif gone:
        say(f"would free {size(freed)}; nothing was done: --yes deletes")


def _rm(
    place: Annotated[str, typer.Argument(metavar="URL@STEP", help="the checkpoint to delete")],
    *,
    force: Annotated[
        bool, typer.Option("--force", help="also the newest, the best, or a pinned one")
    ] = False,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Delete one checkpoint; the newest, best and pinned ones only with --force (exit code 13).

    Example: dist-ckpt rm runs/17@100
    """
    # Without a step the newest would be meant, which no slip may delete.
    if places.split(place)[0] == place:
        raise UsageError(f"name the checkpoint to delete: {place}@STEP")
    run, step = places.open_step(place, storage_option, metric)
    # Who keeps the best by a metric of their own has no policy that would protect it.
    if places.split(place)[1] == "best" and not force:
        raise UsageError(
            f"step {step} in {run.url} is not removed: it is the best; to mean it, name it as "
            f"@{step}, or give --force",
            kind=ErrorKind.PROTECTED,
        )
    run.remove(step, force=force)
    say_json({"url": run.url, "removed": step}) if json else say(f"step {step} was deleted")


def _pin(
    place: Place,
    *,
    reason: Annotated[str, typer.Option(help="for people")] = "",
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Keep a checkpoint, whatever any policy says.

    Example: dist-ckpt pin runs/17@best --metric val/loss --reason "submitted"
    """
    run, step = places.open_step(place, storage_option, metric)
    run.pin(step, reason=reason)
    say_json({"url": run.url, "pinned": step}) if json else say(f"step {step} is pinned")


def _unpin(
    place: Place, *, metric: Metric = None, storage_option: Options = None, json: Json = False
) -> None:
    """Let policies decide about a checkpoint again.

    Example: dist-ckpt unpin runs/17@100
    """
    run, step = places.open_step(place, storage_option, metric)
    run.unpin(step)
    say_json({"url": run.url, "unpinned": step}) if json else say(f"step {step} is not pinned")


def _sweep(
    url: Url,
    *,
    older_than: Annotated[
        str | None,
        typer.Option(metavar="AGE", help="only where nothing was put for so long: 2d, 12h, 30min"),
    ] = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Remove what killed jobs left: files without a manifest, abandoned uploads.

    What the newest job of the run writes is never touched.

    Example: dist-ckpt sweep s3://bucket/runs/17 --older-than 2d
    """
    age = None if older_than is None else parse_age(older_than)
    run = places.open_whole(url, storage_option)
    gone = run.sweep(older_than=age)
    if json:
        say_json({"url": run.url, "removed": gone})
        return
    for each in gone:
        say(each)
    say(f"removed {len(gone)} folders")


def _cp(
    source: FirstPlace,
    destination: Annotated[
        str | None, typer.Argument(metavar="URL", help="the run to copy into")
    ] = None,
    *,
    every: Annotated[bool, typer.Option("--all", help="every checkpoint of the run")] = False,
    parts: Annotated[
        str | None,
        typer.Option(metavar="PART,...", help="these alone, as a checkpoint that has no others"),
    ] = None,
    metric: Metric = None,
    storage_option: Options = None,
    json: Json = False,
) -> None:
    """Copy a checkpoint to another run, on any storage: verified, and committed last.

    Run again after it was cut off, it goes on where it was.

    Example: dist-ckpt cp runs/17@best s3://bucket/kept/17 --metric val/loss --parts model
    """
    source, destination = places.or_environment(source, destination, "the run to copy into")
    here, there = places.share_options(storage_option, source, destination)
    target = places.open_target(destination, there)
    left: Left = {}
    if every:
        run = places.open_every(source, here, metric)
        steps, left = _every_step(run)
    else:
        run, step = places.open_step(source, here, metric)
        steps = [step]
    done = []
    # Imported by this very use, as the run is.
    module: Any = import_module("dist_ckpt.cli.source")
    source_store = module.SourceStore(run.store)
    seen = dist_ckpt.Run(source_store)

    def copy(step: int) -> None:
        with showing_work(), source_store.telling():
            copied, words = (
                _whole(seen, step, target) if parts is None else _parts(seen, step, target, parts)
            )
        done.append(copied)
        # At once: a long copy that is cut off has told what it did.
        if not json:
            say(f"step {step}: {words}")

    # That the other place fails says something of all of them.
    passed_over = {IntegrityError: "damaged", module.SourceFailed: "unreadable"}
    left |= work_on(steps, copy, every=every, passed_over=passed_over)
    if json:
        copies = [asdict(each) for each in done]
        say_json({"url": target.url, "checkpoints": copies, "not_copied": _reasons(left)})
    else:
        for step, (state, error) in sorted(left.items()):
            say(f"step {step}: NOT COPIED, {state}")
            say(f"  {error.message}")
    if left:
        # Of several reasons damage tells, as it does for verify.
        raise max(left.values(), key=lambda each: each[0] == "damaged")[1]


def _reasons(left: Left) -> list[dict[str, Any]]:
    return [
        {"step": step, "state": state, "problem": error.message}
        for step, (state, error) in sorted(left.items())
    ]


def _every_step(run: Run) -> tuple[list[int], Left]:
    """Return the steps that can be copied, and by step what is known of those that cannot."""
    listed = run.listed()
    left: Left = {}
    for each in listed:
        if not each.is_bad:
            continue
        try:
            run.manifest(each.step)  # which says why it cannot be read
        except CheckpointError as error:
            left[each.step] = each.state, error
    steps = [each.step for each in listed if each.manifest is not None]
    if not steps and not left:
        run.newest()  # which says why there is none
    return steps, left


def _whole(run: Run, step: int, target: Run) -> tuple[Any, str]:
    """Copy a checkpoint; return the report, and what to say of it."""
    done = run.copy(step, target)
    kept = f", {done.kept} were there" if done.kept else ""
    return done, f"{done.files} files, {size(done.nbytes)} copied{kept}"


def _parts(run: Run, step: int, target: Run, parts: str) -> tuple[Any, str]:
    # Of all copies this one needs torch: it saves anew.
    module: Any = import_module("dist_ckpt.doors.parts")
    names = list(dict.fromkeys(filter(None, parts.split(","))))
    done = module.copy_parts(run.store, target.store, step=step, parts=names)
    how = "was there already" if done.was_there else f"{size(done.nbytes)} copied"
    return done, f"{', '.join(names)}, {done.tensors} tensors, {how}"


def parse_age(text: str) -> timedelta:
    """Return how long `2d`, `12h`, `30min` or `90s` is.

    Raises:
        UsageError: it is no such text.
    """
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)(d|h|min|s)", text)
    seconds = float(found[1]) * _SECONDS[found[2]] if found else -1.0
    # More is an OverflowError of `timedelta`.
    if not 0 <= seconds < timedelta.max.total_seconds():
        raise UsageError(f"--older-than takes an age such as 2d, 12h, 30min or 90s, not {text!r}")
    return timedelta(seconds=seconds)


def parse_policy(text: str) -> KeepPolicy:
    """Return the policy that `text` says: calls of `dist_ckpt.keep`, joined by `|`.

    Nothing is evaluated: names, numbers and texts are all that there may be.

    Raises:
        UsageError: it is something else.
    """
    try:
        # In a shell an exclamation mark or a newline comes in easily; spaces do no harm.
        tree = ast.parse(text.strip(), mode="eval").body
    # For what is nested too deep the parser of Python raises one of the last two.
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise UsageError(
            f"{text!r} is no policy such as 'latest(3) | best(\"val/loss\")'"
        ) from error
    return _policy(tree, text)


def _policy(node: ast.expr, text: str) -> KeepPolicy:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return dist_ckpt.keep.either(_policy(node.left, text), _policy(node.right, text))
    if not isinstance(node, ast.Call):
        raise UsageError(f"{text!r} is no policy such as 'latest(3) | best(\"val/loss\")'")
    # As it stands in a program: what is pasted from there works here.
    name = re.sub(r"^keep\.", "", ast.unparse(node.func))
    if name not in _POLICIES:
        raise UsageError(f"no policy is called {name!r}{near(name, _POLICIES)}")
    try:
        positional = [_literal(each) for each in node.args]
        # `**` has no name, and is none of what literals are.
        named = {each.arg or "**": _literal(each.value) for each in node.keywords}
        policy: KeepPolicy = getattr(dist_ckpt.keep, name)(*positional, **named)
    except (ValueError, TypeError) as error:
        raise UsageError(f"{ast.unparse(node)} is no policy: {error}") from error
    return policy


def _literal(node: ast.expr) -> Any:
    # Literals alone, so that no text runs anything.
    try:
        return ast.literal_eval(node)
    except ValueError as error:
        raise UsageError(
            f"{ast.unparse(node)} is neither a number nor a text in quotes, as in "
            'best("val/loss"): keep it from the shell by quotes of the other kind around all'
        ) from error
