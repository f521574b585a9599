"""What a search may change in a recipe, as Optuna's parameters, and a point of it as a recipe again."""

from __future__ import annotations

import json
from collections.abc import Container, Mapping, Sequence
from math import prod
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from plait.errors import RecipeError
from plait.recipes.candidates import (
    Point,
    SearchParameter,
    candidate_data,
    is_active,
    label_of,
    recipe_path,
    search_parameters,
    value_at,
)
from plait.recipes.paths import Plain
from plait.recipes.problems import Origins
from plait.recipes.schema import Recipe
from plait.recipes.validation import check_recipe

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution
    from optuna.trial import Trial


class SearchSpace:
    """The candidates of a search.

    Args:
        recipe: to start from; its `search` says what changes.

    Attributes:
        parameters: what changes, the method first.
        start: the recipe's own values, where they are among those that are searched; else None.
    """

    def __init__(self, recipe: Recipe) -> None:
        self._recipe = recipe
        self._data: dict[str, Plain] = recipe.model_dump(mode="json", by_alias=True, exclude={"search"})
        self.parameters = search_parameters(self._data, recipe.search)
        self._active: dict[Any, frozenset[str]] = {}  # method, as a label → paths that its candidates have
        self.start = self.of_recipe(recipe)

    @property
    def is_conditional(self) -> bool:
        """Whether some parameters belong to some of the methods only."""
        methods = self._of("method")
        return methods is not None and any(
            len({is_active(p.path, candidate_data(self._data, {"method": value})[0]) for value in methods.ends}) > 1
            for p in self.parameters
        )

    @property
    def size(self) -> int | None:
        """How many candidates there are; None for any number."""
        if any(p.kind == "float" for p in self.parameters):
            return None
        if not self.is_conditional:
            return prod(self._count(p) for p in self.parameters)
        methods = self._of("method")
        recipes = [self.data({"method": value}) for value in (methods.ends if methods is not None else ())]
        return sum(
            prod(self._count(p) for p in self.parameters if p is not methods and is_active(p.path, data)) for data in recipes
        )

    def grid(self) -> list[dict[str, Plain]]:
        """Return all combinations, each once, the last path changing fastest; every parameter is a choice."""
        points: list[dict[str, Plain]] = [{}]
        for parameter in self.parameters:
            points = [
                {**point, parameter.path: value} if self._has(parameter, point) else point
                for point in points
                for value in (parameter.ends if self._has(parameter, point) else (None,))
            ]
        return points

    def wanted(self, given: Mapping[str, Plain]) -> dict[str, Plain]:
        """Return a point that its user wants tried: what is not given is the recipe's own, where that is searched."""
        asked = {recipe_path(key): value for key, value in given.items()}
        point: dict[str, Plain] = {}
        for parameter in self.parameters:
            if not self._has(parameter, point):
                continue
            if parameter.path in asked:
                point[parameter.path] = asked[parameter.path]
            elif parameter.holds(own := value_at(self.data(point), parameter.path)):
                point[parameter.path] = own
        return point

    def anywhere(self, given: Mapping[str, Plain] = MappingProxyType({})) -> dict[str, Plain]:
        """Return a point with some values; others are the recipe's own, or the first where those are not searched."""
        point = self.wanted(given)
        for p in self.parameters:
            if self._has(p, point):
                point.setdefault(p.path, p.ends[0])
        return point

    def suggest(self, trial: Trial) -> dict[str, Plain]:
        """Return the point of a trial: what it has already, and what its sampler suggests for the rest."""
        point: dict[str, Plain] = {}
        for p in self.parameters:
            if not self._has(p, point):
                continue
            if p.kind == "categorical":
                point[p.path] = p.choices[trial.suggest_categorical(p.path, list(p.choices))]
            elif p.kind == "int":
                point[p.path] = trial.suggest_int(p.path, int(p.low), int(p.high), log=p.log)
            else:
                point[p.path] = trial.suggest_float(p.path, p.low, p.high, log=p.log)
        return point

    def point(self, labels: Mapping[str, Any]) -> dict[str, Plain]:
        """Return a point that Optuna has."""
        choices = {p.path: p.choices for p in self.parameters if p.kind == "categorical"}
        return {path: choices[path][value] if path in choices else value for path, value in labels.items()}

    def at(self, unit: Sequence[float]) -> dict[str, Plain]:
        """Return the point at a place in the unit cube of all parameters, of which it has some."""
        point: dict[str, Plain] = {}
        for p, x in zip(self.parameters, unit, strict=True):
            if self._has(p, point):
                point[p.path] = p.at(float(x))
        return point

    def unit(self, point: Point) -> list[float]:
        """Return the place of a point in the unit cube; the middle for a parameter that it does not have."""
        return [p.unit(point[p.path]) if p.path in point else 0.5 for p in self.parameters]

    def labels(self, point: Point) -> dict[str, Any]:
        """Return a point as Optuna has it."""
        choices = {p.path for p in self.parameters if p.kind == "categorical"}
        return {path: label_of(value) if path in choices else value for path, value in point.items()}

    def distributions(self, point: Container[str]) -> dict[str, BaseDistribution]:
        """Return the distributions of the parameters that a point has.

        Args:
            point: its paths.
        """
        from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

        found: dict[str, BaseDistribution] = {}
        for p in (p for p in self.parameters if p.path in point):
            if p.kind == "categorical":
                found[p.path] = CategoricalDistribution(list(p.choices))
            elif p.kind == "int":
                found[p.path] = IntDistribution(int(p.low), int(p.high), log=p.log)
            else:
                found[p.path] = FloatDistribution(p.low, p.high, log=p.log)
        return found

    def data(self, point: Point) -> dict[str, Plain]:
        """Return the recipe of a point as plain data."""
        return candidate_data(self._data, point)[0]

    def of_every_method(self) -> list[Recipe]:
        """Return one candidate's recipe per method that is searched; none where the method is not."""
        methods = self._of("method")
        return [] if methods is None else [self.recipe(self.anywhere({"method": value})) for value in methods.ends]

    def recipe(self, point: Point) -> Recipe:
        """Return the recipe of a point.

        Raises:
            RecipeError: these values do not go together.
        """
        data, dead_ends = candidate_data(self._data, point)
        recipe, problems = check_recipe(data)
        Origins("").refuse([*dead_ends, *problems])
        if recipe is None:
            raise RecipeError("this candidate is not a recipe.")
        return recipe if self._recipe.folder is None else recipe.placed(self._recipe.folder)

    def of_recipe(self, recipe: Recipe) -> dict[str, Plain] | None:
        """Return the point at which a recipe would be; None where one of its values is not searched."""
        data = recipe.model_dump(mode="json", by_alias=True, exclude={"search"})
        point: dict[str, Plain] = {}
        for parameter in self.parameters:
            if not self._has(parameter, point):
                continue
            value = value_at(data, parameter.path)
            if not parameter.holds(value):
                return None
            point[parameter.path] = value
        return point

    def _of(self, path: str) -> SearchParameter | None:
        return next((p for p in self.parameters if p.path == path), None)

    def _has(self, parameter: SearchParameter, point: Point) -> bool:
        """Whether a candidate with these values, the method's among them, has a parameter."""
        method = label_of(point.get("method"))
        if method not in self._active:
            data = self.data({"method": point["method"]} if "method" in point else {})
            self._active[method] = frozenset(p.path for p in self.parameters if is_active(p.path, data))
        return parameter.path in self._active[method]

    @staticmethod
    def _count(parameter: SearchParameter) -> int:
        return len(parameter.choices) if parameter.kind == "categorical" else int(parameter.high - parameter.low) + 1


def point_key(point: Point) -> str:
    """Return a text that equal points share."""
    return json.dumps({path: float(v) if type(v) is int else v for path, v in point.items()}, sort_keys=True)
