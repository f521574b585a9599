"""The files of the demo, as its own scripts import them."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest

DEMO = Path(__file__).parents[1] / "examples" / "demo"
TASKS = ("sentiment", "supersense", "langid")


def module(name: str, patch: pytest.MonkeyPatch) -> ModuleType:
    """Import a file of the demo, next to its neighbors."""
    patch.syspath_prepend(str(DEMO))
    return importlib.import_module(name)


def base_model() -> Path:
    """Return the folder of the model that the demo merges adapters of."""
    with pytest.MonkeyPatch.context() as patch:
        return module("base_model", patch).base_model()
