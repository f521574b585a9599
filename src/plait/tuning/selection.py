"""Which step is kept: criteria over what each task kept, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from plait.recipes.tuning import Criterion

Kept = Sequence[float]  # per task: 1 is the own adapter, 0 the base


def mean(kept: Kept) -> float:
    """Return the mean."""
    return math.fsum(kept) / len(kept)


def worst(kept: Kept) -> float:
    """Return the smallest."""
    return min(kept)


def geometric(kept: Kept) -> float:
    """Return the geometric mean; where a task is below the base, the smallest, which is negative."""
    return min(kept) if min(kept) < 0 else math.prod(kept) ** (1 / len(kept))


def l2_shortfall(kept: Kept) -> float:
    """Return −√(mean of max(0, 1 − kept)²): what is above 1 makes good for nothing."""
    return -math.sqrt(math.fsum(max(0.0, 1 - k) ** 2 for k in kept) / len(kept))


def hypervolume(kept: Kept) -> float:
    """Return the volume between the base (all 0) and this point."""
    return math.prod(max(0.0, k) for k in kept)


CRITERIA: dict[Criterion, Callable[[Kept], float]] = {
    "mean": mean,
    "worst": worst,
    "geometric": geometric,
    "l2_shortfall": l2_shortfall,
    "hypervolume": hypervolume,
}


def selection_score(kept: Mapping[str, float], criterion: Criterion) -> float:
    """Return what a step is worth; larger is better."""
    return CRITERIA[criterion](list(kept.values()))
