"""Recipe and tasks → what is to be calibrated: adapters, their texts, the base, and hashes of all; no model is loaded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeVar

from plait.adapters.adapter import Adapter
from plait.calibration.record import CalibratedTexts, CalibrationPlan
from plait.calibration.texts import Texts, overlap_with_evaluation, read_texts
from plait.checkpoints.digests import weight_files
from plait.errors import PlanError, TaskError, collect
from plait.evaluation.loaded_base import with_used_dtype
from plait.evaluation.scores import adapter_digest, digest
from plait.hub.download import Located, resolve_model
from plait.hub.pretrained import LoadOptions
from plait.merging.inventory import Inventory, naming_base, take_inventory
from plait.mixture.loading import check_loading
from plait.recipes.calibration import CalibrationSpec
from plait.recipes.naming import naming_its_file
from plait.recipes.problems import Problem
from plait.recipes.schema import Recipe
from plait.results.digests import sha256
from plait.results.lock import relative_path
from plait.results.versions import library_versions
from plait.tasks.asking import Reading
from plait.tasks.loading import absolute_reference, recipe_tasks
from plait.tasks.schema import Task

T = TypeVar("T")

#: Raised by every change of plait after which moments of the same texts may be others.
MOMENTS_VERSION = 1
_MODEL_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "*.py")  # files next to a base's weights that decide what it computes


def base_digests(folder: Path) -> dict[str, str]:
    """Return name → sha256 of a base's weights, configuration, tokenizer and own code."""
    others = sorted(p for pattern in _MODEL_FILES for p in folder.glob(pattern) if p.is_file())
    return {p.name: sha256(p) for p in [*weight_files(folder), *others]}


@dataclass(frozen=True, eq=False)
class CalibrationRequest:
    """What is to be calibrated.

    Attributes:
        inventory: the recipe and its adapters.
        base: the base model.
        options: of this machine.
        texts: task → its texts.
        owners: task → its adapter.
    """

    inventory: Inventory
    base: Located
    options: LoadOptions
    texts: Mapping[str, Texts]
    owners: Mapping[str, str]

    @property
    def spec(self) -> CalibrationSpec:
        """The recipe's settings."""
        return self.inventory.recipe.calibration

    @cached_property
    def targets(self) -> tuple[str, ...]:
        """The modules whose inputs are taken: all that some adapter has, and that read vectors."""
        return tuple(path for path, layout in self.inventory.layouts.items() if layout.reads_vectors)

    @cached_property
    def base_files(self) -> dict[str, str]:
        """As `base_digests` has them."""
        return base_digests(self.base.folder)

    @cached_property
    def base_digest(self) -> str:
        """Hash of these files."""
        return digest(self.base_files)

    def tasks_of(self, adapter: str) -> list[str]:
        """Return the tasks that an adapter owns."""
        return [task for task, owner in self.owners.items() if owner == adapter]

    def has_head(self, adapter: str) -> bool:
        """Whether an adapter's texts are read as a whole, and answered by a head, if at all."""
        return all(isinstance(self.texts[task].task.ask, Reading) for task in self.tasks_of(adapter))

    def text_digests(self, adapter: str) -> dict[str, str]:
        """Return task → digest of its texts, of an adapter's tasks."""
        return {task: self.texts[task].digest for task in self.tasks_of(adapter)}

    def key(self, adapter: Adapter) -> str:
        """Return a hash of everything that an adapter's moments depend on."""
        forms = [
            self.texts[task].task.model_dump(mode="json", exclude={"data", "splits"}) for task in self.tasks_of(adapter.name)
        ]
        about = [self.spec.tokens, self.spec.seed, self.options.dtype, library_versions("transformers")]
        about += [made for task in self.tasks_of(adapter.name) if (made := self.texts[task].task.own_digest())]
        texts = self.text_digests(adapter.name)
        own = adapter_digest(adapter)
        return digest(MOMENTS_VERSION, self.base_digest, own, self.targets, texts, forms, about)

    def seen(self) -> tuple[CalibratedTexts, ...]:
        """Describe the texts."""
        return tuple(
            CalibratedTexts(
                task=name,
                adapter=self.owners[name],
                kind=t.kind,
                source=t.source,
                count=len(t.prompts),
                digest=t.digest,
                shown=t.shown,
            )
            for name, t in self.texts.items()
        )

    def plan(self) -> CalibrationPlan:
        """Return what would be done."""
        layouts = self.inventory.layouts
        size = 4 * sum(layouts[t].d_in * min(layouts[t].d_in, self.spec.tokens) for t in self.targets)
        return CalibrationPlan(
            base=str(self.base.folder),
            texts=self.seen(),
            adapters={a.name: len(self.targets) for a in self.inventory.adapters},
            left_out=tuple(sorted(set(layouts) - set(self.targets))),
            bytes=size * len(self.inventory.adapters),
        )


@naming_its_file
def locked_request(
    recipe: Recipe, start: Path | None, out: Path, part: Literal["calibration", "tune"], texts: Mapping[str, str]
) -> dict[str, Any]:
    """Return what a lock keeps of a request for texts: what was given, its paths from the result's own folder.

    Args:
        recipe: as asked for.
        start: what its relative paths are relative to.
        out: the folder of the result.
        part: which of its parts is about texts.
        texts: task → digest of its texts.
    """

    def placed(reference: str) -> str:
        absolute = absolute_reference(reference, start)
        return f"./{relative_path(Path(absolute), out)}" if Path(absolute).is_absolute() else absolute

    given = recipe.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude={"base_model"})
    given["adapters"] = [{"name": a.name, "weight": a.weight} for a in recipe.adapters]
    given["tasks"] = [placed(task) for task in recipe.tasks]
    if files := getattr(recipe, part).files:
        given[part] = {**given[part], "files": {task: placed(file) for task, file in files.items()}}
    return {"request": given, "texts": dict(texts)}


def read_calibration(recipe: Recipe, folder: Path | None, options: LoadOptions) -> CalibrationRequest:
    """Find adapters, base, tasks and texts.

    Args:
        recipe: adapters, tasks, and `calibration`.
        folder: what its relative paths are relative to; the current folder when None.
        options: of this machine.

    Raises:
        PlaitError: something of it cannot be used; texts are not disjoint from what the tasks are judged on.
    """
    check_loading(options.dtype, options.device_map)
    inventory = take_inventory(recipe, folder)
    texts, owners = task_texts(recipe, folder, [a.name for a in inventory.adapters])
    problems = [problem for t in texts.values() for problem in overlap_with_evaluation(t)]
    collect(TaskError, problems, "texts must be disjoint from the validation and test splits, and are not")
    base = base_of(inventory, folder, options.base)
    return CalibrationRequest(inventory, base, with_used_dtype(options, base.folder), texts, owners)


def base_of(inventory: Inventory, folder: Path | None, given: str | None) -> Located:
    """Find the base model.

    Args:
        inventory: whose recipe or adapters name it.
        folder: what the recipe's relative paths are relative to.
        given: its reference, in place of theirs.

    Raises:
        PlaitError: nothing names it, or it cannot be found.
    """
    name = given or inventory.base_model
    if name is None:
        raise PlanError("the base model is not known: no adapter names it. Give --base-id (base_model=).")
    own = given is None and inventory.recipe.base_model is not None
    with naming_base(inventory.recipe, inventory.adapters, given=given):
        return resolve_model(name, base=folder if own else None)


def task_texts(recipe: Recipe, folder: Path | None, adapters: Sequence[str]) -> tuple[dict[str, Texts], dict[str, str]]:
    """Read every task's texts; return task → texts and task → adapter.

    Args:
        recipe: its tasks, and `calibration`.
        folder: what relative paths are relative to.
        adapters: names.

    Raises:
        TaskError: there are no tasks, one has no adapter, an adapter has no task, or texts cannot be read; all at once.
    """
    tasks, problems = paired_tasks(recipe, folder, adapters)
    problems += tasks_key_problem(recipe, "calibration", "files", recipe.calibration.files, tasks)
    found = read_each(recipe, tasks, problems, lambda task: texts_of(task, recipe, "calibration", folder))
    return found, {t.name: t.own_adapter for t in tasks}


def read_each(recipe: Recipe, tasks: Sequence[Task], problems: Sequence[str], read: Callable[[Task], T]) -> dict[str, T]:
    """Return task → what `read` returns of it.

    Raises:
        TaskError: one cannot be read, or there are problems with the tasks already; all at once.
    """
    found: dict[str, T] = {}
    wrong = [*problems]
    for task in tasks:
        try:
            found[task.name] = read(task)
        except TaskError as error:
            wrong.append(str(error))
    with recipe.origins.at("tasks"):
        collect(TaskError, wrong, "these tasks and adapters do not suit each other")
    return found


def paired_tasks(recipe: Recipe, folder: Path | None, adapters: Sequence[str]) -> tuple[Sequence[Task], list[str]]:
    """Return a recipe's tasks, and what is wrong with them: tasks of other adapters, adapters without a task.

    Raises:
        TaskError: there are no tasks, or one cannot be read.
    """
    tasks = recipe_tasks(recipe, folder)
    problems = [
        f"task {t.name!r} belongs to adapter {t.own_adapter!r}, and there are {', '.join(adapters)}; name it with 'adapter' in "
        "the task's file."
        for t in tasks
        if t.own_adapter not in adapters
    ]
    owned = {t.own_adapter for t in tasks}
    problems += [
        f"adapter {name!r} has no task, so nothing of it would be kept. Give a task of its name, or one with 'adapter: {name}'."
        for name in adapters
        if name not in owned
    ]
    return tasks, problems


def tasks_key_problem(recipe: Recipe, key: str, inner: str, given: Iterable[str], tasks: Sequence[Task]) -> list[str]:
    """Return what is wrong with a key of the recipe, such as `tune.files`, that names tasks."""
    names = [t.name for t in tasks]
    text = f"is not a task; there are {', '.join(names)}."
    return [recipe.origins.describe(Problem((key, inner, name), f"{name!r} {text}")) for name in sorted(set(given) - {*names})]


def texts_of(task: Task, recipe: Recipe, key: Literal["calibration", "tune"], folder: Path | None) -> Texts:
    """Read one task's texts, as a part of the recipe wants them.

    Raises:
        TaskError: they cannot be read.
    """
    spec = getattr(recipe, key)
    added = recipe.tune.generic_lines if key == "tune" else 0
    file = spec.files.get(task.name)
    if file is None:
        return read_texts(task, kind=spec.texts, count=spec.count, seed=spec.seed, split=spec.split, added=added)
    with recipe.origins.at(key, "files", task.name):
        file = absolute_reference(file, folder)
        return read_texts(task, kind=None, count=spec.count, seed=spec.seed, split=spec.split, file=file, added=added)
