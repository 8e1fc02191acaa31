"""What a `torch.save` file holds, leaf by leaf."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from dist_ckpt.foreign.leaves import DictKey, Path, TupleKey
from dist_ckpt.foreign.names import path_as_text
from dist_ckpt.foreign.torch_files import TorchTensor, describe_file
from dist_ckpt.foreign.torch_values import unknown_in, what_of
from dist_ckpt.state.encoding import Unreadable
from dist_ckpt.storage.base import Store


def torch_leaves(store: Store, key: str) -> Iterator[tuple[Path, Any]]:
    """Yield each leaf of the file under `key`, with the keys that lead there.

    A `TorchTensor` for a tensor, an `Unreadable` for what only a program could read that executes
    pickles, and any other value itself.

    Raises:
        CheckpointError: see `dist_ckpt.foreign.torch_files.describe_file`.
    """
    for path, leaf in _leaves(describe_file(store, key, lenient=True), ()):
        unknown = None if isinstance(leaf, TorchTensor) else unknown_in(leaf)
        if unknown is None:
            yield path, leaf
        else:
            yield path, Unreadable(f"{path_as_text(path)}: {what_of(unknown)}")


def _leaves(value: Any, path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield the tensors in dicts, lists and tuples, and all without any, with the keys to there.

    The state of an optimizer is taken apart without tensors, too: it may have none yet.
    """
    apart = (isinstance(value, dict) and value and path == ()) or _has_tensor(value)
    # By keys that nobody can read nothing has a name, or two have one.
    if isinstance(value, dict) and apart and unknown_in([*value]) is None:
        for key, item in value.items():
            # A number that was a key is no position in a list.
            yield from _leaves(item, (*path, DictKey(key) if type(key) is int else key))
    elif isinstance(value, list) and apart:
        for at, item in enumerate(value):
            yield from _leaves(item, (*path, at))
    elif type(value) is tuple and apart:
        for at, item in enumerate(value):
            yield from _leaves(item, (*path, TupleKey(at)))
    else:
        # A file may hold one value and no dict: then this is its name.
        yield path or ("value",), value


def _has_tensor(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_is_of_group, value)) or any(map(_has_tensor, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_has_tensor, value))
    return isinstance(value, TorchTensor)


def _is_of_group(key: Any) -> bool:
    return type(key) is str and key.partition(".")[0] == "param_groups"
