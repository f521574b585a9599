"""The family that solves for the merged matrix by least squares; see `stages.solve`."""

from __future__ import annotations

from functools import partial

from plait.methods.base import Preset, Source, register
from plait.stages.pipeline import Pipeline
from plait.stages.solve import Ridge, RidgeFields, SolveCoreInputs, SolveDeltas, SolveInputs, SolveInputsFields

# no coordinates are involved: the result is the same in each space
_Solved = partial(Preset, spaces=("core", "knots", "delta"), combines="deltas")
_RIDGE = (
    "A ridge relative to the mean eigenvalue, which pulls to the mean of the deltas (one adapter, or copies of it, come out "
    "unchanged), keeps the condition below 10⁶ and is raised tenfold while ‖M‖_F > 2 √T · mean ‖wₜ ΔWₜ‖_F. Weights multiply "
    "the deltas."
)


def _solve_inputs(params: SolveInputsFields) -> Pipeline:
    return Pipeline(SolveInputs.of(params))


class WudiParams(RidgeFields):
    """Parameters of `wudi`."""

    ridge: Ridge = 1e-1


register(
    _Solved(
        name="regmean",
        summary="Least squares: the matrix that keeps every adapter's outputs on its own inputs. Needs second moments.",
        equation="ΔW = (Σ wₜ ΔWₜ Gₜ + ρ/T Σ wₜ ΔWₜ)(Σ Gₜ + ρI)⁻¹,  Gₜ = E[x xᵀ], off-diagonal × `off_diagonal`",
        params=SolveInputsFields,
        source=Source("Jin et al. 2023, RegMean", "https://arxiv.org/abs/2212.09849"),
        deviation=f"E[x xᵀ] for Σ x xᵀ, so that more text weighs no more; a ridge, where the paper has only α. {_RIDGE}",
        stages=_solve_inputs,
    )
)
register(
    _Solved(
        name="regmean_sequential",
        summary="RegMean on what a layer gets from the merged layers below it. Needs the base model and texts (`--tasks`).",
        equation="as regmean, layer by layer; Gₜ = E[x xᵀ] with the layers below merged and this layer's own adapter",
        params=SolveInputsFields,
        source=Source("RegMean++ 2025", "https://arxiv.org/abs/2508.03121"),
        deviation=f"E[x xᵀ] for Σ x xᵀ, as in `regmean`. Layers below act at scale 1, whatever `scale` is. {_RIDGE}",
        sequential=True,
        stages=_solve_inputs,
    )
)
register(
    _Solved(
        name="ssr",
        summary="RegMean with rows from the adapters' joint row space only: a system of size Σ r. Needs second moments.",
        equation="ΔW = (Σ wₜ ΔWₜ V Gₜ + ρ/T Σ wₜ ΔWₜ V)(Σ Gₜ + ρI)⁻¹ Vᵀ,  Gₜ = Vᵀ E[x xᵀ] V,  V = joint row space",
        params=RidgeFields,
        source=Source("SSR-Merge 2026, closed form", "https://arxiv.org/abs/2606.10617"),
        deviation="Orthonormal coordinates V in place of the raw rows of A, so that the result does not depend on factors. "
        f"{_RIDGE} The paper's ridge is 10⁻⁴, absolute, and pulls to zero.",
        stages=lambda params: Pipeline(SolveCoreInputs.of(params)),
    )
)
register(
    _Solved(
        name="wudi",
        summary="Least squares without data: keeps every adapter's outputs on the directions of its own rows.",
        equation="ΔW = (Σ wₜ ΔWₜ Gₜ + ρ/T Σ wₜ ΔWₜ)(Σ Gₜ + ρI)⁻¹,  Gₜ = ΔWₜᵀ ΔWₜ / ‖ΔWₜ‖²",
        params=WudiParams,
        source=Source("Cheng et al. 2025, WUDI-Merging", "https://arxiv.org/abs/2503.08099"),
        deviation=f"The minimum in closed form; the paper takes 300 steps of Adam from the sum of the deltas. {_RIDGE}",
        stages=lambda params: Pipeline(SolveDeltas.of(params)),
    )
)
