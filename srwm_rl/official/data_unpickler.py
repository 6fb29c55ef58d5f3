"""Pickles read as data: nothing that a file names is looked up, imported or called.

`pickletools.genops` splits the bytes into operations, which build Python's own containers here. Classes, functions and
their calls become placeholders.

`torch.load(weights_only=True)` does not replace this. It refuses the numpy numbers that the authors' learner stores in
every checkpoint; a key of nested tuples keeps it hashing for ever; and it calls `bytearray(n)` and `torch.Tensor(n)`
with any `n`. `tests/srwm_rl/hostile/hostile_corpus.py` has such files.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from srwm_rl.errors import UserError

MAX_BYTES = 2**22  # a million operations take about two seconds
# Types of a dictionary's keys: hashing tuples that share their items takes exponential time.
KEYS = (str, int, float, bool, bytes, type(None))


@dataclass(frozen=True, eq=False)
class Named:
    """The class or function "module.name", or what it would make of `arguments`; its later state is dropped."""

    name: str
    arguments: tuple[Any, ...] | None = None  # None: it is not called


@dataclass(frozen=True, eq=False)
class PersistentId:
    """A reference to an object that the pickle does not hold."""

    value: Any


def read_pickle(data: bytes) -> Any:
    """Return what a pickle of any protocol describes: containers, texts, bytes, numbers, None and placeholders.

    Raises:
        UserError: the pickle is damaged, too long, or has operations that no checkpoint needs.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"its pickle has {len(data):,} bytes; at most {MAX_BYTES:,} are read")
    machine = _Machine()
    try:
        for operation, argument, _ in pickletools.genops(data):  # raises a ValueError where the end is missing
            machine.execute(operation, argument)
        return machine.stack.pop()
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError("its pickle is damaged") from error


def _dict(items: list[Any]) -> dict[Any, Any]:
    keys = items[::2]
    if len(items) % 2 or not all(isinstance(key, KEYS) for key in keys):
        raise TypeError("keys")
    return dict(zip(keys, items[1::2], strict=True))


def _call(pair: list[Any]) -> Any:
    function, arguments = pair
    if not isinstance(function, Named) or not isinstance(arguments, tuple):
        raise TypeError("call")
    if function.name == "collections.OrderedDict" and not arguments:
        return {}  # torch adds the items later
    return Named(function.name, arguments)


LITERALS = (
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
)  # fmt: skip
# What an operation pushes, made of its argument or of the items that it takes from the stack.
MAKE: dict[str, Callable[[list[Any]], Any]] = {
    **dict.fromkeys(LITERALS, lambda items: items[0]),
    "NONE": lambda _: None,
    "NEWTRUE": lambda _: True,
    "NEWFALSE": lambda _: False,
    **dict.fromkeys(("EMPTY_TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "TUPLE"), tuple),
    **dict.fromkeys(("EMPTY_LIST", "LIST"), list),
    **dict.fromkeys(("EMPTY_DICT", "DICT"), _dict),
    **dict.fromkeys(("EMPTY_SET", "FROZENSET"), lambda _: Named("set")),
    **dict.fromkeys(("OBJ", "INST", "NEWOBJ", "NEWOBJ_EX"), lambda _: Named("object")),
    **dict.fromkeys(("GLOBAL", "STACK_GLOBAL"), lambda names: Named(" ".join(names).replace(" ", ".", 1))),
    "REDUCE": _call,
    "BUILD": lambda pair: pair[0],  # an object and its state
    "BINPERSID": lambda items: PersistentId(items[0]),
}
# What an operation adds items to.
UPDATES = {"APPEND": list, "APPENDS": list, "SETITEM": dict, "SETITEMS": dict, "ADDITEMS": Named}


class _Machine:
    """The unpickler's stack, marks and memo."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marked: list[list[Any]] = []  # the stacks below the open marks
        self.memo: dict[int, Any] = {}

    def execute(self, operation: pickletools.OpcodeInfo, argument: Any) -> None:
        name, before = operation.name, operation.stack_before
        if name in MAKE:
            items = self._take(before)
            self.stack.append(MAKE[name](items if argument is None else [argument]))
        elif name in UPDATES:
            _update(UPDATES[name], self._take(before[1:]), self.stack[-1])
        elif name == "MARK":
            self.marked.append(self.stack)
            self.stack = []
        elif name in ("POP", "POP_MARK"):
            self._take(before if self.stack else [pickletools.markobject])  # Python's unpickler pops a mark, too
        elif name == "DUP":
            self.stack.append(self.stack[-1])
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = self.stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            self.stack.append(self.memo[argument])
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UserError(f"its pickle has an operation {name}, which no checkpoint needs")

    def _take(self, needed: list[pickletools.StackObject]) -> list[Any]:
        """Take the items above the last mark, or as many as are needed."""
        if pickletools.markobject not in needed:
            return [self.stack.pop() for _ in needed][::-1]
        items, self.stack = self.stack, self.marked.pop()
        return items


def _update(kind: type, items: list[Any], target: Any) -> None:
    """Add items to a list or a dict; those of an object that is not made are dropped."""
    new = _dict(items) if kind is dict else items
    if isinstance(target, list) and kind is list:
        target.extend(new)
    elif isinstance(target, dict) and kind is dict:
        target.update(new)
    elif not isinstance(target, Named):
        raise TypeError(kind)
