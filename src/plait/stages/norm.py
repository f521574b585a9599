"""Stages that set the size of the merged delta."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.adapters.lowrank import LowRank
from plait.deferred import torch
from plait.records import Record
from plait.stages.base import MergedStage, Site, StageParams, register_stage


class NormMatchFields(Record):
    """Parameters of `norm_match`, the stage and the method."""

    to: Annotated[Literal["mean", "median", "max"], Field(description="Which of the adapters' norms the merge is given.")] = (
        "mean"
    )


@register_stage
class NormMatch(NormMatchFields, StageParams, MergedStage):
    """Scale the merged delta to the norm of the adapters' own, ‖wₜ ΔWₜ‖_F: their mean, median or largest.

    Adapters without the module, and those of norm 0, do not count.
    """

    name: Literal["norm_match"] = "norm_match"

    def apply(self, merged: LowRank, site: Site) -> LowRank:
        """Return the delta with the norm asked for; a zero delta stays zero."""
        norms = torch.tensor([d.energy() for d in site.weighted_sources()], dtype=torch.float64).sqrt()
        norms, size = norms[norms > 0], merged.energy() ** 0.5
        if len(norms) == 0 or size == 0:
            return merged
        wanted = {"mean": norms.mean(), "median": norms.quantile(0.5), "max": norms.max()}[self.to]
        return merged.scaled(float(wanted) / size)


@register_stage
class Truncate(StageParams, MergedStage):
    """Keep the largest singular directions of the merged delta (Eckart & Young 1936)."""

    name: Literal["truncate"] = "truncate"
    to: Annotated[int, Field(ge=1, le=65536, description="The rank kept.")] = 16

    def apply(self, merged: LowRank, site: Site) -> LowRank:
        """Return the best approximation of that rank."""
        return LowRank.from_svd(merged.svd().head(self.to)) if merged.rank > self.to else merged

    def rank(self, rank: int) -> int:
        """Return the smaller of the two."""
        return min(rank, self.to)
