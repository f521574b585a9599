"""The scale of a start: the one at which it is nearest to the adapters."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from plait.calibration.search import search_scale
from plait.recipes.schema import Recipe
from plait.results.progress import Progress
from plait.tuning.held_out import HeldOutScore, SplitLessons, evaluate_held_out
from plait.tuning.learners import FactorLearner
from plait.tuning.working import WorkingState


def scale_start(
    learner: FactorLearner, taught: SplitLessons, recipe: Recipe, working: WorkingState, progress: Progress
) -> tuple[float, list[tuple[float, float]], HeldOutScore]:
    """Give the start its scale: the recipe's where it has one, else the one with the smallest share of KL (see `HeldOutScore`).

    Returns:
        The scale, all that were tried with their shares, and the look at the start so scaled.
    """
    if "scale" in recipe.model_fields_set and recipe.scale != "auto":
        return recipe.factor, [], evaluate_held_out(learner, taught, 0, recipe.tune)
    if (found := working.load("scale", _from_scale)) is not None:
        learner.factors.scale(found[0])
        return found
    known: dict[float, HeldOutScore] = {}
    unscaled = learner.state()

    def share(scale: float) -> float:
        if scale not in known:
            learner.load(unscaled)
            learner.factors.scale(scale)
            known[scale] = evaluate_held_out(learner, taught, 0, recipe.tune)
            progress.advance()
        return known[scale].share

    progress.start("scale", 6, "scales")
    try:
        best = search_scale(share)
    finally:
        progress.finish()
    learner.load(unscaled)
    learner.factors.scale(best)
    tried = [(scale, held.share) for scale, held in known.items()]
    working.save("scale", {}, {"scale": best, "tried": tried, "held": known[best].model_dump(mode="json")})
    return best, tried, known[best]


def _from_scale(_: Mapping[str, Tensor], info: Mapping[str, Any]) -> tuple[float, list[tuple[float, float]], HeldOutScore]:
    """Return the scale that was saved, those that were tried, and the look.

    Raises:
        LookupError, TypeError, ValueError: it is none.
    """
    scale = float(info["scale"])
    if not 0 < scale < math.inf:
        raise ValueError(scale)
    return scale, [(float(s), float(share)) for s, share in info["tried"]], HeldOutScore.model_validate(info["held"])
