"""Methods that keep entries by magnitude and then sum: magnitude pruning, Breadcrumbs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

from pydantic import Field, model_validator

from plait.linalg.sparsify import Count
from plait.methods.base import MethodParams, Preset, Scope, Source, register
from plait.stages.pipeline import Pipeline
from plait.stages.sparsify import Band, Trim
from plait.stages.sums import Sum


class MagnitudeParams(MethodParams):
    """Parameters of `magnitude_prune`."""

    density: Annotated[float, Field(gt=0, le=1, description="Share of entries kept per adapter.")] = 0.5
    scope: Annotated[Scope, Field(description="Trim within each module, or over the whole task vector.")] = "module"
    kept: Annotated[Count, Field(description="How density · entries becomes a count.")] = "floor"


MAGNITUDE = Preset(
    name="magnitude_prune",
    summary="Keep each delta's largest entries, then take the weighted sum.",
    equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = the `density` largest of |xₜ|",
    params=MagnitudeParams,
    source=Source("PEFT add_weighted_adapter(combination_type='magnitude_prune')"),
    deviation="On deltas, not on A and B apart (that is `space: factors`). Entries that tie with the threshold are all kept.",
    stages=lambda params: Pipeline(pre=(Trim.of(params),), combine=Sum()),
)
register(MAGNITUDE)
register(
    replace(
        MAGNITUDE,
        name="magnitude_prune_svd",
        summary="PEFT's `magnitude_prune_svd`: on the dense deltas, truncated to the largest source rank.",
        source=Source("PEFT add_weighted_adapter(combination_type='magnitude_prune_svd')"),
        deviation="Randomised truncation by row blocks instead of a dense SVD; √S on both factors.",
        spaces=("delta",),
        auto_rank="largest",
    )
)


class BreadcrumbsParams(MethodParams):
    """Parameters of `breadcrumbs`."""

    density: Annotated[float, Field(gt=0, le=1, description="Share of entries kept: 1 − the shares dropped at both ends.")] = (
        0.9
    )
    gamma: Annotated[float, Field(ge=0, lt=1, description="Share of the largest entries that is dropped.")] = 0.01
    scope: Annotated[Scope, Field(description="Rank within each module, or over the whole task vector.")] = "module"

    @model_validator(mode="after")
    def _leave_room(self) -> BreadcrumbsParams:
        if self.density + self.gamma > 1:
            raise ValueError(f"density {self.density} and gamma {self.gamma} add up to more than 1")
        return self


register(
    Preset(
        name="breadcrumbs",
        summary="Drop each delta's largest outliers and its small entries, then take the weighted sum.",
        equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = xₜ without its `gamma` largest and its 1 − density − gamma smallest",
        params=BreadcrumbsParams,
        source=Source("Davari & Belilovsky 2024, Model Breadcrumbs, §3", "https://arxiv.org/abs/2312.06795"),
        deviation="With gamma · entries < 1 nothing is dropped at the top (mergekit drops all then). The paper's α is `scale`.",
        stages=lambda params: Pipeline(pre=(Band.of(params),), combine=Sum()),
    )
)
