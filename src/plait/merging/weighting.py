"""Which weight an adapter has in a module: the recipe's weight policy, resolved."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor

from plait.adapters.names import layer_key
from plait.recipes.schema import AdapterWeights, LayerWeights, ModuleWeights, PerAdapter, Recipe, ScalarWeights


def module_weights(recipe: Recipe, module: str) -> Tensor:
    """Return the adapters' weights in one target module, (T,) float64: `adapters[].weight` times the policy's factor."""
    values = [a.weight * _factor(recipe, a.name, module) for a in recipe.adapters]
    return torch.tensor(values, dtype=torch.float64)


def policy_problems(recipe: Recipe, modules: Sequence[str]) -> list[str]:
    """Return what the policy names that the adapters do not have: layers, ambiguous layer numbers, patterns without a match."""
    match recipe.weights:
        case LayerWeights(layers=layers):
            return layer_problems("weights.layers", list(layers), modules)
        case ModuleWeights(modules=patterns):
            return [
                f"weights.modules: {pattern!r} matches no target module; they look like {modules[0]!r}"
                for pattern in patterns
                if not any(fnmatchcase(m, pattern) for m in modules)
            ]
    return []


def layer_problems(where: str, names: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Return which layer names mean no layer, layers of several towers, or the same layer twice."""
    problems = [p for name in names for p in _layer_problem(where, name, modules)]
    for key in {key for m in modules if (key := layer_key(m)) is not None}:
        meant = [name for name in names if key.matches(name)]
        if len(meant) > 1:
            problems.append(f"{where}: {' and '.join(map(repr, meant))} both mean {key}; keep one")
    return problems


def _factor(recipe: Recipe, adapter: str, module: str) -> float:
    match recipe.weights:
        case ScalarWeights(value=value):
            return _of(value, adapter)
        case AdapterWeights(adapters=adapters, default=default):
            return adapters.get(adapter, default)
        case LayerWeights(layers=layers, default=default):
            key = layer_key(module)
            found = next((v for name, v in layers.items() if key is not None and key.matches(name)), default)
            return _of(found, adapter)
        case ModuleWeights(modules=patterns, default=default):
            return _of(next((v for p, v in patterns.items() if fnmatchcase(module, p)), default), adapter)
    return 1.0


def _of(value: PerAdapter, adapter: str) -> float:
    return value.get(adapter, 1.0) if isinstance(value, dict) else value


def _layer_problem(where: str, name: str, modules: Iterable[str]) -> list[str]:
    keys = {key for m in modules if (key := layer_key(m)) is not None}
    towers = sorted({key.tower for key in keys if key.matches(name)})
    if len(towers) > 1:
        index = name.rpartition(".")[2]
        said = ", ".join(f"{t}.{index}" for t in towers)
        return [f"{where}: {name!r} stands in {len(towers)} towers; say which: {said}"]
    if not towers:
        last = {tower: max(k.index for k in keys if k.tower == tower) for tower in sorted({k.tower for k in keys})}
        known = ", ".join(f"{tower}.0 to {tower}.{index}" for tower, index in last.items()) or "no layers"
        return [f"{where}: {name!r} is no layer of these adapters; they have {known}"]
    return []
