"""A small cohort with tasks, and searches over its merges."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plait
import plait.evaluation.session as session
from plait.search.conclusion import SweepResult
from plait.search.record import StudyRecord
from tests.language_models import LABELS, WORDS, label, train_pair, write_task

RANDOM = {"type": "random", "seed": 1, "budget": 4, "space": {"scale": "0.1..3"}}


def write_tasks(folder: Path, **changes: Any) -> list[Path]:
    """Write both tasks: plain words to compare candidates on, `very` before them to judge the best."""
    files = []
    for task in LABELS:
        files.append(write_task(folder, task, splits={"validation": "test.jsonl", "test": "other.jsonl"}, **changes))
        rows = [json.dumps({"word": f"very {word}", "label": label(task, word)}) for word in WORDS]
        (folder / task / "other.jsonl").write_text("\n".join(rows) + "\n")
    return files


def make_cohort(folder: Path) -> Path:
    """Return a new folder with a base, two adapters of it, and their tasks."""
    folder = train_pair(folder)
    write_tasks(folder)
    return folder


def noted_questions(patch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return the tasks that a model is asked from now on, with the number of examples."""
    found: list[tuple[str, int]] = []

    def noted(model: Any, tokenizer: Any, examples: Any, **how: Any) -> Any:
        found.append((examples.task.name, len(examples.items)))
        return answer(model, tokenizer, examples, **how)

    answer = session.answer_examples
    patch.setattr(session, "answer_examples", noted)
    return found


def sweep(place: Path, out: Path, search: dict[str, Any] | None = None, **changes: Any) -> SweepResult:
    given: dict[str, Any] = {
        "tasks": [place / "sort.yaml", place / "rate.yaml"],
        "base_model": str(place / "base"),
        "method": "linear",
        "workspace": out.parent / "artifacts",
        **changes,
    }
    return plait.sweep([place / "sort", place / "rate"], out=out, search=RANDOM if search is None else search, **given)


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a base, two adapters of it, and their tasks, which tests only read."""
    return make_cohort(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="module")
def drawn(pair: Path) -> SweepResult:
    """Return the study of `RANDOM`."""
    return sweep(pair, pair / "studies" / "drawn")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return what a model is asked in a test."""
    return noted_questions(monkeypatch)


def tried(record: StudyRecord) -> list[tuple[Any, ...]]:
    """Return what does not depend on how long something took."""
    return [(r.number, r.phase, r.params, r.score, r.results, r.examples, r.stopped) for r in record.runs]
