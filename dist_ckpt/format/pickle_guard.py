"""Bounds on a pickle stream before any unpickler sees it: nothing in it is built or called."""

from __future__ import annotations

import pickletools
from typing import Any

_MAX_TUPLE_DEPTH = 32
_KEEPS = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD"})


def check_pickle(data: bytes) -> None:
    """Refuse a stream with which the C unpickler would exhaust memory or the stack.

    A memo index is an array index there: five bytes could ask for 64 GiB. And the hash of a tuple
    goes down its nesting on the C stack, unguarded: as a key of a dict it ends the process.

    Raises:
        ValueError: such a stream, or none at all.
    """
    stack: list[int | None] = []  # how deep tuples nest in each value; None is a mark
    memo: dict[int, int] = {}
    for op, arg, _ in pickletools.genops(data):
        name = op.name
        number = arg if isinstance(arg, int) else 0
        if name == "MARK":
            stack.append(None)
        elif name == "MEMOIZE":
            memo[len(memo)] = stack[-1] or 0
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            if number > len(data):
                raise ValueError(f"it numbers a value {number}, and has not so many")
            memo[number] = stack[-1] or 0
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[number])
        elif name == "DUP":
            stack.append(stack[-1])
        else:
            _apply(name, op, stack)


def _apply(name: str, op: pickletools.OpcodeInfo, stack: list[Any]) -> None:
    before = op.stack_before
    taken: list[int] = []
    if pickletools.markobject in before:
        while (depth := stack.pop()) is not None:
            taken.append(depth)
        taken += [stack.pop() for _ in range(before.index(pickletools.markobject))]
    else:
        taken = [stack.pop() for _ in before]
    for _ in op.stack_after:
        deepest = max(taken, default=0)
        grows = name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "REDUCE", "NEWOBJ", "NEWOBJ_EX")
        depth = deepest + 1 if grows else deepest if name in _KEEPS else 0
        if depth > _MAX_TUPLE_DEPTH:
            raise ValueError(f"it nests tuples more than {_MAX_TUPLE_DEPTH} deep")
        stack.append(depth)
