"""A module imports only from floors below its own; imports inside functions count."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[2] / "src" / "plait"
# from the ground up; names on one line stand side by side and do not import each other
FLOORS = [
    {"errors", "notices", "records"},
    {"extras"},
    {"folders", "libraries", "linalg", "locking", "parsing"},
    {"hub"},
    {"adapters"},
    {"spaces", "transforms"},
    {"stages"},
    {"methods"},
    {"recipes"},
    {"merging"},
    {"baking"},
    {"verification"},
    {"mixture", "tasks"},
    {"evaluation"},
    {"calibration"},
    {"tuning"},
    {"reports"},
    {"training"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(FLOORS) for name in names}


def floor_of(path: Path) -> str:
    return path.relative_to(SOURCE).with_suffix("").parts[0]


def imports(tree: ast.AST) -> set[str]:
    """Return the floors that a module imports from, `if TYPE_CHECKING` included."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the floor"
            names = [f"{node.module}.{a.name}" for a in node.names] if node.module == "plait" else [node.module or ""]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("plait.")}
    return found - {"__version__"}


def modules() -> list[Path]:
    return sorted(p for p in SOURCE.rglob("*.py") if p.name != "__init__.py" or p.parent != SOURCE)


@pytest.mark.parametrize("path", modules(), ids=lambda p: str(p.relative_to(SOURCE)))
def test_imports_point_down(path: Path) -> None:
    own = floor_of(path)
    if own == "testing":
        return  # may import anything; the next test sees to it that nothing imports it
    assert own in LEVEL, f"{own} has no floor: put it into the picture in docs/design.md and into this list"
    for other in imports(ast.parse(path.read_text(encoding="utf-8"))) - {own}:
        assert other != "testing", f"{path} imports plait.testing"
        assert LEVEL[other] < LEVEL[own], f"{path} imports plait.{other}, which is not below plait.{own}"


def test_every_folder_has_a_floor() -> None:
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert folders <= {*LEVEL, "testing"}


def test_no_dumping_grounds() -> None:
    banned = {"utils", "util", "helpers", "common", "misc", "core_utils"}
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in banned or p.parent.name in banned]
