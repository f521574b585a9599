"""Linear algebra on products `b @ a` that never forms the product.

Shapes: `a` is (r, n), `b` is (m, r); r is small. Everything of size r × r runs in float64. A tall matrix is always reduced to
r × r first: `svd` on m × r directly costs many times as much.
"""

from __future__ import annotations

from typing import NamedTuple

from plait.deferred import Tensor, torch

# The largest mean of 1/σ² over the singular values of a matrix with columns of norm 1, by the bytes of one of its values.
# One σ may hold all of it, and the round-off of its direction grows with 1/σ²: float32 has no digits to spare.
_WELL_CONDITIONED = {4: 1.5, 8: 4.0}
_ONCE, _TWICE = 100.0, 1e8  # the same, for a basis that may lose a digit, and for one that is made twice
_RESOLVED = 1e-3  # singular values above this share of the largest are found from their squares with digits to spare


class ThinSVD(NamedTuple):
    """`u @ diag(s) @ vh`, with u (m, k), s (k,) descending in float64, vh (k, n)."""

    u: Tensor
    s: Tensor
    vh: Tensor

    def head(self, rank: int) -> ThinSVD:
        """Keep the `rank` largest singular values."""
        return ThinSVD(self.u[:, :rank], self.s[:rank], self.vh[:rank])


class Reduced(NamedTuple):
    """A tall x (m, k) as q @ r, with q = basis @ turn orthonormal; q itself is not formed.

    Attributes:
        basis: (m, j), in the dtype of x.
        turn: (j, j) float64; None for the identity.
        r: (j, k), float64.
    """

    basis: Tensor
    turn: Tensor | None
    r: Tensor

    @staticmethod
    def of(x: Tensor) -> Reduced:
        """Reduce a matrix: by Cholesky of its Gram matrix, or by Householder QR where that would lose digits.

        The former costs a third of the latter. Its round-off grows with the squared condition of x, once every column is
        brought to norm 1: near 1 for columns as random as those of A and B. Adapters that share their A take the QR.
        """
        gram = (x.mT @ x).double()
        norms = gram.diagonal().sqrt()
        limits = torch.finfo(x.dtype)
        if bool((norms > limits.tiny**0.5 / limits.eps).all()):  # squares of what is smaller have lost digits
            lower, failed = torch.linalg.cholesky_ex(gram / torch.outer(norms, norms))
            inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False).mT
            if not failed and float(inverse.square().sum()) <= _WELL_CONDITIONED[x.itemsize] * len(lower):
                return Reduced(x, inverse / norms.unsqueeze(1), lower.mT * norms)
        q, r = torch.linalg.qr(x)
        return Reduced(q, None, r.double())

    def times(self, y: Tensor) -> Tensor:
        """Return q @ y for y (j, l) float64, (m, l) in the dtype of x."""
        return self.basis @ self._turned(y)

    def times_transposed(self, y: Tensor) -> Tensor:
        """Return (q @ y)ᵀ for y (j, l) float64, (l, m) in the dtype of x, row by row in memory."""
        return self._turned(y).mT @ self.basis.mT

    def _turned(self, y: Tensor) -> Tensor:
        return (y if self.turn is None else self.turn @ y).to(self.basis.dtype)


def orthonormal_rows(y: Tensor, others: Tensor) -> Tensor:
    """Return an orthonormal basis of what the rows of y add to others, in the dtype of y.

    By Cholesky of their Gram matrix, and once more where the first time left round-off; where they add next to nothing in some
    direction, by Householder QR, which puts any direction there.

    Args:
        y: (k, m).
        others: orthonormal rows (j, m), j + k at most m.

    Returns:
        (k, m), orthogonal to `others`.
    """
    found: Tensor = y
    for _ in range(2):
        if len(others):  # what is left of a row may be small, and then not yet orthogonal
            found = torch.addmm(found, found @ others.mT, others, alpha=-1)
            found = torch.addmm(found, found @ others.mT, others, alpha=-1)
        wide = found.double()
        gram = wide @ wide.mT
        norms = gram.diagonal().sqrt()
        lower, failed = torch.linalg.cholesky_ex(gram / torch.outer(norms, norms))
        inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
        grown = float(inverse.square().sum()) / len(lower)  # the mean of 1/σ², by which round-off grows
        if failed or not grown < _TWICE:
            break
        found = (inverse / norms).to(y.dtype) @ found
        if grown < _ONCE:
            return found
    q: Tensor = torch.linalg.qr(torch.cat([others, y]).mT).Q
    return q[:, len(others) :].mT


def orthonormal_rows_of_each(y: Tensor, others: Tensor, out: Tensor) -> None:
    """Put into every matrix of `out` an orthonormal basis of what the rows of y add to others.

    By two Cholesky decompositions of their Gram matrices, of all at once; where these do not suffice, by `orthonormal_rows`.

    Args:
        y: (T, k, m).
        others: orthonormal rows (T, j, m), j + k at most m.
        out: (T, k, m).
    """
    found, settled = y, torch.ones(len(y), dtype=torch.bool)
    for projections, limit in ((2, _TWICE), (1, _ONCE)):
        for _ in range(projections if others.shape[1] else 0):
            found = torch.baddbmm(found, torch.bmm(found, others.mT), others, alpha=-1)
        wide = found.double()
        gram = torch.bmm(wide, wide.mT)
        norms = gram.diagonal(dim1=-2, dim2=-1).sqrt()
        lower, failed = torch.linalg.cholesky_ex(gram / (norms.unsqueeze(-1) * norms.unsqueeze(-2)))
        inverse = torch.linalg.solve_triangular(lower, torch.eye(y.shape[1], dtype=lower.dtype), upper=False)
        settled &= (failed == 0) & (inverse.square().sum((-2, -1)) / y.shape[1] < limit)
        found = torch.bmm((inverse / norms.unsqueeze(-2)).to(y.dtype), found)
    out.copy_(found)
    for i in (~settled).nonzero().flatten().tolist():
        out[i] = orthonormal_rows(y[i], others[i])


def product_svd(b: Tensor, a: Tensor) -> ThinSVD:
    """Compute the thin SVD of `b @ a` from QR of both factors and one r × r SVD.

    Args:
        b: (m, r).
        a: (r, n).

    Returns:
        k = min(m, n, r) triplets, u and vh in the dtype of the factors; singular values below round-off are kept (they
        are honest zeros), so that shapes depend on shapes only.
    """
    q_b, q_a = Reduced.of(b), Reduced.of(a.mT)
    u, s, vh = torch.linalg.svd(q_b.r @ q_a.r.mT, full_matrices=False)  # of (k_b, k_a)
    return ThinSVD(q_b.times(u), s, q_a.times_transposed(vh.mT))


def truncated_product(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the best approximation of `b @ a` of at most a rank, in balanced factors: U √S and √S Vᵀ.

    As `product_svd`, but what is cut off is never formed, and √S enters while matrices are small.

    Args:
        b: (m, r).
        a: (r, n).
        rank: of the result, k; at most min(m, n, r).

    Returns:
        The factors (m, k) and (k, n) in the dtype of `b` and `a`, and all singular values of `b @ a`, (min(m, n, r),) float64.
    """
    q_b, q_a = Reduced.of(b), Reduced.of(a.mT)
    u, s, vh = torch.linalg.svd(q_b.r @ q_a.r.mT, full_matrices=False)
    root = s[:rank].sqrt()
    return q_b.times(u[:, :rank] * root), q_a.times_transposed(vh[:rank].mT * root), s


def singular_values(b: Tensor, a: Tensor) -> Tensor:
    """Return the singular values of `b @ a`, descending, (min(m, n, r),), float64."""
    values: Tensor = torch.linalg.svdvals(Reduced.of(b).r @ Reduced.of(a.mT).r.mT)
    return values


def flattener(b: Tensor, a: Tensor, tolerance: float) -> Tensor | None:
    """Return the X with which `b @ X @ a` has the singular directions of `b @ a`, and its mean singular value for each.

    From two Gram matrices and one symmetric eigenproblem, all r × r: with A Aᵀ = L Lᵀ and Lᵀ BᵀB L = W diag(σ²) Wᵀ, singular
    vectors are B L W diag(1/σ) and Aᵀ L⁻ᵀ W, so that X = mean(σ) L W diag(1/σ) Wᵀ L⁻¹. That is half the work of the SVD.

    Args:
        b: (m, r).
        a: (r, n).
        tolerance: singular values have to be above this share of the largest.

    Returns:
        (r, r), float64; None where squares would lose digits (rows of a nearly dependent, or singular values below a thousandth
        of the largest) or a singular value is not above the tolerance: there it takes the SVD.
    """
    rows, columns = a.double(), b.double()
    gram = rows @ rows.mT
    lower, failed = torch.linalg.cholesky_ex(gram)
    if len(gram) == 0 or failed:
        return None
    inverse = torch.linalg.solve_triangular(lower, torch.eye(len(lower), dtype=lower.dtype), upper=False)
    if not float((inverse * gram.diagonal().sqrt()).square().sum()) <= _WELL_CONDITIONED[gram.itemsize] * len(lower):
        return None
    squares, w = torch.linalg.eigh(lower.mT @ (columns.mT @ columns) @ lower)  # ascending
    if not squares[0] > max(_RESOLVED, tolerance) ** 2 * squares[-1]:
        return None
    s = squares.sqrt()
    middle: Tensor = (lower @ (w * (s.mean() / s))) @ (w.mT @ inverse)
    return middle


def frobenius_inner(b1: Tensor, a1: Tensor, b2: Tensor, a2: Tensor) -> float:
    """Return the Frobenius inner product ⟨b1 a1, b2 a2⟩ from two small Gram matrices, accumulated in float64."""
    return float(((b1.mT.double() @ b2.double()) * (a1.double() @ a2.mT.double())).sum())


def left_basis(x: Tensor, *, tolerance: float = 1e-6) -> Tensor:
    """Return the left singular vectors of a tall (m, R) matrix whose singular values exceed tolerance · largest.

    The singular basis, unlike a QR basis, does not depend on the order of the columns' blocks
    (`methods` that act entry by entry need that). Shape (m, k) with k ≥ 1.
    """
    q = Reduced.of(x)
    u, s, _ = torch.linalg.svd(q.r, full_matrices=False)
    kept = max(1, int((s > tolerance * s[0]).sum())) if len(s) else 0
    return q.times(u[:, :kept])


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
    # One ulp of slack: energy 1.0 must not ask for the rounding noise after the last real value.
    wanted = energy * float(power[-1]) * (1 - 1e-12)
    return min(len(s), int(torch.searchsorted(power, torch.tensor(wanted, dtype=power.dtype))) + 1)
