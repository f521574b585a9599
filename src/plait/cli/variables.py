"""Variables of the environment: what they ask of every command, and those that no command reads."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Iterator

from plait.errors import RecipeError, did_you_mean

_WIDTHS = ("COLUMNS", "LINES", "TERMINAL_WIDTH")
_YES, _NO = ("1", "true", "t", "yes", "y", "on"), ("", "0", "false", "f", "no", "n", "off")
_COMPLETION = "_PLAIT_COMPLETE"
_NEAR = 0.9  # likeness of a name with one letter wrong
_DIGITS = 6  # no terminal has a million columns


def forget_impossible_widths() -> None:
    """Take the size of the terminal out of the environment where it is not a positive whole number: then it is not set.

    rich and typer read them as they are, and print nothing in no columns.
    """
    for name in _WIDTHS:
        text = os.environ.get(name, "1")
        if not (text.isascii() and text.isdecimal() and len(text) <= _DIGITS and int(text) > 0):
            del os.environ[name]


def is_asked(name: str) -> bool:
    """Return whether a variable that is either on or off is on.

    Raises:
        RecipeError: it is neither.
    """
    text = os.environ.get(name, "").strip().lower()
    if text not in (*_YES, *_NO):
        raise RecipeError(f"the variable {name} is {os.environ[name]!r}; it must be 1 or true, or 0 or false.")
    return text in _YES


def unknown_variables(known: Collection[str], commands: Collection[str]) -> Iterator[str]:
    """Yield a note on every variable that looks like one of plait's and is not read.

    Args:
        known: the variables that are read.
        commands: names of all commands, of those in groups with the group's name before them, with spaces between.
    """
    starts = tuple("_".join(("plait", *name.split(), "")).replace("-", "_").upper() for name in commands)
    given = sorted(name for name in os.environ if name.startswith("PLAIT_") and name not in known)
    for name in () if _COMPLETION in os.environ else given:
        if name.startswith(starts) or difflib.get_close_matches(name, known, n=1, cutoff=_NEAR):
            yield f"the variable {name} changes nothing: no option has it.{did_you_mean(name, known)}"
