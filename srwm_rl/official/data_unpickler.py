"""Pickles read as data: nothing that a file names is looked up, imported or called.

`pickletools.genops` splits the bytes into operations; what these would build is built here of Python's own containers.
For everything else that the file names stands a placeholder that does nothing.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from srwm_rl.errors import UserError


@dataclass(frozen=True)
class Global:
    """A class or function that the file names, as "module.name"."""

    name: str


@dataclass(frozen=True)
class Opaque:
    """What only the file's own code could have made; what made it, and with what, is forgotten."""

    name: str


Builder = Callable[..., Any]
LITERALS = {
    "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
    "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8",
    "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8",
}  # fmt: skip
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
# What a dictionary's key may be: to hash a tuple of tuples of tuples can take longer than anyone waits.
KEYS = (str, int, float, bool, bytes, type(None))


def read_pickle(
    data: bytes, builders: Mapping[str, Builder], persistent: Callable[[Any], Any], most_bytes: int = 2**22
) -> Any:
    """Return what a pickle describes, in dicts, lists, tuples, texts, bytes, numbers, None and placeholders.

    Args:
        data: the pickle, of any protocol.
        builders: functions of ours in place of the file's, by "module.name"; they get the arguments in the file.
        persistent: turns a persistent id into an object of ours.
        most_bytes: the longest pickle to read; a million operations take some two seconds.

    Raises:
        UserError: the pickle is damaged, too long, or has operations that no checkpoint needs.
    """
    if len(data) > most_bytes:
        raise UserError(f"its pickle has {len(data):,} bytes, more than the {most_bytes:,} that are read")
    machine = _Machine(builders, persistent)
    try:
        for operation, argument, _ in pickletools.genops(data):
            if operation.name == "STOP":
                return machine.stack.pop()
            machine.do(operation.name, argument)
    except UserError:
        raise
    except (ValueError, IndexError, KeyError, TypeError) as error:
        raise UserError("its pickle is damaged") from error
    raise UserError("its pickle is damaged: it has no end")


class _Machine:
    """The unpickler's stack, marks and memo. `_op_<name>` does the operation that `pickletools` gives that name."""

    def __init__(self, builders: Mapping[str, Builder], persistent: Callable[[Any], Any]) -> None:
        self.builders, self.persistent = builders, persistent
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []  # what lay under each open mark
        self.memo: dict[int, Any] = {}

    def do(self, name: str, argument: Any) -> None:
        if name in LITERALS:
            self.stack.append(argument)
        elif name in CONSTANTS:
            self.stack.append(CONSTANTS[name])
        elif name in TUPLES:
            self.stack.append(tuple(self._last(TUPLES[name])))
        else:
            action = getattr(self, f"_op_{name.lower()}", None)  # the name is pickletools' own, not the file's
            if action is None:
                raise UserError(f"its pickle has an operation {name}, which no checkpoint needs")
            action(argument)

    def _last(self, n: int) -> list[Any]:
        if n > len(self.stack):
            raise IndexError(n)
        taken = self.stack[len(self.stack) - n :]
        del self.stack[len(self.stack) - n :]
        return taken

    def _since_mark(self) -> list[Any]:
        taken, self.stack = self.stack, self.below.pop()
        return taken

    def _op_proto(self, version: int) -> None:
        pass

    _op_frame = _op_proto

    def _op_mark(self, _: None) -> None:
        self.below.append(self.stack)
        self.stack = []

    def _op_pop(self, _: None) -> None:
        # Python's own unpickler takes a mark that lies on top, too.
        if self.stack:
            self.stack.pop()
        else:
            self._since_mark()

    def _op_pop_mark(self, _: None) -> None:
        self._since_mark()

    def _op_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def _op_put(self, index: int) -> None:
        self.memo[index] = self.stack[-1]

    _op_binput = _op_long_binput = _op_put

    def _op_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    def _op_get(self, index: int) -> None:
        self.stack.append(self.memo[index])

    _op_binget = _op_long_binget = _op_get

    def _op_tuple(self, _: None) -> None:
        items = tuple(self._since_mark())
        self.stack.append(items)

    def _op_empty_list(self, _: None) -> None:
        self.stack.append([])

    def _op_list(self, _: None) -> None:
        items = self._since_mark()
        self.stack.append(items)

    def _op_append(self, _: None) -> None:
        self._extend(self._last(1))

    def _op_appends(self, _: None) -> None:
        self._extend(self._since_mark())

    def _extend(self, items: list[Any]) -> None:
        target = self.stack[-1]
        if isinstance(target, list):
            target.extend(items)
        elif not isinstance(target, Opaque):
            raise TypeError(target)

    def _op_empty_dict(self, _: None) -> None:
        self.stack.append({})

    def _op_dict(self, _: None) -> None:
        items = self._since_mark()
        self.stack.append({})
        self._update(items)

    def _op_setitem(self, _: None) -> None:
        self._update(self._last(2))

    def _op_setitems(self, _: None) -> None:
        self._update(self._since_mark())

    def _update(self, items: list[Any]) -> None:
        target = self.stack[-1]
        keys = items[::2]
        if len(items) % 2 or not all(isinstance(key, KEYS) for key in keys):
            raise TypeError("keys")
        if isinstance(target, dict):
            target.update(zip(keys, items[1::2], strict=True))
        elif not isinstance(target, Opaque):
            raise TypeError(target)

    def _op_global(self, name: str) -> None:
        self.stack.append(Global(name.replace(" ", ".", 1)))

    def _op_stack_global(self, _: None) -> None:
        module, name = self._last(2)
        if not (isinstance(module, str) and isinstance(name, str)):
            raise TypeError(module)
        self.stack.append(Global(f"{module}.{name}"))

    def _op_reduce(self, _: None) -> None:
        function, arguments = self._last(2)
        if not isinstance(function, Global | Opaque) or not isinstance(arguments, tuple):
            raise TypeError(function)
        builder = self.builders.get(function.name) if isinstance(function, Global) else None
        self.stack.append(builder(*arguments) if builder else Opaque(function.name))

    def _op_build(self, _: None) -> None:
        target, _attributes = self._last(2)  # a plain container has no attributes that matter
        self.stack.append(target)

    def _op_newobj(self, _: None) -> None:
        self._last(2)
        self.stack.append(Opaque("object"))

    def _op_newobj_ex(self, _: None) -> None:
        self._last(3)
        self.stack.append(Opaque("object"))

    def _op_obj(self, _: None) -> None:
        self._since_mark()
        self.stack.append(Opaque("object"))

    def _op_inst(self, name: str) -> None:
        self._since_mark()
        self.stack.append(Opaque(name))

    def _op_empty_set(self, _: None) -> None:
        self.stack.append(Opaque("set"))

    def _op_additems(self, _: None) -> None:
        self._since_mark()

    _op_frozenset = _op_obj

    def _op_binpersid(self, _: None) -> None:
        self.stack.append(self.persistent(self._last(1)[0]))
