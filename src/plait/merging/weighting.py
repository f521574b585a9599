"""Which weight an adapter has in a module: the recipe's weight policy, resolved.

Every command takes weights from here. A policy over the depth of the model is resolved with the towers that the adapters have.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase

from plait.adapters.names import layer_key
from plait.recipes.schema import (
    AdapterWeights,
    LayerWeights,
    LinesWeights,
    ModuleWeights,
    PerAdapter,
    Recipe,
    ScalarWeights,
    ScheduleWeights,
)

Towers = Mapping[str, int]  # tower → index of its last layer


def towers_of(modules: Iterable[str]) -> dict[str, int]:
    """Return the towers of target modules, each with the index of its last layer."""
    towers: dict[str, int] = {}
    for key in (layer_key(m) for m in modules):
        if key is not None:
            towers[key.tower] = max(key.index, towers.get(key.tower, 0))
    return towers


def module_weights(recipe: Recipe, module: str, towers: Towers) -> list[float]:
    """Return the adapters' weights in one target module: `adapters[].weight` times the policy's factor.

    Args:
        recipe: whose policy.
        module: path of the target module.
        towers: of all target modules of the merge (`towers_of`).
    """
    return [a.weight * _factor(recipe, a.name, module, towers) for a in recipe.adapters]


def policy_problems(recipe: Recipe, modules: Sequence[str]) -> list[str]:
    """Return what the policy names that the adapters do not have: layers, ambiguous layer numbers, patterns without a match."""
    match recipe.weights:
        case ScheduleWeights(layers=count) | LinesWeights(layers=count):
            return _depth_problems(count, modules)
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


def _factor(recipe: Recipe, adapter: str, module: str, towers: Towers) -> float:
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
        case ScheduleWeights() as schedule:
            depth = _depth(module, towers, schedule.layers)
            return _of(schedule.default, adapter) if depth is None else _on_curve(schedule, adapter, depth)
        case LinesWeights(alpha=alpha, beta=beta, layers=count):
            return alpha + beta * (_depth(module, towers, count) or 0.0)
    return 1.0


def _depth(module: str, towers: Towers, count: int | None) -> float | None:
    """Return the depth of a module in its tower, in [0, 1]; None outside of layers."""
    key = layer_key(module)
    if key is None:
        return None
    last = towers[key.tower] if count is None else count - 1
    return key.index / last if last else 0.0


def _on_curve(schedule: ScheduleWeights, adapter: str, depth: float) -> float:
    """Return the factor at a depth in [0, 1]."""
    points = schedule.points.get(adapter) if isinstance(schedule.points, dict) else schedule.points
    if schedule.points is None:
        points = (_of(schedule.first, adapter), _of(schedule.last, adapter))
    if points is None:  # an adapter that has no curve among those of others
        return _of(schedule.default, adapter)
    if schedule.curve == "cosine":
        depth = (1 - math.cos(math.pi * depth)) / 2
    position = depth * (len(points) - 1)
    start = min(int(position), len(points) - 2)
    share = position - start
    return (1 - share) * points[start] + share * points[start + 1]


def _depth_problems(count: int | None, modules: Sequence[str]) -> list[str]:
    """Return why a curve over the depth means nothing for these modules."""
    towers = towers_of(modules)
    if not towers:
        return [f"weights.policy: the adapters have no layers to follow a curve over; their modules look like {modules[0]!r}"]
    return [
        f"weights.layers: {count} layers, but the adapters have {tower}.{last}; give at least {last + 1}"
        for tower, last in towers.items()
        if count is not None and last >= count
    ]


def _of(value: PerAdapter, adapter: str) -> float:
    return value.get(adapter, 1.0) if isinstance(value, dict) else value


def _layer_problem(where: str, name: str, modules: Iterable[str]) -> list[str]:
    keys = {key for m in modules if (key := layer_key(m)) is not None}
    towers = sorted({key.tower for key in keys if key.matches(name)})
    if len(towers) > 1:
        index = name.rpartition(".")[2]
        text = ", ".join(f"{t}.{index}" for t in towers)
        return [f"{where}: {name!r} is a layer of {len(towers)} towers; name one of {text}"]
    if not towers:
        last = {tower: max(k.index for k in keys if k.tower == tower) for tower in sorted({k.tower for k in keys})}
        known = ", ".join(f"{tower}.0 to {tower}.{index}" for tower, index in last.items()) or "no layers"
        return [f"{where}: {name!r} is not a layer of these adapters; they have {known}"]
    return []
