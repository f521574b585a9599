"""Combining singular directions: whitened (TSV-M), or common ones first (Iso-CTS), or in a cover of all (DC-Merge)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.elect import elect_sign, merge_agreeing
from plait.linalg.factored import ThinSVD
from plait.linalg.sparsify import keep_at_least, kept_count
from plait.linalg.spectral import numerical_rank, polar, smooth_spectrum
from plait.records import Record
from plait.stages.base import DeltaCombine, Site, StageParams, register_stage
from plait.stages.joint import Joint, joint_sum


class PolarFields(Record):
    """Parameters of `polar` and of TSV-M."""

    keep: Annotated[
        float, Field(gt=0, le=1, description="Share of each adapter's singular directions that is kept, the strongest first.")
    ] = 1.0


@register_stage
class Polar(PolarFields, StageParams, DeltaCombine):
    """Put all singular directions side by side, make them orthonormal, and sum up (TSV-M, Algorithm 1).

    Σ σₖ ũₖ ṽₖᵀ, where Ũ = polar([U₁ … U_T]), Ṽ likewise, and Uₜ diag(σₜ) Vₜᵀ = wₜ ΔWₜ.
    """

    name: Literal["polar"] = "polar"

    def combine(self, site: Site) -> LowRank:
        """Return the sum over whitened directions."""
        joint = Joint.of(site.weighted())
        svds = [svd.head(kept_count(len(svd.s), self.keep, "floor")) for svd in joint.svds()]
        return joint.lift(whitened(svds))

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the number of directions that are kept, at most."""
        return min(sum(kept_count(r, self.keep, "floor") for r in ranks), *shape)


class CommonSpecificFields(Record):
    """Parameters of `common_specific` and of Iso-CTS."""

    common: Annotated[float, Field(ge=0, le=1, description="Share of all directions that is taken from the sum.")] = 0.8


@register_stage
class CommonSpecific(CommonSpecificFields, StageParams, DeltaCombine):
    """Take the leading directions of the sum, then each adapter's own outside of them, and whiten (Iso-CTS, §4.2)."""

    name: Literal["common_specific"] = "common_specific"

    def combine(self, site: Site) -> LowRank:
        """Return the sum over whitened directions, with the singular values that they came with."""
        joint = Joint.of(site.weighted())
        alone = joint.svds()
        present = [(d, float(svd.s[0])) for d, svd in zip(joint.deltas, alone, strict=True) if len(svd.s)]
        if not present:
            return LowRank.zero(site.shape, site.deltas[0].a.dtype)
        size = min(sum(len(svd.s) for svd in alone), *site.shape)
        left = size - int(round(self.common * size, 9))  # a product such as 0.8 · 15 must not fall below 12
        each = min(round(left / len(present)), size // len(present))  # directions that every adapter adds of its own
        total = LowRank.concatenate(joint.deltas, [1.0] * len(joint.deltas)).svd()
        weakest = max(largest for _, largest in present)  # what the adapters cancel to is not a direction
        common = total.head(min(size - each * len(present), numerical_rank(total.s, weakest)))
        outside = [(LowRank(d.a, d.b - common.u @ (common.u.mT @ d.b)).svd(), largest) for d, largest in present]
        specific = [svd.head(min(each, numerical_rank(svd.s, largest))) for svd, largest in outside]
        return joint.lift(whitened([*specific, common]))


class CoverFields(Record):
    """Parameters of `cover` and of DC-Merge."""

    rho: Annotated[
        float | None,
        Field(
            ge=1, le=1e6, description="Largest singular value over the smallest after smoothing; 1: all equal, None: unchanged."
        ),
    ] = 5.0
    density: Annotated[
        float | None,
        Field(gt=0, le=1, description="Share of entries kept per adapter; None keeps as many as the adapter has directions."),
    ] = None


@register_stage
class Cover(CoverFields, StageParams, DeltaCombine):
    """Smooth every spectrum, elect signs per entry in coordinates that cover all adapters, keep the diagonal blocks (DC-Merge).

    Smoothing is part of it, because directions can no longer be distinguished once their singular values are equal.
    """

    name: Literal["cover"] = "cover"

    def combine(self, site: Site) -> LowRank:
        """Return Ũ M Ṽᵀ, M the merged diagonal blocks."""
        joint = Joint.of(site.weighted())
        svds = joint.svds()
        u, v = polar(torch.cat([x.u for x in svds], dim=1)), polar(torch.cat([x.vh for x in svds]).mT)  # (k, R), (l, R)
        if u.shape[1] == 0:
            return LowRank.zero(site.shape, site.deltas[0].a.dtype)
        spectra = [x.s if self.rho is None else smooth_spectrum(x.s, self.rho) for x in svds]
        cores = torch.stack([self._kept((u.mT @ x.u * s) @ (x.vh @ v), len(s)) for x, s in zip(svds, spectra, strict=True)])
        sign = elect_sign(cores, "total")
        merged = merge_agreeing(cores, cores, sign, torch.ones(len(cores), dtype=cores.dtype), "count")  # (R, R)
        blocks = torch.block_diag(*(torch.ones(len(x.s), len(x.s), dtype=cores.dtype) for x in svds))  # type: ignore[no-untyped-call]
        return joint.lift_dense(u @ (merged * blocks) @ v.mT)

    def _kept(self, core: Tensor, directions: int) -> Tensor:
        if directions == 0:
            return core
        count = directions if self.density is None else kept_count(core.numel(), self.density, "floor")
        smallest = core.abs().flatten().topk(count).values[-1:]
        return keep_at_least(core.unsqueeze(0), smallest).squeeze(0)


def whitened(svds: Sequence[ThinSVD]) -> LowRank:
    """Return Σ σₖ ũₖ ṽₖᵀ over all directions, ũ and ṽ made orthonormal by polar decomposition."""
    u, v = torch.cat([x.u for x in svds], dim=1), torch.cat([x.vh for x in svds]).mT
    return joint_sum(polar(u), torch.cat([x.s for x in svds]), polar(v))
