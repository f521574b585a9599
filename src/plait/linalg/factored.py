"""Linear algebra on products `b @ a` that never forms the product.

Shapes: `a` is (r, n), `b` is (m, r); r is small. The tall products accumulate in the dtype of the factors, everything of
size r × r runs in float64. A tall matrix is always reduced by QR first: `svd` on m × r directly costs five times as much.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class ThinSVD(NamedTuple):
    """`u @ diag(s) @ vh`, with u (m, k), s (k,) descending in float64, vh (k, n)."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def head(self, rank: int) -> ThinSVD:
        """Keep the `rank` largest singular values."""
        return ThinSVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])


def product_svd(b: Tensor, a: Tensor) -> ThinSVD:
    """Compute the thin SVD of `b @ a` from QR of both factors and one r × r SVD.

    Args:
        b: (m, r).
        a: (r, n).

    Returns:
        k = min(m, n, r) triplets, u and vh in the dtype of the factors; singular values below round-off are kept (they
        are honest zeros), so that shapes depend on shapes only.
    """
    q_b, r_b = torch.linalg.qr(b)  # (m, k_b), (k_b, r)
    q_a, r_a = torch.linalg.qr(a.mT)  # (n, k_a), (k_a, r)
    core = r_b.double() @ r_a.double().mT  # (k_b, k_a)
    u, s, vh = torch.linalg.svd(core, full_matrices=False)
    return ThinSVD(q_b @ u.to(b.dtype), s, vh.to(a.dtype) @ q_a.mT)


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values of `b @ a`, descending, (min(m, n, r),), float64."""
    r_b = torch.linalg.qr(b, mode="r").R.double()
    r_a = torch.linalg.qr(a.mT, mode="r").R.double()
    values: Tensor = torch.linalg.svdvals(r_b @ r_a.mT)
    return values


def inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the Frobenius inner product ⟨b1 a1, b2 a2⟩ from two small Gram matrices, accumulated in float64."""
    return float(((b1.mT.double() @ b2.double()) * (a1.double() @ a2.mT.double())).sum())


def left_basis(x: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Return the left singular vectors of a tall (m, R) matrix whose singular values exceed tolerance · largest.

    The singular basis, unlike a QR basis, does not depend on the order of the columns' blocks
    (`methods` that act entry by entry need that). Shape (m, k) with k ≥ 1.
    """
    q, r = torch.linalg.qr(x)
    u, s, _ = torch.linalg.svd(r.double(), full_matrices=False)
    kept = max(1, int((s > tolerance * s[0]).sum())) if len(s) else 0
    basis: Tensor = q @ u[:, :kept].to(x.dtype)
    return basis


def orient(u: Tensor) -> Tensor:
    """Return the sign (±1, per column) that makes the entry of largest magnitude of every column positive."""
    if u.numel() == 0:
        return u.new_ones(u.shape[1])
    picked = u.gather(0, u.abs().argmax(0, keepdim=True)).squeeze(0)
    return torch.where(picked < 0, -1.0, 1.0).to(u.dtype)


def rank_for_energy(s: Tensor, energy: float) -> int:
    """Return the smallest rank whose squared singular values hold at least `energy` of the total (1 for a zero matrix).

    Args:
        s: (k,) descending, float64.
        energy: share in (0, 1].
    """
    power = s.square().cumsum(0)
    if len(s) == 0 or power[-1] <= 0:
        return 1
    # One ulp of slack: energy 1.0 must not ask for the rounding noise behind the last real value.
    wanted = energy * float(power[-1]) * (1 - 1e-12)
    return min(len(s), int(torch.searchsorted(power, torch.tensor(wanted, dtype=power.dtype))) + 1)
