"""The texts of a tuning: read, without those of the test split, and as its record has them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from plait.calibration.request import paired_tasks, read_each, tasks_key_problem, texts_of
from plait.calibration.texts import Texts, answer_problem, texts_in_split
from plait.errors import TaskError, collect
from plait.merging.inventory import Inventory
from plait.recipes.schema import Recipe
from plait.recipes.tuning import LABELED
from plait.tasks.asking import ClassPrompts, Generated, Head, Transcribed
from plait.tuning.held_out import SplitLessons
from plait.tuning.labels import read_labeled
from plait.tuning.record import SeenTexts


def tuning_texts(
    recipe: Recipe, folder: Path | None, inventory: Inventory
) -> tuple[dict[str, Texts], dict[str, tuple[str, ...]], dict[str, str]]:
    """Read every task's texts; return them, the right answers where labels are learned from, and task → adapter.

    Raises:
        TaskError: there are no tasks, one has no adapter, an adapter has no task, or texts cannot be read; all at once.
    """
    tasks, problems = paired_tasks(recipe, folder, [a.name for a in inventory.adapters])
    spec = recipe.tune
    weights = spec.task_weights if isinstance(spec.task_weights, dict) else {}
    named: dict[str, Mapping[str, object]] = {"files": spec.files, "samplers": spec.samplers, "task_weights": weights}
    for key, given in named.items():
        problems += tasks_key_problem(recipe, "tune", key, given, tasks)
    missing = [t.name for t in tasks if t.name not in weights]
    if isinstance(spec.task_weights, dict) and (missing or not any(weights.values())):
        text = f"gives {', '.join(map(repr, missing))} no number" if missing else "is 0 for every task"
        problems.append(f"tune.task_weights {text}; every task must have one, and one must be above 0.")
    problems += [problem for t in tasks if (problem := answer_problem(t))]
    if spec.objective == "hidden":
        problems += [
            f"task {t.name!r} ({t.kind}): objective 'hidden' compares hidden states where an answer is read, and a label "
            "of an image or a sound is read of all of them at once, in a form of its own. Use 'distill', which reads no label."
            for t in tasks
            if getattr(t, "file_column", None) is not None and isinstance(t.ask, (Head, ClassPrompts))
        ]
    if spec.objective == "adamerging":
        problems += [
            f"task {t.name!r} ({t.kind}): objective 'adamerging' is the entropy of one decision, and the first token of a "
            "transcript decides nothing of the rest. Use 'distill', which reads no label either."
            for t in tasks
            if isinstance(t.ask, Transcribed) or (isinstance(t.ask, Generated) and t.ask.transcript)
        ]
    owners = {t.name: t.own_adapter for t in tasks}
    if spec.objective not in LABELED:
        return read_each(recipe, tasks, problems, lambda task: texts_of(task, recipe, "tune", folder)), {}, owners
    labeled = read_each(recipe, tasks, problems, lambda task: read_labeled(task, spec))
    return {name: t for name, (t, _) in labeled.items()}, {name: right for name, (_, right) in labeled.items()}, owners


def without_test_texts(
    texts: dict[str, Texts], right: dict[str, tuple[str, ...]]
) -> tuple[dict[str, Texts], dict[str, tuple[str, ...]], list[str]]:
    """Leave out texts that the test split asks too; return what remains, with notes.

    Raises:
        TaskError: nothing remains of a task.
    """
    kept_texts, kept_right = dict(texts), dict(right)
    notes: list[str] = []
    problems: list[str] = []
    for name, t in texts.items():
        tested_texts = set(texts_in_split(t, "test"))
        kept = [i for i in range(len(t.prompts)) if i not in tested_texts]
        if not kept:
            problems.append(f"task {name!r}: its split 'test' contains every one of these texts ({t.source}) too; give others.")
        elif tested_texts:
            notes.append(
                f"{name}: {len(tested_texts)} of {len(t.prompts)} texts are left out, since the split 'test' contains them too."
            )
            kept_texts[name] = t.take(kept)
            if name in right:
                kept_right[name] = tuple(right[name][i] for i in kept)
    collect(TaskError, problems, "texts must be disjoint from those that judge the result")
    return kept_texts, kept_right, notes


def seen_texts(texts: Mapping[str, Texts], owners: Mapping[str, str], taught: SplitLessons) -> tuple[SeenTexts, ...]:
    """Return what the record says of every task's texts; `owners` is task → adapter, `taught` the texts learned from."""
    return tuple(
        SeenTexts(
            task=name,
            adapter=owners[name],
            kind=t.kind,
            source=t.source,
            count=len(t.prompts),
            learned=len(taught.learn[name]),
            digest=t.digest,
            shown=t.shown,
        )
        for name, t in texts.items()
    )
