"""Merged delta → what is written: truncation to the planned rank, with the energy it keeps."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.blocks import RowBlocks, truncated_svd, truncated_svds
from plait.linalg.factored import ThinSVD, rank_for_energy
from plait.linalg.keyed import Key
from plait.merging.plan import DENSE_RANK_CAP
from plait.spaces.base import MergedMatrix

_WIDER = "write another dtype (bfloat16 or float32)"


@dataclass(frozen=True)
class OutputFactors:
    """The factors of one target module, ready to be written.

    Attributes:
        slices: one `LowRank` per matrix, all of one rank.
        energy: ‖ΔW‖²_F before truncation; None where nothing was truncated and so nothing was measured.
        kept: the part of it that the factors hold.
    """

    slices: tuple[LowRank, ...]
    energy: float | None = None
    kept: float | None = None

    @property
    def rank(self) -> int:
        """Rank of the factors."""
        return self.slices[0].rank

    def scaled(self, factor: float) -> OutputFactors:
        """Return the factors of the delta times a number."""
        if factor == 1:
            return self
        energy, kept = (None if x is None else x * factor**2 for x in (self.energy, self.kept))
        return OutputFactors(tuple(s.scaled(factor) for s in self.slices), energy, kept)


def truncate_module(merged: Sequence[MergedMatrix], rank: int, key: Key) -> OutputFactors:
    """Bring every matrix of a module to at most `rank`.

    Low-rank deltas that fit are passed on untouched; others are truncated by their exact SVD, dense ones by a randomized SVD
    over row blocks.
    """
    return truncate_modules([merged], rank, [key])[0]


def truncate_modules(modules: Sequence[Sequence[MergedMatrix]], rank: int, keys: Sequence[Key]) -> list[OutputFactors]:
    """Do what `truncate_module` does with every module, bit for bit; dense ones of one shape at the same time."""
    pairs = [(m, key.child(str(i))) for merged, key in zip(modules, keys, strict=True) for i, m in enumerate(merged)]
    dense = [(m, key) for m, key in pairs if isinstance(m, RowBlocks)]
    svds = iter(truncated_svds([m for m, _ in dense], rank, [key for _, key in dense]))
    fitted = iter([_fit(m, rank) if isinstance(m, LowRank) else _cut(m, next(svds)) for m, _ in pairs])
    return [_output([next(fitted) for _ in merged]) for merged in modules]


def _output(parts: Sequence[tuple[LowRank, float | None, float | None]]) -> OutputFactors:
    widest = max(p.rank for p, _, _ in parts)
    slices = tuple(p.padded(widest) for p, _, _ in parts)
    if all(energy is None for _, energy, _ in parts):
        return OutputFactors(slices)
    return OutputFactors(slices, math.fsum(e or 0.0 for _, e, _ in parts), math.fsum(k or 0.0 for _, _, k in parts))


def rank_at_energy(merged: Sequence[MergedMatrix], energy: float, key: Key) -> int:
    """Return the smallest rank that keeps a share of the energy in every matrix of a module."""
    return max(_rank_at_energy(m, energy, key.child(str(i))) for i, m in enumerate(merged))


def _fit(merged: LowRank, rank: int) -> tuple[LowRank, float | None, float | None]:
    if merged.rank <= rank:
        return merged, None, None
    best, s = merged.truncated(rank)
    return best, float(s.square().sum()), float(s[:rank].square().sum())


def _cut(merged: RowBlocks, svd: ThinSVD) -> tuple[LowRank, float, float]:
    return LowRank.from_svd(svd), merged.energy(), float(svd.s.square().sum())


def _rank_at_energy(merged: MergedMatrix, energy: float, key: Key) -> int:
    if isinstance(merged, LowRank):
        return rank_for_energy(merged.singular_values(), energy) if merged.rank else 1
    total, width = merged.energy(), DENSE_RANK_CAP
    while True:  # the sketch is widened until it holds the share, at the latest when it is the complete spectrum
        s = truncated_svd(merged, width, key).s
        # what was not computed is put last, as one value, so that the share is of the total energy
        rest = math.sqrt(max(0.0, total - float(s.square().sum())))
        rank = rank_for_energy(torch.cat([s, s.new_tensor([rest])]), energy)
        if rank <= len(s) or len(s) == min(merged.shape):
            return min(rank, len(s))
        width *= 2


def rounded(target: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor of a merge in the output's dtype.

    Raises:
        PlanError: it overflows there, or vanishes.
    """
    cast = tensor.to(dtype)
    name = str(dtype).removeprefix("torch.")
    low, high = (float(x) for x in cast.aminmax()) if cast.numel() else (0.0, 0.0)  # one pass for all that is asked
    if not math.isfinite(low + high):
        raise PlanError(f"{target}: the merged values overflow in {name}; the weights or the scale are too large, or {_WIDER}.")
    if low == high == 0 and bool(tensor.any()):
        raise PlanError(f"{target}: the merged values are too small for {name} and vanish; {_WIDER}.")
    return cast


def as_blocks(merged: MergedMatrix) -> RowBlocks:
    """Return a merged delta as blocks of rows, for a dense output."""
    if isinstance(merged, RowBlocks):
        return merged
    return RowBlocks(merged.shape, lambda start, stop: merged.b[start:stop] @ merged.a, merged.a.dtype)
