"""Methods that keep entries by magnitude and then sum: magnitude pruning, Breadcrumbs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import torch
from pydantic import Field, model_validator
from torch import Tensor

from plait.linalg.sparsify import Count, keep_at_least, kept_count
from plait.methods.base import Block, ElementwiseMethod, MethodParams, Scope, Source, Survey, register
from plait.methods.surveys import magnitudes


class MagnitudeParams(MethodParams):
    """Parameters of `magnitude_prune`."""

    density: Annotated[float, Field(gt=0, le=1, description="Share of entries kept per adapter.")] = 0.5
    scope: Annotated[Scope, Field(description="Trim within each module, or over the whole task vector.")] = "module"
    kept: Annotated[Count, Field(description="How density · entries becomes a count.")] = "floor"


def _sum(block: Block, x: Tensor) -> Tensor:
    return (x * block.weights.to(x.dtype).view(-1, 1, 1)).sum(0)


def magnitude_prune(block: Block, params: MagnitudeParams) -> Tensor:
    """Keep each adapter's largest entries and take the weighted sum; (p, q)."""
    return _sum(block, keep_at_least(block.x, block.statistics[0][:, 0]))


def _magnitude_surveys(params: MagnitudeParams) -> tuple[Survey, ...]:
    return (magnitudes(params.scope, lambda entries: [kept_count(entries, params.density, params.kept)]),)


MAGNITUDE = ElementwiseMethod(
    name="magnitude_prune",
    summary="Keep each delta's largest entries, then take the weighted sum.",
    equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = the `density` largest of |xₜ|",
    params=MagnitudeParams,
    source=Source("PEFT add_weighted_adapter(combination_type='magnitude_prune')"),
    deviation="On deltas, not on A and B apart (that is `space: factors`). Entries that tie with the threshold are all kept.",
    combine=magnitude_prune,
    surveys=_magnitude_surveys,
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

    def ranks(self, entries: int) -> tuple[int, int]:
        """Return the ranks of the largest and of the smallest entry that are kept."""
        top = min(int(self.gamma * entries), entries - 1)
        return top + 1, min(entries, top + kept_count(entries, self.density, "floor"))


def breadcrumbs(block: Block, params: BreadcrumbsParams) -> Tensor:
    """Drop outliers and small entries of each adapter and take the weighted sum; (p, q)."""
    largest, smallest = block.statistics[0].unbind(1)
    trimmed = keep_at_least(block.x, smallest)
    return _sum(block, torch.where(trimmed.abs() > largest.view(-1, 1, 1), 0, trimmed))


register(
    ElementwiseMethod(
        name="breadcrumbs",
        summary="Drop each delta's largest outliers and its small entries, then take the weighted sum.",
        equation="ΔW = Σ wₜ x̂ₜ,  x̂ₜ = xₜ without its `gamma` largest and its 1 − density − gamma smallest",
        params=BreadcrumbsParams,
        source=Source("Davari & Belilovsky 2024, Model Breadcrumbs, §3", "https://arxiv.org/abs/2312.06795"),
        deviation="With gamma · entries < 1 nothing is dropped at the top (mergekit drops all then). The paper's α is `scale`.",
        combine=breadcrumbs,
        surveys=lambda params: (magnitudes(params.scope, params.ranks),),
    )
)
