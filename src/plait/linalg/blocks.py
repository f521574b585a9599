"""A matrix that exists only as blocks of rows, and what can be learned of it by passing over them.

`RowBlocks` is how a dense m × n delta is handled: its first rows, up to a fixed number of entries, are computed once and kept,
and every pass computes those beyond anew. The truncated SVD is a subspace iteration fed by such passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

from plait.deferred import Tensor, torch
from plait.linalg.factored import Reduced, ThinSVD
from plait.linalg.keyed import Key, normal

RangeHint = Callable[[Tensor], Tensor]

MATRIX_BLOCK_ELEMENTS = 1 << 19  # rows per block × columns: enough rows that products of factors run at full speed
CACHED_ELEMENTS = 1 << 18  # work on single entries takes so many at a time, over all adapters: they stay in the cache
_CHANCE = 1e-3  # share of the random part in a sketch that has a hint
_OVERSAMPLE = 16  # extra columns of a sketch
_TOLERANCE = 0.01  # share of its error that an iteration of the SVD must gain for another one
HOLD_ELEMENTS = 1 << 26  # so much of a matrix is computed once and kept: 256 MiB in float32, any projection of an 8B model
_SAFE = 1e-20  # a sum of squares in float32 below this may have lost some of them


class RowBlocks:
    """An m × n matrix given by a function of a range of rows. The first `HOLD_ELEMENTS` entries are computed once and kept.

    Args:
        shape: (m, n).
        rows: `rows(start, stop)` returns the rows [start, stop), (stop − start, n). It must be pure: what is not kept is
            computed again in every pass.
        dtype: of the blocks.
        range_hint: x (n, k) ↦ Nᵀ N x, (n, k), of a matrix N whose leading row space is believed to be near this one's. It
            spares `truncated_svd` iterations when that is so and costs one when it is not.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rows: Callable[[int, int], Tensor],
        dtype: torch.dtype,
        range_hint: RangeHint | None = None,
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.range_hint = range_hint
        self._rows = rows
        self._held: Tensor | None = None  # the first rows
        self._held_energy = 0.0
        self._energy: float | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block).

        Raises:
            ValueError: `rows` returned another shape or dtype.
        """
        held = self._hold()
        if len(held):
            yield 0, held
        yield from self._compute(len(held), self.shape[0])

    def release(self) -> None:
        """Give up the rows that are kept; they are computed again when they are wanted."""
        self._held = None

    def _hold(self) -> Tensor:
        """Return the rows that are kept; made, and their squares summed, the first time."""
        if self._held is None:
            m, n = self.shape
            step = _rows_per_block(n)
            # whole blocks: others would be computed with other round-off
            kept = m if m * n <= HOLD_ELEMENTS else HOLD_ELEMENTS // (step * n) * step
            held, squares = torch.empty(kept, n, dtype=self.dtype), []
            for start, block in self._compute(0, kept):
                held[start : start + len(block)] = block
                squares.append(_energy(block))
            self._held, self._held_energy = held, sum(squares)
        return self._held

    def _compute(self, first: int, end: int) -> Iterator[tuple[int, Tensor]]:
        """Yield the blocks of the rows [first, end), which begin and end where blocks do."""
        for start, stop in block_ranges(end - first, self.shape[1]):
            start, stop = start + first, stop + first
            block = self._rows(start, stop)
            if block.shape != (stop - start, self.shape[1]):
                raise ValueError(f"rows {start}:{stop} of {self.shape}: the block has shape {tuple(block.shape)}")
            if block.dtype != self.dtype:
                raise ValueError(f"rows {start}:{stop}: the block is {block.dtype}, the adapters are {self.dtype}")
            yield start, block

    def scaled(self, factor: float) -> RowBlocks:
        """Return the matrix times a number."""
        if factor == 1:
            return self
        return RowBlocks(self.shape, lambda start, stop: self._rows(start, stop) * factor, self.dtype, self.range_hint)

    def dense(self) -> Tensor:
        """Return the complete matrix, (m, n)."""
        return torch.cat([block for _, block in self])

    def matmul(self, x: Tensor) -> Tensor:
        """Return `self @ x` for x (n, k)."""
        return torch.cat([block @ x for _, block in self])

    def rmatmul(self, x: Tensor) -> Tensor:
        """Return `selfᵀ @ x` for x (m, k)."""
        out = torch.zeros(self.shape[1], x.shape[1], dtype=self.dtype)
        for start, block in self:
            out.addmm_(block.mT, x[start : start + len(block)])
        return out

    def energy(self) -> float:
        """Return the squared Frobenius norm; not finite when, and for float32 only when, an entry is not. Computed once."""
        if self._energy is None:
            rest = self._compute(len(self._hold()), self.shape[0])
            self._energy = self._held_energy + sum(_energy(block) for _, block in rest)
        return self._energy


def _energy(block: Tensor) -> float:
    """Return the sum of the squares: in the block's dtype along a row, or in float64 where that is too little or too much."""
    if block.dtype == torch.float32:
        squares = float(torch.linalg.vector_norm(block, dim=1).double().square().sum())
        if _SAFE < squares < math.inf:
            return squares
    return float(torch.linalg.vector_norm(block, dtype=torch.float64)) ** 2


def block_ranges(m: int, n: int, stride: int = 1) -> Iterator[tuple[int, int]]:
    """Yield the row ranges that cover an m × n matrix; a function of the shape alone, so that results are too.

    With a stride only every stride-th row of a range is to be used, and ranges are that much longer.
    """
    step = stride * _rows_per_block(n)
    for start in range(0, m, step):
        yield start, min(m, start + step)


def _rows_per_block(n: int) -> int:
    return max(1, MATRIX_BLOCK_ELEMENTS // max(1, n))


def truncated_svd(matrix: RowBlocks, rank: int, key: Key, *, iterations: int = 4) -> ThinSVD:
    """Compute the leading `rank` singular triplets of a matrix given by row blocks.

    Halko, Martinsson & Tropp 2011 (arXiv:0909.4061), algorithms 4.4 and 5.1: randomized subspace iteration, with the shift of
    Feng, Yu, Xie & Tang 2024 (arXiv:2404.09276), which hastens it where the spectrum hardly falls. Deviations: it ends when the
    error ‖M − U S Vᵀ‖ fell by less than a share of itself (what is left to gain is less than that in practice), and it begins
    with the matrix's `range_hint` where there is one. The sketch is drawn from `key`, never from a global generator. Where the
    sketch would be half as wide as the matrix, a dense SVD is both exact and cheaper, and is used instead.

    Args:
        matrix: (m, n), float32 or float64.
        rank: number of triplets; at most min(m, n) are returned.
        key: of the random sketch.
        iterations: at most, two passes each, and at least one.
    """
    m, n = matrix.shape
    rank = min(rank, m, n)
    width = rank + _OVERSAMPLE
    if min(m, n) <= 2 * max(width, 32):
        u, s, vh = torch.linalg.svd(matrix.dense(), full_matrices=False)
        return ThinSVD(u[:, :rank], s[:rank].double(), vh[:rank])
    total = matrix.energy()
    slack = torch.finfo(matrix.dtype).eps * total  # the round-off of a sum of squares
    y = matrix.matmul(_sketch(matrix, key, width))
    before = shift = 0.0
    for done in range(iterations + 1):
        u, s, v = _ritz(matrix, y)
        found = float(s[:rank].square().sum())
        if done == iterations or (done and found - before <= max(2 * _TOLERANCE * (total - found), slack)):
            break
        before, shift = found, max(shift, float(s[-1]) ** 2 / 2)
        # (M Mᵀ − shift) u = σ (M v − shift / σ · u); the factor σ does not change the span, and float32 would lose it
        y = matrix.matmul(v) - u * (shift / s.clamp_min(shift**0.5)).nan_to_num().to(u.dtype)
    return ThinSVD(u, s, v.mT).head(rank)


def _sketch(matrix: RowBlocks, key: Key, width: int) -> Tensor:
    """Return (n, width) random columns, turned toward where the hint has the leading row space."""
    x = normal(key, matrix.shape[1], width, matrix.dtype)
    if matrix.range_hint is None:
        return x
    near = matrix.range_hint(x)
    size = float(torch.linalg.vector_norm(near, dtype=torch.float64))
    if not 0 < size < math.inf:
        return x
    # some chance stays in: a hint of low rank leaves directions empty
    return _CHANCE * x + near * (float(torch.linalg.vector_norm(x)) / size)


def _ritz(matrix: RowBlocks, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the singular triplets u (m, w), s (w,), v (n, w) of the matrix's projection on the columns of y (m, w)."""
    q = Reduced.of(y)
    z = matrix.rmatmul(q.basis)
    q_z = Reduced.of(z if q.turn is None else z @ q.turn.to(z.dtype))  # of (n, w) = (qᵀ M)ᵀ
    u, s, vh = torch.linalg.svd(q_z.r.mT, full_matrices=False)
    return q.times(u), s, q_z.times(vh.mT)
