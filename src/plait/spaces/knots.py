"""`knots`: one joint column basis for all adapters, row coordinates per adapter."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.linalg.blocks import RowBlocks
from plait.linalg.factored import orient
from plait.spaces.base import Array, Frame, MergedMatrix, Space, in_memory, unchanged

_TOLERANCE = 1e-6


class Knots(Space):
    """KnOTS (Stoica et al. 2025, arXiv:2410.19735, §4): [ΔW₁ … ΔW_T] = U Σ [V₁ᵀ … V_Tᵀ]; adapter t is Σ Vₜᵀ, (k, d_in).

    The SVD of the (m, T·n) concatenation is taken from its factors: B = Q R_B, Aₜᵀ = Qₜ Rₜ, and only R_B · diag(Rₜᵀ) of size
    R × R is decomposed. Deviations: scalings are folded in (the authors' code omits them), the cut-off is relative (1e-6 of
    the largest; theirs is the absolute 1e-5, which deletes small adapters), and signs are fixed.
    """

    name = "knots"
    about = "joint column basis, one block of row coordinates per adapter; free of gauge and order"
    low_rank = True
    arrays = ("knots",)

    def frame(self, factors: Sequence[LowRank], scalings: Sequence[float]) -> Frame:
        """Return Σ Vₜᵀ as one stack of (k, d_in), k at most Σ rₜ."""
        deltas = [f.scaled(s) for f, s in zip(factors, scalings, strict=True)]
        q_b, r_b = torch.linalg.qr(torch.cat([d.b for d in deltas], dim=1))  # (m, k_b), (k_b, R)
        rows = [torch.linalg.qr(d.a.mT, mode="r").R for d in deltas]  # Aₜ = Rₜᵀ Qₜᵀ
        middle = r_b.double() @ torch.block_diag(*(r.double().mT for r in rows))  # type: ignore[no-untyped-call]
        u, s, _ = torch.linalg.svd(middle, full_matrices=False)
        kept = max(1, int((s > _TOLERANCE * s[0]).sum())) if len(s) else 0
        basis = q_b @ u[:, :kept].to(q_b.dtype)
        basis = basis * orient(basis)
        # Σ Vₜᵀ = Uᵀ ΔWₜ: taken from the factors, a zero delta is exactly zero here and has no vote
        small = tuple(basis.mT @ delta.b for delta in deltas)  # (k, rₜ)
        coordinates = _coordinates(small, deltas)

        def lift(merged: Sequence[RowBlocks]) -> MergedMatrix:
            return LowRank(merged[0].dense(), basis)

        return Frame(_arrays(coordinates), lift, basis.dtype, basis.nbytes + coordinates.nbytes, small)

    def arrays_again(self, small: Sequence[Tensor], deltas: Callable[[], Sequence[LowRank]]) -> tuple[Array, ...]:
        """Return the row coordinates (Uᵀ Bₜ) Aₜ."""
        return _arrays(_coordinates(small, deltas()))

    def rank(self, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return min(Σ rₜ, d_out, d_in)."""
        return min(sum(ranks), *shape)


def _coordinates(small: Sequence[Tensor], deltas: Sequence[LowRank]) -> Tensor:
    """Return (Uᵀ Bₜ) Aₜ, (T, k, n)."""
    out = small[0].new_empty(len(deltas), len(small[0]), deltas[0].shape[1])
    for left, delta, place in zip(small, deltas, out, strict=True):
        torch.mm(left, delta.a, out=place)
    return out


def _arrays(coordinates: Tensor) -> tuple[Array, ...]:
    return (Array("knots", (coordinates.shape[1], coordinates.shape[2]), in_memory(coordinates), unchanged),)


KNOTS = Knots()
