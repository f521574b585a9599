"""Spectra and subspaces: numerical rank, polar factors, coordinates shared by several matrices, Tucker bases.

Everything here is small (Σ r on a side, float64), but for the one tall reduction that makes it so.
"""

from __future__ import annotations

from collections.abc import Sequence

from plait.deferred import Tensor, torch
from plait.linalg.factored import Reduced

# Singular values below this share of the largest are the round-off of products of float32 factors. What promotes weak
# directions (whitening, equal spectra) must not see them: it would return noise of full size.
TOLERANCE = 1e-5


def numerical_rank(s: Tensor, largest: float | None = None, *, tolerance: float = TOLERANCE) -> int:
    """Return how many singular values exceed tolerance · largest.

    Args:
        s: (k,) descending.
        largest: what they are compared with; their own largest when not given.
        tolerance: share of it.
    """
    if len(s) == 0:
        return 0
    return int((s > tolerance * (float(s[0]) if largest is None else largest)).sum())


def polar(x: Tensor) -> Tensor:
    """Return the polar factor X (XᵀX)^(−1/2): the matrix with orthonormal columns that is nearest to X.

    From the R × R Gram matrix, with a pseudo-inverse root: singular directions of X below 1e-4 · largest are dropped (round-off
    of 1e-7 in X is amplified by at most the inverse of that), and the result is then a partial isometry. (The polar factor from
    an SVD is not unique there: it fills up with an arbitrary basis of the null space.)

    Args:
        x: (k, R), float64.

    Returns:
        (k, R).
    """
    if x.shape[1] == 0:
        return x
    values, vectors = torch.linalg.eigh(x.mT @ x)
    kept = values > 1e-8 * values[-1]
    vectors = vectors[:, kept]
    factor: Tensor = (x @ (vectors * values[kept].rsqrt())) @ vectors.mT
    return factor


def joint_coordinates(blocks: Sequence[Tensor]) -> tuple[Reduced, list[Tensor]]:
    """Return an orthonormal basis of the columns of several tall matrices, and their coordinates in it: blockₜ = Q Rₜ.

    The basis depends on the order of the blocks; what is computed from the coordinates must not depend on the basis.

    Args:
        blocks: each (m, rₜ).

    Returns:
        Q (m, k), k = min(m, Σ rₜ), which is not formed, and Rₜ (k, rₜ) in float64.
    """
    q = Reduced.of(torch.cat(list(blocks), dim=1))
    return q, list(torch.split(q.r, [block.shape[1] for block in blocks], dim=1))


def smooth_spectrum(s: Tensor, ratio: float) -> Tensor:
    """Return a linear spectrum of the same sum, whose first value is `ratio` times its last, or s₁/s_k times if that is less.

    Args:
        s: (k,) descending, positive.
        ratio: at least 1, which makes all values equal.
    """
    if len(s) == 0:
        return s
    shape = torch.linspace(min(ratio, float(s[0] / s[-1])), 1, len(s), dtype=s.dtype)
    return shape * (s.sum() / shape.sum())


def tucker_bases(cores: Tensor, rank: int, *, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """Return the column and the row basis of rank r that hold most of the energy of a stack of matrices together.

    Tucker-2 by higher-order orthogonal iteration (De Lathauwer, De Moor & Vandewalle 2000, algorithm 4.2), from the
    higher-order SVD. Directions without energy fill a basis up when there are not `rank` others.

    Args:
        cores: (T, p, q), float64.
        rank: r; a basis has no more columns than rows.
        iterations: most iterations.
        tolerance: it ends when ‖C − UUᵀCVVᵀ‖ / ‖C‖ moves by less.

    Returns:
        U (p, min(r, p)) and V (q, min(r, q)).
    """
    energy = float(cores.square().sum())
    u, v = _leading(cores, rank), _leading(cores.mT, rank)
    before = 2.0
    for _ in range(iterations):
        u = _leading(cores @ v, rank)
        projected = u.mT @ cores  # (T, r, q)
        v = _leading(projected.mT, rank)
        lost = max(0.0, 1 - float((projected @ v).square().sum()) / energy) ** 0.5 if energy else 0.0
        if before - lost < tolerance:
            break
        before = lost
    return u, v


def _leading(stack: Tensor, rank: int) -> Tensor:
    """Return the leading left singular vectors of the matrices side by side: stack (T, p, q), result (p, rank)."""
    vectors: Tensor = torch.linalg.eigh((stack @ stack.mT).sum(0)).eigenvectors
    return vectors.flip(1)[:, :rank]
