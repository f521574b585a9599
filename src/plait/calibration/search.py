"""The scale, ridge and density with which a merge is nearest to each task's own adapter, on unlabeled texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from plait.calibration.inputs import check_texts
from plait.calibration.request import CalibrationRequest
from plait.calibration.teachers import answer_texts
from plait.errors import PlanError
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import Inventory
from plait.merging.kept import KeptResults
from plait.merging.plan import make_plan
from plait.methods.auto import SEARCHED
from plait.mixture import Mixture
from plait.results.progress import Progress, SilentProgress

_WIDEST = 4.0  # steps of the scale end beyond this, and below its inverse
_SHALLOW = 0.5  # share above which a minimum may be another one than the best
_FAR_BELOW = (2, 4, 8, 16)
_FIRST = (1.0, 1.4)
#: Nats: an adapter nearer to the base than this must not decide by a share of almost nothing.
LEAST_DIVERGENCE = 0.01


@dataclass(frozen=True)
class FoundValues:
    """Values that were found.

    Attributes:
        values: `scale` and parameters of the method, as far as they were to be found.
        share: mean over the tasks of KL(own adapter ‖ merge) / KL(own adapter ‖ base), the latter at least
            `LEAST_DIVERGENCE`: 0 for the adapters, 1 for the base.
        tried: everything that was tried, with its share, in the order of trying.
    """

    values: Mapping[str, float]
    share: float
    tried: tuple[tuple[Mapping[str, float], float], ...]


def find_values(
    request: CalibrationRequest,
    mixture: Mixture,
    inventory: Inventory,
    wanted: Mapping[str, float],
    workers: int,
    progress: Progress,
) -> FoundValues:
    """Merge in memory, and find the values with the smallest divergence from each task's own adapter; no label is read.

    Args:
        request: tasks and their texts.
        mixture: the base with the adapters.
        inventory: of the merge, with numbers for everything, and its moments where its method needs them.
        wanted: `scale` and parameters of the method → the value to begin at.
        workers: modules merged at a time.
        progress: receives stages and steps.

    Raises:
        PlaitError: it cannot be merged; texts with answers are longer than the base's context; or no adapter differs from
            the base on its texts.
    """
    check_texts(mixture, request.texts, answered=True)
    teachers = [_Teacher(request, mixture, task, progress) for task in request.texts]
    teachers = [t for t in teachers if t.base > 0]
    if not teachers:
        raise PlanError(
            f"{', '.join(wanted)}: no adapter answers its texts otherwise than the base does, so that no value is "
            "nearest. Give a number."
        )
    tried: dict[tuple[float, ...], float] = {}
    parameters = [name for name in wanted if name != "scale"]
    given = inventory.recipe.factor
    inventory = replace(inventory, kept=inventory.kept or KeptResults())
    is_dora = inventory.base is not None  # it normalizes by the merged weight, which is not linear in the scale

    @lru_cache(maxsize=1)
    def merged(*values: float) -> list[MergedModule]:
        """Merge with values of `parameters`, at scale 1; or at the scale that follows them."""
        named = dict(zip([*parameters, "scale"], (*values, 1.0)[: len(parameters) + 1], strict=True))
        at = replace(inventory, recipe=inventory.recipe.with_values(named))
        shown = SilentProgress() if tried or is_dora else progress
        engine = Engine(at, make_plan(at, workers=workers), workers=workers, progress=shown)
        combiner = engine.prepare()
        return list(engine.run(combiner, engine.ranks(combiner)))

    def share(point: Mapping[str, float]) -> float:
        own, scale = [point[name] for name in parameters], point.get("scale", given)
        if (*own, scale) not in tried:
            try:
                found = merged(*own, scale) if is_dora else [_scaled(m, scale) for m in merged(*own)]
            except ValidationError:  # values that the method does not take together
                tried[(*own, scale)] = math.inf
            else:
                tried[(*own, scale)] = sum(t.share(mixture, found) for t in teachers) / len(teachers)
            progress.advance()
        return tried[(*own, scale)]

    if not is_dora:
        merged(*[wanted[name] for name in parameters])

    progress.start(" and ".join(wanted), 6 + 4 * sum(len(SEARCHED[name]) for name in parameters), "values")
    try:
        best = search_values(share, wanted)
    finally:
        progress.finish()
    points = tuple((dict(zip([*parameters, "scale"], key, strict=True)), value) for key, value in tried.items())
    return FoundValues(best, share(best), points)


def search_values(share: Callable[[Mapping[str, float]], float], wanted: Mapping[str, float]) -> dict[str, float]:
    """Return the values of the smallest share.

    A parameter is tried at the values of `SEARCHED`, each at the scale that is best there where the scale is to be found too,
    and once more between the best and its neighbors.

    Args:
        share: of values; infinite where there is no merge with them.
        wanted: `scale` and parameters of the method → the value to begin at.
    """

    def at_best_scale(values: Mapping[str, float]) -> dict[str, float]:
        if "scale" not in wanted:
            return dict(values)
        start = values["scale"]
        return {**values, "scale": search_scale(lambda x: share({**values, "scale": x}), first=(start, start * _FIRST[1]))}

    best = at_best_scale(wanted)
    for name in wanted:
        if name == "scale":
            continue
        others = sorted({*SEARCHED[name]} - {best[name]}, key=lambda v: abs(math.log(v / wanted[name])))
        points = sorted([best, *(at_best_scale({**best, name: v}) for v in others)], key=lambda p: p[name])
        best = min(points, key=share)
        at = points.index(best)
        near = [(math.log(p[name]), share(p)) for p in points[max(at - 1, 0) : at + 2]]
        if len(near) == 3 and all(math.isfinite(y) for _, y in near):
            best = min(best, at_best_scale({**best, name: _vertex(near)}), key=share)
    return best


def search_scale(
    share: Callable[[float], float],
    *,
    first: tuple[float, float] = _FIRST,
) -> float:
    """Return the scale of the smallest share: bracketed from 1 and 1.4 by steps of 1.4, then a parabola in log scale.

    Where more than half of the divergence is left there, as in a merge in which one adapter drowns the others, scales far below
    are tried too, and the best of them is refined in the same way.

    Args:
        share: of a scale; asked again for the same one, it must answer the same. Infinite where there is no merge.
        first: two scales to begin with; their ratio is the step.
    """
    known: dict[float, float] = {}

    def at(scale: float) -> float:
        known[scale] = share(scale)
        return known[scale]

    def descend(low: float, high: float) -> float:
        step = high / low
        if at(low) < at(high):
            low, high, step = high, low, low / high
        while at(high) <= at(low) and 1 / _WIDEST < high < _WIDEST:
            low, high = high, high * step
        middle, left, right = (low, low / step, high) if at(high) > at(low) else (high, low, high * step)
        points = [(math.log(s), at(s)) for s in (left, middle, right)]
        if all(math.isfinite(y) for _, y in points):
            at(_vertex(points))
        return min(known, key=lambda s: known[s])

    best = descend(*first)
    if _SHALLOW < known[best] < math.inf:
        lower = min((first[0] / part for part in _FAR_BELOW), key=at)
        if known[lower] < known[best]:
            best = descend(lower, lower * first[1] / first[0])
    return best


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Return e to the abscissa of the lowest point of the parabola through three points, kept between the outer two."""
    (x0, y0), (x1, y1), (x2, y2) = sorted(points)
    below = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    if below == 0:
        return math.exp(x1)
    vertex = x1 - 0.5 * ((x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)) / below
    return math.exp(min(max(vertex, x0), x2))


class _Teacher:
    """One task's own adapter, and what it answers to the task's texts.

    Attributes:
        base: mean KL(adapter ‖ base) over the answers' positions, nats.
    """

    def __init__(self, request: CalibrationRequest, mixture: Mixture, task: str, progress: Progress) -> None:
        self._adapter = request.owners[task]
        progress.start(f"answers of {self._adapter}", len(request.texts[task].prompts), "texts")
        try:
            self._answered = answer_texts(mixture, request.texts[task], self._adapter, report=progress.advance)
        finally:
            progress.finish()
        with mixture.active(None, heads=self._adapter if self._answered.head else False) as model:
            self.base = self._divergence(model)

    def share(self, mixture: Mixture, merged: Sequence[MergedModule]) -> float:
        """Return KL(adapter ‖ merge) / KL(adapter ‖ base), the latter at least `LEAST_DIVERGENCE`."""
        with mixture.attached(merged, heads=self._adapter) as model:
            return self._divergence(model) / max(self.base, LEAST_DIVERGENCE)

    def _divergence(self, model: Any) -> float:
        return self._answered.divergence(model, range(len(self._answered.passages)))


def _scaled(merged: MergedModule, scale: float) -> MergedModule:
    factors = merged.factors
    return replace(
        merged,
        factors=None if factors is None else replace(factors, slices=tuple(s.scaled(scale) for s in factors.slices)),
        dense=None if merged.dense is None else tuple(d.scaled(scale) for d in merged.dense),
        bias=None if merged.bias is None else merged.bias * scale,
    )
