"""How things are shown: tables and sizes for people, JSON for programs."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.table import Table

_NARROW = 60
_WIDE = 200


def console() -> Console:
    """Return what is printed on, as wide as the terminal."""
    width = shutil.get_terminal_size((_WIDE, 24)).columns
    return Console(width=max(width, _NARROW), highlight=False, markup=False, emoji=False)


def write(text: str, *, flush: bool = False) -> None:
    """Write to standard output; who reads there may have seen enough: `dist-ckpt ls | head`."""
    try:
        sys.stdout.write(text)
        if flush:
            sys.stdout.flush()
    except BrokenPipeError:
        # Else the interpreter would try once more at its end, and complain.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)


def clear() -> None:
    """Let what follows be at the top of the screen, where there is one."""
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
    write(f"{json.dumps(finite(value), indent=None if lines else 2, ensure_ascii=False)}\n")


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


def escaped(text: str) -> str:
    """Return `text` with its control characters shown: names come from storage, and may be any."""
    return "".join(
        each if each.isprintable() or each == "\n" else each.encode("unicode_escape").decode()
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
    if created is None:
        return "?"
    seconds = (datetime.now(UTC) - created).total_seconds()
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
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
    titled = any(title for title, _ in columns)
    shown = Table(box=None, pad_edge=False, header_style="bold", show_header=titled)
    for title, justify in columns:
        # What does not fit is folded: nothing of a name is ever left out.
        shown.add_column(title, justify="right" if justify == "right" else "left", overflow="fold")
    for row in rows:
        shown.add_row(*map(escaped, row))
    screen = console()
    with screen.capture() as printed:
        screen.print(shown)
    write("\n".join(line.rstrip() for line in printed.get().splitlines()) + "\n")


def _lines(columns: Sequence[tuple[str, str]], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    titles = [title for title, _ in columns]
    cells = [titles] * any(titles) + [list(map(escaped, row)) for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(
            cell.rjust(width) if justify == "right" else cell.ljust(width)
            for cell, width, (_, justify) in zip(row, widths, columns, strict=True)
        ).rstrip()
