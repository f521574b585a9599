"""Stages that set singular values: isotropic (Iso-C), calibrated after (SVC) or before (Pico, STAR, smoothing) the merge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.factored import ThinSVD, flattener, rank_for_energy
from plait.linalg.sparsify import kept_count
from plait.linalg.spectral import TOLERANCE, joint_coordinates, numerical_rank, smooth_spectrum
from plait.records import Record
from plait.stages.base import DeltaStage, MergedStage, Site, StageParams, register_stage


class IsoFields(Record):
    """Parameters of `iso` and of Iso-C."""

    directions: Annotated[
        Literal["all", "effective"],
        Field(
            description="All directions that are not round-off, or as many as the effective rank exp(−Σ p ln p), p = σ / Σ σ."
        ),
    ] = "all"
    tolerance: Annotated[
        float, Field(ge=0, lt=1, description="Singular values up to this share of the largest are round-off and dropped.")
    ] = TOLERANCE


@register_stage
class Iso(IsoFields, StageParams, MergedStage):
    """Give all singular directions of the merged delta the mean of its singular values (Iso-C, §4.1)."""

    name: Literal["iso"] = "iso"

    def apply(self, merged: LowRank, site: Site) -> LowRank:
        """Return σ̄ U Vᵀ; a zero delta stays zero."""
        if self.directions == "all":
            middle = flattener(merged.b, merged.a, self.tolerance)
            if middle is not None:
                return LowRank(merged.a, merged.b @ middle.to(merged.b.dtype))
        svd = merged.svd()
        svd = svd.head(numerical_rank(svd.s, tolerance=self.tolerance))
        if len(svd.s) == 0:
            return merged
        if self.directions == "effective":
            svd = svd.head(_effective_rank(svd.s))
        return LowRank.from_svd(svd._replace(s=svd.s.mean().expand_as(svd.s)))


class SvcFields(Record):
    """Parameters of `svc`, the stage and the method."""

    alpha: Annotated[
        float, Field(gt=0, le=1, description="Least contribution; 1 / alpha is the most a direction can grow.")
    ] = 0.1


@register_stage
class Svc(SvcFields, StageParams, MergedStage):
    """Shrink the singular values of the merged delta to which several adapters have contributed (SVC, Algorithm 1).

    γᵣ = T / Σₜ max(α, sᵣₜ) with sᵣₜ = ⟨uᵣᵀM, uᵣᵀΔWₜ⟩ / ‖uᵣᵀΔWₜ‖², and ΔWₜ times its weight. An adapter without a part in a
    direction is not counted there.
    """

    name: Literal["svc"] = "svc"

    def apply(self, merged: LowRank, site: Site) -> LowRank:
        """Return U diag(γ σ) Vᵀ; a zero delta stays zero."""
        svd = merged.svd()
        svd = svd.head(numerical_rank(svd.s))
        if len(svd.s) == 0:
            return merged
        found = [_response(d, svd) for d in site.weighted()]
        inner, energy = torch.stack([i for i, _ in found]), torch.stack([e for _, e in found])  # (T, k)
        counted = energy > TOLERANCE**2 * energy.amax(0)
        shares = torch.where(counted, inner / energy.where(counted, 1), 0).clamp_min(self.alpha)
        total = shares.where(counted, 0).sum(0)
        gamma = torch.where(total > 0, counted.sum(0) / total.where(total > 0, 1), 1)
        return LowRank.from_svd(svd._replace(s=svd.s * gamma))


@register_stage
class Pico(StageParams, DeltaStage):
    """Shrink the output directions that several adapters share (Pico, §3): ΔWₜ ← U diag(α) Uᵀ ΔWₜ.

    αᵢ = 1 / (1 + (T − 1) cᵢ) with cᵢ = σᵢ² / Σ σ², from [ΔW₁ … ΔW_T] = U diag(σ) Vᵀ. Adapters without the module, or with a
    zero delta there, are not counted in T.
    """

    name: Literal["pico"] = "pico"

    def apply(self, site: Site) -> Sequence[LowRank]:
        """Return the shrunk deltas."""
        q, columns = joint_coordinates([d.b for d in site.deltas])
        rows = [torch.linalg.qr(d.a.mT, mode="r").R.double() for d in site.deltas]
        cores = [b @ r.mT for b, r in zip(columns, rows, strict=True)]  # ΔWₜ but for orthonormal factors on both sides
        count = sum(bool(c.any()) for c in cores)
        if count < 2:
            return site.deltas
        u, s, _ = torch.linalg.svd(torch.cat(cores, dim=1), full_matrices=False)
        collision = s.square() / s.square().sum()
        shrink = (u / (1 + (count - 1) * collision)) @ u.mT  # (k, k)
        return [LowRank(d.a, q.times(shrink @ b)) for d, b in zip(site.deltas, columns, strict=True)]


class StarFields(Record):
    """Parameters of `star`, the stage and the method."""

    eta: Annotated[float, Field(gt=0, le=1, description="Share of the nuclear norm that the kept values must hold.")] = 0.4


@register_stage
class Star(StarFields, StageParams, DeltaStage):
    """Keep each adapter's largest singular values and stretch them to the sum of all (STAR, §2)."""

    name: Literal["star"] = "star"

    def apply(self, site: Site) -> Sequence[LowRank]:
        """Return the truncated deltas, of unchanged nuclear norms."""
        return [self._truncated(d.svd()) if d.rank else d for d in site.deltas]

    def rank(self, ranks: Sequence[int]) -> list[int]:
        """Return ⌈η r⌉ each: the largest k of r values hold at least k / r of their sum."""
        return [kept_count(r, self.eta, "ceil") for r in ranks]

    def _truncated(self, svd: ThinSVD) -> LowRank:
        kept = svd.head(rank_for_energy(svd.s.sqrt(), self.eta))
        part = float(kept.s.sum())
        return LowRank.from_svd(kept._replace(s=kept.s * (float(svd.s.sum()) / part if part else 1.0)))


@register_stage
class Smooth(StageParams, DeltaStage):
    """Replace each adapter's singular values by a flatter, linear spectrum of the same sum (DC-Merge, §3.1)."""

    name: Literal["smooth"] = "smooth"
    rho: Annotated[
        float, Field(ge=1, le=1e6, description="Largest singular value over the smallest, at most; 1 makes them equal.")
    ] = 5.0

    def apply(self, site: Site) -> Sequence[LowRank]:
        """Return the smoothed deltas, of unchanged nuclear norms."""
        return [self._smoothed(d.svd()) if d.rank else d for d in site.deltas]

    def _smoothed(self, svd: ThinSVD) -> LowRank:
        kept = svd.head(max(1, numerical_rank(svd.s)))
        return LowRank.from_svd(kept._replace(s=smooth_spectrum(kept.s, self.rho) if kept.s[0] > 0 else kept.s))


def _effective_rank(s: Tensor) -> int:
    """Return the effective rank of a spectrum (Roy & Vetterli 2007), rounded up."""
    p = s / s.sum()
    return min(len(s), int(torch.ceil(torch.exp(-(p * p.log()).sum()) - 1e-9)))


def _response(delta: LowRank, svd: ThinSVD) -> tuple[Tensor, Tensor]:
    """Return ⟨uᵣᵀM, uᵣᵀΔW⟩ and ‖uᵣᵀΔW‖² for every direction of M = U diag(s) Vᵀ, (k,) float64 each."""
    left = (svd.u.mT @ delta.b).double()  # (k, r)
    right = (svd.vh @ delta.a.mT).double()  # (k, r)
    gram = delta.a.double() @ delta.a.mT.double()
    return svd.s * (left * right).sum(1), ((left @ gram) * left).sum(1)
