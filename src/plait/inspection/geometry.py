"""The relative geometry of adapters' deltas: Gram matrices, principal angles, signs, spectra.

Everything is a function of ΔW = s·B·A, so it is the same for any factors of it (B G, G⁻¹ A). Almost all of it comes from
the two Gram matrices A Aᵀ and Bᵀ B of the joined factors, in float64; only the signs need the entries of ΔW, which pass by
in blocks of rows. Independent of what the numbers are called in a report.
"""

from __future__ import annotations

import math
import statistics
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

from plait.adapters.adapter import Adapter
from plait.adapters.extremes import float32_limit
from plait.adapters.lowrank import LowRank
from plait.adapters.names import layer_key
from plait.deferred import Tensor, np, torch
from plait.linalg.bits import different, packed, shared
from plait.linalg.factored import rank_for_energy
from plait.linalg.scratch import Scratch
from plait.results.threads import one_thread_each

SymmetricMatrix = tuple[tuple[float | None, ...], ...]  # (T, T); None where a value is not defined
TILE_ELEMENTS = 1 << 17  # entries of one delta that are in memory at a time
TILES_ELEMENTS = 1 << 21  # and of all deltas
_TILE_ROWS = 1024
_SUMMED = 1 << 13  # entries that are summed in the deltas' own dtype, before float64
_APART = 1040  # entries between tiles: what is a power of two apart competes for the same places of the cache
_PRODUCT_ROWS = 128  # of factors that are multiplied at once: fewer take longer, more compute a part of the lower triangle
_NULL = 1e-5  # directions of a factor below this share of its largest singular value are round-off


class EntrySums:
    """Sums over the entries of one module, or over the modules of a layer; each (T, T), float64."""

    def __init__(self, count: int) -> None:
        self.inner = torch.zeros(count, count, dtype=torch.float64)  # ⟨x, y⟩
        self.magnitude = torch.zeros_like(self.inner)  # ⟨|x|, |y|⟩
        self.nonzero = torch.zeros_like(self.inner)  # number of entries non-zero in both
        self.signs = torch.zeros_like(self.inner)  # ⟨sign x, sign y⟩: agreeing entries − opposed ones

    def __iadd__(self, other: EntrySums) -> EntrySums:
        self.inner += other.inner
        self.magnitude += other.magnitude
        self.nonzero += other.nonzero
        self.signs += other.signs
        return self

    def norms(self) -> tuple[float, ...]:
        """Return every adapter's ‖ΔW‖_F."""
        return tuple(math.sqrt(max(0.0, x)) for x in self.inner.diagonal().tolist())

    def cosine(self) -> SymmetricMatrix:
        """Return ⟨ΔWᵢ, ΔWⱼ⟩ / (‖ΔWᵢ‖ ‖ΔWⱼ‖), (T, T)."""
        norm = self.inner.diagonal().clamp_min(0).sqrt()
        return as_matrix((self.inner / torch.outer(norm, norm)).clamp(-1, 1))

    def conflict(self) -> SymmetricMatrix:
        """Return, of the entries that are non-zero in both, the share whose signs differ, (T, T)."""
        return as_matrix((1 - self.signs / self.nonzero) / 2)

    def weighted_conflict(self) -> SymmetricMatrix:
        """Return the same share with every entry counted by |xᵢ xⱼ|, (T, T)."""
        # The two sums round differently: equal adapters must not come out a hair below 0.
        return as_matrix(((1 - self.inner / self.magnitude) / 2).clamp(0, 1))


class RowSpaceOverlap(NamedTuple):
    """The overlap of the spaces of one factor of two adapters, in one matrix.

    Attributes:
        factor: `a` (row space) or `b` (column space).
        pair: (i, j) with i < j.
        median: cosine of the median principal angle.
        chance: the root mean square cosine between random subspaces of these sizes.
    """

    factor: str
    pair: tuple[int, int]
    median: float
    chance: float


class ModuleMeasures(NamedTuple):
    """The measures of one target module.

    Attributes:
        path: of the module.
        powers: adapter → the squared singular values of each of its matrices; only adapters that have the module.
        sums: None when the adapters store it in different shapes, so that nothing can be compared.
        overlaps: of all its matrices.
    """

    path: str
    powers: dict[int, list[Tensor]]
    sums: EntrySums | None
    overlaps: list[RowSpaceOverlap]


def measure_all(adapters: Sequence[Adapter], paths: Sequence[str], workers: int) -> Iterator[ModuleMeasures]:
    """Yield the measures of the modules, in their order. In every worker torch keeps to one thread: the tensors are small."""
    dtype = torch.float64 if any("F64" in a.dtypes for a in adapters) else torch.float32
    scratch = Scratch()
    with one_thread_each(workers) as pool:
        yield from pool.map(lambda path: _measure(adapters, path, dtype, scratch), paths)


def row_overlaps(adapters: Sequence[Adapter], path: str) -> list[RowSpaceOverlap]:
    """Return the overlap of the row spaces of A in one module, pair by pair; only adapters that have it."""
    present = [t for t, adapter in enumerate(adapters) if path in adapter.targets]
    stacks = [adapters[t].read(path, torch.float64) for t in present]
    return [
        found for parts in zip(*stacks, strict=True) for found in _Gram("a", [p.a for p in parts], Scratch()).overlaps(present)
    ]


def _measure(adapters: Sequence[Adapter], path: str, dtype: torch.dtype, scratch: Scratch) -> ModuleMeasures:
    targets = {t: a.targets[path] for t, a in enumerate(adapters) if path in a.targets}
    raw = {t: adapters[t].read(path, dtype) for t in targets}
    if any(float32_limit(raw[t], target.scaling) is not None for t, target in targets.items()):
        raw = {t: adapters[t].read(path, torch.float64) for t in targets}
    stacks = {t: [d.scaled(target.scaling) for d in raw[t]] for t, target in targets.items()}
    if len({target.layout for target in targets.values()}) > 1:
        alone = {t: [power for delta in stack for power in _Grams([delta], scratch).powers()] for t, stack in stacks.items()}
        return ModuleMeasures(path, alone, None, [])
    present = list(stacks)
    grid = torch.meshgrid(torch.tensor(present), torch.tensor(present), indexing="ij")
    powers: dict[int, list[Tensor]] = {t: [] for t in present}
    sums = EntrySums(len(adapters))
    overlaps: list[RowSpaceOverlap] = []
    for parts in zip(*stacks.values(), strict=True):
        grams = _Grams(parts, scratch)
        for t, power in zip(present, grams.powers(), strict=True):
            powers[t].append(power)
        sums.inner[grid] += grams.inner()
        if len(parts) > 1:
            signs, magnitude, nonzero = _entry_sums(parts, scratch)
            sums.signs[grid] += signs
            sums.magnitude[grid] += magnitude
            sums.nonzero[grid] += nonzero
            overlaps += [*grams.a.overlaps(present), *grams.b.overlaps(present)]
    return ModuleMeasures(path, powers, sums, overlaps)


class _Gram:
    """The Gram matrix F Fᵀ of one factor of several deltas, joined; float64, and only its upper triangle of blocks.

    Args:
        name: `a` or `b`.
        factors: of every delta, (r, n): A or Bᵀ.
        scratch: has memory for the factors.
    """

    def __init__(self, name: str, factors: Sequence[Tensor], scratch: Scratch) -> None:
        ends = [0, *accumulate(len(f) for f in factors)]
        joined = scratch.take("factors", torch.float64, ends[-1], factors[0].shape[1])
        for factor, rows in zip(factors, torch.split(joined, [len(f) for f in factors]), strict=True):
            rows.copy_(factor)
        self._name, self._dim = name, joined.shape[1]
        self._ends, self.count = ends, len(factors)
        starts = [0]  # of products, in rows
        for end in ends[:-1]:
            if end - starts[-1] >= _PRODUCT_ROWS:
                starts.append(end)
        self._starts = starts
        products = zip(starts, [*starts[1:], ends[-1]], strict=True)
        self._products = [joined[start:stop] @ joined[start:].mT for start, stop in products]

    def block(self, i: int, j: int) -> Tensor:
        """Return Fᵢ Fⱼᵀ, (rᵢ, rⱼ), for i ≤ j."""
        at = bisect_right(self._starts, self._ends[i]) - 1
        (top, bottom), (left, right) = (
            (self._ends[k] - self._starts[at], self._ends[k + 1] - self._starts[at]) for k in (i, j)
        )
        return self._products[at][top:bottom, left:right]

    @cached_property
    def eigen(self) -> list[tuple[Tensor, Tensor]]:
        """Eigenvalues, ascending, and eigenvectors of every Fᵢ Fᵢᵀ."""
        return [torch.linalg.eigh(self.block(i, i)) for i in range(self.count)]

    def overlaps(self, adapters: Sequence[int]) -> Iterator[RowSpaceOverlap]:
        """Yield the overlaps of all pairs; `adapters` are the numbers of the factors.

        The squared cosines of two spaces are the eigenvalues of P Pᵀ, where P holds the products of their bases.
        """
        whiteners = [_whitener(*pair) for pair in self.eigen]
        found = [i for i, whitener in enumerate(whiteners) if whitener.shape[1]]
        for place, i in enumerate(found[:-1]):
            one, others = whiteners[i], found[place + 1 :]
            products = [one.mT @ self.block(i, j) @ whiteners[j] for j in others]
            squares = torch.linalg.eigvalsh(torch.stack([p @ p.mT for p in products]))
            for j, values in zip(others, squares.clamp(0, 1).sqrt().tolist(), strict=True):
                few, many = sorted((one.shape[1], whiteners[j].shape[1]))
                median = statistics.median(values[-few:])  # the others are those of directions that j has not
                yield RowSpaceOverlap(self._name, (adapters[i], adapters[j]), median, math.sqrt(many / self._dim))


class _Grams:
    """The Gram matrices of several deltas of one shape: A Aᵀ and Bᵀ B of all factors joined."""

    def __init__(self, parts: Sequence[LowRank], scratch: Scratch) -> None:
        self.a = _Gram("a", [p.a for p in parts], scratch)
        self.b = _Gram("b", [p.b.mT for p in parts], scratch)

    def inner(self) -> Tensor:
        """Return ⟨ΔW_i, ΔW_j⟩, (T, T)."""
        count = self.a.count
        inner = torch.zeros(count, count, dtype=torch.float64)
        for i in range(count):
            for j in range(i, count):
                inner[i, j] = inner[j, i] = torch.sum(self.a.block(i, j) * self.b.block(i, j))
        return inner

    def powers(self) -> Iterator[Tensor]:
        """Yield every delta's σ², descending, (r,), float64: the eigenvalues of Rᵀ (Bᵀ B) R, where A Aᵀ = R Rᵀ."""
        for i, (values, vectors) in enumerate(self.a.eigen):
            root = vectors * values.clamp_min(0).sqrt()
            yield torch.linalg.eigvalsh(root.mT @ self.b.block(i, i) @ root).clamp_min(0).flip(0)


def _whitener(values: Tensor, vectors: Tensor) -> Tensor:
    """Return W (r, k) with Wᵀ G W = I on the k directions of a Gram matrix G (r, r) that are not round-off.

    Args:
        values: eigenvalues of G, ascending, (r,).
        vectors: its eigenvectors, (r, r).
    """
    kept = values > _NULL**2 * values[-1].clamp_min(torch.finfo(values.dtype).tiny)
    whitener: Tensor = vectors[:, kept] / values[kept].sqrt()
    return whitener


def _entry_sums(parts: Sequence[LowRank], scratch: Scratch) -> tuple[Tensor, Tensor, Tensor]:
    """Return ⟨sign x, sign y⟩, ⟨|x|, |y|⟩ and the number of entries non-zero in both, each (T, T), float64.

    The entries pass by in tiles. Signs are counted as bits: a pair of deltas costs one exclusive or per 64 entries. A NaN
    counts as zero.
    """
    count, (m, n) = len(parts), parts[0].shape
    opposed, nonzero = (np.zeros((count, count), dtype=np.int64) for _ in range(2))
    magnitude = torch.zeros(count, count, dtype=torch.float64)
    for rows, columns in _tiles(m, n, count):
        size = (rows.stop - rows.start) * (columns.stop - columns.start)
        x = scratch.take("tiles", parts[0].a.dtype, count, size + _APART)[:, :size]
        flags, values = scratch.take("flags", torch.bool, count, size).numpy(), x.numpy()
        smallest = np.empty(count)
        for t, part in enumerate(parts):  # one after another, while its entries are in the processor's cache
            torch.mm(part.b[rows], part.a[:, columns], out=x[t].view(rows.stop - rows.start, -1))
            np.less(values[t], 0, out=flags[t])
            np.abs(values[t], out=values[t])
            smallest[t] = values[t].min()  # NaN where an entry is
        negative = packed(flags)
        for piece in torch.split(x, _SUMMED, dim=1):
            magnitude += piece @ piece.mT
        if smallest.min() > 0:
            nonzero += size
            opposed += different(negative)
        else:
            present = packed(np.greater(values, 0, out=flags))
            nonzero += shared(present)
            opposed += different(negative, present)
    return torch.from_numpy(nonzero - 2 * opposed).double(), magnitude, torch.from_numpy(nonzero).double()


def _tiles(m: int, n: int, count: int) -> Iterator[tuple[slice, slice]]:
    """Yield the rows and columns of tiles that cover an m × n matrix, of which `count` are in memory at a time.

    The product of two factors is fast where a tile has many rows, for it prepares the columns of A anew in every tile.
    """
    entries = max(1, min(TILE_ELEMENTS, TILES_ELEMENTS // count))
    width = min(n, max(1, entries // _TILE_ROWS))
    height = min(m, max(1, entries // width))
    for top in range(0, m, height):
        for left in range(0, n, width):
            yield slice(top, min(m, top + height)), slice(left, min(n, left + width))


class Spectra:
    """Measures of the singular values of one adapter's matrices."""

    def __init__(self) -> None:
        self.energies: dict[str, float] = {}  # path → ‖ΔW‖²
        self.stable_ranks: list[float] = []
        self.ranks_for_99: list[int] = []

    def add(self, path: str, powers: Sequence[Tensor]) -> None:
        """Take in the squared singular values of a module's matrices."""
        self.energies[path] = sum(float(power.sum()) for power in powers)
        for power in powers:
            if float(power[0]) > 0:
                self.stable_ranks.append(float(power.sum() / power[0]))
                self.ranks_for_99.append(rank_for_energy(power.sqrt(), 0.99))


class PairwiseMeasures:
    """What adapters have in common, layer by layer."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.layers: dict[str, EntrySums] = {}
        self.overlaps: dict[tuple[str, str, tuple[int, int]], list[float]] = defaultdict(list)  # layer, factor, pair
        self.chances: dict[str, list[float]] = defaultdict(list)

    def add(self, measured: ModuleMeasures) -> None:
        """Add the measures of one module."""
        if measured.sums is None:
            return
        name = layer_name(measured.path)
        layer = self.layers.setdefault(name, EntrySums(self.count))
        layer += measured.sums
        of_module: dict[tuple[str, tuple[int, int]], list[float]] = defaultdict(list)
        for found in measured.overlaps:
            of_module[found.factor, found.pair].append(found.median)
            self.chances[found.factor].append(found.chance)
        for (factor, pair), medians in of_module.items():
            self.overlaps[name, factor, pair].append(statistics.median(medians))

    def overlap(self, factor: str, layer: str | None = None) -> SymmetricMatrix:
        """Return the (T, T) median overlaps of one factor, over all modules or those of one layer."""
        values = torch.full((self.count, self.count), math.nan, dtype=torch.float64).fill_diagonal_(1)
        found: dict[tuple[int, int], list[float]] = defaultdict(list)
        for (where, of, pair), medians in self.overlaps.items():
            if of == factor and layer in (None, where):
                found[pair] += medians
        for (i, j), medians in found.items():
            values[i, j] = values[j, i] = statistics.median(medians)
        return as_matrix(values)

    def chance(self, factor: str) -> float | None:
        """Return the median chance level of one factor's overlaps."""
        return statistics.median(self.chances[factor]) if self.chances[factor] else None


def as_matrix(values: Tensor) -> SymmetricMatrix:
    """Return a symmetric matrix, to the last bit, with None where a value is not defined (0 / 0)."""
    rows = (values.triu() + values.triu(1).mT).tolist()
    return tuple(tuple(None if math.isnan(value) else float(value) for value in row) for row in rows)


def layer_name(path: str) -> str:
    """Return the layer of a module, or the module itself outside of layers."""
    return str(layer_key(path) or path)
