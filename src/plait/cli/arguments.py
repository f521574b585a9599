"""Texts of a command line that several commands take apart in the same way."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


def named_paths(
    flag: str, texts: Iterable[str], form: str = "NAME=PATH", example: str = "math=./adapters/math"
) -> dict[str, str]:
    """Return name → path of a flag's values, `NAME=PATH` each; or of another form with an example.

    Raises:
        RecipeError: a value is not of that form; all of them.
    """
    from plait.errors import RecipeError, collect

    pairs = {text: text.partition("=") for text in texts}
    wrong = [text for text, (name, _, path) in pairs.items() if not (name and path)]
    collect(RecipeError, [f"{flag} {w}: write {form}, such as {flag} {example}." for w in wrong], "the command")
    return {name: path for name, _, path in pairs.values()}


def task_files(texts: Iterable[str]) -> list[str]:
    """Return the task files of `--tasks`: an option each, or with commas between them where no file has that name."""
    return [part for text in texts for part in ([text] if Path(text).is_file() else text.split(",")) if part]
