"""The program: its commands, where they look, and what its exit codes mean."""

from __future__ import annotations

import io
import logging
import os
import sys
from typing import Any, NoReturn

import typer

from dist_ckpt.cli.comparing import add_comparing
from dist_ckpt.cli.doors import add_doors
from dist_ckpt.cli.health import add_health
from dist_ckpt.cli.looking import add_looking
from dist_ckpt.cli.numbers import add_numbers
from dist_ckpt.cli.output import Warnings, complain, to_stderr, write
from dist_ckpt.cli.tidying import add_tidying
from dist_ckpt.cli.watching import add_watching
from dist_ckpt.errors import (
    CheckpointError,
    ErrorKind,
    IntegrityError,
    NotFound,
    StorageError,
    UsageError,
)

ERROR, USAGE, NO_RUN, NO_CHECKPOINT, DAMAGED, REFUSED = 1, 2, 10, 11, 12, 13
"""Exit codes, to which others may be added: 0 is fine, 1 any other failure."""

app = typer.Typer(
    name="dist-ckpt",
    help="Look after the checkpoints of a training: on disk, NFS, S3.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    epilog="Exit codes: 0 fine, 1 error, 2 usage, 10 no run, 11 no such checkpoint, 12 damaged, "
    "13 refused for safety. Colours end where the output is no terminal, or by NO_COLOR.",
)
# A group of commands is a module, which adds them.
for _add in (
    *(add_looking, add_comparing, add_numbers, add_tidying),
    *(add_watching, add_doors, add_health),
):
    _add(app)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line, and end the process with its exit code.

    Args:
        arguments: those of the process for None.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by who started this
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 until the end
    if isinstance(sys.stdout, io.TextIOWrapper):
        # A name that the encoding of this terminal lacks is shown as control characters are.
        sys.stdout.reconfigure(errors="backslashreplace")
    command: Any = typer.main.get_command(app)
    warnings, log = Warnings(), logging.getLogger("dist_ckpt")
    log.addHandler(warnings)
    try:
        command.main(arguments, prog_name="dist-ckpt")
    except SystemExit as ended:
        _end(_code_of(ended))
    except CheckpointError as error:
        complain(error.message)
        _end(exit_code(error))
    finally:
        log.removeHandler(warnings)


def _code_of(ended: SystemExit) -> Any:
    """Return the exit code: what prints help ends as failed where `head` has read enough of it."""
    # click makes a SystemExit of a broken pipe; the call that was wrong is the context of that.
    broken = ended.__context__
    if not isinstance(broken, BrokenPipeError):
        return ended.code
    # That a call is wrong stays so, also where nobody reads what is said of it.
    return getattr(broken.__context__, "exit_code", 0)


def _end(code: Any) -> NoReturn:
    """End the process, when all that was said is written; what cannot be is an error, too."""
    try:
        # Here a full disk can still become an exit code; at its end Python would only complain.
        write("", flush=True)
    except StorageError as error:
        complain(error.message)
        # A code that says more stays.
        code = code or ERROR
    to_stderr("")
    sys.exit(code)


def exit_code(error: CheckpointError) -> int:
    """Return the exit code that tells `error`."""
    # First: a NotFound of a run, or of a checkpoint, has a code of its own.
    by_kind = {
        ErrorKind.NO_RUN: NO_RUN,
        ErrorKind.NO_BUCKET: NO_RUN,
        ErrorKind.NO_CHECKPOINT: NO_CHECKPOINT,
        ErrorKind.PROTECTED: REFUSED,
    }
    if error.kind in by_kind:
        return by_kind[error.kind]
    if isinstance(error, IntegrityError):
        return DAMAGED
    # What is not found, and is no checkpoint, was named: a part, a tensor, a folder.
    if isinstance(error, UsageError | NotFound):
        return USAGE
    return ERROR
