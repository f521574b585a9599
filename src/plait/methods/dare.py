"""DARE: drop entries at random, rescale the rest."""

from __future__ import annotations

from dataclasses import replace

from plait.methods.base import Preset, Source, register
from plait.stages.elect import Elect, ElectFields
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Drop, DropFields
from plait.stages.sums import Sum

_PAPER = Source("Yu et al. 2024, DARE, eq. 2–4", "https://arxiv.org/abs/2311.03099")
_DEVIATION = (
    "`density` = 1 − the paper's drop rate p; the default is 0.5, for LoRA deltas, where the paper uses p = 0.9 on full "
    "fine-tunes. Masks are keyed by (seed, adapter, module, position): they do not depend on order, workers or device."
)


class DareTiesParams(ElectFields, DropFields):
    """Parameters of `dare_ties`."""


DARE_LINEAR = Preset(
    name="dare_linear",
    summary="Drop entries at random and rescale the rest, then take the weighted sum.",
    equation="ΔW = Σ wₜ mₜ ⊙ xₜ / density,  mₜ ~ Bernoulli(density)",
    params=DropFields,
    source=_PAPER,
    deviation=_DEVIATION,
    randomised=True,
    stages=lambda params: Pipeline(pre=(Drop.of(params),), combine=Sum()),
)
DARE_TIES = Preset(
    name="dare_ties",
    summary="Drop entries at random and rescale the rest, then elect signs and average as TIES does.",
    equation="x̂ₜ = mₜ ⊙ xₜ / density;  ΔW = Σ_{t: sgn x̂ₜ = γ} wₜ x̂ₜ / #{…},  γ = sgn(Σ x̂ₜ)",
    params=DareTiesParams,
    source=_PAPER,
    deviation=_DEVIATION,
    randomised=True,
    stages=lambda params: Pipeline(pre=(Drop.of(params),), combine=Elect.of(params)),
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
