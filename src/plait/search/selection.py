"""Which candidate is the best, which ones no other surpasses, and when a search may end."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from plait.recipes.candidates import SearchParameter, recipe_path
from plait.recipes.search import EarlyStop, SearchSpec
from plait.search.record import Run

_LOWEST = -math.inf


def rank_key(run: Run, spec: SearchSpec) -> tuple[float, ...]:
    """Return what candidates are ordered by, the best largest: what is maximized, ties by the mean, then by the worst."""
    goals = [_value(run.goal(name)) for name in spec.maximize]
    return (float(run.nonnegative or not spec.constraint_nonnegative), *goals, _value(run.mean), _value(run.worst))


def ranked(runs: Sequence[Run], spec: SearchSpec) -> list[int]:
    """Return the indices of the candidates that were asked everything, the best first; of equal ones the earliest.

    The base model, which a search knows as scale 0, does not count.
    """
    complete = [i for i, run in enumerate(runs) if run.complete and run.phase != "zero"]
    return sorted(complete, key=lambda i: rank_key(runs[i], spec), reverse=True)


def front(runs: Sequence[Run], spec: SearchSpec) -> list[int]:
    """Return the indices of the candidates that no other surpasses, in the order of what is maximized first."""
    goals = spec.maximize if len(spec.maximize) > 1 else ("worst_recovery", "mean_recovery")
    values = {i: tuple(_value(runs[i].goal(name)) for name in goals) for i in ranked(runs, spec)}

    def surpassed(one: tuple[float, ...]) -> bool:
        return any(other != one and all(a >= b for a, b in zip(other, one, strict=True)) for other in values.values())

    found = {value: i for i, value in reversed(values.items()) if not surpassed(value)}  # of equal ones the best
    return sorted(found.values(), key=lambda i: values[i], reverse=True)


def reason_to_stop(runs: Sequence[Run], spec: SearchSpec, parameters: Sequence[SearchParameter]) -> str | None:
    """Return why a search ends; None where it continues.

    Args:
        runs: all so far, in their order.
        spec: its `early_stop`.
        parameters: that are searched.
    """
    stop = spec.early_stop
    if stop is None:
        return None
    tried = [run for run in runs if run.phase == "search" and run.score is not None]
    if len(tried) < max(stop.min_trials or max(8, spec.used_init_points), stop.patience + 1):
        return None
    recent = tried[-stop.patience :]
    complete = [run for run in runs if run.complete]
    earlier = [run for run in complete if run not in recent]
    best, before = (max((_value(run.score) for run in some), default=_LOWEST) for some in (complete, earlier))
    plateau = best - before < stop.min_gain
    leader = max(complete, key=lambda run: rank_key(run, spec), default=None)
    same = bool(stop.resolution) and leader is not None and all(_near(run, leader, stop, parameters) for run in recent)
    words = []
    if plateau:
        words.append(f"the last {stop.patience} trials gained less than {stop.min_gain:g}")
    if same:
        words.append(f"the last {stop.patience} trials round to the values of the best")
    wanted = 2 if stop.resolution and stop.require_both else 1
    return " and ".join(words) if len(words) >= wanted else None


def _near(run: Run, best: Run, stop: EarlyStop, parameters: Sequence[SearchParameter]) -> bool:
    """Whether a candidate rounds to the same steps as the best; where a path has no step, it must be equal."""
    steps = {recipe_path(key): step for key, step in stop.resolution.items()}
    return all(_bucket(run.params, p.path, steps) == _bucket(best.params, p.path, steps) for p in parameters)


def _bucket(params: Mapping[str, object], path: str, steps: Mapping[str, float]) -> object:
    value = params.get(path)
    return round(value / steps[path]) if path in steps and isinstance(value, (int, float)) else value


def _value(number: float | None) -> float:
    return _LOWEST if number is None else number
