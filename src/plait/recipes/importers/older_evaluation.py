"""What a recipe of the older framework asks of evaluation: its split, its subset and its tasks, in the present form.

Independent of what is merged.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from plait.errors import join_words
from plait.parsing import DOCUMENT_SUFFIXES
from plait.recipes.paths import KeyPath, Plain
from plait.recipes.problems import Problem, show_value, spell_value
from plait.recipes.validation import unknown_key

KEYS = ("split", "eval_subset", "eval_tasks")
_FOLDERS = ("", "tasks/")
_SAMPLE = ("max_samples", "shuffle", "seed", "stratified", "label_column", "stratify_by", "tag", "eval_tag")
_CHOICE = "The examples are others than before: they are chosen by a hash of seed and content."
_ELSEWHERE = {
    "label_column": "the labels are those of the task's own file",
    "stratify_by": "the labels are those of the task's own file",
    "tag": "results are named by a hash of the examples",
    "eval_tag": "results are named by a hash of the examples",
}


@dataclass
class OlderEvaluation:
    """An older recipe's wishes for evaluation.

    Attributes:
        data: `eval` and `tasks`, as far as something is wished.
        notes: what was found, what means the same now, and what to know of it.
        moved: path in `data` → the path where its user wrote it.
        problems: what cannot be carried over.
        missing: tasks without a file; nothing that a merge needs.
    """

    data: dict[str, Any] = field(default_factory=dict)
    notes: list[tuple[str, str, str]] = field(default_factory=list)
    moved: dict[KeyPath, KeyPath] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)
    missing: list[Problem] = field(default_factory=list)


def take_evaluation(data: dict[str, Plain], folder: Path) -> OlderEvaluation:
    """Take `split`, `eval_subset` and `eval_tasks` out of a recipe and return them in the present form.

    Args:
        data: the recipe; loses these keys.
        folder: where the tasks' files are looked for, and in `tasks/` there.
    """
    found = OlderEvaluation()
    old = {key: value for key in KEYS if (value := data.pop(key, None)) is not None}
    for key, place in (("split", ("eval", "split")), ("eval_subset", ("eval", "subset")), ("eval_tasks", ("tasks",))):
        if key in old and _is_given(data, place):
            found.problems.append(Problem((key,), f"{key} and {'.'.join(place)} mean the same; keep {'.'.join(place)}."))
            del old[key]
    if "split" in old:
        found.data["eval"] = {"split": old["split"]}
        found.moved["eval", "split"] = ("split",)
        found.notes.append((f"split: {spell_value(old['split'])}", f"eval: {{split: {spell_value(old['split'])}}}", ""))
    if "eval_subset" in old:
        _take_subset(old["eval_subset"], found)
    if "eval_tasks" in old:
        _take_tasks(old["eval_tasks"], folder, found)
    return found


def _is_given(data: Mapping[str, Plain], place: tuple[str, ...]) -> bool:
    value: Plain = data
    for key in place:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value is not None


def _take_subset(old: Plain, found: OlderEvaluation) -> None:
    path: KeyPath = ("eval_subset",)
    if not isinstance(old, Mapping):
        found.problems.append(Problem(path, f"eval_subset is {show_value(old)}; it must be a mapping."))
        return
    found.problems += _unknown(old, ("enabled", *_SAMPLE, "per_task"), path)
    if (problem := _switch_problem(old, path)) is not None:
        found.problems.append(problem)
        return
    if old.get("enabled", True) is False:
        found.notes.append((f"eval_subset: {spell_value(dict(old))}", "", " It is not enabled: all examples are taken."))
        return
    subset = {key: old[key] for key in ("max_samples", "stratified", "seed") if old.get(key) is not None}
    found.moved |= {("eval", "subset", key): (*path, key) for key in subset}
    remarks = list(_remarks(old))
    if own := _per_task(old, found, remarks):
        subset["per_task"] = own
    if "max_samples" not in subset and not own:
        found.notes.append((f"eval_subset: {spell_value(dict(old))}", "", " It has no max_samples: all examples are taken."))
        return
    found.data.setdefault("eval", {})["subset"] = subset
    left = f" Not carried over: {'; '.join(remarks)}." if remarks else ""
    new = f"eval: {spell_value({'subset': subset})}"
    found.notes.append((f"eval_subset: {spell_value(dict(old))}", new, f" {_CHOICE}{left}"))


def _per_task(old: Mapping[str, Plain], found: OlderEvaluation, remarks: list[str]) -> dict[str, Plain]:
    """Return each task's own number; None for all of its examples."""
    path: KeyPath = ("eval_subset", "per_task")
    tasks = old.get("per_task")
    if tasks is None:
        return {}
    if not isinstance(tasks, Mapping):
        found.problems.append(Problem(path, f"per_task is {show_value(tasks)}; it must map tasks to numbers or mappings."))
        return {}
    own: dict[str, Plain] = {}
    for name, value in tasks.items():
        place = (*path, name)
        if not isinstance(value, Mapping):
            own[name] = value
            found.moved["eval", "subset", "per_task", name] = place
            continue
        found.problems += _unknown(value, ("enabled", *_SAMPLE), place)
        if (problem := _switch_problem(value, place)) is not None:
            found.problems.append(problem)
            continue
        remarks += [f"per_task.{name}.{remark}" for remark in (*_remarks(value), *_differences(value, old))]
        if value.get("enabled", True) is False:
            own[name] = None
        elif value.get("max_samples") is not None:
            own[name] = value["max_samples"]
            found.moved["eval", "subset", "per_task", name] = (*place, "max_samples")
    return own


def _unknown(given: Mapping[str, Plain], allowed: tuple[str, ...], path: KeyPath) -> list[Problem]:
    return [Problem((*path, key), unknown_key(str(key), allowed)) for key in given if key not in allowed]


def _switch_problem(given: Mapping[str, Plain], path: KeyPath) -> Problem | None:
    value = given.get("enabled", True)
    if isinstance(value, bool):
        return None
    return Problem((*path, "enabled"), f"enabled is {show_value(value)}; it must be true or false.")


def _remarks(given: Mapping[str, Plain]) -> Iterator[str]:
    """Report which parts of a sample have no counterpart, and why none is needed."""
    if given.get("shuffle") is False:
        yield "shuffle: false (a sample does not depend on the order of the rows)"
    for key, why in _ELSEWHERE.items():
        if given.get(key) is not None:
            yield f"{key}: {spell_value(given[key])} ({why})"


def _differences(given: Mapping[str, Plain], common: Mapping[str, Plain]) -> Iterator[str]:
    for key in ("seed", "stratified"):
        if given.get(key) is not None and given[key] != common.get(key):
            yield f"{key}: {spell_value(given[key])} (eval.subset has one {key} for all tasks)"


def _take_tasks(old: Plain, folder: Path, found: OlderEvaluation) -> None:
    path: KeyPath = ("eval_tasks",)
    names = [old] if isinstance(old, str) else old
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        found.problems.append(Problem(path, f"eval_tasks is {show_value(old)}; it must be a list of tasks."))
        return
    if not names:
        return
    files = [_task_file(name, folder) for name in names]
    found.data["tasks"] = [file or f"{name}.yaml" for name, file in zip(names, files, strict=True)]
    found.moved |= {("tasks", i): (*path, i) for i in range(len(names))}
    lost = [name for name, file in zip(names, files, strict=True) if file is None]
    for name in lost:
        places = join_words([f"{place}{name}.yaml" for place in _FOLDERS], "or")
        found.missing.append(
            Problem(
                (*path, names.index(name)),
                f"task {name!r} has no file: there is no {places} next to the recipe. Write one ({places}; see docs/tasks.md), "
                "or take eval_tasks out and name the tasks' files when you evaluate (--tasks, tasks=[...]).",
            )
        )
    more = f" {join_words(lost, 'and')}: no such file is there yet; a merge needs none, an evaluation does." if lost else ""
    found.notes.append((f"eval_tasks: {spell_value(old)}", f"tasks: {spell_value(found.data['tasks'])}", more))


def _task_file(name: str, folder: Path) -> str | None:
    """Return the file that describes a task, as a recipe next to it names it; None where there is none."""
    if name.startswith("lm_eval:") or "/" in name or name.endswith(DOCUMENT_SUFFIXES):
        return name
    names = (f"{place}{name}{suffix}" for place in _FOLDERS for suffix in DOCUMENT_SUFFIXES)
    return next((text for text in names if (folder / text).is_file()), None)
