"""`LowRank`: the delta of one target module as two factors, and everything that is exact on them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.deferred import Tensor, torch
from plait.linalg import factored
from plait.linalg.factored import ThinSVD


@dataclass(frozen=True, eq=False)
class LowRank:
    """ΔW = b @ a, with every scaling already folded in.

    >>> import torch
    >>> one, two = (plait.LowRank(torch.randn(2, 6), torch.randn(4, 2)) for _ in range(2))
    >>> total = plait.LowRank.concatenate([one, two], [0.7, 0.3])
    >>> total.rank, torch.allclose(total.dense(), 0.7 * one.dense() + 0.3 * two.dense(), atol=1e-5)

    Attributes:
        a: (r, d_in).
        b: (d_out, r).
    """

    a: Tensor
    b: Tensor

    @property
    def rank(self) -> int:
        """Number of columns of b; the numerical rank may be lower."""
        return self.a.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """(d_out, d_in) of ΔW."""
        return self.b.shape[0], self.a.shape[1]

    @staticmethod
    def zero(shape: tuple[int, int], dtype: torch.dtype | None = None, rank: int = 0) -> LowRank:
        """Return the zero delta, in float32 where no dtype is given: what a module that an adapter lacks contributes."""
        dtype = dtype or torch.float32
        return LowRank(torch.zeros(rank, shape[1], dtype=dtype), torch.zeros(shape[0], rank, dtype=dtype))

    @staticmethod
    def from_svd(svd: ThinSVD) -> LowRank:
        """Return the balanced factors b = U √S, a = √S Vᵀ: equal norms, and free of the gauge B → BG, A → G⁻¹A."""
        root = svd.s.clamp_min(0).sqrt()
        return LowRank(root.to(svd.vh.dtype).unsqueeze(1) * svd.vh, svd.u * root.to(svd.u.dtype))

    @staticmethod
    def concatenate(parts: Sequence[LowRank], coefficients: Sequence[float]) -> LowRank:
        """Return Σ cₜ ΔWₜ exactly, of rank Σ rₜ: the factors side by side, coefficients on b.

        Parts whose coefficient is 0 take no rank; at least one part is needed. Where a product with a coefficient would lose
        digits below the smallest normal number, or overflow, it is moved (see `normal_in`).
        """
        used = [(part, c) for part, c in zip(parts, coefficients, strict=True) if c != 0 and part.rank]
        used = [(part, c) if _are_normal(part.b, 0, part.b.dtype, c) else (part._times(c), 1.0) for part, c in used]
        if not used:
            return LowRank.zero(parts[0].shape, parts[0].a.dtype)
        b = torch.empty(parts[0].shape[0], sum(p.rank for p, _ in used), dtype=used[0][0].b.dtype)
        for (part, c), place in zip(used, torch.split(b, [p.rank for p, _ in used], dim=1), strict=True):
            torch.mul(part.b, c, out=place)
        return LowRank(torch.cat([p.a for p, _ in used]), b)

    def to(self, dtype: torch.dtype) -> LowRank:
        """Return it in another dtype."""
        return LowRank(self.a.to(dtype), self.b.to(dtype))

    def scaled(self, factor: float) -> LowRank:
        """Return factor · ΔW."""
        return self if factor == 1 else LowRank(self.a, self.b * factor)

    def normal_in(self, dtype: torch.dtype) -> LowRank:
        """Return the same ΔW with factors that keep their digits in a dtype.

        Where a column of b or a row of a is so small there that it has few digits left, or so large that it overflows, a power
        of two moves between the two until they are of one size; that is exact. What the dtype cannot hold as a product stays.
        """
        if _are_normal(self.b, 0, dtype) and _are_normal(self.a, 1, dtype):
            return self
        b, a = _sizes(self.b, 0), _sizes(self.a, 1)
        limits = torch.finfo(dtype)
        fits = (b * a >= limits.tiny * limits.eps) & (b * a <= limits.max)
        moved = ~(_normal(b, dtype) & _normal(a, dtype)) & fits
        steps = torch.where(moved, ((a.log2() - b.log2()) / 2).round(), 0.0).exp2()  # a / b may overflow
        return LowRank((self.a / steps.unsqueeze(1)).to(self.a.dtype), (self.b * steps).to(self.b.dtype))

    def _times(self, factor: float) -> LowRank:
        """Return factor · ΔW where the product of b with it is not normal in b's dtype."""
        return self.to(torch.float64).scaled(factor).normal_in(self.b.dtype).to(self.b.dtype)

    def padded(self, rank: int) -> LowRank:
        """Return the same delta with zero rows and columns up to `rank`."""
        more = rank - self.rank
        if more == 0:
            return self
        return LowRank(torch.nn.functional.pad(self.a, (0, 0, 0, more)), torch.nn.functional.pad(self.b, (0, more)))

    def dense(self) -> Tensor:
        """Return ΔW, (d_out, d_in)."""
        return self.b @ self.a

    def svd(self) -> ThinSVD:
        """Return the thin SVD of ΔW without forming it."""
        return factored.product_svd(self.b, self.a)

    def truncated(self, rank: int) -> tuple[LowRank, Tensor]:
        """Return the best approximation of at most `rank`, in balanced factors (see `from_svd`), and all singular values of ΔW.

        The values are (min(d_out, d_in, r),), descending, float64.
        """
        b, a, s = factored.truncated_product(self.b, self.a, rank)
        return LowRank(a, b), s

    def canonical(self) -> LowRank:
        """Return the balanced factors of the same ΔW (see `from_svd`), rank at most min(d_out, d_in)."""
        return self.truncated(self.rank)[0] if self.rank else self

    def singular_values(self) -> Tensor:
        """Return the singular values of ΔW, descending, float64."""
        return factored.singular_values(self.b, self.a)

    def inner(self, other: LowRank) -> float:
        """Return the Frobenius inner product ⟨ΔW, ΔW'⟩."""
        return factored.frobenius_inner(self.b, self.a, other.b, other.a)

    def energy(self) -> float:
        """Return ‖ΔW‖²_F."""
        return max(0.0, self.inner(self))


def _sizes(x: Tensor, dim: int) -> Tensor:
    """Return the largest magnitude of every column (0) or row (1), float64."""
    largest: Tensor = torch.linalg.vector_norm(x, math.inf, dim=dim)
    return largest.double()


def _normal(sizes: Tensor, dtype: torch.dtype) -> Tensor:
    """Return which vectors of these sizes keep their digits in a dtype, and do not overflow."""
    limits = torch.finfo(dtype)
    return (sizes == 0) | ((sizes >= 4 * limits.tiny) & (sizes <= limits.max / 4))


def _are_normal(x: Tensor, dim: int, dtype: torch.dtype, factor: float = 1.0) -> bool:
    """Return whether all columns (0) or rows (1) of x · factor keep their digits in a dtype.

    A few entries show that of a vector, and the extremes of x that nothing overflows; all of it is looked at where they do not.
    """
    if x.numel() == 0:
        return True
    limits, c = torch.finfo(dtype), abs(factor)
    some = _sizes(x.narrow(dim, 0, min(8, x.shape[dim])), dim) * c
    low, high = x.aminmax()
    if max(-float(low), float(high)) * c <= limits.max / 4 and bool((some >= 4 * limits.tiny).all()):
        return True
    return bool(_normal(_sizes(x, dim) * c, dtype).all())
