"""An earlier merge with one adapter more: from its sources, or from the merged adapter itself."""

from __future__ import annotations

import glob
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from plait.adapters.adapter import Adapter
from plait.deferred import Tensor, torch
from plait.errors import AdapterError, PlanError, RecipeError, listed
from plait.folders import working_folder
from plait.hub.references import parse_reference
from plait.merging.combine import pipeline_of
from plait.merging.inventory import open_adapters
from plait.merging.weighting import module_weights, towers_of
from plait.parsing import is_there, read_object, shown
from plait.recipes.loading import build_recipe
from plait.recipes.problems import Origins
from plait.recipes.request import Adapters, extend_request
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json
from plait.results.checks import check_files
from plait.results.lock import CARD, LOCK, RUN_RECORD, Lock, read_lock, relative_path
from plait.results.records import Result
from plait.stages.base import LinearCombine
from plait.verification.inputs import BASE, FoundInput, InputCheck, check_inputs
from plait.verification.rebuild import located_recipe

ModuleFactors = dict[str, list[float]]  # target module → one factor per adapter


@dataclass(frozen=True)
class Extension:
    """What to merge so that an earlier merge has more adapters.

    Attributes:
        recipe: relative paths start from the working directory.
        base_folder: where the base model is, when the earlier merge read it.
        notes: how the result relates to merging all adapters at once.
    """

    recipe: Recipe
    base_folder: Path | None
    notes: tuple[str, ...]


def extend(
    folder: Path,
    add: Adapters,
    settings: Mapping[str, Any],
    sets: Sequence[str] = (),
    *,
    inputs: Mapping[str, str] | None = None,
    from_merged: bool = False,
) -> Extension:
    """Return the recipe of an earlier merge with more adapters.

    From the sources that its lock names, the result is that of merging all at once, whatever the method. From the merged
    adapter (`from_merged`) it is that too for linear methods, as far as the earlier merge was written exactly; for any other
    it is another merge, which a note reports.

    Args:
        folder: of the earlier merge, with its `plait.lock`.
        add: references, or name → reference.
        settings: changes of the earlier recipe, as `plait.merge` takes them; `weights` are those of the added adapters.
        sets: `PATH=VALUE`, applied last.
        inputs: name → reference, for sources that are elsewhere than the lock records.
        from_merged: take the merged adapter in place of its sources.

    Raises:
        AdapterError: there is no lock, or sources are gone or have changed.
        PlanError: the merged adapter cannot replace its sources.
        RecipeError: the recipe cannot be read, or what is added does not suit it.
    """
    lock = read_lock(folder)
    if lock.kind not in ("merge", "bake"):
        raise RecipeError(f"{folder}: made by `plait {lock.kind}`, which merges nothing that an adapter could be added to.")
    if from_merged:
        return _from_merged(folder, lock, add, settings, sets)
    checks, found = check_inputs(folder, lock, inputs or {})
    lost = [c for c in checks if c.state == "changed" or not c.found]
    if lost:
        lines = "\n".join(f"  - {c.name}: {_what_changed(c)}" for c in lost)
        given = " ".join(f"--input {c.name}=PATH" for c in lost)
        then = _recipe(folder, lock)
        exact = f"exact for {then.method_name!r}, by arithmetic on the weights"
        other = f"with {then.method_name!r} another result than merging all at once"
        raise AdapterError(
            f"{folder}: {len(lost)} of {len(checks)} sources of this merge are not what they were:\n{lines}\n"
            f"Give their present places ({given}), or add to the merged adapter itself (--from-merged): "
            f"{exact if _is_exact(then) else other}."
        )
    earlier = recipe_json(located_recipe(lock, found, str(folder / LOCK)))
    for entry in earlier["adapters"]:
        name = entry["name"]
        source = lock.inputs[name]  # on the Hub, or from the working directory, so that no home folder is published
        moved = not source.repo or name in (inputs or {})
        entry["path"] = relative_path(found[name].path, working_folder()) if moved else source.path
    base = found[BASE].folder if BASE in found else None
    return Extension(extend_request(earlier, add, settings, sets).written(_origins(folder)), base, ())


def _origins(folder: Path) -> Origins:
    """Name the file that holds the recipe of an earlier merge in what is refused of it."""
    return Origins(f"{folder / LOCK}, its recipe with what is added")


def _what_changed(c: InputCheck) -> str:
    return f"{c.path} has other files than then ({c.detail})" if c.state == "changed" else c.detail or f"{c.path} is not there"


def _recipe(folder: Path, lock: Lock) -> Recipe:
    """Return a lock's recipe; its paths are not looked at."""
    return located_recipe(lock, {name: FoundInput(Path("/", name), None) for name in lock.inputs}, str(folder / LOCK))


def _from_merged(folder: Path, lock: Lock, add: Adapters, settings: Mapping[str, Any], sets: Sequence[str]) -> Extension:
    earlier = _recipe(folder, lock)
    if lock.kind != "merge" or earlier.output.kind != "adapter":
        raise PlanError(f"{folder}: --from-merged needs a merged adapter, and this is a {lock.kind} of dense weights.")
    _check_unchanged(folder, lock)
    every = extend_request(recipe_json(earlier), add, settings, sets)
    new = every.adapters[len(earlier.adapters) :]
    _, opened = open_adapters([("merged", str(folder)), *((a.name, a.path) for a in new)])
    linear = _is_exact(earlier) and _is_exact(every)
    factors = _factors(earlier, every, opened) if linear else _plain_factors(every, opened, len(earlier.adapters))
    name = parse_reference(str(folder)).default_name()
    entries = [{"name": name, "path": relative_path(folder, working_folder())}, *(a.model_dump(mode="json") for a in new)]
    data = recipe_json(every) | {"scale": 1.0, "adapters": entries} | ({"method": {"name": "linear"}} if linear else {})
    recipe = build_recipe(_weighed(data, factors), source="the request").written(_origins(folder))
    return Extension(recipe, None, (_relation(folder, every, exact=linear),))


def _is_exact(recipe: Recipe) -> bool:
    """Return whether a merge of merges is the merge of all: Σ cₜ ΔWₜ of the deltas as they are."""
    return pipeline_of(recipe).is_linear and recipe.space_name != "factors" and not recipe.transforms


def _factors(earlier: Recipe, every: Recipe, opened: Sequence[Adapter]) -> ModuleFactors:
    """Return the factors of (merged, new, …) per module that make Σ cₜ ΔWₜ over all adapters.

    Raises:
        PlanError: the new recipe weighs the earlier adapters otherwise against each other.
    """
    count, modules = len(earlier.adapters), sorted({m for a in opened for m in a.targets})
    before, after = towers_of(opened[0].targets), towers_of(modules)
    found: ModuleFactors = {}
    for module in modules:
        inside = module in opened[0].targets
        old = _coefficients(earlier, module, before) if inside else torch.zeros(count, dtype=torch.float64)
        new = _coefficients(every, module, after)
        share = float((new[:count] @ old) / (old @ old)) if inside and old.any() else 0.0
        if inside and not torch.allclose(new[:count], share * old, rtol=1e-9, atol=1e-12):
            raise PlanError(
                f"{module}: with another adapter the earlier ones weigh differently against each other, and their merge cannot "
                "be taken apart. Merge from the sources."
            )
        found[module] = [share, *new[count:].tolist()]
    return found


def _coefficients(recipe: Recipe, module: str, towers: Mapping[str, int]) -> Tensor:
    combine = pipeline_of(recipe).combine
    if not isinstance(combine, LinearCombine):
        raise AssertionError(f"{combine} is not linear")
    weights = torch.tensor(module_weights(recipe, module, towers), dtype=torch.float64)
    return combine.coefficients(weights, module) * recipe.factor


def _plain_factors(every: Recipe, opened: Sequence[Adapter], count: int) -> ModuleFactors:
    """Return 1 for the merged adapter and the weights of the new ones, times the scale that the merged one has in it."""
    modules = sorted({m for a in opened for m in a.targets})
    towers = towers_of(modules)
    return {m: [1.0, *(weight * every.factor for weight in module_weights(every, m, towers)[count:])] for m in modules}


def _weighed(data: dict[str, Any], factors: ModuleFactors) -> dict[str, Any]:
    """Write factors as the adapters' weights, or per module where they differ."""
    rows = list(factors.values())
    names = [entry["name"] for entry in data["adapters"]]
    if all(row == rows[0] for row in rows):
        entries = [{**entry, "weight": w} for entry, w in zip(data["adapters"], rows[0], strict=True)]
        return data | {"adapters": entries, "weights": None}
    patterns = {glob.escape(m): dict(zip(names, row, strict=True)) for m, row in factors.items()}
    entries = [{**entry, "weight": 1.0} for entry in data["adapters"]]
    return data | {"adapters": entries, "weights": {"policy": "per_module", "modules": patterns}}


def _relation(folder: Path, every: Recipe, *, exact: bool) -> str:
    """Report how the result relates to merging all adapters at once."""
    count = len(every.adapters)
    if not exact:
        linear = pipeline_of(every).is_linear and every.space_name != "factors"
        why = "each adapter is transformed first" if linear else f"{every.method_name!r} is not linear"
        return (
            f"this is {every.method_name!r} of the earlier merge and what is added, another result than that of all {count} "
            f"adapters at once: {why}. The sources are needed for that one."
        )
    result = _written_as(folder)
    if result is None:
        return (
            f"{folder} has no {RUN_RECORD}: whether the earlier merge was truncated is not known. If it was, what it lost is "
            f"missing here too, against merging all {count} adapters at once."
        )
    if result == "truncated":
        return (
            f"the earlier merge was truncated: what it lost is missing here too, against merging all {count} adapters at once."
        )
    rounded = f", up to rounding it to {every.output.dtype} once more" if every.output.dtype != "float32" else ""
    return f"the same as merging all {count} adapters at once{rounded}: {every.method_name!r} is linear."


def _written_as(folder: Path) -> str | None:
    """Return whether an earlier merge was written exactly; None where it has no record.

    Raises:
        AdapterError: the record cannot be read.
    """
    record = folder / RUN_RECORD
    if not is_there(record, AdapterError):
        return None
    result = read_object(record, AdapterError).get("result")
    if result not in get_args(Result):
        raise AdapterError(f"{record}: result: {shown(result)} must be one of {', '.join(get_args(Result))}.")
    return str(result)


def _check_unchanged(folder: Path, lock: Lock) -> None:
    """Refuse a merged adapter that is not what its lock says.

    Raises:
        AdapterError: files of it are gone, or have changed.
    """
    wrong = [f"{f.name} ({f.state})" for f in check_files(folder, lock) if f.state not in ("equal", "extra") and f.name != CARD]
    if wrong:
        raise AdapterError(
            f"{folder}: {listed(wrong)}: not what {LOCK} says was written; how the earlier adapters are weighed in it is not "
            "known. Make the merge again, or merge the folder as an adapter: plait merge, without --add."
        )
