"""Methods by lengths and angles of the deltas: one coefficient per adapter, exact; `norm_match` sets the size of the sum."""

from __future__ import annotations

from plait.methods.base import Preset, Source, register
from plait.stages.gram import (
    Karcher,
    KarcherFields,
    MetaGPT,
    MetaGPTFields,
    ModelStock,
    ModelStockFields,
    MultiSlerp,
    MultiSlerpFields,
    Slerp,
    SlerpFields,
)
from plait.stages.norm import NormMatch, NormMatchFields
from plait.stages.pipeline import Pipeline
from plait.stages.sums import Sum

_SPACES = ("delta", "core", "knots")  # the result is the same in all of them
_MERGEKIT = "https://github.com/arcee-ai/mergekit"


register(
    Preset(
        name="slerp",
        summary="The arc from one adapter to another, module by module; exact.",
        equation="ΔW = (sin((1−t)θ) w₁ΔW₁ + sin(tθ) w₂ΔW₂) / sin θ,  θ = the angle between ΔW₁ and ΔW₂",
        params=SlerpFields,
        source=Source("Shoemake 1985, Animating rotation with quaternion curves", "https://doi.org/10.1145/325334.325242"),
        deviation=(
            "On deltas, as mergekit's `nuslerp` with a base model; its `slerp` turns full models. Straight where there is no "
            "one arc: a zero delta, parallel or antipodal deltas."
        ),
        spaces=_SPACES,
        min_adapters=2,
        max_adapters=2,
        combines="linear",
        stages=lambda params: Pipeline(Slerp.of(params)),
    )
)


register(
    Preset(
        name="multislerp",
        summary="The mean direction of the deltas at their mean norm, module by module; exact.",
        equation="ΔW = Σ wₜ‖ΔWₜ‖ · m / ‖m‖,  m = Σ wₜ ΔWₜ / ‖ΔWₜ‖",
        params=MultiSlerpFields,
        source=Source("mergekit, multislerp", _MERGEKIT),
        deviation=(
            "mergekit continues to the tangent space at m, where the weighted sum of the unit deltas is zero by construction: "
            "this is all of it. A negative weight turns its delta round. Unit deltas that cancel give the weighted mean "
            "(there an error)."
        ),
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(MultiSlerp.of(params)),
    )
)


register(
    Preset(
        name="karcher",
        summary="The Riemannian mean of the deltas' directions at their mean norm, module by module; exact.",
        equation="ΔW = Σ wₜ‖ΔWₜ‖ · m,  m = argmin_{‖m‖=1} Σ wₜ ∠(m, ΔWₜ)²",
        params=KarcherFields,
        source=Source(
            "Karcher 1977, Riemannian center of mass and mollifier smoothing", "https://doi.org/10.1002/cpa.3160300502"
        ),
        deviation=(
            "On deltas; mergekit's is of full models, with equal weights and at most 10 steps. Weights are divided by the sum "
            "of their magnitudes; a negative one turns its delta round. Unit deltas that cancel give the weighted mean."
        ),
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(Karcher.of(params)),
    )
)


register(
    Preset(
        name="metagpt",
        summary="Weigh the adapters by their share of the energy; exact.",
        equation="ΔW = Σ wₜ λₜ ΔWₜ,  λₜ = ‖τₜ‖² / Σ ‖τₛ‖²",
        params=MetaGPTFields,
        source=Source("Zhou et al. 2024, MetaGPT, §4", "https://arxiv.org/abs/2406.11385"),
        deviation="Weights multiply the paper's coefficients, which sum to 1.",
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(MetaGPT.of(params)),
    )
)
register(
    Preset(
        name="model_stock",
        summary="The mean, shrunk by how little the adapters agree: for several runs of one task; exact.",
        equation="ΔW = T cos θ / (1 + (T−1) cos θ) · (1/T) Σ wₜ ΔWₜ,  θ = the angle between deltas",
        params=ModelStockFields,
        source=Source("Jang et al. 2024, Model Stock, eq. 3", "https://arxiv.org/abs/2403.19522"),
        deviation=(
            "cos θ is the mean over all pairs, as in mergekit. Adapters of different tasks are nearly orthogonal, and little "
            "is left of them; where they point against each other the factor is negative."
        ),
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(ModelStock.of(params)),
    )
)


register(
    Preset(
        name="norm_match",
        summary="Weighted sum, scaled module by module to the adapters' mean norm; no λ to choose, exact.",
        equation="ΔW = mean ‖wₜ ΔWₜ‖ · m / ‖m‖,  m = Σ wₜ ΔWₜ",
        params=NormMatchFields,
        source=Source("the norm rule of Pico (2026), on task arithmetic", "https://arxiv.org/abs/2604.16826"),
        deviation="Adapters without the module do not count toward the norm.",
        spaces=_SPACES,
        combines="deltas",
        stages=lambda params: Pipeline(Sum(), post=(NormMatch.of(params),)),
    )
)
