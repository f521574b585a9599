"""A matrix that exists only as blocks of rows, and what can be learnt of it by passing over them.

`RowBlocks` is how a dense m × n delta is handled without holding it: every pass computes the blocks anew (or keeps them,
when the whole matrix is small). The truncated SVD is a randomized range finder with power iterations fed by such passes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from plait.linalg.factored import ThinSVD
from plait.linalg.keyed import Key, normal

BLOCK_ELEMENTS = 1 << 20  # rows per block × columns: large enough for BLAS, small enough for the cache
HOLD_ELEMENTS = 1 << 24  # a matrix up to 64 MiB (float32) is computed once and held


class RowBlocks:
    """An m × n matrix given by a function of a range of rows.

    Args:
        shape: (m, n).
        rows: `rows(start, stop)` returns the rows [start, stop), (stop − start, n). It must be pure: it is called again in
            every pass.
        dtype: of the blocks.
    """

    def __init__(self, shape: tuple[int, int], rows: Callable[[int, int], Tensor], dtype: torch.dtype) -> None:
        self.shape = shape
        self.dtype = dtype
        self._rows = rows
        self._held: Tensor | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block)."""
        m, n = self.shape
        if self._held is None and m * n <= HOLD_ELEMENTS:
            self._held = torch.cat([block for _, block in self._compute()]) if m else torch.empty(0, n, dtype=self.dtype)
        if self._held is not None:
            yield 0, self._held
        else:
            yield from self._compute()

    def _compute(self) -> Iterator[tuple[int, Tensor]]:
        for start, stop in block_ranges(*self.shape):
            yield start, self._rows(start, stop)

    def scaled(self, factor: float) -> RowBlocks:
        """Return the matrix times a number."""
        if factor == 1:
            return self
        return RowBlocks(self.shape, lambda start, stop: self._rows(start, stop) * factor, self.dtype)

    def dense(self) -> Tensor:
        """Return the whole matrix, (m, n)."""
        return torch.cat([block for _, block in self])

    def matmul(self, x: Tensor) -> Tensor:
        """Return `self @ x` for x (n, k)."""
        return torch.cat([block @ x for _, block in self])

    def rmatmul(self, x: Tensor) -> Tensor:
        """Return `selfᵀ @ x` for x (m, k)."""
        out = torch.zeros(self.shape[1], x.shape[1], dtype=self.dtype)
        for start, block in self:
            out += block.mT @ x[start : start + len(block)]
        return out

    def energy(self) -> float:
        """Return the squared Frobenius norm."""
        return sum(float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2 for _, block in self)


def block_ranges(m: int, n: int) -> Iterator[tuple[int, int]]:
    """Yield the row ranges that cover an m × n matrix; a function of the shape alone, so that results are too."""
    step = max(1, BLOCK_ELEMENTS // max(1, n))
    for start in range(0, m, step):
        yield start, min(m, start + step)


def truncated_svd(matrix: RowBlocks, rank: int, key: Key, *, oversample: int = 32, iterations: int = 3) -> ThinSVD:
    """Compute the leading `rank` singular triplets of a matrix given by row blocks.

    Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithm 4.4 (randomized subspace iteration) with re-orthonormalising
    between the passes, then their algorithm 5.1. The sketch is drawn from `key`, never from a global generator. When the
    sketch would be as wide as the matrix, a dense SVD is both exact and cheaper, and is used instead.

    Args:
        matrix: (m, n), float32 or float64.
        rank: number of triplets; at most min(m, n) are returned.
        key: of the random sketch.
        oversample: extra columns of the sketch.
        iterations: power iterations, two passes each.
    """
    m, n = matrix.shape
    rank = min(rank, m, n)
    width = rank + oversample
    if width >= min(m, n) // 2:
        u, s, vh = torch.linalg.svd(matrix.dense(), full_matrices=False)
        return ThinSVD(u[:, :rank], s[:rank].double(), vh[:rank])
    q = _orthonormal(matrix.matmul(normal(key, n, width, matrix.dtype)))
    for _ in range(iterations):
        q = _orthonormal(matrix.matmul(_orthonormal(matrix.rmatmul(q))))
    small = matrix.rmatmul(q)  # (n, width) = (qᵀ M)ᵀ
    q_small, r_small = torch.linalg.qr(small)
    u, s, vh = torch.linalg.svd(r_small.double().mT, full_matrices=False)
    return ThinSVD(q @ u.to(q.dtype), s, vh.to(q.dtype) @ q_small.mT).head(rank)


def _orthonormal(x: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(x).Q
    return q
