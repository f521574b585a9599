"""The recipe of something that was made before: a merge, a search, or an evaluation, by its folder."""

from __future__ import annotations

from pathlib import Path

from plait.errors import AdapterError, RecipeError, ReportError
from plait.evaluation.record import Evaluation
from plait.parsing import read_record
from plait.recipes.loading import build_recipe, read_recipe
from plait.recipes.problems import Origins
from plait.recipes.schema import Recipe
from plait.results.lock import LEARNED_RECIPE, LOCK, read_lock
from plait.verification.inputs import BASE, check_inputs
from plait.verification.rebuild import located_recipe

_RESULTS = "eval_results_*.json"
_RECIPE = "recipe.yaml"  # of a search, with its best values


def is_run(folder: Path) -> bool:
    """Whether a folder is that of a result that names its recipe, and not a trained adapter."""
    return folder.is_dir() and ((folder / LOCK).is_file() or (folder / _RECIPE).is_file() or any(folder.glob(_RESULTS)))


def recipe_of_run(folder: Path) -> tuple[Recipe, Path | None]:
    """Return the recipe of a run, and the folder that its relative paths start from.

    Args:
        folder: of a merge, bake or tuning of coefficients (with its lock), of a search, or of an evaluation of a merge.

    Raises:
        PlaitError: adapters are gone or have changed, or the run is not that of a merge.
    """
    if (folder / LOCK).is_file():
        return _locked(folder), None
    if (folder / _RECIPE).is_file():
        return read_recipe(folder / _RECIPE)
    file = sorted(folder.glob(_RESULTS))[0]
    what = "a result that this version of plait wrote"
    found = read_record(Evaluation, file, ReportError, what=what, advice="Evaluate again.")
    if found.recipe is None:
        raise RecipeError(f"{file}: evaluates {found.name}, which no recipe made. Give its adapters.")
    return build_recipe(found.recipe, source=str(file)).written(Origins(str(file))), None


def _locked(folder: Path) -> Recipe:
    lock = read_lock(folder)
    if not lock.has_adapters:
        raise RecipeError(f"{folder}: made by `plait {lock.kind}`, which merges nothing. Give adapters, or a merge of some.")
    if lock.kind == "tune" and LEARNED_RECIPE not in lock.outputs:
        raise RecipeError(f"{folder}: a tuning of factors, which no weights make again. Give its adapters.")
    checks, found = check_inputs(folder, lock, {})
    if lost := [c for c in checks if c.state != "equal" and c.name in lock.inputs]:
        lines = "\n".join(f"  - {c.name}: {c.detail or c.path}" for c in lost)
        raise AdapterError(
            f"{folder}: {len(lost)} of the adapters that it was made of are not what they were:\n{lines}\n"
            "Give adapters or a recipe in its place."
        )
    recipe = located_recipe(lock, found, str(folder / LOCK))
    if BASE in found:
        recipe = recipe.changed(base_model=str(found[BASE].path))
    return recipe.written(Origins(str(folder / LOCK)))
