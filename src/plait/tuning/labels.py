"""Labeled texts of a task, for the objectives that read labels."""

from __future__ import annotations

from dataclasses import replace

from plait.calibration.texts import MOST_TEXTS, Texts, chosen_rows
from plait.errors import TaskError
from plait.recipes.tuning import TuneSpec
from plait.tasks.asking import TargetLikelihood
from plait.tasks.examples import read_examples
from plait.tasks.inputs import Example
from plait.tasks.schema import RowTask, Task


def read_labeled(task: Task, spec: TuneSpec) -> tuple[Texts, tuple[str, ...]]:
    """Return texts of a task's split, chosen by the seed, and the right answer of each.

    Raises:
        TaskError: the task has no split to read labels from, or rows that do not fit it.
    """
    if not isinstance(task, RowTask):
        raise TaskError(f"task {task.name!r} ({task.kind}) has no prompt of its own to put texts into; use a task file.")
    if task.name in spec.files or spec.texts in ("lines", "template"):
        given = "a file" if task.name in spec.files else f"texts: {spec.texts}"
        raise TaskError(
            f"task {task.name!r}: objective {spec.objective!r} reads labels, and {given} has none. Give a split of the task "
            "(tune.split), or an objective without labels: distill, hidden, adamerging."
        )
    split = spec.split or ("calibration" if "calibration" in task.splits else "train")
    examples = read_examples(task, split)
    chosen = examples.take(chosen_rows(task, len(examples.items), spec.count or MOST_TEXTS, spec.seed))
    likelihood = isinstance(task.ask, TargetLikelihood)
    asked = tuple(Example(e.inputs, e.target if likelihood else "", e.choices) for e in chosen.items)
    texts = Texts(task, "split", f"split {split!r}", replace(chosen, items=asked))
    return texts, tuple(e.target for e in chosen.items)
