"""Recipe → inventory: every adapter found and opened by its headers, and checked against the others. No tensor is read."""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.agreement import in_one_naming
from plait.adapters.layouts import Layout
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.files import read_config
from plait.checkpoints.weights import BaseWeights
from plait.errors import AdapterError, AddressError, PlanError, collect, take_all
from plait.folders import expanded
from plait.hub.download import ADAPTER_CONFIG, Located, resolve, resolve_model
from plait.hub.references import parse_reference
from plait.inspection.compatibility import check_compatibility, with_places
from plait.merging.kept import KeptResults
from plait.merging.moments import Moments, MomentsOf, from_files, from_function, not_taken_yet
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json


@dataclass(frozen=True)
class Inventory:
    """What there is to merge.

    Attributes:
        recipe: what was asked for.
        adapters: opened, in the recipe's order.
        located: where each came from.
        layouts: target module → how it is stored; the union over adapters, sorted.
        base: the base model's weights, where the merge needs them (DoRA).
        base_located: where those came from.
        moments: second moments of the modules' inputs, where the recipe or the caller gives them.
        kept: results per module that merges of these adapters share; None where each is merged once.
        base_config: the base model's `config.json`, where a dense output needs it and it is in a local folder; else empty.
    """

    recipe: Recipe
    adapters: tuple[Adapter, ...]
    located: tuple[Located, ...]
    layouts: Mapping[str, Layout]
    base: BaseWeights | None
    base_located: Located | None = None
    moments: Moments | None = None
    kept: KeptResults | None = field(default=None, repr=False)
    base_config: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def base_model(self) -> str | None:
        """The base model's name: the recipe's, else the first that an adapter gives."""
        return self.recipe.base_model or next((a.config.base_model for a in self.adapters if a.config.base_model), None)


def take_inventory(
    recipe: Recipe, folder: Path | None = None, moments: MomentsOf | None = None, base_folder: Path | None = None
) -> Inventory:
    """Find and open everything a recipe names.

    Args:
        recipe: what was asked for.
        folder: what relative paths are relative to; the current folder when None.
        moments: gives the second moments of modules' inputs, in place of files that the recipe names.
        base_folder: of the base model, where its name does not lead there.

    Raises:
        AddressError: references that lead nowhere.
        AdapterError: files that are not adapters.
        PlanError: adapters that do not belong together.
    """
    located, adapters = open_entries(recipe, folder)
    problems = check_compatibility(adapters, base_model=recipe.base_model).problems
    collect(PlanError, with_places(problems, adapters), "these adapters do not fit together")
    layouts = {path: target.layout for adapter in adapters for path, target in adapter.targets.items()}
    base, place = None, None
    if recipe.base_model is not None and any(t.is_dora for a in adapters for t in a.targets.values()):
        with naming_base(recipe, adapters):
            place = (
                resolve_model(recipe.base_model, base=folder, any_form=True)
                if base_folder is None
                else Located(folder=base_folder)
            )
        base = BaseWeights(place.path)
    found = _moments(recipe, folder, moments, adapters)
    inventory = Inventory(recipe, tuple(adapters), tuple(located), dict(sorted(layouts.items())), base, place, found)
    return (
        replace(inventory, base_config=_base_config(inventory, folder, base_folder))
        if recipe.output.kind == "delta"
        else inventory
    )


@contextmanager
def naming_base(recipe: Recipe | None, adapters: Sequence[Adapter], *, given: object = None) -> Iterator[None]:
    """Name in a refusal of the base model what names it: the recipe's key, or an adapter's field; nothing where it is given."""
    try:
        yield
    except AddressError as error:
        if given:
            raise
        if recipe is not None and recipe.base_model:
            with recipe.origins.at("base_model"):
                raise
        if owner := next((a for a in adapters if a.config.base_model), None):
            error.args = (f"{owner.folder / ADAPTER_CONFIG}: base_model_name_or_path: {error}",)
            if not getattr(error, "__notes__", ()):  # a bake says whose base it is
                error.add_note("--base-id (base=, or base_model in a recipe) names another place.")
        raise


def _base_config(inventory: Inventory, folder: Path | None, given: Path | None) -> Mapping[str, Any]:
    """Return the base's configuration where it is in a local folder: a dense output asks it for the orientation of layers."""
    named = inventory.base_model
    place = given if given is not None or named is None else (folder or Path()) / expanded(named)
    return {} if place is None or not place.is_dir() else read_config(place)


def _moments(recipe: Recipe, folder: Path | None, given: MomentsOf | None, adapters: Sequence[Adapter]) -> Moments | None:
    if given is not None and recipe.is_sequential and given is not not_taken_yet:
        raise PlanError(
            f"method {recipe.method_name!r} takes second moments layer by layer, with the layers below already merged; a "
            "function cannot give them. Give tasks (tasks=) in its place, or use 'regmean'."
        )
    if given is not None:
        return from_function(given, {a.name: a.targets for a in adapters})
    names = [a.name for a in recipe.adapters]
    paths = {a.name: (folder or Path()) / expanded(a.moments) for a in recipe.adapters if a.moments is not None}
    if not paths:
        return None
    if lacking := [a.name for a in adapters if a.name not in paths]:
        raise PlanError(f"adapters[].moments: given for {', '.join(paths)}, not for {', '.join(lacking)}; all need them.")
    return from_files(paths, adapters, lambda name: recipe.origins.at("adapters", names.index(name), "moments"))


def placed_recipe(recipe: Recipe, inventory: Inventory) -> dict[str, Any]:
    """Return a recipe as plain values that name the folders and files that were found, for a process elsewhere.

    Args:
        recipe: what was asked for.
        inventory: what was found for it.
    """
    data = recipe_json(recipe)
    for entry, place in zip(data["adapters"], inventory.located, strict=True):
        entry["path"] = str(place.path.absolute())
        if inventory.moments is not None and entry["name"] in inventory.moments.files:
            entry["moments"] = str(inventory.moments.files[entry["name"]].path.absolute())
    return data


def open_entries(recipe: Recipe, folder: Path | None) -> tuple[list[Located], list[Adapter]]:
    """Find and open the adapters of a recipe; see `open_adapters`."""
    references = [(entry.name, entry.path) for entry in recipe.adapters]
    modules = modules_of(recipe.base_model, folder)
    return open_adapters(references, folder, lambda i: recipe.origins.at("adapters", i, "path"), modules)


def modules_of(base_model: str | None, folder: Path | None) -> Callable[[], Collection[str]] | None:
    """Return what gives the modules of a base model that is on this machine; None for others: a name fetches none."""
    place = None if base_model is None else (folder or Path()) / expanded(base_model)
    if place is None or not os.path.exists(place):  # noqa: PTH110  (of a name that is too long, Path.exists raises)
        return None
    return lambda: BaseCheckpoint.open(str(place.absolute())).modules()


def open_adapters(
    references: Sequence[tuple[str | None, str]],
    folder: Path | None = None,
    naming: Callable[[int], AbstractContextManager[None]] = lambda _: nullcontext(),
    modules: Callable[[], Collection[str]] | None = None,
) -> tuple[list[Located], list[Adapter]]:
    """Find and open adapters.

    Args:
        references: (name, reference); without a name the reference gives one, made different from the others'.
        folder: what relative paths are relative to; the current folder when None.
        naming: index → what names the place of that reference in what is refused of it.
        modules: gives the paths of the base model's modules, where it is at hand.

    Raises:
        AddressError: references that lead nowhere, all at once.
        AdapterError: files that are not adapters, all at once.
    """
    names: set[str] = set()

    def opened(index: int) -> tuple[Located, Adapter]:
        given, text = references[index]
        with naming(index):
            reference = parse_reference(text, base=folder)
            place = resolve(reference, base=folder)
            adapter = Adapter.open(place.path, given or _unused(reference.default_name(folder), names), modules)
        names.add(adapter.name)
        return place, adapter

    found = take_all(AdapterError, (partial(opened, i) for i in range(len(references))), "some adapters cannot be opened")
    return [place for place, _ in found], in_one_naming([adapter for _, adapter in found])


def _unused(name: str, taken: set[str]) -> str:
    candidates = (name if number == 1 else f"{name}-{number}" for number in count(1))
    return next(c for c in candidates if c not in taken)
