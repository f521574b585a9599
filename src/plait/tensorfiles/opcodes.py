"""Reads a pickle of tensors as data: nothing is imported or called; the results are tuples, lists, dicts and descriptions.

`torch.save` writes a pickle that calls functions of torch with storages. Here each such call becomes a `FunctionCall`, which
`plait.tensorfiles.pickled` recognizes as a tensor, or refuses.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, Final, NamedTuple

_MARK: Final = object()
_PLAIN_KEYS = (str, int, float, bool, type(None))


class PickleError(ValueError):
    """Why a pickle cannot be read, as the end of a sentence."""


@dataclass(frozen=True, eq=False, repr=False)
class GlobalName:
    """A class or function that is named.

    Attributes:
        path: `module.name`.
    """

    path: str


@dataclass(frozen=True, eq=False, repr=False)
class FunctionCall:
    """What a function would have made of arguments.

    Attributes:
        function: `module.name`; a description where it is not a name.
        arguments: as in the pickle.
    """

    function: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True, eq=False, repr=False)
class PersistentReference:
    """Something outside of the pickle: of torch, a storage.

    Attributes:
        parts: of its persistent id.
    """

    parts: Any


class Pickle(NamedTuple):
    """The content of a pickle.

    Attributes:
        content: the value.
        references: all of them, in order.
        functions: `module.name` of all that would be called.
    """

    content: Any
    references: list[PersistentReference]
    functions: set[str]


def read_pickle(stream: IO[bytes]) -> Pickle:
    """Read one pickle from the position of a stream, and leave the stream after it.

    Args:
        stream: whose `read(n)` returns no more than there is.

    Raises:
        PickleError: it is cut off, damaged, or holds what no file of tensors holds.
    """
    try:
        reader = _StackMachine()
        return Pickle(reader.run(stream), reader.references, reader.functions)
    except PickleError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, OverflowError, AttributeError, RecursionError):
        raise PickleError("it is damaged or cut off") from None


class _StackMachine:
    """A stack machine for the operations that files of tensors need."""

    def __init__(self) -> None:
        self._stack: list[Any] = []
        self._memo: dict[int, Any] = {}
        self.references: list[PersistentReference] = []
        self.functions: set[str] = set()

    def run(self, stream: IO[bytes]) -> Any:
        for operation, argument, _ in pickletools.genops(stream):
            name = operation.name
            if name == "STOP":
                return self._stack.pop()
            if name in _VALUES:
                self._stack.append(argument)
            elif name in _CONSTANTS:
                self._stack.append(_CONSTANTS[name])
            elif name in _ACTIONS:
                _ACTIONS[name](self, argument)
            elif name not in ("PROTO", "FRAME"):
                raise PickleError(f"it holds more than tensors ({name.lower()})")
        raise PickleError("it is cut off")

    def remember(self, at: int | None) -> None:
        self._memo[len(self._memo) if at is None else at] = self._stack[-1]

    def recall(self, at: int) -> None:
        self._stack.append(self._memo[at])

    def name(self, argument: str | None) -> None:
        if argument is None:
            attribute, module = self._stack.pop(), self._stack.pop()
            argument = f"{module} {attribute}"
        self._stack.append(GlobalName(argument.replace(" ", ".")))

    def put(self, value: Any) -> None:
        self._stack.append(value)

    def pop(self, count: int = 1) -> list[Any]:
        """Take the last values off the stack, in their order."""
        found = self._stack[-count:]
        if len(found) < count or _MARK in found:
            raise IndexError
        del self._stack[-count:]
        return found

    def refer(self) -> None:
        self.references.append(PersistentReference(self.pop()[0]))
        self._stack.append(self.references[-1])

    def drop(self, values: list[Any]) -> None:
        """Do nothing with values that were taken off the stack."""

    def since_mark(self) -> list[Any]:
        at = len(self._stack) - 1
        while self._stack[at] is not _MARK:
            at -= 1
            if at < 0:
                raise IndexError
        found = self._stack[at + 1 :]
        del self._stack[at:]
        return found

    def set_items(self, items: list[Any]) -> None:
        target = self._stack[-1]
        if not isinstance(target, dict) or len(items) % 2:
            raise PickleError("it holds more than tensors")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, _PLAIN_KEYS):
                raise PickleError("a name in it is not text")
            target[key] = value

    def append(self, items: list[Any]) -> None:
        if not isinstance(self._stack[-1], list):
            raise PickleError("it holds more than tensors")
        self._stack[-1].extend(items)

    def call(self) -> None:
        function, arguments = self.pop(2)
        if not isinstance(function, GlobalName) or not isinstance(arguments, tuple):
            raise PickleError("it holds more than tensors")
        if function.path == "collections.OrderedDict" and not arguments:
            self._stack.append({})
        else:
            self.functions.add(function.path)
            self._stack.append(FunctionCall(function.path, arguments))

    def make(self) -> None:
        kind, arguments = self.pop(2)
        path = kind.path if isinstance(kind, GlobalName) else "an object"
        self.functions.add(path)
        self._stack.append(FunctionCall(path, arguments if isinstance(arguments, tuple) else ()))

    def build(self) -> None:
        """Drop the attributes of a mapping (`_metadata` of a state dict); of anything else they are a part of it."""
        target, _ = self.pop(2)
        if not isinstance(target, (dict, FunctionCall)):
            raise PickleError("it holds more than tensors")
        self._stack.append(target)


_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": (), "MARK": _MARK}
_VALUES = frozenset(
    (
        "INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT", "STRING", "BINSTRING",
        "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES",
        "BINBYTES8",
    )
)  # fmt: skip
_ACTIONS: dict[str, Callable[[_StackMachine, Any], None]] = {
    "EMPTY_DICT": lambda r, _: r.put({}),
    "EMPTY_LIST": lambda r, _: r.put([]),
    "TUPLE": lambda r, _: r.put(tuple(r.since_mark())),
    "TUPLE1": lambda r, _: r.put(tuple(r.pop(1))),
    "TUPLE2": lambda r, _: r.put(tuple(r.pop(2))),
    "TUPLE3": lambda r, _: r.put(tuple(r.pop(3))),
    "LIST": lambda r, _: r.put(r.since_mark()),
    "APPEND": lambda r, _: r.append(r.pop()),
    "APPENDS": lambda r, _: r.append(r.since_mark()),
    "SETITEM": lambda r, _: r.set_items(r.pop(2)),
    "SETITEMS": lambda r, _: r.set_items(r.since_mark()),
    "BINPERSID": lambda r, _: r.refer(),
    "REDUCE": lambda r, _: r.call(),
    "NEWOBJ": lambda r, _: r.make(),
    "BUILD": lambda r, _: r.build(),
    "POP": lambda r, _: r.drop(r.pop()),
    "POP_MARK": lambda r, _: r.drop(r.since_mark()),
    "GLOBAL": lambda r, argument: r.name(argument),
    "STACK_GLOBAL": lambda r, _: r.name(None),
    "PUT": lambda r, at: r.remember(at),
    "BINPUT": lambda r, at: r.remember(at),
    "LONG_BINPUT": lambda r, at: r.remember(at),
    "MEMOIZE": lambda r, _: r.remember(None),
    "GET": lambda r, at: r.recall(at),
    "BINGET": lambda r, at: r.recall(at),
    "LONG_BINGET": lambda r, at: r.recall(at),
}
