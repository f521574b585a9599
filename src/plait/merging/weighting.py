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
            return [p for name in layers for p in _layer_problem(name, modules)]
        case ModuleWeights(modules=patterns):
            return [
                f"weights.modules: {pattern!r} matches no target module; they look like {modules[0]!r}"
                for pattern in patterns
                if not any(fnmatchcase(m, pattern) for m in modules)
            ]
    return []


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


def _layer_problem(name: str, modules: Iterable[str]) -> list[str]:
    keys = {key for m in modules if (key := layer_key(m)) is not None}
    towers = sorted({key.tower for key in keys if key.matches(name)})
    if len(towers) > 1:
        index = name.rpartition(".")[2]
        return [
            f"weights.layers: {name!r} stands in {len(towers)} towers; say which: {', '.join(f'{t}.{index}' for t in towers)}"
        ]
    if not towers:
        known = ", ".join(sorted({key.tower for key in keys})) or "no layers"
        return [f"weights.layers: {name!r} is no layer of these adapters; they have {known}, up to {_top(keys)}"]
    return []


def _top(keys: Iterable[object]) -> str:
    return str(max(keys, key=lambda k: k.index, default="none"))  # type: ignore[attr-defined]
