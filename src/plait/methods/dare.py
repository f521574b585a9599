"""DARE: drop entries at random, rescale the rest."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from plait.methods.base import Block, ElementwiseMethod, MethodParams, Source, register
from plait.methods.ties import ElectionParams, check_election, elect_and_merge, majority

_PAPER = Source("Yu et al. 2024, DARE, eq. 2–4", "https://arxiv.org/abs/2311.03099")
_DEVIATION = (
    "`density` = 1 − the paper's drop rate p; the default is 0.5, for LoRA deltas, where the paper uses p = 0.9 on full "
    "fine-tunes. Masks are keyed by (seed, adapter, module, position): they do not depend on order, workers or device."
)


class DareParams(MethodParams):
    """Parameters of `dare_linear`."""

    density: Annotated[float, Field(gt=0, le=1, description="Probability with which an entry is kept (1 − drop rate).")] = 0.5


class DareTiesParams(DareParams, ElectionParams):
    """Parameters of `dare_ties`."""


def drop_and_rescale(block: Block, density: float) -> Tensor:
    """Return x ⊙ m / density with m ~ Bernoulli(density) per adapter and entry, (T, p, q)."""
    if density >= 1:
        return block.x
    kept = [torch.where(block.uniform(t) < density, x, 0) for t, x in enumerate(block.x)]
    return torch.stack(kept).div_(density)


def dare_linear(block: Block, params: DareParams) -> Tensor:
    """Drop, rescale, sum with weights; (p, q)."""
    return (drop_and_rescale(block, params.density) * block.weights.to(block.x.dtype).view(-1, 1, 1)).sum(0)


def dare_ties(block: Block, params: DareTiesParams) -> Tensor:
    """Drop, rescale, elect a sign, average those that agree; (p, q)."""
    return elect_and_merge(block, drop_and_rescale(block, params.density), params)


DARE_LINEAR = ElementwiseMethod(
    name="dare_linear",
    summary="Drop entries at random and rescale the rest, then take the weighted sum.",
    equation="ΔW = Σ wₜ mₜ ⊙ xₜ / density,  mₜ ~ Bernoulli(density)",
    params=DareParams,
    source=_PAPER,
    deviation=_DEVIATION,
    randomised=True,
    combine=dare_linear,
)
DARE_TIES = ElementwiseMethod(
    name="dare_ties",
    summary="Drop entries at random and rescale the rest, then elect signs and average as TIES does.",
    equation="x̂ₜ = mₜ ⊙ xₜ / density;  ΔW = Σ_{t: sgn x̂ₜ = γ} wₜ x̂ₜ / #{…},  γ = sgn(Σ x̂ₜ)",
    params=DareTiesParams,
    source=_PAPER,
    deviation=_DEVIATION,
    randomised=True,
    combine=dare_ties,
    check=check_election,
    surveys=lambda params: majority(params, "model", lambda block: drop_and_rescale(block, params.density)),
)

register(DARE_LINEAR)
register(DARE_TIES)
for _method in (DARE_LINEAR, DARE_TIES):
    register(
        replace(
            _method,
            name=f"{_method.name}_svd",
            summary=f"PEFT's `{_method.name}_svd`: on the dense deltas, truncated to the largest source rank.",
            source=Source(f"PEFT add_weighted_adapter(combination_type='{_method.name}_svd')"),
            spaces=("delta",),
            auto_rank="largest",
        )
    )
