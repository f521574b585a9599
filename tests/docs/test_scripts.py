"""What examples, benchmarks and the generator of the docs import from plait is there; no test runs all of them.

So is what tests name in strings: what they patch, and what code that they run in other processes uses.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from contextlib import suppress
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


def named_in_strings(source: str) -> Iterator[str]:
    """Yield what is patched by its dotted name, and what programs in strings use of plait's modules."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("setattr", "patch")) and node.args:
            name = getattr(node.args[0], "value", None)
            if isinstance(name, str) and name.startswith("plait."):
                yield name
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and "import plait" in node.value:
            with suppress(SyntaxError):
                program = ast.parse(node.value)
                known = {a.asname: a.name for n in ast.walk(program) if isinstance(n, ast.Import) for a in n.names if a.asname}
                for used in ast.walk(program):
                    first, _, rest = ast.unparse(used).partition(".") if isinstance(used, ast.Attribute) else ("", "", "")
                    if first in known:
                        yield f"{known[first]}.{rest}"


def is_there(dotted: str) -> bool:
    """Return whether a dotted name leads somewhere, through modules and then attributes."""
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        with suppress(ModuleNotFoundError):
            found = import_module(".".join(parts[:count]))
            return all((found := getattr(found, part, None)) is not None for part in parts[count:])
    return False


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


def test_names_that_tests_have_in_strings_exist() -> None:
    wrong = []
    for file in sorted((ROOT / "tests").rglob("*.py")):
        names = named_in_strings(file.read_text(encoding="utf-8"))
        wrong += [f"{file.relative_to(ROOT)}: {name}" for name in sorted(set(names)) if not is_there(name)]
    assert not wrong


def test_a_name_that_is_gone_is_seen() -> None:
    program = 'CODE = """\nimport plait.errors as e\ne.NoSuchName.x\n"""\nmonkeypatch.setattr("plait.errors.Gone", 1)'
    assert [is_there(name) for name in named_in_strings(program)] == [False, False, False]
    assert is_there("plait.errors.PlaitError.__init__")
    assert not exists("plait.errors", "NoSuchName")
    assert not exists("plait.nothing", "name")
    assert exists("plait.errors", "PlaitError")
    assert exists("plait", "merge")
    assert exists("plait.methods", "ties")
