"""Keys around the parts of a state dict, which are left away, and one that is missing."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from dist_ckpt.foreign.leaves import ForeignLeaf, Path, dotted
from dist_ckpt.foreign.optimizers import OPTIMIZER_KEYS, is_optimizer_name

_OPTIMIZER, _SCHEDULER = "optimizer", "scheduler"
_SCHEDULER_KEYS = ("last_epoch", "_step_count")


def unwrapped(
    entries: Sequence[ForeignLeaf], *, guessed: bool, whole: Collection[str] = ()
) -> list[Path]:
    """Return the paths of `entries` as they lie in a dict of parts.

    Args:
        entries: the leaves.
        guessed: whether the second key of a path is a name, perhaps of several keys.
        whole: what is a part for certain, whatever lies in it.
    """
    paths = [entry.path for entry in entries]
    names = [dotted(path).split(".") for path in paths]
    if all(map(is_optimizer_name, names)) and any(name[0] == "param_groups" for name in names):
        return [(_OPTIMIZER, *path) for path in paths]  # it was saved by itself
    if {path[0] for path in paths}.issuperset(_SCHEDULER_KEYS):
        return [(_SCHEDULER, *path) for path in paths]  # and so was this
    cut = [_cut(path) for path in paths] if guessed else paths
    tops: dict[Any, list[Path]] = {}
    for path in cut:
        tops.setdefault(path[0], []).append(path)
    outer = {
        top
        for top, mine in tops.items()
        if top not in whole and _is_around(mine, doubtful=guessed or len(tops) > 1)
    }
    inner = [path[1] for top in outer for path in tops[top]]
    if len(outer) != 1 or not (tops.keys() - outer).isdisjoint(map(str, inner)):
        return paths
    return [
        inner[1:] if inner[0] in outer else path for path, inner in zip(paths, cut, strict=True)
    ]


def _cut(path: Path) -> Path:
    """Return a path of two keys with the first component of the second set apart."""
    if len(path) != 2 or type(path[1]) is not str:
        return path
    return (path[0], *path[1].split(".", 1))


def _is_around(paths: Sequence[Path], *, doubtful: bool) -> bool:
    """Tell whether the first key of `paths`, the same in all, lies around parts.

    Args:
        paths: all that it begins.
        doubtful: whether it may be a part itself, and must prove to be none.
    """
    if not all(len(path) > 1 for path in paths):
        return False
    inner = {path[1] for path in paths}
    # An optimizer beside something else: alone it may be one of several.
    optimizers = {path[1] for path in paths if dotted(path[2:]).split(".")[0] == "param_groups"}
    if optimizers and inner - optimizers and optimizers.isdisjoint(OPTIMIZER_KEYS):
        return True
    deep = all(len(path) > 2 for path in paths)
    return deep and not doubtful and not inner.issubset(OPTIMIZER_KEYS)
