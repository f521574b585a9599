"""A package imports only from those below its own, no module takes part in a circle; imports inside functions count."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

SOURCE = Path(__file__).parents[2] / "src" / "plait"
# from the bottom up; names on one line do not import each other
ORDER = [
    {"deferred", "errors", "notices", "records", "version"},
    {"extras", "plugins"},
    {"views"},
    {"libraries", "linalg", "parsing"},
    {"folders"},
    {"tensorfiles"},
    {"hub"},
    {"results"},
    {"adapters", "cluster"},
    {"checkpoints", "inspection"},
    {"spaces", "transforms"},
    {"stages"},
    {"methods"},
    {"recipes"},
    {"merging"},
    {"baking", "extraction"},
    {"verification"},
    {"mixture", "tasks"},
    {"evaluation"},
    {"calibration"},
    {"search", "tuning"},
    {"mixer", "reports"},
    {"training"},
    {"commands"},
    {"api"},
    {"cli"},
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(ORDER) for name in names}
ANYWHERE = "testing"  # contract tests for others: imports anything, and nothing imports it


def package_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


@cache
def sources() -> dict[str, ast.Module]:
    found = {}
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        name = ".".join(("plait", *(p for p in parts if p != "__init__")))
        found[name] = ast.parse(path.read_text(encoding="utf-8"))
    return found


def imports(tree: ast.AST, modules: Mapping[str, object]) -> Iterator[str]:
    """Yield the modules of plait that a module imports, `plait` itself included, wherever the statement is."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "plait")
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative imports hide the package"
            source = node.module or ""
            if source.split(".")[0] == "plait":
                yield from (n if (n := f"{source}.{alias.name}") in modules else source for alias in node.names)


def misplaced(module: str, tree: ast.AST, modules: Mapping[str, object]) -> list[str]:
    """Return what a module imports and may not."""
    own = package_of(module)
    if own in ("", ANYWHERE):
        return []  # the public names are loaded when first used
    found = []
    for other in imports(tree, modules):
        package = package_of(other)
        below = package == own or (package in LEVEL and LEVEL[package] < LEVEL[own])
        if not below:
            found.append(f"{module} imports {other}")
    return found


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return groups of modules that import each other, by following every import from every module."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        rest = [start]
        while rest:
            for other in graph[rest.pop()] - seen:
                seen.add(other)
                rest.append(other)
        return seen

    reach = {module: reached(module) for module in graph}
    groups = {frozenset(o for o in reach[m] if m in reach[o]) for m in graph if m in reach[m]}
    return sorted(sorted(group) for group in groups)


def test_imports_point_down() -> None:
    modules = sources()
    unknown = {package_of(m) for m in modules} - {*LEVEL, ANYWHERE, ""}
    assert not unknown, "put them into the picture in docs/design.md and into ORDER"
    assert not [line for module, tree in modules.items() for line in misplaced(module, tree, modules)]


def test_no_module_takes_part_in_a_circle() -> None:
    modules = sources()
    graph = {m: {o for o in imports(tree, modules) if o in modules and o != m} for m, tree in modules.items()}
    graph["plait"] = set()  # loads public names on demand
    assert not circles(graph)


def test_what_points_up_is_seen() -> None:
    modules = sources()
    for planted in (
        "import plait\nplait.merge",
        "from plait import merge",
        "def f():\n    import plait.merging.plan",
        "def f():\n    from plait.cli import main",
        "from plait.testing import contract",
    ):
        assert misplaced("plait.errors", ast.parse(planted), modules), planted
    assert not misplaced("plait.merging.plan", ast.parse("from plait.errors import PlanError"), modules)
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"a"}, "d": {"a"}}) == [["a", "b", "c"]]


def test_no_dumping_grounds() -> None:
    banned = {"utils", "util", "helpers", "common", "misc", "core_utils"}
    assert not [p for p in SOURCE.rglob("*.py") if p.stem in banned or p.parent.name in banned]
