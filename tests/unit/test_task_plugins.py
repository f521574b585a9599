"""Kinds of tasks and metrics of third parties: the examples of CONTRIBUTING.md as an installed package."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

PAGE = Path(__file__).parents[2] / "CONTRIBUTING.md"
BLOCK = re.compile(r"<!-- skip: run by tests/unit/test_task_plugins.py -->\n```python\n(.*?)```", re.DOTALL)
TASK = """\
name: t
kind: yes_no
data: {path: rows.jsonl}
splits: {test: {rows: [0, 2]}}
prompt: "{{ text }}?"
target: "{{ label }}"
metric: first_letter
"""
CODE = """\
from plait.errors import TaskError
from plait.tasks.answers import Answer
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_task
from plait.tasks.metrics import metric_of
task = load_task("t.yaml")
items = read_examples(task, "test").items
assert [(e.text, e.target, e.choices) for e in items] == [("a?", "yes", ("yes", "no")), ("b?", "no", ("yes", "no"))], items
answers = [Answer(id=e.id, target=e.target, given="year") for e in items]
assert metric_of(task).value(answers) == 0.5
try:
    load_task("wrong.yaml")
except TaskError as error:
    assert "wrong.yaml:7: metric: metric is 'wer'; it must be 'accuracy' or 'first_letter'." in str(error), error
else:
    raise AssertionError
"""


def test_examples_of_contributing_as_an_installed_package(tmp_path):
    kind, metric = BLOCK.findall(PAGE.read_text(encoding="utf-8"))
    (tmp_path / "their_kind.py").write_text(kind, encoding="utf-8")
    (tmp_path / "their_metric.py").write_text(metric, encoding="utf-8")
    info = tmp_path / "theirs-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[plait.task_kinds]\nyes_no = their_kind:YesNo\n\n[plait.metrics]\nfirst_letter = their_metric:first_letter\n"
    )
    rows = [{"text": "a", "label": "yes"}, {"text": "b", "label": "no"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "t.yaml").write_text(TASK)
    (tmp_path / "wrong.yaml").write_text(TASK.replace("first_letter", "wer"))
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
