"""Methods on spectra and subspaces. All are exact on factors: nothing larger than Σ r on a side is decomposed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plait.methods.base import MethodParams, NoParams, Preset, Source, register
from plait.stages.calibrate import Iso, IsoFields, Pico, Star, StarFields, Svc, SvcFields
from plait.stages.elect import Elect
from plait.stages.norm import NormMatch
from plait.stages.pipeline import Pipeline
from plait.stages.polar import CommonSpecific, CommonSpecificFields, Cover, CoverFields, Polar, PolarFields
from plait.stages.sparsify import Density, Trim
from plait.stages.subspace import Beta, Cart, CartFields, SpaceRank, Tucker
from plait.stages.sums import Mean, Sum

# no coordinates are involved: the result is the same in each
ANYWHERE = ("core", "knots", "delta")


class CtmParams(MethodParams):
    """Parameters of `ctm`."""

    rank: SpaceRank = None
    beta: Beta = 0.25
    density: Density = 0.25


def _preset(name: str, stages: Callable[[Any], Pipeline], **fields: Any) -> None:
    register(Preset(name=name, stages=stages, **{"params": NoParams, "spaces": ANYWHERE, "combines": "deltas", **fields}))


_preset(
    "tsv",
    lambda params: Pipeline(Polar.of(params)),
    summary="Make the singular directions of all adapters orthonormal, then sum.",
    equation="ΔW = Σ σₖ ũₖ ṽₖᵀ,  Ũ = polar([U₁ … U_T]),  Ṽ = polar([V₁ … V_T]),  wₜ ΔWₜ = Uₜ diag(σₜ) Vₜᵀ",
    params=PolarFields,
    source=Source("Gargiulo et al. 2025, TSV-M, Algorithm 1", "https://arxiv.org/abs/2412.00081"),
    deviation=(
        "All directions of an adapter are kept: the paper keeps 1/T of min(d_out, d_in), so that all fit, as low-rank "
        "deltas do. Weights multiply the deltas. Directions below 1e-5 of an adapter's largest are not directions, and the "
        "polar factor is a partial isometry where the stack of all is rank deficient. The α of the paper is `scale`."
    ),
)
_preset(
    "iso_c",
    lambda params: Pipeline(Sum(), post=(Iso.of(params),)),
    summary="Sum, then give all singular directions the same size.",
    equation="ΔW = σ̄ U Vᵀ,  U diag(σ) Vᵀ = Σ wₜ ΔWₜ",
    params=IsoFields,
    source=Source("Marczak et al. 2025, Iso-C, eq. 6", "https://arxiv.org/abs/2502.04959"),
    deviation=(
        "The mean is over the directions that are there (at most Σ rₜ), not over min(d_out, d_in): on a low-rank sum the rest "
        "are arbitrary vectors. The λ of the paper is `scale`."
    ),
)
_preset(
    "iso_cts",
    lambda params: Pipeline(CommonSpecific.of(params), post=(Iso(),)),
    summary="Common directions of the sum and each adapter's own, made orthonormal, all of the same size.",
    equation="ΔW = σ̄ Ũ Ṽᵀ,  Ũ = polar([U₀ U₁ … U_T]),  U₀ of Σ wₜ ΔWₜ,  Uₜ of (I − U₀U₀ᵀ) wₜ ΔWₜ",
    params=CommonSpecificFields,
    source=Source("Marczak et al. 2025, Iso-CTS, Algorithm 2", "https://arxiv.org/abs/2502.04959"),
    deviation="Shares are of Σ rₜ directions, not of min(d_out, d_in); directions below 1e-5 of an adapter's largest are none.",
)
_preset(
    "svc",
    lambda params: Pipeline(Sum(), post=(Svc.of(params),)),
    summary="Sum, then shrink the singular values to which several adapters have contributed.",
    equation="ΔW = U diag(γ σ) Vᵀ,  γᵣ = T / Σₜ max(α, ⟨uᵣᵀM, uᵣᵀΔWₜ⟩ / ‖uᵣᵀΔWₜ‖²),  M = Σ wₜ ΔWₜ = U diag(σ) Vᵀ",
    params=SvcFields,
    source=Source("2026, Spectral Over-Accumulation in Model Merging, Algorithm 1", "https://arxiv.org/abs/2602.05536"),
    deviation=(
        "An adapter without a part in a direction is not counted there (the ratio is 0 / 0). ΔWₜ is taken times its weight, so "
        "that a common factor of all weights stays."
    ),
)
_preset(
    "pico",
    lambda params: Pipeline(Sum(), pre=(Pico(),), post=(NormMatch(),)),
    summary="Shrink output directions that several adapters share, sum, and restore the adapters' mean norm.",
    equation="ΔW = c Σ wₜ U diag(α) Uᵀ ΔWₜ,  αᵢ = 1 / (1 + (T − 1) σᵢ² / Σ σ²),  [ΔW₁ … ΔW_T] = U diag(σ) Vᵀ",
    source=Source("2026, Pico, §3", "https://arxiv.org/abs/2604.16826"),
    deviation=(
        "U and σ are of the deltas side by side; the authors' code takes them of the raw B side by side, which B → cB, A → A/c "
        "changes. The norm is restored after the merge, as their Python interface does (their folder mode does it per adapter)."
    ),
)
_preset(
    "ctm",
    lambda params: Pipeline(
        Elect(zero_sign="majority", scope="module"),
        pre=(
            Tucker(to=params.rank, beta=params.beta),
            Trim(density=params.density, scope="module", kept="inclusive"),
        ),
    ),
    summary="Project all deltas to one column and one row space of rank r, then TIES there: rank r by construction.",
    equation="ΔW = TIES(U Uᵀ ΔWₜ V Vᵀ),  (U, V) = argmax Σₜ nₜ² ‖Uᵀ ΔWₜ V‖²,  nₜ = β + (1 − β) mean‖ΔW‖ / ‖ΔWₜ‖",
    params=CtmParams,
    source=Source("2026, Compress then Merge, §4", "https://arxiv.org/abs/2606.03723"),
    deviation=(
        "TIES acts in the coordinates of `space` (singular bases), the paper's in the bases with which HOOI happens to end. At "
        "most 100 iterations (paper: 1000). Kept entries and ties as in the authors' code. The paper's K is `density`, its λ "
        "(.75) is `scale`."
    ),
    spaces=("core", "knots"),
    combines="entries",
)
_preset(
    "dc_merge",
    lambda params: Pipeline(Cover.of(params)),
    summary="Smooth every spectrum, elect signs in coordinates that cover all adapters, keep the diagonal blocks.",
    equation="ΔW = Ũ (B ⊙ elect(topₖ(Ũᵀ Sₜ Ṽ))) Ṽᵀ,  Sₜ = Uₜ diag(smooth(σₜ)) Vₜᵀ,  Ũ = polar([U₁ … U_T])",
    params=CoverFields,
    source=Source("2026, DC-Merge, §3", "https://arxiv.org/abs/2603.06242"),
    deviation=(
        "Ranks and diagonal blocks are the adapters' own (the authors' code fixes 16). As many entries are kept as an adapter "
        "has directions; for the paper's T = 8, r = 16 that is its .1 %. Weights multiply the deltas. An even vote drops the "
        "entry. The α of the paper is `scale`."
    ),
)
_preset(
    "cart",
    lambda params: Pipeline(Cart.of(params)),
    summary="Mean, plus the strongest directions of each adapter's distance from the mean.",
    equation="ΔW = D + λ Σₜ SVDₖ(wₜ ΔWₜ − D),  D = (1/T) Σ wₜ ΔWₜ,  k = ⌈ρ Σ rₜ⌉",
    params=CartFields,
    source=Source("Choi et al. 2024, CART, eq. 5; ρ and λ of Panariello et al. 2025", "https://arxiv.org/abs/2412.12153"),
    deviation="ρ is a share of Σ rₜ, as in core space, not of min(d_out, d_in). Weights multiply the deltas.",
)
_preset(
    "star",
    lambda params: Pipeline(Mean(), pre=(Star.of(params),)),
    summary="Keep each adapter's largest singular values, stretch them to the sum of all, then average.",
    equation="ΔW = (1/T) Σ wₜ (‖σₜ‖₁ / ‖σ̂ₜ‖₁) Uₜ diag(σ̂ₜ) Vₜᵀ,  σ̂ₜ = the fewest largest σ that hold η ‖σₜ‖₁",
    params=StarFields,
    source=Source("Lee et al. 2025, STAR, §2", "https://arxiv.org/abs/2502.10339"),
)
