"""The base of everything that passes between stages: frozen, strict, JSON-able, shown in a few lines.

Independent of adapters or merging.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict

_TEXT, _ITEMS, _LINE = 70, 4, 100  # characters of a text, values of a list, characters of a line


class ShortRepr:
    """A repr of a few lines: numbers and short texts as they are, and how much there is of everything else."""

    def __repr__(self) -> str:
        """Return the type's name and its fields."""
        shown = [f"{name}={_short(value)}" for name, value in _fields(self)]
        line = f"{type(self).__name__}({', '.join(shown)})"
        if len(line) <= _LINE:
            return line
        return f"{type(self).__name__}(\n" + "".join(f"{row}\n" for row in _rows(shown)) + ")"

    __str__ = __repr__


class Record(ShortRepr, BaseModel):
    """A frozen value; unknown keys are errors, so that a misspelled one can never be dropped in silence."""

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="null")


def _fields(value: object) -> Iterator[tuple[str, object]]:
    if isinstance(value, BaseModel):
        yield from ((name, getattr(value, name)) for name in type(value).model_fields)
    elif dataclasses.is_dataclass(value):
        yield from ((f.name, getattr(value, f.name)) for f in dataclasses.fields(value) if f.repr)


def _short(value: Any, depth: int = 0) -> str:
    if isinstance(value, ShortRepr):
        return f"{type(value).__name__}(…)"
    if isinstance(value, Mapping):
        return f"{{{len(value)} entries}}" if len(value) > _ITEMS or depth else _listed(value, "{}", depth)
    if isinstance(value, (tuple, list, set, frozenset)):
        kinds = {type(item).__name__ for item in value}
        if len(value) > _ITEMS or depth > 1 or any(isinstance(item, (ShortRepr, Mapping)) for item in value):
            return f"({len(value)} × {kinds.pop()})" if len(kinds) == 1 else f"({len(value)} values)"
        return _listed(value, "()", depth)
    text = repr(value)
    return text if len(text) <= _TEXT else f"{text[: _TEXT - 1]}…"


def _listed(value: Any, brackets: str, depth: int) -> str:
    shown = (
        [f"{key!r}: {_short(item, depth + 1)}" for key, item in value.items()]
        if isinstance(value, Mapping)
        else [_short(item, depth + 1) for item in value]
    )
    comma = "," if brackets == "()" and len(shown) == 1 else ""
    return f"{brackets[0]}{', '.join(shown)}{comma}{brackets[1]}"


def _rows(shown: list[str]) -> Iterator[str]:
    """Yield fields, as many on a line as fit."""
    row = ""
    for field in shown:
        if row and len(row) + len(field) > _LINE:
            yield row
            row = ""
        row = f"{row or '   '} {field},"
    yield row
