"""Methods that keep entries by magnitude and then sum: magnitude pruning, Breadcrumbs."""

from __future__ import annotations

from dataclasses import replace

from plait.methods.base import Preset, Source, register
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Band, BandFields, Density, RankScope, Trim, TrimFields
from plait.stages.sums import Sum


class MagnitudeParams(TrimFields):
    """Parameters of `magnitude_prune`."""

    density: Density = 0.5
    scope: RankScope = "module"


MAGNITUDE = Preset(
    name="magnitude_prune",
    summary="Keep each delta's largest entries, then take the weighted sum.",
    equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = the `density` largest of |xₜ|",
    params=MagnitudeParams,
    source=Source("PEFT add_weighted_adapter(combination_type='magnitude_prune')"),
    deviation="On deltas, not on A and B (that is `space: factors`). Entries that tie with the threshold are all kept.",
    stages=lambda params: Pipeline(pre=(Trim.of(params),), combine=Sum()),
)
register(MAGNITUDE)
register(
    replace(
        MAGNITUDE,
        name="magnitude_prune_svd",
        summary="PEFT's `magnitude_prune_svd`: on the dense deltas, truncated to the largest source rank.",
        source=Source("PEFT add_weighted_adapter(combination_type='magnitude_prune_svd')"),
        deviation="Randomized truncation by row blocks instead of a dense SVD; √S on both factors.",
        spaces=("delta",),
        auto_rank="largest",
    )
)


register(
    Preset(
        name="breadcrumbs",
        summary="Drop each delta's largest outliers and its small entries, then take the weighted sum.",
        equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = xₜ without its `gamma` largest and its 1 − density − gamma smallest",
        params=BandFields,
        source=Source("Davari & Belilovsky 2024, Model Breadcrumbs, §3", "https://arxiv.org/abs/2312.06795"),
        deviation="With gamma · entries < 1 nothing is dropped at the top (mergekit drops all then). The paper's α is `scale`.",
        stages=lambda params: Pipeline(pre=(Band.of(params),), combine=Sum()),
    )
)
