"""What the mixer's controls say: a recipe at one moment, and the query of an address that holds it.

Independent of models and of how it is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any
from urllib.parse import parse_qsl, urlencode

from pydantic import Field

from plait.adapters.names import LayerKey, layer_key
from plait.errors import RecipeError
from plait.parsing import shown
from plait.recipes.loading import build_recipe
from plait.recipes.schema import LayerWeights, Recipe
from plait.recipes.shapes import spell_number
from plait.recipes.writing import shortest
from plait.records import Record

Finite = Annotated[float, Field(allow_inf_nan=False)]
_BANDS = 3  # of a tower, where it has as many layers


class Band(Record):
    """Neighboring layers of one tower.

    Attributes:
        tower: container of the layers.
        indices: of those layers that adapters have.
    """

    tower: str
    indices: tuple[int, ...]

    @property
    def name(self) -> str:
        """Tower and layers, as an address spells it."""
        first, last = self.indices[0], self.indices[-1]
        return f"{self.tower}.{first}-{last}" if last > first else f"{self.tower}.{first}"

    @property
    def layers(self) -> list[str]:
        """The layers as a recipe names them."""
        return [str(LayerKey(self.tower, index)) for index in self.indices]


def bands_of(modules: Iterable[str]) -> tuple[Band, ...]:
    """Return every tower of some target modules in up to three bands of equal depth, in order."""
    towers: dict[str, set[int]] = {}
    for key in filter(None, map(layer_key, modules)):
        towers.setdefault(key.tower, set()).add(key.index)
    found = []
    for tower, indices in sorted(towers.items()):
        present = sorted(indices)
        count = min(_BANDS, len(present))
        for i in range(count):
            own = present[i * len(present) // count : (i + 1) * len(present) // count]
            found.append(Band(tower=tower, indices=tuple(own)))
    return tuple(found)


class Setting(Record):
    """Where the controls are.

    Attributes:
        weights: adapter → its coefficient.
        bands: adapter → name of a band → factor on its coefficient there; 1 where none is given.
        method: name.
        space: coordinates; the method's first when None.
        params: parameters of the method that are not its defaults, as a recipe spells them.
        scale: factor on the merged delta.
    """

    weights: dict[str, Finite]
    bands: dict[str, dict[str, Finite]] = {}  # noqa: RUF012 (frozen)
    method: str = "linear"
    space: str | None = None
    params: dict[str, Any] = {}  # noqa: RUF012 (frozen)
    scale: Finite = 1.0

    def query(self) -> str:
        """Return it as the query of an address, without `?`."""
        pairs = [("weight", f"{name}:{spell_number(value)}") for name, value in self.weights.items()]
        factors = [(name, band, value) for name, own in self.bands.items() for band, value in own.items() if value != 1]
        pairs += [("band", f"{name}:{band}:{spell_number(value)}") for name, band, value in factors]
        pairs += [("method", self.method)] + ([("space", self.space)] if self.space is not None else [])
        pairs += [("param", f"{name}:{json.dumps(value, ensure_ascii=False)}") for name, value in self.params.items()]
        return urlencode([*pairs, ("scale", spell_number(self.scale))], safe=":")


class Controls:
    """What can be set: the adapters, bands and methods of a recipe.

    Args:
        recipe: where the controls begin; its transforms, heads, output, seed and tasks stay as they are.
        modules: target modules of its adapters.

    Attributes:
        names: of the adapters.
        bands: that have factors of their own; none where the recipe has a policy of weights that bands cannot hold.
        start: the recipe's own setting.
    """

    def __init__(self, recipe: Recipe, modules: Iterable[str]) -> None:
        self.recipe = recipe
        self.names = tuple(entry.name for entry in recipe.adapters)
        bands = bands_of(modules)
        own = _in_bands(recipe, bands)
        self.bands = () if own is None else bands
        spelled = shortest(recipe.method)
        given: Mapping[str, Any] = spelled if isinstance(spelled, Mapping) else {}
        self.start = Setting(
            weights={entry.name: entry.weight for entry in recipe.adapters},
            bands=own or {},
            method=recipe.method_name,
            space=given.get("space"),
            params={name: value for name, value in given.items() if name not in ("name", "space")},
            scale=recipe.factor,
        )

    def recipe_of(self, setting: Setting) -> Recipe:
        """Return the recipe that a setting means; relative paths start where those of the first one do.

        Raises:
            RecipeError: the method does not take these parameters, or so many adapters.
        """
        self._check(setting)
        data = self.recipe.model_dump(mode="json", by_alias=True, exclude_unset=True)
        data["version"] = 1
        data["adapters"] = [
            {**entry.model_dump(mode="json", exclude_none=True), "weight": setting.weights[entry.name]}
            for entry in self.recipe.adapters
        ]
        space = {} if setting.space is None else {"space": setting.space}
        data["method"] = {"name": setting.method, **setting.params, **space}
        data["scale"] = setting.scale
        if self.bands:
            data.pop("weights", None)
        if layers := self._layers(setting):
            data["weights"] = {"policy": "per_layer", "layers": layers}
        return build_recipe(data, source="the setting")

    def read(self, query: str) -> Setting:
        """Return the setting that an address holds; what it does not name is as it was at the start.

        Args:
            query: with or without `?`; keys of others are not looked at.

        Raises:
            RecipeError: it names what there is not, or values that are none; all of them.
        """
        found: dict[str, dict[str, Any]] = {"weight": {}, "band": {}, "param": {}, "": {}}
        problems: list[str] = []
        for key, text in parse_qsl(query.removeprefix("?"), keep_blank_values=True):
            name, _, value = text.rpartition(":") if key != "param" else text.partition(":")
            try:
                if key in ("weight", "band"):
                    found[key][name] = float(value)
                elif key == "param":
                    found[key][name] = json.loads(value)
                elif key in ("method", "space", "scale"):
                    found[""][key] = float(text) if key == "scale" else text
            except (ValueError, RecursionError):
                problems.append(f"{key}={shown(text)} is not a value")
        if not problems and not any(found.values()):
            return self.start
        if not problems:
            try:
                setting = self._setting(found)
            except ValueError:
                problems.append("a weight, factor or scale is not a finite number")
            else:
                self._check(setting)
                return setting
        raise RecipeError(f"the address holds no setting of these adapters: {'; '.join(problems)}.")

    def _setting(self, found: Mapping[str, Mapping[str, Any]]) -> Setting:
        """Return the setting of what an address names, by the kinds of its keys."""
        others, bands = dict(found[""]), dict[str, dict[str, float]]()
        for place, factor in found["band"].items():
            name, _, band = place.partition(":")
            bands.setdefault(name, {})[band] = factor
        params = dict(found["param"])
        if "method" not in others:
            params = {**self.start.params, **params}
            others = {"method": self.start.method, "space": self.start.space, **others}
        weights = {**self.start.weights, **found["weight"]}
        return Setting(weights=weights, bands=bands, params=params, **{"scale": self.start.scale, **others})

    def _check(self, setting: Setting) -> None:
        bands = {band.name for band in self.bands}
        unknown = sorted({*setting.weights, *setting.bands} - {*self.names})
        problems = [f"{shown(name)} is not an adapter here; there are {', '.join(self.names)}" for name in unknown]
        lost = sorted({band for own in setting.bands.values() for band in own} - bands)
        problems += [
            f"{shown(band)} is not a band of layers here; there are {', '.join(sorted(bands)) or 'none'}" for band in lost
        ]
        problems += [f"{name} is not a parameter of a method" for name in ("name", "space") if name in setting.params]
        problems += [f"{name} has no weight" for name in self.names if name not in setting.weights]
        if problems:
            raise RecipeError(f"these adapters have no such setting: {'; '.join(problems)}.")

    def _layers(self, setting: Setting) -> dict[str, dict[str, float]]:
        """Return layer → adapter → factor, where a factor is not 1."""
        found: dict[str, dict[str, float]] = {}
        for band in self.bands:
            factors = {name: own[band.name] for name, own in setting.bands.items() if own.get(band.name, 1.0) != 1}
            found |= {layer: factors for layer in band.layers} if factors else {}
        return found


def _in_bands(recipe: Recipe, bands: Sequence[Band]) -> dict[str, dict[str, float]] | None:
    """Return the factors of a recipe's policy of weights by adapter and band; None where bands cannot hold them."""
    if recipe.weights is None:
        return {}
    if not isinstance(recipe.weights, LayerWeights) or recipe.weights.default != 1.0:
        return None
    names = [entry.name for entry in recipe.adapters]
    layers: Mapping[str, Any] = recipe.weights.layers
    found: dict[str, dict[str, float]] = {}
    left = set(layers)
    for band in bands:
        values = [layers.get(layer, 1.0) for layer in band.layers]
        if any(value != values[0] for value in values):
            return None
        left -= {*band.layers}
        for name in names:
            factor = values[0].get(name, 1.0) if isinstance(values[0], dict) else values[0]
            if factor != 1.0:
                found.setdefault(name, {})[band.name] = factor
    return None if left else found
