"""Merges of the same adapters, with the base loaded once: one, or many on a leaderboard."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from plait.errors import PlanError, TaskError, collect
from plait.evaluation.pipeline import EvaluateOptions, recipe_evaluator
from plait.evaluation.record import EVALUATION_VERSION, Bounds, Evaluation
from plait.evaluation.workspace import check_index
from plait.merging.inventory import take_inventory
from plait.merging.plan import announce_zeros, make_plan
from plait.recipes.evaluation import SplitName
from plait.recipes.schema import Recipe
from plait.records import Record
from plait.results.progress import Progress
from plait.version import __version__
from plait.views import Viewed


class LeaderboardEntry(Record):
    """One merge on the leaderboard; the fields are those of `Evaluation`.

    Attributes:
        name: for people.
        tag: of its results.
        method: of the merge.
        space: of the merge.
        mean_recovery: over tasks.
        worst_recovery: the smallest.
        worst_interval: 95 %.
        worst_task: whose it is.
        below_base: tasks on which it is worse than the base.
        recovery: per task.
        metric: per task.
    """

    name: str
    tag: str
    method: str | None
    space: str | None
    mean_recovery: float | None
    worst_recovery: float | None
    worst_interval: Bounds | None
    worst_task: str | None
    below_base: tuple[str, ...]
    recovery: dict[str, float | None]
    metric: dict[str, float]


class Leaderboard(Viewed, Record):
    """A leaderboard: the largest worst recovery first, ties by the mean.

    Attributes:
        version: of this format.
        plait: version that made it.
        split: of every task.
        adapters: the single adapters.
        base: per task, the bare base's metric.
        single: per task, its own adapter's metric; None where there is none.
        places: best first.
        skipped: merges that cannot be done, and why.
        notes: what else is worth knowing.
    """

    version: int = EVALUATION_VERSION
    plait: str
    split: SplitName
    adapters: tuple[str, ...]
    base: dict[str, float]
    single: dict[str, float | None]
    places: tuple[LeaderboardEntry, ...]
    skipped: dict[str, str]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class ComparedMerges:
    """Evaluated merges, best first.

    Attributes:
        board: for people and files.
        evaluations: one per merge.
        recipes: what each of them is, in the same order.
        folder: where their relative paths start.
    """

    board: Leaderboard
    evaluations: tuple[Evaluation, ...]
    recipes: tuple[Recipe, ...]
    folder: Path | None


def compare_merges(
    recipes: Mapping[str, Recipe],
    folder: Path | None,
    options: EvaluateOptions,
    progress: Progress | None = None,
    *,
    skipped: Mapping[str, str] | None = None,
    check: Callable[[list[str]], object] = lambda tasks: None,
    complete: Callable[[Recipe], Recipe] = lambda recipe: recipe,
) -> ComparedMerges:
    """Evaluate merges of the same adapters on the same tasks.

    Args:
        recipes: name → recipe; they differ only in how the adapters are merged.
        folder: where relative paths start; the working directory when None.
        options: how to evaluate.
        progress: receives stages and steps.
        skipped: merges that are known to be impossible, and why.
        check: given the tasks' names before anything is computed; may raise.
        complete: takes what a recipe leaves to its tasks' texts.

    Raises:
        PlaitError: none of them can be done, or anything wrong with what they share.
    """
    if options.workspace is not None:
        for recipe in recipes.values():
            check_index(options.workspace, recipe.method_name, [entry.name for entry in recipe.adapters])
    evaluator, first = recipe_evaluator(next(iter(recipes.values())), folder, options, progress)
    check([entry.task.name for entry in evaluator.tasks])
    inventories, impossible = {}, dict(skipped or {})
    completed = dict(recipes)
    for name, recipe in recipes.items():
        try:
            completed[name] = complete(recipe)
            is_first = completed[name] is first.recipe
            inventories[name] = first if is_first else take_inventory(completed[name], folder)
            announce_zeros(completed[name], make_plan(inventories[name], workers=1))
        except (PlanError, TaskError) as error:
            inventories.pop(name, None)
            impossible[name] = str(error)
    if not inventories:
        problems = list(impossible.values()) if len(recipes) == 1 else [f"{n}: {why}" for n, why in impossible.items()]
        collect(PlanError, problems, "none of these merges can be done")
    found = [(evaluator.evaluate(evaluator.merge(inventory, name)), completed[name]) for name, inventory in inventories.items()]
    found.sort(key=lambda pair: _rank_key(pair[0]), reverse=True)
    evaluations = tuple(evaluation for evaluation, _ in found)
    return ComparedMerges(_leaderboard(evaluations, impossible), evaluations, tuple(recipe for _, recipe in found), folder)


def _leaderboard(evaluations: tuple[Evaluation, ...], skipped: Mapping[str, str]) -> Leaderboard:
    best = evaluations[0]
    return Leaderboard(
        plait=__version__,
        split=best.split,
        adapters=tuple(s.name for s in best.sources),
        base={t.task: t.base for t in best.tasks},
        single={t.task: t.single for t in best.tasks},
        places=tuple(_entry(e) for e in evaluations),
        skipped=dict(skipped),
        notes=best.notes,
    )


def _rank_key(found: Evaluation) -> tuple[float, float]:
    lowest = -float("inf")
    worst = lowest if found.worst_recovery is None else found.worst_recovery
    return worst, lowest if found.mean_recovery is None else found.mean_recovery


def _entry(found: Evaluation) -> LeaderboardEntry:
    return LeaderboardEntry(
        name=found.name,
        tag=found.tag,
        method=found.method,
        space=found.space,
        mean_recovery=found.mean_recovery,
        worst_recovery=found.worst_recovery,
        worst_interval=found.worst_interval,
        worst_task=found.worst_task,
        below_base=found.below_base,
        recovery={t.task: t.recovery for t in found.tasks},
        metric={t.task: t.merged for t in found.tasks},
    )
