"""Deltas in coordinates that all adapters of a matrix share: where methods on complete matrices do their work."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.factored import Reduced, ThinSVD
from plait.linalg.spectral import joint_coordinates, numerical_rank


@dataclass(frozen=True, eq=False)
class Joint:
    """ΔWₜ = u Cₜ vᵀ, exactly: k and l are at most Σ rₜ, and whatever does not depend on the basis can be done on the Cₜ.

    Attributes:
        u: (d_out, k), orthonormal columns, not formed.
        v: (d_in, l), likewise.
        deltas: the Cₜ, each (k, l) of rank rₜ, in float64.
    """

    u: Reduced
    v: Reduced
    deltas: tuple[LowRank, ...]

    @classmethod
    def of(cls, deltas: Sequence[LowRank]) -> Joint:
        """Take deltas to joint coordinates by reducing both sides."""
        u, b = joint_coordinates([d.b for d in deltas])
        v, a = joint_coordinates([d.a.mT for d in deltas])
        return cls(u, v, tuple(LowRank(x.mT, y) for x, y in zip(a, b, strict=True)))

    def dense(self) -> Tensor:
        """Return the Cₜ as one stack, (T, k, l)."""
        return torch.stack([d.dense() for d in self.deltas])

    def svds(self) -> list[ThinSVD]:
        """Return the SVD of every Cₜ without the directions that are round-off; none are left of a zero delta."""
        found = [d.svd() for d in self.deltas]
        return [svd.head(numerical_rank(svd.s)) for svd in found]

    def lift(self, merged: LowRank) -> LowRank:
        """Return u C vᵀ for C (k, l) in factors."""
        small = merged.canonical() if merged.rank > min(merged.shape) else merged
        return LowRank(self.v.times_transposed(small.a.mT.double()), self.u.times(small.b.double()))

    def lift_dense(self, merged: Tensor) -> LowRank:
        """Return u C vᵀ for C (k, l) float64."""
        k, l = merged.shape  # noqa: E741 (as above)
        if k <= l:
            return LowRank(self.v.times_transposed(merged.mT), self.u.times(torch.eye(k, dtype=merged.dtype)))
        return LowRank(self.v.times_transposed(torch.eye(l, dtype=merged.dtype)), self.u.times(merged))


def joint_sum(u: Tensor, s: Tensor, v: Tensor) -> LowRank:
    """Return Σ sₖ uₖ vₖᵀ for u (k, r), s (r,), v (l, r), whose columns need not be orthogonal."""
    root = s.sqrt()
    return LowRank((v * root).mT, u * root)
