"""Which releases of a framework were tried, said once to whoever has another one."""

from __future__ import annotations

import logging
import re
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from dist_ckpt import __version__

_log = logging.getLogger("dist_ckpt")


@cache
def warn_if_untested(package: str, *, first: str, last: str) -> None:
    """Warn, once per process, when the installed `package` is none of the releases tried.

    It may work all the same, so nothing is refused.

    Args:
        package: as pip calls it.
        first: the first release tried, such as "5.24".
        last: the last one; "5.24" stands for all of 5.24.
    """
    try:
        found = version(package)
    except PackageNotFoundError:  # run from a source tree that was never installed
        found = "of an unknown release"
    newest = _numbers(last)
    # No further than `last` goes: 5.24.1 is a release of 5.24.
    if _numbers(first) <= _numbers(found) and _numbers(found)[: len(newest)] <= newest:
        return
    _log.warning(
        "%s %s was not tried with dist_ckpt %s, %s was: try a resume before you rely on it",
        package,
        found,
        __version__,
        first if first == last else f"{first} to {last}",
    )


def _numbers(release: str) -> tuple[int, ...]:
    """Return the numbers that `release` begins with: (5, 24) of "5.24rc1+local"."""
    found = re.match(r"\d+(\.\d+)*", release)
    return tuple(map(int, found[0].split("."))) if found else ()
