"""Command lines out of files, read by what would read them: torchrun, dist-ckpt, the training."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from torch.distributed.run import get_args_parser
from typer.main import get_command

from dist_ckpt.cli.app import app
from examples import train_gpt

PROGRAM = "train_gpt.py"


def expand(word: str, variables: Mapping[str, str]) -> str:
    """Put the values of `$(NAME)` and `$NAME` into `word`, for names in `variables`.

    Raises:
        KeyError: a variable that is not there.
    """
    # What a shell runs is no variable; the day of the week is all that is asked for.
    word = word.replace("$(date +%u)", "3")
    return re.sub(r"\$\((\w+)\)|\$(\w+)", lambda found: variables[found[1] or found[2]], word)


def torchrun(words: Sequence[str]) -> tuple[argparse.Namespace, train_gpt.Options]:
    """Return what torchrun reads in the `words` behind its name, and what the training reads then.

    Raises:
        SystemExit: one of them refuses them.
    """
    options = get_args_parser().parse_args(words)
    assert options.training_script.endswith(f"/{PROGRAM}")
    return options, train_gpt.parse_options(options.training_script_args)


def dist_ckpt(words: Sequence[str]) -> str:
    """Return the command of `dist-ckpt` that `words` call, having read the options behind it.

    Raises:
        Exception: there is no such command, or it refuses them.
    """
    if list(words[:2]) == ["sh", "-c"]:
        (script,) = words[2:]
        words = shlex.split(script.removeprefix("exec "))
    assert words[0] == "dist-ckpt"
    group: Any = get_command(app)
    with group.context_class(group) as context:
        name, command, arguments = group.resolve_command(context, list(words[1:]))
        command.make_context(name, arguments, parent=context)
    return str(name)
