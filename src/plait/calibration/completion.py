"""What a recipe leaves to its tasks' texts: second moments that its method needs, and values that are to be found."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from plait.calibration.pipeline import load_base, take_all_moments, take_sequential_moments
from plait.calibration.request import CalibrationRequest, read_calibration
from plait.calibration.search import FoundValues, find_values
from plait.calibration.texts import answer_problem, describe_counts
from plait.errors import OutputError, PlanError, TaskError, collect
from plait.extras import require
from plait.folders import absolute
from plait.hub.pretrained import LoadOptions
from plait.merging.inventory import take_inventory
from plait.merging.moments import MomentsOf, not_taken_yet
from plait.merging.plan import make_plan
from plait.mixture import Mixture
from plait.notices import announce
from plait.recipes.naming import naming_its_file
from plait.recipes.schema import Recipe
from plait.results.progress import Progress, SilentProgress
from plait.results.staging import output_problem
from plait.results.threads import worker_count

STORE = Path("artifacts", "moments")  # in the workspace: moments by content


@dataclass(frozen=True)
class CompletedRecipe:
    """A recipe that a merge can run.

    Attributes:
        recipe: with files of moments, and a number for everything that was `auto`.
        found: how those numbers were found; None where there were none to find.
        notes: on what was found, for the record of the merge.
    """

    recipe: Recipe
    found: FoundValues | None = None
    notes: tuple[str, ...] = ()


@naming_its_file
def read_for_completion(recipe: Recipe, folder: Path | None, options: LoadOptions) -> CalibrationRequest:
    """Find what `complete_recipe` reads for a recipe that lacks something; loads no model.

    Raises:
        PlaitError: what it lacks cannot be taken.
    """
    wanted = recipe.values_to_find
    if not recipe.tasks:
        raise PlanError(
            f"{', '.join(wanted)}: 'auto' is found on texts of tasks, and there are none; give --tasks FILE.yaml, or a number."
        )
    if recipe.is_sequential and wanted.keys() - {"scale"}:
        raise PlanError(
            f"method {recipe.method_name!r} takes its moments with a number for every parameter; 'auto' cannot be found for "
            f"{', '.join(wanted.keys() - {'scale'})}. Give a number, or find one with 'regmean'."
        )
    require("a merge that reads texts", {"eval": ["transformers", "accelerate", "jinja2"]})
    request = read_calibration(recipe, folder, options)
    if wanted:
        problems = [problem for t in request.texts.values() if (problem := answer_problem(t.task))]
        collect(TaskError, problems, f"{', '.join(wanted)}: 'auto' cannot be found for these tasks")
    return request


@naming_its_file
def complete_recipe(
    recipe: Recipe,
    *,
    folder: Path | None,
    out: Path | None = None,
    force: bool = False,
    moments: MomentsOf | None = None,
    options: LoadOptions | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> CompletedRecipe:
    """Take what a recipe lacks from its tasks' texts; no label is read.

    Second moments are kept in the workspace by content, and used again by the next merge of the same base, adapters and texts.

    Args:
        recipe: any; it comes back as it is where it lacks nothing, and where it has no tasks and nothing is `auto`.
        folder: what its relative paths are relative to; the current folder when None.
        out: where the merge will be written, which is checked before anything is computed.
        force: replace a result at `out`.
        moments: second moments that are given as a function.
        options: how, on this machine.
        workers: modules merged at a time.
        progress: receives stages and steps.

    Raises:
        PlaitError: what it lacks cannot be taken.
    """
    lacks_moments = moments is None and recipe.lacks_moments
    wanted = recipe.values_to_find
    if not lacks_moments and not wanted:
        return CompletedRecipe(recipe)
    if out is not None and (problem := output_problem(out, force=force)):
        raise OutputError(problem)
    progress = progress or SilentProgress()
    request = read_for_completion(recipe, folder, options or LoadOptions())
    given = not_taken_yet if lacks_moments else moments
    make_plan(take_inventory(recipe.with_values(wanted), folder, given), workers=1)  # refused before the base is loaded
    mixture = cache(lambda: load_base(request, progress))
    notes: tuple[str, ...] = ()
    if lacks_moments:
        recipe = _with_moments(recipe, request, folder, mixture, worker_count(workers), progress)
        notes = (f"second moments are of {describe_counts(request.texts)}; no label was read.",)
    if not wanted:
        return CompletedRecipe(recipe, notes=notes)
    inventory = take_inventory(recipe.with_values(wanted), folder, moments)
    found = find_values(request, mixture(), inventory, wanted, worker_count(workers), progress)
    values = ", ".join(f"{name} {value:.4g}" for name, value in found.values.items())
    digests = ", ".join(f"{name} {texts.digest}" for name, texts in request.texts.items())
    note = (
        f"{values} {'was' if len(found.values) == 1 else 'were'} found on {describe_counts(request.texts)}: nearest to each "
        f"task's own adapter, with {found.share:.1%} of the base's divergence from it; no label was read. "
        f"Texts: {digests}."
    )
    return CompletedRecipe(recipe.with_values(found.values), found, (*notes, note))


def _with_moments(
    recipe: Recipe,
    request: CalibrationRequest,
    folder: Path | None,
    mixture: Callable[[], Mixture],
    workers: int,
    progress: Progress,
) -> Recipe:
    if recipe.is_sequential:
        names, fresh = take_sequential_moments(request, STORE, mixture, workers, progress)
    else:
        names = {a.name: f"{a.name}-{request.key(a)}.safetensors" for a in request.inventory.adapters}
        taken = take_all_moments(request, lambda a: STORE / names[a.name], mixture, progress)
        fresh = [a.name for a in taken if not a.reused]
    how = f"taken now on {describe_counts(request.texts)}" if fresh else "taken by an earlier run on the same texts"
    announce(f"second moments of {', '.join(names)}, {how}, are kept in {STORE}.")
    home = STORE if folder is None else absolute(STORE)
    entries = (e.model_copy(update={"moments": str(home / names[e.name])}) for e in recipe.adapters)
    return recipe.changed(*(("adapters", i, "moments") for i in range(len(names))), adapters=tuple(entries))
