"""Paths into plain data, and how they are spelled: `method.density`, `adapters.0.weight`, `weights.modules."*.q_proj"`.

Independent of what a recipe holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias, TypeGuard

from plait.errors import RecipeError

KeyPath: TypeAlias = tuple[str | int, ...]
#: What YAML and JSON can hold: mappings with keys as text, lists, scalars.
Plain: TypeAlias = Any
_QUOTED = json.JSONDecoder()


def show_path(path: Sequence[str | int]) -> str:
    """Write a path as text; a key that holds a dot, a blank, `=` or `"` is put in double quotes."""
    return ".".join(_show_key(str(key)) for key in path)


def read_path(text: str) -> tuple[str, ...]:
    """Read what `show_path` writes; indices come back as text.

    Raises:
        RecipeError: a key is empty, or a quote is not closed.
    """
    keys, rest = split_assignment(text)
    if rest is not None:
        raise RecipeError(f"{text!r} is not a path: a key that holds '=' needs double quotes.")
    return keys


def get_item(data: Plain, key: str | int) -> Plain:
    """Return `data[key]`, or None when there is no such thing."""
    if isinstance(data, Mapping):
        return data.get(key)
    if isinstance(data, list) and isinstance(key, int) and 0 <= key < len(data):
        return data[key]
    return None


def is_number(value: Plain) -> TypeGuard[float]:
    """Return whether a value is a number; true and false are not."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def split_assignment(text: str) -> tuple[tuple[str, ...], str | None]:
    """Take `PATH` or `PATH=VALUE` apart; the value is None when there is no `=`.

    Raises:
        RecipeError: a key is empty, or a quote is not closed.
    """
    keys: list[str] = []
    position = 0
    while True:
        key, position = _read_key(text, position)
        keys.append(key)
        if position == len(text):
            return tuple(keys), None
        if text[position] == "=":
            return tuple(keys), text[position + 1 :]
        position += 1


def _show_key(key: str) -> str:
    plain = key and key.isprintable() and not any(c in '."=' or c.isspace() for c in key)
    return key if plain else json.dumps(key, ensure_ascii=False)


def _read_key(text: str, start: int) -> tuple[str, int]:
    """Return the key that starts at `start`, and the position of the `.` or `=` after it, or of the end."""
    if text[start : start + 1] == '"':
        try:
            key, end = _QUOTED.raw_decode(text, start)
        except json.JSONDecodeError:
            raise RecipeError(f"{text!r} is not a path: the quote at character {start + 1} is not closed.") from None
        if end < len(text) and text[end] not in ".=":
            raise RecipeError(f"{text!r} is not a path: after a quoted key comes '.' or '=', not {text[end]!r}.")
        return key, end
    end = min((at for at in (text.find(".", start), text.find("=", start)) if at >= 0), default=len(text))
    key = text[start:end].strip()
    if not key:
        raise RecipeError(
            f"{text!r} is not a path: it has an empty key. Write keys with dots between them, such as 'method.density'; "
            'a key that holds a dot needs double quotes, such as weights.modules."*.q_proj".'
        )
    return key, end
