"""The notebooks run from top to bottom, with a small model in place of the demo's."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from plait.views import Viewed
from tests.language_models import LABELS, WORDS, label, train_pair, write_task

# PEFT's and torch's own
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
NOTEBOOKS = sorted((Path(__file__).parents[2] / "examples" / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base, two adapters, and their tasks, whose splits differ in a word before every text."""
    folder = train_pair(tmp_path_factory.mktemp("notebooks"), steps=20)
    for task in LABELS:
        write_task(folder, task, splits={"train": "test.jsonl", "validation": "validation.jsonl", "test": "other.jsonl"})
        for name, before in (("validation", "very"), ("other", "very very")):
            rows = [json.dumps({"word": f"{before} {word}", "label": label(task, word)}) for word in WORDS]
            (folder / task / f"{name}.jsonl").write_text("\n".join(rows) + "\n")
    return folder


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What IPython displays: in this process it may be missing."""
    found: list[str] = []
    module = ModuleType("IPython.display")
    module.HTML = str  # type: ignore[attr-defined]
    module.display = lambda html, display_id: found.append(html) or SimpleNamespace(update=found.append)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return found


def run(cells: list[dict[str, Any]], values: dict[str, Any]) -> list[Any]:
    """Run code cells one after another, the values in place of the cell of parameters; return what cells end with."""
    names: dict[str, Any] = {}
    results = []
    for cell in cells:
        source = "".join(cell["source"])
        if "parameters" in cell["metadata"].get("tags", ()):
            exec(source, names)
            assert set(values) <= set(names), "a value that the notebook does not have"
            names |= values
            continue
        tree = ast.parse(source)
        last = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        exec(compile(tree, "cell", "exec"), names)
        results.append(None if last is None else eval(compile(ast.Expression(last.value), "cell", "eval"), names))
        assert not isinstance(results[-1], Viewed) or '<div class="plait">' in (results[-1]._repr_html_() or ""), source
    return results


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs(notebook: Path, place: Path, shown: list[str], tmp_path: Path) -> None:
    cells = [cell for cell in json.loads(notebook.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code"]
    values = {
        "BASE": place / "base",
        "ADAPTERS": {task: place / task for task in LABELS},
        "TASKS": [place / f"{task}.yaml" for task in LABELS],
        "PROMPT": "sort w3 :",
        "OUT": tmp_path / "out",
        "EXAMPLES": 12,
        "TEXTS": 8,
        "STEPS": 4,
    }
    assigned = {
        node.id for cell in cells for node in ast.walk(ast.parse("".join(cell["source"]))) if isinstance(node, ast.Name)
    }
    results = run(cells, {name: value for name, value in values.items() if name in assigned})
    assert shown, "progress is shown"
    last = results[-1]
    assert list(last.columns) == ["solved", "scaled", "tuned"] if hasattr(last, "columns") else last in (True, [True, True])


def test_there_are_notebooks_for_each_of_the_three_ways() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1_merge_and_judge", "2_calibrate_and_tune", "3_train_and_deploy"]
