"""Methods by lengths and angles of the deltas: one coefficient per adapter, exact; `norm_match` sets the size of the sum."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.methods.base import MethodParams, Preset, Scope, Source, register
from plait.stages.gram import Karcher, MetaGPT, ModelStock, MultiSlerp, Slerp
from plait.stages.norm import NormMatch
from plait.stages.pipeline import Pipeline
from plait.stages.sums import Sum

_SPACES = ("delta", "core", "knots")  # the result is the same in all of them
_MERGEKIT = "https://github.com/arcee-ai/mergekit"


class SphereParams(MethodParams):
    """Whose lengths and angles count."""

    scope: Annotated[Scope, Field(description="Lengths and angles of each module's delta, or of the whole task vector.")] = (
        "module"
    )


class SlerpParams(SphereParams):
    """Parameters of `slerp`."""

    t: Annotated[float, Field(ge=0, le=1, description="How far: 0 is the first adapter, 1 the second.")] = 0.5
    norm: Annotated[
        Literal["raw", "interpolate"],
        Field(description="Put the deltas as they are into the formula, or turn the direction and interpolate the norm."),
    ] = "raw"


register(
    Preset(
        name="slerp",
        summary="The arc from one adapter to another, module by module; exact.",
        equation="ΔW = (sin((1−t)θ) w₁ΔW₁ + sin(tθ) w₂ΔW₂) / sin θ,  θ = the angle between ΔW₁ and ΔW₂",
        params=SlerpParams,
        source=Source("Shoemake 1985, Animating rotation with quaternion curves", "https://doi.org/10.1145/325334.325242"),
        deviation=(
            "On deltas, as mergekit's `nuslerp` with a base model; its `slerp` turns whole models. Straight where there is no "
            "one arc: a zero delta, parallel or antipodal deltas."
        ),
        spaces=_SPACES,
        min_adapters=2,
        max_adapters=2,
        combines="linear",
        stages=lambda params: Pipeline(Slerp.of(params)),
    )
)


class MultiSlerpParams(SphereParams):
    """Parameters of `multislerp`."""

    normalize: Annotated[bool, Field(description="Divide the weights by the sum of their magnitudes.")] = True


register(
    Preset(
        name="multislerp",
        summary="The mean direction of the deltas at their mean norm, module by module; exact.",
        equation="ΔW = Σ wₜ‖ΔWₜ‖ · m / ‖m‖,  m = Σ wₜ ΔWₜ / ‖ΔWₜ‖",
        params=MultiSlerpParams,
        source=Source("mergekit, multislerp", _MERGEKIT),
        deviation=(
            "mergekit goes on to the tangent space at m, where the weighted sum of the unit deltas is zero by construction: "
            "this is all of it. A negative weight turns its delta round. Unit deltas that cancel give the weighted mean "
            "(there an error)."
        ),
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(MultiSlerp.of(params)),
    )
)


class KarcherParams(SphereParams):
    """Parameters of `karcher`."""

    iterations: Annotated[int, Field(ge=1, le=10000, description="Most steps.")] = 100
    tolerance: Annotated[float, Field(gt=0, le=1, description="Stop when a step turns by less, in radians.")] = 1e-9


register(
    Preset(
        name="karcher",
        summary="The Riemannian mean of the deltas' directions at their mean norm, module by module; exact.",
        equation="ΔW = Σ wₜ‖ΔWₜ‖ · m,  m = argmin_{‖m‖=1} Σ wₜ ∠(m, ΔWₜ)²",
        params=KarcherParams,
        source=Source(
            "Karcher 1977, Riemannian center of mass and mollifier smoothing", "https://doi.org/10.1002/cpa.3160300502"
        ),
        deviation=(
            "On deltas; mergekit's is of whole models, with equal weights and at most 10 steps. Weights are divided by the sum "
            "of their magnitudes; a negative one turns its delta round. Unit deltas that cancel give the weighted mean."
        ),
        spaces=_SPACES,
        combines="linear",
        stages=lambda params: Pipeline(Karcher.of(params)),
    )
)


class MetaGptParams(MethodParams):
    """Parameters of `metagpt`."""

    scope: Annotated[Scope, Field(description="Energies of the whole task vectors, or of each module.")] = "model"


register(
    Preset(
        name="metagpt",
        summary="Weigh the adapters by their share of the energy; exact.",
        equation="ΔW = Σ wₜ λₜ ΔWₜ,  λₜ = ‖τₜ‖² / Σ ‖τₛ‖²",
        params=MetaGptParams,
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
        params=SphereParams,
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


class NormMatchParams(MethodParams):
    """Parameters of `norm_match`."""

    to: Annotated[Literal["mean", "median", "max"], Field(description="Which of the adapters' norms.")] = "mean"


register(
    Preset(
        name="norm_match",
        summary="Weighted sum, scaled module by module to the adapters' mean norm; no λ to choose, exact.",
        equation="ΔW = mean ‖wₜ ΔWₜ‖ · m / ‖m‖,  m = Σ wₜ ΔWₜ",
        params=NormMatchParams,
        source=Source("the norm rule of Pico (2026), on task arithmetic", "https://arxiv.org/abs/2604.16826"),
        deviation="Adapters without the module have no say in the norm.",
        spaces=_SPACES,
        combines="deltas",
        stages=lambda params: Pipeline(Sum(), post=(NormMatch.of(params),)),
    )
)
