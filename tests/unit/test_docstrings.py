"""`help(plait.NAME)` of every public name is complete, and its examples are right."""

from __future__ import annotations

import ast
import inspect
import re
import sys
import typing
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import plait
from plait.testing import cohort

#: Whose examples need files alone, in an order in which each has what it needs.
FILES_ALONE = (
    *("plan", "inspect", "merge", "compress", "convert", "load_recipe", "migrate_recipe", "Recipe", "Adapter", "LowRank"),
    *("Inspection", "MergePlan", "MergeResult", "report", "verify"),
)


def functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    yield from ((name, getattr(plait, name)) for name in plait.__all__ if inspect.isroutine(getattr(plait, name)))
    yield from ((f"Session.{name}", getattr(plait.Session, name)) for name in ("merge", "score", "ask", "save"))


def examples(thing: object) -> list[str]:
    lines = [line for line in (inspect.getdoc(thing) or "").splitlines() if line.startswith((">>> ", "... "))]
    return [
        part.strip() for part in re.split(r"^>>> ", "\n".join(lines).replace("\n... ", "\n    "), flags=re.MULTILINE) if part
    ]


def settings_of(function: Callable[..., Any]) -> Any:
    """Return the type of a function's keywords; None where it has none that is a type."""
    taken = inspect.signature(function).parameters.get("settings")
    found = None if taken is None else re.fullmatch(r"Unpack\[(\w+)\]", str(taken.annotation))
    return None if found is None else vars(sys.modules[function.__module__])[found[1]]


@pytest.mark.parametrize(("name", "function"), list(functions()), ids=lambda value: value if isinstance(value, str) else "")
def test_a_function_says_what_it_takes_gives_and_refuses(name: str, function: Callable[..., Any]) -> None:
    text = inspect.getdoc(function) or ""
    taken = [parameter for parameter in inspect.signature(function).parameters if parameter != "self"]
    assert not [p for p in taken if not re.search(rf"^    \*{{0,2}}{p}: ", text, re.MULTILINE)]
    assert "Raises:" in text
    assert "Returns:" in text or name in ("save_moments",)
    assert examples(function) or name.startswith("Session.")


def test_a_class_says_what_it_is_with_an_example() -> None:
    for name in plait.__all__:
        thing = getattr(plait, name)
        if inspect.isclass(thing):
            assert thing.__doc__, name
            assert examples(thing) or issubclass(thing, Exception), name


def test_calls_in_examples_are_right() -> None:
    calls = 0
    for name in plait.__all__:
        for example in examples(getattr(plait, name)):
            for call in ast.walk(ast.parse(example)):
                called = ast.unparse(call.func).removeprefix("plait.") if isinstance(call, ast.Call) else ""
                function = getattr(plait, called, None) if called in plait.__all__ else None
                if not isinstance(call, ast.Call) or not inspect.isroutine(function):
                    continue
                calls += 1
                given = [keyword.arg for keyword in call.keywords if keyword.arg]
                inspect.signature(function).bind(*call.args, **dict.fromkeys(given))
                if (kind := settings_of(function)) is not None:
                    known = {*inspect.signature(function).parameters, *kind.__annotations__}
                    assert not {*given} - known, f"{name}: {example}"
    assert calls > 20


def test_examples_that_need_files_alone_run(tmp_path, monkeypatch) -> None:
    cohort([(6, 4), (4, 6)], [2, 2]).save(tmp_path)
    for before, after in (("adapter0", "a"), ("adapter1", "b")):
        (tmp_path / before).rename(tmp_path / after)
    (tmp_path / "recipe.yaml").write_text("adapters: [./a, ./b]\nmethod: linear\n")
    monkeypatch.chdir(tmp_path)
    ran = set()
    for name in FILES_ALONE:
        names: dict[str, Any] = {"plait": plait}
        for example in examples(getattr(plait, name)):
            exec(example.replace("rank=4", "rank=1"), names)
            ran.add(name)
    assert ran == {*FILES_ALONE}


def test_keywords_have_types_that_an_editor_shows() -> None:
    kind = settings_of(plait.merge)
    assert {"method", "space", "density", "scale", "rank", "dtype", "seed", "merge_mode"} <= {*kind.__annotations__}
    assert "ties" in str(typing.get_type_hints(kind)["method"])
    assert "auto" in str(typing.get_type_hints(kind)["scale"])
