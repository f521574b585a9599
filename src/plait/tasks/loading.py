"""A task's file → `Task`, with everything that is wrong, at once, by line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from plait.errors import PlaitError, TaskError, collect, did_you_mean, join_words
from plait.folders import absolute, expanded, one_file, working_folder
from plait.recipes.documents import YamlDocument, open_document
from plait.recipes.file_kinds import refuse_other_kind
from plait.recipes.paths import Plain, get_item
from plait.recipes.problems import Origins, Problem, show_value
from plait.recipes.schema import Recipe
from plait.recipes.validation import validate
from plait.tasks.kinds import KINDS
from plait.tasks.kinds.lm_eval import LM_EVAL, LmEval
from plait.tasks.metrics import metrics_of, not_a_metric
from plait.tasks.schema import Task


def load_task(path: str | Path) -> Task:
    """Return the task that a file describes; its data's path is made absolute, from the file's folder.

    Args:
        path: of the file; or `lm_eval:NAME`, a task of the harness without a file, which is then called NAME.

    Raises:
        TaskError: the file cannot be read, or is not a valid task; all that is wrong is listed with its line.
    """
    if _is_harness(path):
        return _without_file(str(path))
    file = expanded(path)
    folder = absolute(file).parent
    return build_task(open_document(file, error=TaskError), source=str(path), folder=folder)


def load_tasks(
    paths: Iterable[str | Path], naming: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext()
) -> tuple[Task, ...]:
    """Return several tasks, whose names all differ.

    Args:
        paths: as `load_task` takes them.
        naming: index → what names the place of that path in what is refused of it.

    Raises:
        TaskError: anything wrong with any of them.
    """
    tasks: list[Task] = []
    problems: list[str] = []
    for i, path in enumerate(paths):
        try:
            with naming(i):
                task = load_task(path)
        except PlaitError as error:
            problems.append(str(error))
            continue
        if same := next((t.name for t in tasks if one_file(t.name, task.name)), None):
            called = f"{same!r} too" if same == task.name else f"{same!r}, the same as {task.name!r} to some file systems"
            problems.append(f"{path}: another task is called {called}; task names must be unique.")
        tasks.append(task)
    collect(TaskError, problems, "some tasks cannot be used")
    return tuple(tasks)


def recipe_tasks(recipe: Recipe, folder: Path | None) -> tuple[Task, ...]:
    """Return a recipe's tasks, as `load_tasks`; its relative paths start at a folder, the working directory when None.

    Raises:
        TaskError: there are none, or one cannot be read.
    """
    with recipe.origins.at("tasks"):
        if not recipe.tasks:
            raise TaskError("there are no tasks; give --tasks FILE.yaml, or 'tasks' in the recipe (tasks=[...] in Python).")
    return load_tasks((absolute_reference(text, folder) for text in recipe.tasks), lambda i: recipe.origins.at("tasks", i))


def with_tasks(recipe: Recipe, tasks: Iterable[str | Path] | None) -> Recipe:
    """Return a recipe with other tasks, relative to the working directory; as it is when None."""
    return recipe if tasks is None else recipe.changed(tasks=tuple(absolute_reference(t) for t in tasks))


def absolute_reference(reference: str | Path, folder: Path | None = None) -> str:
    """Return a task's reference that means the same in any working directory.

    Args:
        reference: a file, or `lm_eval:NAME`.
        folder: where a relative path starts; the working directory when None.
    """
    return str(reference) if _is_harness(reference) else str(absolute(expanded(reference), folder))


def build_task(document: YamlDocument, *, source: str = "task", folder: Path | None = None) -> Task:
    """Return the task that plain data describes.

    Args:
        document: mappings, lists and scalars, with their lines.
        source: what messages call it.
        folder: where a relative data path starts; the working directory when None.

    Raises:
        TaskError: it is not valid; all that is wrong is listed.
    """
    data = document.data
    origins = Origins(source, document.lines, error=TaskError)
    if not isinstance(data, Mapping) or not data:
        raise TaskError(
            f"{source}: a task is a mapping (key: value) with at least 'name' and 'prompt'; to be evaluated on, it "
            "needs 'kind', 'data', 'splits' and 'target' too."
        )
    refuse_other_kind(data, "a task", source, TaskError)
    without_rows = ("prompt" in data or "messages" in data) and data.keys().isdisjoint({"data", "splits", "choices"})
    if "kind" not in data and without_rows:  # nothing but a prompt and, perhaps, labels: its kind is plain then
        data = {**data, "kind": "classification" if "labels" in data else "generation"}
    kind = data.get("kind")
    family = str(kind).partition(":")[0] if _is_harness(str(kind)) else kind
    if not isinstance(family, str) or family not in KINDS:
        origins.refuse([*document.problems, _bad_kind(kind)])
    model = KINDS[str(family)]
    task, problems = validate(model, _placed(data, folder or working_folder()))
    name, has_own = data.get("metric"), model.model_fields["metric"].default is None
    if isinstance(name, str) and not has_own and name not in metrics_of(model, str(family)):
        problems.append(Problem(("metric",), f"metric {not_a_metric(model, str(family), name)}"))
    origins.refuse([*document.problems, *problems])
    if task is None:
        raise AssertionError("a task without problems was not built")
    return task


def _bad_kind(kind: Plain) -> Problem:
    known = join_words([repr(f"{LM_EVAL}NAME" if model is LmEval else name) for name, model in KINDS.items()], "or")
    if kind is None:
        return Problem(("kind",), f"'kind' is missing; it must be {known}.")
    return Problem(("kind",), f"kind is {show_value(kind)}; it must be {known}.{did_you_mean(str(kind), KINDS)}")


def _without_file(reference: str) -> LmEval:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", reference.removeprefix(LM_EVAL)).lstrip("._-")
    if not name:
        raise TaskError(f"{reference}: which task? Write {LM_EVAL}NAME, such as {LM_EVAL}arc_easy.")
    return LmEval(name=name, kind=reference)


def _placed(data: Mapping[str, Plain], folder: Path) -> dict[str, Plain]:
    """Make paths absolute, so that the task means the same in any working directory."""
    found = dict(data)
    if isinstance(path := get_item(data.get("data"), "path"), str) and path:
        found["data"] = {**data["data"], "path": str(absolute(expanded(path), folder))}
    for key in ("include", "spellings"):
        if isinstance(path := data.get(key), str) and path:
            found[key] = str(absolute(expanded(path), folder))
    return found


def _is_harness(reference: str | Path) -> bool:
    return str(reference).startswith(LM_EVAL)
