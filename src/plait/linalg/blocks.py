"""A matrix that exists only as blocks of rows, and what can be learned of it by passing over them.

`RowBlocks` is how a dense m × n delta is handled: its first rows, up to a fixed number of entries, are computed once and kept,
and every pass computes those beyond anew. The truncated SVD is a block Krylov method fed by such passes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from plait.deferred import Tensor, torch
from plait.linalg.factored import ThinSVD, orthonormal_rows, orthonormal_rows_of_each
from plait.linalg.keyed import Key, uniform

RangeHint = Sequence[tuple[Tensor, Tensor]]

MATRIX_BLOCK_ELEMENTS = 1 << 19  # rows per block × columns: enough rows that products of factors run at full speed
CACHED_ELEMENTS = 1 << 19  # work on single entries takes so many at a time, over all adapters: they stay in the cache
_CHANCE = 1e-3  # share of the random part in a sketch that has a hint
_DENSE_BELOW = 16  # a matrix that is not twice as wide as its rank and so much is decomposed completely
HOLD_ELEMENTS = 1 << 26  # so much of a matrix is computed once and kept: 256 MiB in float32, any projection of an 8B model
_SAFE = 1e-20  # a sum of squares in float32 below this may have lost some of them


class _Search(NamedTuple):
    """How `truncated_svd` searches.

    Attributes:
        extra: rows of the sketch beyond those that are wanted, or that the hint has.
        continued: so many directions beyond those that are wanted begin the next block.
        settled: share of what a block gained that is left to those that do not begin the next one.
        tolerance: share of its error that a block must gain for another one.
    """

    extra: int
    continued: int
    settled: float
    tolerance: float


TOGETHER_BELOW = 1 << 20  # entries of a matrix that is decomposed with others: alone, calls would cost as much as products
TOGETHER = 4  # so many at a time
_BLOCKS = 4  # of `rank` rows each, of such a one whose row space is known
_AT_LARGE = _Search(16, 4, 0.1, 0.01)
_HINTED = _Search(0, 0, 0.2, 0.004)  # from where the hint has the row space, more and narrower blocks find more in fewer rows


class RowBlocks:
    """An m × n matrix given by a function of a range of rows. The first `HOLD_ELEMENTS` entries are computed once and kept.

    Args:
        shape: (m, n).
        rows: `rows(start, stop)` returns the rows [start, stop), (stop − start, n). It must be pure: what is not kept is
            computed again in every pass.
        dtype: of the blocks.
        range_hint: factors b (m, r), a (r, n) of matrices whose row spaces are believed to hold most of this one's leading row
            space. They spare `truncated_svd` iterations when that is so and cost one when it is not.
    """

    def __init__(
        self,
        shape: tuple[int, int],
        rows: Callable[[int, int], Tensor],
        dtype: torch.dtype,
        range_hint: RangeHint = (),
    ) -> None:
        self.shape = shape
        self.dtype = dtype
        self.range_hint = range_hint
        self._rows = rows
        self._held: list[tuple[int, Tensor]] | None = None  # the first rows
        self._held_energy = 0.0
        self._energy: float | None = None

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first row, block).

        Raises:
            ValueError: `rows` returned another shape or dtype.
        """
        held = self._hold()
        yield from held
        yield from self._compute(_end(held), self.shape[0])

    def release(self) -> None:
        """Give up the rows that are kept; they are computed again when they are wanted."""
        self._held = None

    def _hold(self) -> list[tuple[int, Tensor]]:
        """Return the blocks that are kept; made, and their squares summed, the first time."""
        if self._held is None:
            m, n = self.shape
            step = _rows_per_block(n)
            # whole blocks: others would be computed with other round-off
            kept = m if m * n <= HOLD_ELEMENTS else HOLD_ELEMENTS // (step * n) * step
            self._held = list(self._compute(0, kept))
            self._held_energy = sum(_energy(block) for _, block in self._held)
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

    @property
    def hinted(self) -> int:
        """Number of rows of all factors a of the hint."""
        return sum(len(a) for _, a in self.range_hint)

    def scaled(self, factor: float) -> RowBlocks:
        """Return the matrix times a number."""
        if factor == 1:
            return self
        return RowBlocks(self.shape, lambda start, stop: self._rows(start, stop) * factor, self.dtype, self.range_hint)

    def dense(self) -> Tensor:
        """Return the complete matrix, (m, n)."""
        return torch.cat([block for _, block in self])

    def rows_on_right(self, x: Tensor) -> Tensor:
        """Return `x @ selfᵀ`, (k, m), for x (k, n): few long rows are multiplied faster than few long columns."""
        out = x.new_empty(len(x), self.shape[0])
        for start, block in self:
            torch.mm(x, block.mT, out=out[:, start : start + len(block)])
        return out

    def rows_on_left(self, x: Tensor) -> Tensor:
        """Return `x @ self`, (k, n), for x (k, m)."""
        out = x.new_zeros(len(x), self.shape[1])
        for start, block in self:
            out.addmm_(x[:, start : start + len(block)], block)
        return out

    def energy(self) -> float:
        """Return the squared Frobenius norm; not finite when, and for float32 only when, an entry is not. Computed once."""
        if self._energy is None:
            rest = self._compute(_end(self._hold()), self.shape[0])
            self._energy = self._held_energy + sum(_energy(block) for _, block in rest)
        return self._energy


def _end(blocks: list[tuple[int, Tensor]]) -> int:
    """Return the row after the last of these blocks."""
    return blocks[-1][0] + len(blocks[-1][1]) if blocks else 0


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

    Musco & Musco 2015 (arXiv:1504.05477), algorithm 2: a randomized block Krylov method, which finds the triplets in the span
    of all blocks so far. Deviations: a block begins with the leading directions found until then; it ends when the error
    ‖M − U S Vᵀ‖ fell by less than a share of itself (what is left to gain is less than that in practice); and it begins with
    the matrix's `range_hint` where there is one: with its rows, where they are about as many as are wanted. Of a small matrix
    with such a hint, blocks are four, each begins with all leading directions, and nothing is asked between them, so that
    several can be decomposed at a time (`truncated_svds`). The sketch is drawn from `key`, never from a global generator. Where
    the sketch would be half as wide as the matrix, a dense SVD is exact and cheaper, and used instead.

    Args:
        matrix: (m, n), float32 or float64.
        rank: number of triplets; at most min(m, n) are returned.
        key: of the random sketch.
        iterations: at most, two passes each, after the first two passes.
    """
    m, n = matrix.shape
    rank = min(rank, m, n)
    if min(m, n) <= 2 * max(rank + _DENSE_BELOW, 32):
        u, s, vh = torch.linalg.svd(matrix.dense(), full_matrices=False)
        return ThinSVD(u[:, :rank], s[:rank].double(), vh[:rank])
    if _is_taken_together(matrix, rank):
        return _svds_together([matrix], rank, [key])[0]
    total = matrix.energy()
    slack = torch.finfo(matrix.dtype).eps * total  # the round-off of a sum of squares
    known = matrix.hinted
    search = _HINTED if rank <= known <= rank + _AT_LARGE.extra else _AT_LARGE
    width = (known if search is _HINTED else rank) + search.extra
    most = min(m, n, width + iterations * (rank + search.continued))
    y = matrix.rows_on_right(_sketch(matrix, key, width))
    q, z, wide = y.new_empty(most, m), y.new_empty(most, n), torch.empty(most, n, dtype=torch.float64)
    gram = torch.empty(most, most, dtype=torch.float64)  # wide wideᵀ, its upper triangle
    before, old, new = torch.zeros(rank, dtype=torch.float64), 0, width
    for done in range(iterations + 1):
        q[old:new] = orthonormal_rows(y, q[:old])
        wide[old:new] = z[old:new] = matrix.rows_on_left(q[old:new])
        torch.mm(wide[:new], wide[old:new].mT, out=gram[:new, old:new])
        squares, turn = (x.flip(-1) for x in torch.linalg.eigh(gram[:new, :new], UPLO="U"))
        s, gained, before = squares.clamp_min(0).sqrt(), squares[:rank] - before, squares[:rank]
        gain, left = float(gained.sum()), total - float(before.sum())
        if done == iterations or (done and gain <= max(2 * search.tolerance * left, slack)):
            break
        # the largest triplets are found first: those that no longer gain do not begin the next block
        first = int((gained.cumsum(0) <= search.settled * gain).sum()) if done else 0
        old, new = new, min(most, new + rank + search.continued - first)
        if new == old:
            break
        leading = slice(first, first + new - old)
        y = matrix.rows_on_right(_rows_of_unit_norm(turn[:, leading], s[leading], s[0], z[:old]))
    found = turn[:, :rank]
    return ThinSVD((found.to(q.dtype).mT @ q[:new]).mT, s[:rank], _rows_of_unit_norm(found, s[:rank], s[0], z[:new]))


def truncated_svds(matrices: Sequence[RowBlocks], rank: int, keys: Sequence[Key]) -> list[ThinSVD]:
    """Compute what `truncated_svd` does of every matrix, bit for bit; small ones of one shape at the same time.

    Args:
        matrices: of any shapes.
        rank: number of triplets of each.
        keys: of their random sketches.
    """
    found: dict[int, ThinSVD] = {}
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, matrix in enumerate(matrices):
        if _is_taken_together(matrix, rank):
            groups.setdefault((matrix.shape, matrix.dtype, matrix.hinted), []).append(i)
        else:
            found[i] = truncated_svd(matrix, rank, keys[i])
    for places in groups.values():
        found |= zip(places, _svds_together([matrices[i] for i in places], rank, [keys[i] for i in places]), strict=True)
    return [found[i] for i in range(len(matrices))]


def _is_taken_together(matrix: RowBlocks, rank: int) -> bool:
    """Return whether a matrix is small, its row space is about as large as is wanted, and a dense SVD would cost more."""
    m, n = matrix.shape
    small = m * n <= TOGETHER_BELOW and min(m, n) > 2 * max(rank + _DENSE_BELOW, 32)
    return small and rank <= matrix.hinted <= rank + _AT_LARGE.extra


def _svds_together(matrices: Sequence[RowBlocks], rank: int, keys: Sequence[Key]) -> list[ThinSVD]:
    """Decompose matrices of one shape, dtype and number of hinted rows: see `truncated_svd`."""
    (m, n), count, width = matrices[0].shape, len(matrices), matrices[0].hinted
    dense = torch.empty(count, m, n, dtype=matrices[0].dtype)
    for matrix, place in zip(matrices, dense, strict=True):
        for start, block in matrix:
            place[start : start + len(block)] = block
    most = min(m, n, width + (_BLOCKS - 1) * rank)
    q, z = dense.new_empty(count, most, m), dense.new_empty(count, most, n)
    wide, gram = z.new_empty(z.shape, dtype=torch.float64), z.new_empty(count, most, most, dtype=torch.float64)
    sketches = torch.stack([_sketch(matrix, key, width) for matrix, key in zip(matrices, keys, strict=True)])
    y = torch.bmm(sketches, dense.mT)
    old, new = 0, width
    while True:
        orthonormal_rows_of_each(y, q[:, :old], out=q[:, old:new])
        wide[:, old:new] = z[:, old:new] = torch.bmm(q[:, old:new], dense)
        gram[:, :new, old:new] = torch.bmm(wide[:, :new], wide[:, old:new].mT)
        squares, turn = torch.linalg.eigh(gram[:, :new, :new], UPLO="U")  # ascending
        s = squares.clamp_min(0).sqrt()
        if new == most:
            break
        old, new = new, min(most, new + rank)
        leading = slice(2 * old - new, old)
        y = torch.bmm(_rows_of_unit_norm(turn[..., leading], s[:, leading], s[:, -1:], z[:, :old]), dense.mT)
    s, turn = s[:, -rank:].flip(-1), turn[..., -rank:].flip(-1)
    u, vh = torch.bmm(turn.to(q.dtype).mT, q), _rows_of_unit_norm(turn, s, s[:, :1], z)
    return [ThinSVD(u[i].mT, s[i], vh[i]) for i in range(count)]


def _rows_of_unit_norm(turn: Tensor, s: Tensor, largest: Tensor, z: Tensor) -> Tensor:
    """Return turnᵀ z, (…, k, n), each row over its norm: the s (…, k) that is not round-off of the largest."""
    limits = torch.finfo(z.dtype)
    norms = torch.maximum(s, (limits.eps * largest).clamp_min(limits.tiny))
    return (turn / norms.unsqueeze(-2)).to(z.dtype).mT @ z


def _sketch(matrix: RowBlocks, key: Key, width: int) -> Tensor:
    """Return (width, n) random rows, turned to where the hint has the leading row space; its own rows where they are so few."""
    x = uniform(key, 0, width, matrix.shape[1]).to(matrix.dtype).mul_(2).sub_(1)
    hint = matrix.range_hint
    near = [a for _, a in hint]
    if sum(len(part) for part in near) > width:
        near = [sum((x @ a.mT @ b.mT @ b @ a for b, a in hint), torch.zeros_like(x))]
    start = 0
    for part in near:
        place = x[start : start + len(part)]
        start += len(part)
        sizes = torch.linalg.vector_norm(part, dim=1, keepdim=True, dtype=torch.float64)
        if math.isfinite(float(sizes.sum())):
            unit = part / sizes.clamp_min(torch.finfo(part.dtype).tiny).to(part.dtype)
            # some chance stays in: a hint of low rank leaves directions empty; √(n / 3) is the size of a random row
            place.mul_(_CHANCE).add_(unit, alpha=math.sqrt(x.shape[1] / 3))
    return x
