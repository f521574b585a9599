"""Which texts an adapter was trained on, as far as the record of its training knows."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.calibration.texts import Texts
from plait.errors import PlaitError, TaskError
from plait.notices import announce
from plait.parsing import read_object
from plait.recipes.evaluation import SplitName
from plait.tasks.examples import questions_of
from plait.tasks.loading import load_task
from plait.tasks.rows import read_file, read_rows
from plait.tasks.schema import SPLITS, RowTask

_RECORD = "training.json"  # of `plait train` and `plait sft`, next to the adapter's folder
_LEAST = 16  # characters: a shorter text, such as `yes`, is within others by chance


def seen_in_training(texts: Texts, adapter: Adapter) -> int | None:
    """Return how many texts were in an adapter's training; None where no record, or no data that can be read, says it."""
    file = adapter.folder.absolute().parent / _RECORD
    if not os.path.lexists(file):
        return None
    try:
        data = read_object(file, TaskError)["job"]["data"]
        if lacking := {"split", "task", "place", "limit", "text_field"} - {*data}:
            raise LookupError(lacking)
    except (TaskError, LookupError, TypeError) as error:
        why = str(error).rstrip(".") if isinstance(error, TaskError) else f"{file}: it does not say what was trained on"
        announce(f"{why}; {_unknown(adapter)}")
        return None
    try:
        asked = _questions(data)
    except (PlaitError, LookupError, TypeError, ValueError, AttributeError) as error:  # elsewhere, or of another form now
        why = str(error).splitlines()[0].rstrip(".") if isinstance(error, PlaitError) else "it has another form now"
        announce(f"the data that {file} names cannot be read ({why}): {_unknown(adapter)}")
        return None
    exact, longer = set(asked), [q for q in asked if len(q) >= _LEAST]
    prompts = [e.prompt_text.strip() for e in texts.examples.items]
    return sum(p in exact or any(q in p or (len(p) >= _LEAST and p in q) for q in longer) for p in prompts)


def _unknown(adapter: Adapter) -> str:
    return f"whether {adapter.name} was trained on these texts is not known."


def _questions(data: Mapping[str, Any]) -> list[str]:
    """Return what a training asked: prompts of a task, or of rows the prompts, the user's turns, or the texts."""
    splits = [data["split"]] if isinstance(data["split"], str) else list(data["split"])
    if data["task"] is not None:
        task = load_task(data["task"])
        if not isinstance(task, RowTask):
            raise TaskError(f"{data['task']}: has no rows of its own.")
        split: SplitName = next((s for name in splits for s in SPLITS if s == name and s in task.splits), "train")
        found = [e.prompt_text for e in questions_of(task, read_rows(task, split))]
    else:
        rows = read_file(Path(data["place"]))[: data["limit"]]
        found = [q for row in rows for q in _of_row(row, data["text_field"])]
    return [q.strip() for q in found if q.strip()]


def _of_row(row: Mapping[str, Any], text_field: str) -> list[str]:
    turns = row.get("messages") or row.get("prompt") or row.get(text_field) or []
    return [turns] if isinstance(turns, str) else [str(t["content"]) for t in turns if t.get("role") == "user"]
