"""Answers of base, single adapter and merge → how much the merge kept, and how surely that is known.

recovery = (merged − base) / (single − base), oriented so that higher is better: 0 is the base, 1 the task's own adapter.
Where the single adapter is not better than the base, the recovery is undefined.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import product

import numpy as np

from plait.tasks.answers import FloatArray, Metric

Interval = tuple[float, float]
_TAILS = (2.5, 97.5)  # percentiles: 95 %
_CHUNK = 256  # draws at a time; bounds memory
_LEAST_HEADROOM = 1e-9


@dataclass(frozen=True, eq=False)
class PairedStatistics:
    """One task's statistics, (n, k) each, over the same examples.

    Attributes:
        metric: that they belong to.
        base: of the bare base.
        single: of the task's own adapter; None where there is none.
        merged: of what is evaluated.
    """

    metric: Metric
    base: FloatArray
    single: FloatArray | None
    merged: FloatArray

    def draws(self, count: int, seed: tuple[int, ...]) -> BootstrapDraws:
        """Weigh the examples at random, alike on all sides, `count` times.

        The Bayesian bootstrap (Rubin 1981): weights are Dirichlet's. Where examples are right or wrong, what has not been seen
        has a share of one example among all outcomes that the sides may have together, so that four right answers of four
        are not certainty. Of a single side that is Jeffreys' interval of a proportion.
        """
        seen, more = (
            np.random.default_rng(seed),
            np.random.default_rng((*seed, 1)),
        )  # separate: two candidates share the examples
        sides = [s for s in (self.base, self.single, self.merged) if s is not None]
        stacked, unseen = np.concatenate(sides, axis=1), self._unseen(sides)
        sums = []
        for at in range(0, count, _CHUNK):
            size = min(_CHUNK, count - at)
            sums.append(seen.standard_exponential((size, len(stacked))) @ stacked)
            if unseen is not None:
                sums[-1] += more.standard_gamma(1 / len(unseen), (size, len(unseen))) @ unseen
        parts = np.split(np.concatenate(sums), len(sides), axis=1)
        values = [self.metric.from_sums(part) for part in parts]
        sign = 1.0 if self.metric.higher_is_better else -1.0
        single = values[1] if self.single is not None else np.full(count, math.nan)
        return BootstrapDraws(values[0], single, values[-1], recoveries(sign * values[0], sign * single, sign * values[-1]))

    def _unseen(self, sides: list[FloatArray]) -> FloatArray | None:
        """Return all outcomes that the sides may have together, as rows of statistics; None where there is no such list."""
        found = self.metric.outcomes(np.concatenate(sides))
        if found is None:
            return None
        rows = [np.concatenate(chosen) for variant in found for chosen in product(variant, repeat=len(sides))]
        return np.stack(rows)


@dataclass(frozen=True, eq=False)
class BootstrapDraws:
    """Drawn values of one task, (draws,) each; NaN where undefined."""

    base: FloatArray
    single: FloatArray
    merged: FloatArray
    recovery: FloatArray


def recoveries(base: FloatArray, single: FloatArray, merged: FloatArray) -> FloatArray:
    """Return (merged − base) / (single − base), NaN where single − base is not positive; oriented values of any one shape."""
    headroom = single - base
    usable = headroom > _LEAST_HEADROOM
    return np.where(usable, (merged - base) / np.where(usable, headroom, 1.0), math.nan)


def recovery(metric: Metric, base: float, single: float | None, merged: float) -> float | None:
    """Return the recovery of one task; None where it is not defined."""
    if single is None:
        return None
    sign = 1.0 if metric.higher_is_better else -1.0
    value = float(recoveries(np.array(sign * base), np.array(sign * single), np.array(sign * merged)))
    return None if math.isnan(value) else value


def task_seed(seed: int, task: str) -> tuple[int, ...]:
    """Return the bootstrap's seed of one task: it does not depend on which other tasks are evaluated."""
    return (seed, zlib.crc32(task.encode()))


def central_interval(values: FloatArray, found: float) -> Interval | None:
    """Return the middle 95 % of the defined values; None when there are none.

    Args:
        values: drawn.
        found: what was measured; inside the interval, at its end where all examples are right, or all wrong.
    """
    known = values[np.isfinite(values)]
    if not len(known):
        return None
    low, high = np.percentile(known, _TAILS)
    return (min(float(low), found), max(float(high), found)) if math.isfinite(found) else (float(low), float(high))


def mean_and_worst(recoveries_: Mapping[str, FloatArray]) -> tuple[FloatArray, FloatArray]:
    """Return mean and minimum over tasks, per draw; NaN in draws in which a task has no recovery."""
    stacked = np.stack(list(recoveries_.values()))
    return stacked.mean(0), stacked.min(0)
