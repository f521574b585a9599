"""The factor on a merge at which it is nearest to each task's own adapter, on unlabeled texts."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from plait.calibration.inputs import encode_texts
from plait.calibration.passages import Passage, Reader
from plait.calibration.request import CalibrationRequest
from plait.calibration.teachers import OutputDistributions, teacher_distributions
from plait.errors import PlanError
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import Inventory
from plait.merging.plan import make_plan
from plait.mixture import Mixture
from plait.results.progress import Progress, SilentProgress

_WIDEST = 4.0  # scales that are tried: at most this, and at least its inverse
_FIRST = (1.0, 1.4)
_BATCH = 16


@dataclass(frozen=True)
class FoundScale:
    """A scale that was found.

    Attributes:
        scale: the factor.
        share: mean over the tasks of KL(own adapter ‖ merge) / KL(own adapter ‖ base): 0 for the adapters, 1 for the base.
        tried: every scale that was tried, with its share, in the order of trying.
    """

    scale: float
    share: float
    tried: tuple[tuple[float, float], ...]


def find_scale(
    request: CalibrationRequest, mixture: Mixture, inventory: Inventory, workers: int, progress: Progress
) -> FoundScale:
    """Merge in memory, and find the factor with the smallest divergence from each task's own adapter; no label is read.

    Args:
        request: tasks and their texts.
        mixture: the base with the adapters.
        inventory: of the merge, at scale 1, with its moments where its method needs them.
        workers: modules merged at a time.
        progress: receives stages and steps.

    Raises:
        PlaitError: it cannot be merged; or no adapter differs from the base on its texts.
    """
    teachers = [_Teacher(request, mixture, task, progress) for task in request.texts]
    teachers = [t for t in teachers if t.base > 0]
    if not teachers:
        raise PlanError(
            "scale: no adapter answers its texts otherwise than the base does, so that no scale is nearest. Give a number."
        )

    def merged(scale: float, shown: Progress) -> list[MergedModule]:
        scaled = replace(inventory, recipe=inventory.recipe.model_copy(update={"scale": scale}))
        engine = Engine(scaled, make_plan(scaled, workers=workers), workers=workers, progress=shown)
        combiner = engine.prepare()
        return list(engine.run(combiner, engine.ranks(combiner)))

    at_one = merged(1.0, progress)
    tried: dict[float, float] = {}

    def share(scale: float) -> float:
        if scale not in tried:
            # DoRA normalizes by the merged weight, which is not linear in the scale
            found = merged(scale, SilentProgress()) if inventory.base is not None else [_scaled(m, scale) for m in at_one]
            tried[scale] = sum(t.share(mixture, found) for t in teachers) / len(teachers)
            progress.advance()
        return tried[scale]

    progress.start("scale", 6, "scales")
    try:
        scale = search_scale(share)
    finally:
        progress.finish()
    return FoundScale(scale, tried[scale], tuple(tried.items()))


def search_scale(share: Callable[[float], float]) -> float:
    """Return the scale of the smallest share: bracketed from 1 and 1.4 by steps of 1.4, then a parabola in log scale.

    Args:
        share: of a scale; asked again for the same one, it must answer the same.
    """
    known: dict[float, float] = {}

    def at(scale: float) -> float:
        known[scale] = share(scale)
        return known[scale]

    low, high = _FIRST
    step = high / low
    if at(low) < at(high):
        low, high, step = high, low, low / high
    while at(high) <= at(low) and 1 / _WIDEST < high < _WIDEST:
        low, high = high, high * step
    middle, left, right = (low, low / step, high) if at(high) > at(low) else (high, low, high * step)
    at(_vertex([(math.log(s), at(s)) for s in (left, middle, right)]))
    return min(known, key=lambda s: known[s])


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
        self._head = request.has_head(self._adapter)
        passages = encode_texts(mixture, request.texts[task], self._adapter, answered=True)
        self._passages = sorted(passages, key=lambda p: p.tokens)
        progress.start(f"answers of {self._adapter}", len(passages), "texts")
        try:
            with mixture.active({self._adapter: 1.0}) as model:
                self._answers: OutputDistributions = teacher_distributions(
                    model, self._passages, head=self._head, batch_size=_BATCH, report=progress.advance
                )
        finally:
            progress.finish()
        with mixture.active(None, heads=self._adapter if self._head else False) as model:
            self.base = self._divergence(model)

    def share(self, mixture: Mixture, merged: Sequence[MergedModule]) -> float:
        """Return KL(adapter ‖ merge) / KL(adapter ‖ base)."""
        with mixture.attached(merged, heads=self._adapter) as model:
            return self._divergence(model) / self.base

    def _divergence(self, model: Any) -> float:
        reader, row, parts = Reader(model, head=self._head), 0, []
        with torch.inference_mode():
            for at in range(0, len(self._passages), _BATCH):
                batch: list[Passage] = self._passages[at : at + _BATCH]
                rows = range(row, row + sum(p.positions for p in batch))
                parts.append(self._answers.rows(rows).divergence(reader.logits(batch)))
                row = rows.stop
        return float(torch.cat(parts).double().mean())


def _scaled(merged: MergedModule, scale: float) -> MergedModule:
    factors = merged.factors
    return replace(
        merged,
        factors=None if factors is None else replace(factors, slices=tuple(s.scaled(scale) for s in factors.slices)),
        dense=None if merged.dense is None else tuple(d.scaled(scale) for d in merged.dense),
        bias=None if merged.bias is None else merged.bias * scale,
    )
