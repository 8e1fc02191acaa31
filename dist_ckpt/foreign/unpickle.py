"""Reading a pickle without building or calling anything that it names.

The stream is interpreted here, not by `pickle`: a name becomes a stand-in that is made for this one
call, an instance becomes a `Made` that only holds what would have made it, and what is called is
only what the caller lists, in versions of its own. No class of the process is handed out, so
nothing in a stream can change one.

The work is bounded by the length of the stream. What a few bytes could blow up (keys whose hashes
go down deep or collide, values that share one another, copies of long ones) is paid for out of a
budget, and a stream that overdraws it is refused.
"""

from __future__ import annotations

import pickletools
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from dist_ckpt.foreign.stand_ins import Constructor, Kind, Made, Names, Unknown
from dist_ckpt.format.names import HashCounts

_FREE_NODES = 1 << 20
_NODES_PER_BYTE = 4
# Should all of them collide, that is some 32,000 comparisons.
_FEW_KEYS = 256


def unpickle(data: bytes, names: Names, *, refer: Callable[[Any], Any] | None = None) -> Any:
    """Return what the pickle `data` describes.

    Args:
        data: the stream, of any protocol.
        names: see `Names`.
        refer: returns what a persistent reference stands for; None where there is none of them.

    Raises:
        ValueError: no pickle; it names, calls or builds something that it may not, or takes more
            work than its length allows. Constructors and `refer` may raise anything else.
    """
    machine = _Machine(len(data), names, refer)
    # Reads nothing ahead and makes nothing but numbers and text; a claimed length is not believed.
    for op, argument, _ in pickletools.genops(data):
        if op.name in _PLAIN:
            machine.stack.append(argument)
        else:
            machine.step(op.name, argument)
    return machine.result()


class _Mark:
    """What separates the operands on the stack; made once for a stream."""


class _Machine:
    """The stack and the memo of one stream."""

    def __init__(self, nbytes: int, names: Names, refer: Callable[[Any], Any] | None) -> None:
        self._names = names
        self._refer = refer
        self.stack: list[Any] = []
        self._mark = _Mark()
        self._memo: dict[int, Any] = {}
        self._left = _FREE_NODES + _NODES_PER_BYTE * nbytes
        self._limit = self._left
        # By identity, of what has many keys; it is kept too, or another could get its identity.
        self._hashes: dict[int, tuple[Any, HashCounts]] = {}

    def step(self, name: str, argument: Any) -> None:
        todo = _STEPS.get(name)
        if todo is not None:
            todo(self, argument)
        elif name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name not in _IGNORED:
            raise ValueError(f"it uses {name}, for which there is no use here")

    def result(self) -> Any:
        value = self._pop()
        if self.stack:
            raise ValueError("it leaves values behind")
        # Once at the end: what was built may still have been shared after each step.
        _check_tree(value, self._limit)
        return value

    def _spend(self, nodes: int) -> None:
        """Pay for work that is not in proportion to the bytes that asked for it."""
        self._left -= nodes
        if self._left < 0:
            raise ValueError("it asks for more work than its length allows")

    def mark(self, _: Any) -> None:
        self.stack.append(self._mark)

    def pop(self, _: Any) -> None:
        if not self.stack:
            raise ValueError("it takes more than there is")
        self.stack.pop()

    def pop_mark(self, _: Any) -> None:
        self._marked()

    def dup(self, _: Any) -> None:
        self.stack.append(self._top())

    def put(self, number: Any) -> None:
        self._memo[int(number)] = self._top()

    def memoize(self, _: Any) -> None:
        self._memo[len(self._memo)] = self._top()

    def get(self, number: Any) -> None:
        if int(number) not in self._memo:
            raise ValueError(f"it refers to value {number}, which it does not number")
        self.stack.append(self._memo[int(number)])

    def some(self, count: int) -> tuple[Any, ...]:
        """Take the uppermost `count` values."""
        return tuple(reversed([self._pop() for _ in range(count)]))

    def make_tuple(self, _: Any) -> None:
        self.stack.append(tuple(self._marked()))

    def make_tuple_of(self, count: int) -> None:
        self.stack.append(self.some(count))

    def make_list(self, _: Any) -> None:
        self.stack.append(self._marked())

    def make_dict(self, _: Any) -> None:
        items = self._marked()
        self.stack.append({})
        self._set(items)

    def make_frozenset(self, _: Any) -> None:
        items = self._marked()
        self._check_keys(items, items)
        self.stack.append(frozenset(items))

    def append(self, _: Any) -> None:
        self._extend([self._pop()])

    def appends(self, _: Any) -> None:
        self._extend(self._marked())

    def _extend(self, items: list[Any]) -> None:
        # An unknown one is not added to: neither here nor below does it keep anything.
        if type(self._top()) is not Unknown:
            self._of(list).extend(items)

    def set_item(self, _: Any) -> None:
        self._set(list(self.some(2)))

    def set_items(self, _: Any) -> None:
        self._set(self._marked())

    def add_items(self, _: Any) -> None:
        items = self._marked()
        if type(self._top()) is Unknown:
            return
        found: set[Any] = self._of(set)
        self._check_keys(found, items)
        found.update(items)

    def name(self, argument: Any) -> None:
        # By genops both halves come as one text, and no module has a space in its name.
        module, _, name = str(argument).partition(" ")
        self.stack.append(self._names(module, name))

    def stack_name(self, _: Any) -> None:
        module, name = self.some(2)
        if type(module) is not str or type(name) is not str:
            raise ValueError("it refers to a name that is no text")
        self.stack.append(self._names(module, name))

    def reduce(self, _: Any) -> None:
        called, arguments = self.some(2)
        self.stack.append(self._made(called, arguments))

    def new_with_keywords(self, _: Any) -> None:
        called, arguments, keywords = self.some(3)
        if type(called) is not Unknown and (type(keywords) is not dict or keywords):
            raise ValueError("it makes something with keywords")
        self.stack.append(self._made(called, arguments))

    def build(self, _: Any) -> None:
        state = self._pop()
        target = self._top()
        if type(target) is OrderedDict or type(target) is Unknown:
            return  # what torch notes beside a state dict: no attribute of anything is set here
        # Of a fresh stand-in, once: never of a class, or of anything that the process has.
        if type(target) is not Made or target.state is not None:
            raise ValueError(f"it sets the state of a {type(target).__name__}")
        target.state = state

    def persistent(self, argument: Any) -> None:
        self.stack.append(self._referred(argument))

    def persistent_on_stack(self, _: Any) -> None:
        self.stack.append(self._referred(self._pop()))

    def _referred(self, saved: Any) -> Any:
        if self._refer is None:
            raise ValueError("it refers to something outside of itself")
        return self._refer(saved)

    def _made(self, called: Any, arguments: Any) -> Any:
        if type(arguments) is not tuple:
            raise ValueError("it calls something with no tuple of arguments")
        if type(called) is Unknown:
            return called  # what it is given is dropped: a stream pays for it by having it
        if type(called) is Kind:
            return Made(called, arguments)
        if type(called) is not Constructor:
            raise ValueError(f"it calls a {type(called).__name__}")
        # A call copies what it is given: as often as a stream asks for it.
        self._spend(sum(map(_nodes_of, arguments)))
        # Before the call, as a set hashes what it is given.
        if called.hashes:
            for each in arguments:
                self._check_keys(each, each)
        return called.call(*arguments)

    def _check_keys(self, target: Any, keys: Iterable[Any]) -> None:
        """See that `keys` can go into `target`, and pay for their hashes."""
        listed = list(keys)
        for key in listed:
            # A text keeps its hash, and its length is paid for by the stream that has it.
            if type(key) is not str:
                self._spend(_hash_nodes(key))
        if len(target) + len(listed) <= _FEW_KEYS:
            return
        kept = self._hashes.get(id(target))
        if kept is None:
            counts = HashCounts()
            if target is not keys:
                counts.add(target)
            kept = self._hashes[id(target)] = target, counts
        kept[1].add(listed)

    def _set(self, items: list[Any]) -> None:
        if len(items) % 2:
            raise ValueError("it has a key without a value")
        target = self._top()
        if type(target) is Unknown:
            return
        if type(target) is not dict and type(target) is not OrderedDict:
            raise ValueError(f"it sets items of a {type(target).__name__}")
        keys = items[::2]
        self._check_keys(target, keys)
        target.update(zip(keys, items[1::2], strict=True))

    def _of(self, kind: type) -> Any:
        target = self._top()
        if type(target) is not kind:
            raise ValueError(f"it adds to a {type(target).__name__}")
        return target

    def _top(self) -> Any:
        if not self.stack or self.stack[-1] is self._mark:
            raise ValueError("it takes more than there is")
        return self.stack[-1]

    def _pop(self) -> Any:
        # Never the mark: no operand is taken from below it.
        self._top()
        return self.stack.pop()

    def _marked(self) -> list[Any]:
        items: list[Any] = []
        while self.stack:
            item = self.stack.pop()
            if item is self._mark:
                items.reverse()
                return items
            items.append(item)
        raise ValueError("it takes more than there is")


_PLAIN = frozenset(
    {
        *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
        *("STRING", "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"),
        *("UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8", "BYTEARRAY8"),
    }
)
# FRAME claims a length, which nothing here relies on.
_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
# What is not here is refused: numbers of a registry (EXT1, EXT2, EXT4), instances of old classes
# (INST, OBJ), which no program writes any more, and memory out of band.
_STEPS: Mapping[str, Callable[[_Machine, Any], None]] = {
    "MARK": _Machine.mark,
    "POP": _Machine.pop,
    "POP_MARK": _Machine.pop_mark,
    "DUP": _Machine.dup,
    "PUT": _Machine.put,
    "BINPUT": _Machine.put,
    "LONG_BINPUT": _Machine.put,
    "MEMOIZE": _Machine.memoize,
    "GET": _Machine.get,
    "BINGET": _Machine.get,
    "LONG_BINGET": _Machine.get,
    "TUPLE": _Machine.make_tuple,
    "TUPLE1": lambda machine, _: machine.make_tuple_of(1),
    "TUPLE2": lambda machine, _: machine.make_tuple_of(2),
    "TUPLE3": lambda machine, _: machine.make_tuple_of(3),
    "LIST": _Machine.make_list,
    "DICT": _Machine.make_dict,
    "FROZENSET": _Machine.make_frozenset,
    "APPEND": _Machine.append,
    "APPENDS": _Machine.appends,
    "SETITEM": _Machine.set_item,
    "SETITEMS": _Machine.set_items,
    "ADDITEMS": _Machine.add_items,
    "GLOBAL": _Machine.name,
    "STACK_GLOBAL": _Machine.stack_name,
    "REDUCE": _Machine.reduce,
    "NEWOBJ": _Machine.reduce,
    "NEWOBJ_EX": _Machine.new_with_keywords,
    "BUILD": _Machine.build,
    "PERSID": _Machine.persistent,
    "BINPERSID": _Machine.persistent_on_stack,
}


# What the values of a pickle cost whoever hashes, copies or walks over them.


# A tenth of what Python lets a recursion have: whoever walks over the value may recurse.
MAX_DEPTH = 100
_MAX_KEY_NODES = 1000
_TEXT_PER_NODE = 16
_INT_BITS_PER_NODE = 256


def _hash_nodes(key: Any) -> int:
    """Return how many values the hash of `key` goes through; it goes down tuples, unguarded.

    Raises:
        ValueError: they are too many, or too deep.
    """
    if type(key) is int:
        return 1 + key.bit_length() // _INT_BITS_PER_NODE
    if type(key) is not tuple:
        return 1
    nodes, depth, level = 0, 0, [key]
    while level:
        nodes += len(level)
        depth += 1
        tuples = [each for each in level if type(each) is tuple]
        # A tuple twice in another, and that twice in a third, counts as often as it is met.
        if nodes + sum(map(len, tuples)) > _MAX_KEY_NODES or depth > MAX_DEPTH:
            raise ValueError("it has a key that is too large to be one")
        level = [item for each in tuples for item in each]
    return nodes


def _nodes_of(value: Any) -> int:
    """Return what a copy of `value`, without what is in its items, costs."""
    if isinstance(value, bytes | bytearray):
        # Each is written once: only text, as the names of parameters, is shared to save bytes.
        return 1 + len(value)
    if isinstance(value, str):
        return 1 + len(value) // _TEXT_PER_NODE
    if isinstance(value, list | tuple | dict | set | frozenset):
        return 1 + len(value)
    if isinstance(value, int):
        return 1 + value.bit_length() // _INT_BITS_PER_NODE
    return 1


def _check_tree(value: Any, limit: int) -> None:
    """Refuse a value that is small only because it shares its pieces, or that is in itself.

    Whoever walks over it later meets a shared piece as often as it is shared.

    Raises:
        ValueError: it has more than `limit` values in it, or they nest too deep.
    """
    left = limit
    walk: list[Iterator[Any]] = [iter((value,))]
    while walk:
        for item in walk[-1]:
            kind = type(item)
            inner = () if kind is str or kind is int else _inside(item)
            left -= 1 if inner else _nodes_of(item)
            if left < 0:
                raise ValueError("its values share one another until there are too many")
            if inner:
                # Iterators in a list and no recursion: here it is that too deep is found out.
                walk.append(iter(inner))
                break
        else:
            walk.pop()
        if len(walk) > MAX_DEPTH:
            raise ValueError(f"it nests more than {MAX_DEPTH} deep, or is in itself")


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    if isinstance(value, list | tuple | set | frozenset):
        return value
    if type(value) is Made:
        return (value.arguments, value.state)
    return ()
