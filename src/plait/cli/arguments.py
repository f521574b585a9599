"""The positional arguments that several commands take."""

from __future__ import annotations

from pathlib import Path

_RECIPES = (".yaml", ".yml", ".json")


def recipe_file(inputs: list[str]) -> Path | None:
    """Return the recipe among a command's arguments; it comes first."""
    return Path(inputs[0]) if inputs[0].lower().endswith(_RECIPES) else None


def adapters_of(inputs: list[str]) -> list[str]:
    """Return the adapters among a command's arguments."""
    return inputs[1:] if inputs[0].lower().endswith(_RECIPES) else inputs
