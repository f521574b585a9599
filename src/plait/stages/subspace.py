"""Joint subspaces of low rank (CtM) and task-wise corrections of the mean (CART)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from plait.adapters.lowrank import LowRank
from plait.deferred import torch
from plait.linalg.sparsify import kept_count
from plait.linalg.spectral import tucker_bases
from plait.records import Record
from plait.stages.base import DeltaCombine, DeltaStage, Site, StageParams, register_stage
from plait.stages.joint import Joint

SpaceRank = Annotated[
    int | None, Field(ge=1, le=65536, description="Rank of both spaces; None is the largest rank of the adapters.")
]
Beta = Annotated[
    float, Field(ge=0, le=1, description="1 leaves norms as they are while spaces are sought, 0 makes them all equal.")
]


@register_stage
class Tucker(StageParams, DeltaStage):
    """Project all deltas to one column and one row space of low rank, the best for all together (CtM, §4).

    The spaces are those of deltas with blended norms, so that no adapter drowns; what is projected are the deltas themselves.
    """

    name: Literal["tucker"] = "tucker"
    to: SpaceRank = None
    beta: Beta = 0.25
    iterations: Annotated[int, Field(ge=0, le=10000, description="Most iterations of HOOI after the higher-order SVD.")] = 100
    tolerance: Annotated[
        float, Field(ge=0, lt=1, description="Iteration ends when the relative reconstruction error moves by less.")
    ] = 1e-6

    def apply(self, site: Site) -> Sequence[LowRank]:
        """Return U Uᵀ ΔWₜ V Vᵀ."""
        joint = Joint.of(site.deltas)
        cores = joint.dense()
        norms = torch.linalg.matrix_norm(cores)
        present = norms > 0
        if not present.any():
            return site.deltas
        blend = self.beta + (1 - self.beta) * norms[present].mean() / norms.where(present, 1)
        rank = self._rank([len(svd.s) for svd in joint.svds()])
        u, v = tucker_bases(cores * blend.view(-1, 1, 1), rank, iterations=self.iterations, tolerance=self.tolerance)
        return [joint.lift(LowRank((d.a @ v) @ v.mT, u @ (u.mT @ d.b))) for d in joint.deltas]

    def rank(self, ranks: Sequence[int]) -> list[int]:
        """Return at most the rank of the spaces."""
        return [min(r, self._rank(ranks)) for r in ranks]

    def span(self, ranks: Sequence[int], shape: tuple[int, int]) -> tuple[int, int]:
        """Return the rank of the spaces, twice."""
        rank = self._rank(ranks)
        return min(rank, shape[0]), min(rank, shape[1])

    def _rank(self, ranks: Sequence[int]) -> int:
        return max(ranks) if self.to is None else self.to


class CartFields(Record):
    """Parameters of `cart`, the stage and the method."""

    rho: Annotated[
        float, Field(gt=0, le=1, description="Directions added per adapter, as a share of the sum of all ranks.")
    ] = 0.04
    factor: Annotated[float, Field(ge=0, le=1e3, description="Factor on what is added; the paper's λ.")] = 0.1


@register_stage
class Cart(CartFields, StageParams, DeltaCombine):
    """Average, then add the strongest directions of each adapter's distance from the average (CART, eq. 5).

    D + factor · Σₜ SVDₖ(wₜ ΔWₜ − D) with D = (1/T) Σ wₜ ΔWₜ and k = ⌈ρ R⌉.
    """

    name: Literal["cart"] = "cart"

    def combine(self, site: Site) -> LowRank:
        """Return the corrected mean."""
        joint = Joint.of(site.weighted())
        cores = joint.dense()  # (T, k, l)
        mean = cores.mean(0)
        size = min(sum(len(svd.s) for svd in joint.svds()), *mean.shape)
        kept = kept_count(size, self.rho, "ceil")
        u, s, vh = torch.linalg.svd(cores - mean, full_matrices=False)
        merged = mean + self.factor * ((u[..., :kept] * s[:, None, :kept]) @ vh[:, :kept]).sum(0)
        return joint.lift_dense(merged)
