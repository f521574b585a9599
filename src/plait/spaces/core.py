"""`core`: R × R coordinates between the joint column space and the joint row space of all adapters."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.blocks import RowBlocks
from plait.linalg.factored import left_basis, orient
from plait.spaces.base import Array, Frame, MergedMatrix, Space, in_memory, unchanged


class Core(Space):
    """Core space (Panariello et al. 2025, arXiv:2509.17786, §3): ΔWₜ = U Cₜ Vᵀ with Cₜ = (Uᵀ Bₜ)(Aₜ V), lossless.

    Deviations, all toward invariance: every adapter's factors are first balanced by their SVD (the paper takes them raw, so
    that B → BG, A → G⁻¹A changes the result), the bases are singular bases of the joint factors (a QR basis depends on the
    order of the adapters), their signs are fixed, and directions below 1e-6 of the largest are dropped (shared
    initializations make the joint factors rank deficient).
    """

    name = "core"
    about = "exact R × R coordinates in joint singular bases; free of gauge and order"
    low_rank = True
    arrays = ("core",)

    def frame(self, factors: Sequence[LowRank], scalings: Sequence[float]) -> Frame:
        """Return the cores Cₜ as one stack of (p, q), p and q at most Σ rₜ."""
        deltas = [f.scaled(s).canonical() for f, s in zip(factors, scalings, strict=True)]
        u = left_basis(torch.cat([d.b for d in deltas], dim=1))  # (m, p)
        v = left_basis(torch.cat([d.a for d in deltas]).mT)  # (n, q)
        u, v = u * orient(u), v * orient(v)
        cores = torch.stack([(u.mT @ d.b) @ (d.a @ v) for d in deltas])  # (T, p, q)

        def lift(merged: Sequence[RowBlocks]) -> MergedMatrix:
            core = merged[0].dense()
            if core.shape[0] <= core.shape[1]:
                return LowRank(core @ v.mT, u)
            return LowRank(v.mT.contiguous(), u @ core)

        return Frame(_arrays(cores), lift, cores.dtype, sum(x.nbytes for x in (u, v, cores)), (cores,))

    def arrays_again(self, small: Sequence[Tensor], deltas: Callable[[], Sequence[LowRank]]) -> tuple[Array, ...]:
        """Return the cores, which are few values themselves."""
        return _arrays(*small)

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return min(Σ rₜ, d_out, d_in)."""
        return min(sum(ranks), *shape)


def _arrays(cores: Tensor) -> tuple[Array, ...]:
    return (Array("core", (cores.shape[1], cores.shape[2]), in_memory(cores), unchanged),)


CORE = Core()
