"""How things are shown: tables and sizes for people, JSON for programs."""

from __future__ import annotations

import io
import json
import logging
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

from dist_ckpt.errors import StorageError, describe

_NARROW = 60
_WIDE = 200
# What is left of a name that is folded, at least.
_FOLDED = 20


def console() -> Console:
    """Return what is drawn on, as wide as the terminal: in memory, for `write` to print."""
    width = shutil.get_terminal_size((_WIDE, 24)).columns
    return Console(
        # What a closed pipe or a full disk means is known to `write` alone.
        file=io.StringIO(),
        force_terminal=sys.stdout.isatty(),
        width=max(width, _NARROW),
        highlight=False,
        # Names come from storage: `[red]` in one of them is text.
        markup=False,
        emoji=False,
    )


def write(text: str, *, flush: bool = False) -> None:
    """Write to standard output; who reads there may have seen enough: `dist-ckpt ls | head`.

    Raises:
        StorageError: it cannot be written, as where it is a file on a full disk.
    """
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would try once more at its end, and complain.
        _close_output()
        sys.exit(0)
    except OSError as error:
        # What is held back would fail once more at the end, with exit code 120.
        _close_output()
        raise StorageError(f"cannot write to standard output: {describe(error)}") from error


def _close_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def complain(text: str) -> None:
    """Say on standard error what went wrong; where nobody reads it the exit code tells it alone."""
    to_stderr(f"dist-ckpt: {escaped(text, lines=True)}\n")


def to_stderr(text: str) -> None:
    """Write to standard error, and what is held back for it; that nobody reads it is no error."""
    try:
        sys.stderr.write(text)
        sys.stderr.flush()
    except OSError:
        # What Python flushes at its end must not fail, or the exit code would be 120.
        with suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stderr.fileno())


class Warnings(logging.Handler):
    """Says each warning of the library once, however often what goes on comes across it."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    def emit(self, record: logging.LogRecord) -> None:
        """Say it."""
        text = record.getMessage()
        if text not in self._said:
            self._said.add(text)
            complain(text)


def clear() -> None:
    """Let what follows be at the top of the screen, where there is one."""
    # In a file these would be text between the lines.
    if sys.stdout.isatty():
        write("\x1b[H\x1b[2J")


def say(text: str) -> None:
    """Print a line."""
    write(f"{escaped(text)}\n")


def say_json(value: Any, *, lines: bool = False) -> None:
    """Print `value` as JSON, in which what is not finite is a text.

    Args:
        value: what to print.
        lines: in one line, as one of many.
    """
    # JSON has its own escapes for what the encoding of the output may lack.
    narrow = (sys.stdout.encoding or "").replace("-", "").lower() != "utf8"
    write(f"{json.dumps(finite(value), indent=None if lines else 2, ensure_ascii=narrow)}\n")


def finite(value: Any) -> Any:
    """Return `value` as what JSON has: NaN and infinities are the texts that manifests have."""
    if isinstance(value, float) and not math.isfinite(value):
        return "nan" if math.isnan(value) else "inf" if value > 0 else "-inf"
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, dict):
        return {str(key): finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [finite(each) for each in value]
    return value


def escaped(text: str, *, lines: bool = False) -> str:
    """Return `text` with its control characters shown: names come from storage, and may be any.

    Args:
        text: what is shown.
        lines: whether it has several, which are ours.
    """
    return "".join(
        each
        # Not control characters alone: also what turns the direction of text, as U+202E.
        if each.isprintable() or (lines and each == "\n")
        else each.encode("unicode_escape").decode()
        for each in text
    )


def size(nbytes: int | None) -> str:
    """Return a size as people read it, in units of 1,000."""
    if nbytes is None:
        return "?"
    number = float(nbytes)
    for unit in ("B", "kB", "MB", "GB", "TB"):
        if number < 1000:
            return f"{number:.0f} {unit}" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:,.1f} PB"


def age(created: datetime | None) -> str:
    """Return how long ago that was."""
    # The manifest cannot be read, and its time stands in no other place.
    if created is None:
        return "?"
    seconds = (datetime.now(UTC) - created).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    # The clock of the host that saved may be ahead of ours.
    return f"{max(seconds, 0):.0f} s"


def show_number(value: float | None) -> str:
    """Return a metric, short; "" for None."""
    return "" if value is None else f"{value:.6g}"


def table(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> None:
    """Print a table.

    Args:
        columns: the title of each, and "left" or "right".
        rows: the cells of each.
    """
    if not sys.stdout.isatty() and "COLUMNS" not in os.environ:
        # For programs one line each; and rich takes a second for a thousand of them.
        write("".join(f"{line}\n" for line in _lines(columns, rows)))
        return
    titles = [escaped(title) for title, _ in columns]
    cells = [list(map(escaped, row)) for row in rows]
    screen = console()
    texts = list(zip(titles, *cells, strict=True))
    least = [
        _least_width(column, justify) for column, (_, justify) in zip(texts, columns, strict=True)
    ]
    between = len(columns) - 1
    # A number that is cut is wrong, and a name of three letters a line is no name.
    if sum(least) + between > screen.width:
        for row in cells:
            _print_apart(screen, titles, row)
        return
    roomy = sum(max(map(len, column)) for column in texts) + 2 * between <= screen.width
    shown = Table(
        box=None,
        pad_edge=False,
        padding=(0, 1) if roomy else (0, 1, 0, 0),
        header_style="bold",
        show_header=any(titles),
    )
    for title, (_, justify), width in zip(titles, columns, least, strict=True):
        # What does not fit is folded: nothing of a name is ever left out.
        shown.add_column(
            title,
            justify="right" if justify == "right" else "left",
            overflow="fold",
            min_width=width,
        )
    for row in cells:
        shown.add_row(*row)
    _print(screen, shown)


def _least_width(column: Sequence[str], justify: str) -> int:
    """Return how narrow a column can be read: numbers whole, names folded."""
    title, *cells = column
    folded = [title] if justify == "right" else column
    # A cell is folded between words, so the longest is what it needs.
    words = (len(word) for text in folded for word in text.split())
    # A number in two lines reads as two.
    whole = cells if justify == "right" else ()
    return max(min(max(words, default=0), _FOLDED), *map(len, whole), 0)


def _print_apart(screen: Console, titles: Sequence[str], row: Sequence[str]) -> None:
    """Print a row of more columns than the screen has room for, a line for each."""
    shown = Table(box=None, pad_edge=False, show_header=False)
    shown.add_column(style="bold")
    shown.add_column(overflow="fold")
    for title, cell in zip(titles, row, strict=True):
        shown.add_row(title, cell)
    _print(screen, shown)
    write("\n")


def _print(screen: Console, shown: Table) -> None:
    with screen.capture() as printed:
        screen.print(shown)
    # rich fills lines up with blanks, which whoever copies one would take along.
    write("".join(f"{line.rstrip()}\n" for line in printed.get().splitlines()))


def _lines(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    titles = [escaped(title) for title, _ in columns]
    # Without titles there is no empty line for them.
    cells = [titles] * any(titles) + [list(map(escaped, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if justify == "right" else cell.ljust(width)
            for cell, width, (_, justify) in zip(row, widths, columns, strict=True)
        ).rstrip()
