"""What examples, benchmarks and the generator of the docs import from plait is there; no test runs all of them."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def imported(source: str) -> Iterator[tuple[str, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "plait":
            yield from ((str(node.module), alias.name) for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name.split(".")[0] == "plait")


def exists(module: str, name: str) -> bool:
    """Say whether a module, and a name in it, can be imported."""
    try:
        return not name or hasattr(import_module(module), name) or find_spec(f"{module}.{name}") is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("folder", ["examples", "bench", "docs"])
def test_names_that_scripts_import_exist(folder: str) -> None:
    wrong = []
    for file in sorted((ROOT / folder).rglob("*.py")):
        names = imported(file.read_text(encoding="utf-8"))
        wrong += [f"{file.relative_to(ROOT)}: from {m} import {n}" for m, n in names if not exists(m, n)]
    assert not wrong


def test_a_name_that_is_gone_is_seen() -> None:
    assert not exists("plait.errors", "NoSuchName")
    assert not exists("plait.nothing", "name")
    assert exists("plait.errors", "PlaitError")
    assert exists("plait", "merge")
    assert exists("plait.methods", "ties")
