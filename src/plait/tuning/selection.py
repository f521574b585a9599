"""Which step is kept: criteria over what each task kept, and when to stop."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from plait.recipes.tuning import Criterion

Kept = Sequence[float]  # per task: 1 is the own adapter, 0 the base
Texts = Mapping[str, Sequence[tuple[float, int]]]
_DRAWS = 200


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


def hypervolume(points: Sequence[Kept]) -> float:
    """Return the volume between the base (all 0) and several points: of all that some point is at least as good as.

    Exact: the points' volumes one by one, each without what later ones cover too. What is below the base counts as 0.
    """
    front = non_dominated([[max(0.0, k) for k in point] for point in points])
    return math.fsum(
        math.prod(point) - hypervolume([[min(p, q) for p, q in zip(point, other, strict=True)] for other in front[i + 1 :]])
        for i, point in enumerate(front)
    )


def non_dominated(points: Sequence[Kept]) -> list[Kept]:
    """Return the points that no other one is at least as good as in every task; one of those that are equal."""
    distinct = list(dict.fromkeys(map(tuple, points)))
    return [p for p in distinct if not any(q != p and all(b >= a for a, b in zip(p, q, strict=True)) for q in distinct)]


#: Criteria of one look.
CRITERIA: dict[Criterion, Callable[[Kept], float]] = {
    "mean": mean,
    "worst": worst,
    "geometric": geometric,
    "l2_shortfall": l2_shortfall,
}


def selection_score(kept: Mapping[str, float], criterion: Criterion, earlier: Sequence[Mapping[str, float]] = ()) -> float:
    """Return what a step is worth; larger is better.

    The hypervolume is that of this look and all earlier ones: a look is worth more than the last best one where it adds to what
    some look has reached, as the documents have it.

    Args:
        kept: task → what is kept.
        criterion: over the tasks.
        earlier: the same at earlier looks.
    """
    if criterion == "hypervolume":
        return hypervolume([[look[task] for task in kept] for look in (*earlier, kept)])
    return CRITERIA[criterion](list(kept.values()))


def is_clearly_worse(look: Texts, best: Texts, criterion: Criterion, tolerance: float) -> bool:
    """Whether a look is worse than another by more than some standard errors of their difference.

    The error is that of a bootstrap over the texts, which both looks have in common: each is drawn for both. The hypervolume
    counts all looks so far, and so no two of them are compared that way: any smaller one is worse.

    Args:
        look: task → per text, what is kept on it, and over how many positions.
        best: the same of the other.
        criterion: over the tasks.
        tolerance: how many standard errors.
    """
    if criterion == "hypervolume":
        return True
    rng, score = np.random.default_rng(0), CRITERIA[criterion]
    pairs = [np.array([[*one, other[0]] for one, other in zip(look[t], best[t], strict=True)]) for t in look]

    def differences(draws: Sequence[Sequence[NDArray[np.int64]]]) -> list[float]:
        here, there = [], []
        for task, pair in enumerate(pairs):
            kept, weight, other = np.moveaxis(pair[np.stack([draw[task] for draw in draws])], -1, 0)  # each draw × text
            here.append(((kept * weight).sum(1) / weight.sum(1)).tolist())
            there.append(((other * weight).sum(1) / weight.sum(1)).tolist())
        return [score(b) - score(a) for a, b in zip(zip(*here, strict=True), zip(*there, strict=True), strict=True)]

    drawn = [[rng.integers(len(pair), size=len(pair)) for pair in pairs] for _ in range(_DRAWS)]
    (found,) = differences([[np.arange(len(pair)) for pair in pairs]])
    return found > tolerance * float(np.std(differences(drawn)))
