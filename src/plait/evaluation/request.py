"""What a command line or a Python call asks for, on top of a recipe's own `tasks` and `eval`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.methods import METHODS
from plait.recipes.evaluation import EvalSpec
from plait.recipes.problems import Origins
from plait.recipes.request import read_request
from plait.recipes.schema import Recipe
from plait.recipes.validation import validate
from plait.tasks.loading import with_tasks


def recipe_name(recipe: Recipe) -> str:
    """Return what a merge is called for people."""
    return f"{recipe.method_name}, {recipe.space_name}"


def eval_spec(given: EvalSpec, changes: Mapping[str, Any]) -> EvalSpec:
    """Return how to evaluate, with what is not None changed.

    Args:
        given: the recipe's.
        changes: keys of a recipe's `eval`. `subset` may also be a number, of every task; the keys of a subset on their own
            (`subset.max_samples`, …) replace the recipe's subset.

    Raises:
        RecipeError: a value is not allowed.
    """
    changed = {key: value for key, value in changes.items() if value is not None}
    parts = {key.partition(".")[2]: changed.pop(key) for key in [*changed] if key.startswith("subset.")}
    if "seed" in parts and not {"max_samples", "per_task"} & {*parts}:
        raise RecipeError("--seed is that of the subset; give --subset N too, or set both in the recipe (eval.subset).")
    if parts:
        changed["subset"] = parts["max_samples"] if {*parts} == {"max_samples"} else parts
    if isinstance(changed.get("subset"), int):
        before = {} if given.subset is None else given.subset.model_dump()
        changed["subset"] = {**before, "max_samples": changed["subset"], "per_task": {}}
    data = {**given.model_dump(mode="json"), **changed}
    spec, problems = validate(EvalSpec, data)
    Origins("the request").refuse(problems)
    if spec is None:
        raise AssertionError("a specification without problems was not built")
    return spec


def evaluated_recipe(recipe: Recipe, tasks: Sequence[str | Path], changes: Mapping[str, Any]) -> Recipe:
    """Return a recipe with other tasks, where some are given, and `eval_spec` its `eval`.

    Given tasks are relative to the working directory, a recipe's own to its folder.
    """
    return with_tasks(recipe, tasks or None).changed(eval=eval_spec(recipe.eval, changes))


def variants(
    file: Path | None,
    adapters: Any,
    settings: Mapping[str, Any],
    sets: Sequence[str],
    methods: Sequence[str],
    spaces: Sequence[str],
) -> tuple[dict[str, Recipe], Path | None, dict[str, str]]:
    """Return one recipe per method and space; the request's own where none is given.

    A parameter that some of the methods lack is given to those that have it.

    Returns:
        Name → recipe; the folder that relative paths start from; name → why it is left out.

    Raises:
        RecipeError: a method is not known, or none of the recipes is valid.
    """
    recipes: dict[str, Recipe] = {}
    skipped: dict[str, str] = {}
    folder: Path | None = None
    several = len(methods) * max(1, len(spaces)) > 1
    for method, space in product(methods or (None,), spaces or (None,)):
        wanted = _fitting(settings, method) | {k: v for k, v in (("method", method), ("space", space)) if v is not None}
        try:
            recipe, folder = read_request(file, adapters, wanted, sets)
        except RecipeError as error:
            if not (method in METHODS and several):
                raise
            skipped[", ".join(word for word in (method, space) if word)] = str(error)
        else:
            recipes[recipe_name(recipe)] = recipe
    if not recipes:
        raise RecipeError("none of these merges is valid:\n" + "\n".join(f"  - {n}: {why}" for n, why in skipped.items()))
    return recipes, folder, skipped


def _fitting(settings: Mapping[str, Any], method: str | None) -> dict[str, Any]:
    """Leave out parameters that belong to other methods only."""
    if method is None:
        return dict(settings)
    own = set(METHODS[method].params.model_fields) if method in METHODS else set()
    others = {name for m in METHODS.values() for name in m.params.model_fields} - own
    return {key: value for key, value in settings.items() if key not in others}
