"""Merged deltas as rows of the tensors that they are added to, a block at a time."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from plait.adapters.lowrank import LowRank
from plait.baking.changes import RowRange
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.blocks import HOLD_ELEMENTS, RowBlocks
from plait.merging.combine import Combiner
from plait.merging.inventory import Inventory
from plait.spaces.base import MergedMatrix

_NEGLIGIBLE = 1e-5  # share of a delta that is rounding

RowReader = Callable[[int, int], Tensor]  # the rows [start, stop) of the base's tensor, float32 or float64


@dataclass(frozen=True)
class DoraPart:
    """One adapter's DoRA in one target module.

    Attributes:
        delta: with its scaling folded in.
        magnitude: (d_out,); None for an adapter with plain LoRA there.
        coefficient: in the merge.
    """

    delta: LowRank
    magnitude: Tensor | None
    coefficient: float


class ModuleMerge:
    """What a merge does to one target module.

    Args:
        combiner: merges.
        inventory: the adapters.
        target: the module.
    """

    def __init__(self, combiner: Combiner, inventory: Inventory, target: str) -> None:
        self._combiner, self._inventory, self._target = combiner, inventory, target
        self._owners = [a for a in inventory.adapters if target in a.targets]
        self.is_dora = any(a.targets[target].is_dora for a in self._owners)
        self.matrices: Sequence[MergedMatrix] = () if self.is_dora else combiner.merge(target)

    def bias(self) -> Tensor:
        """Return the merged `lora_bias`, (d_out,) float64: the weighted sum, whatever the method."""
        total = torch.zeros((), dtype=torch.float64)
        for adapter, c in zip(self._inventory.adapters, self._combiner.coefficients(self._target).tolist(), strict=True):
            if adapter in self._owners and adapter.targets[self._target].has_bias:
                s = adapter.targets[self._target].scaling
                total = total + c * s * adapter.read_part(self._target, "lora_B.bias", torch.float64)
        return total

    def dora(self) -> list[DoraPart]:
        """Return every adapter's part of a module where some have DoRA."""
        (factors,) = self._combiner.prepared.read(self._target)
        coefficients = self._combiner.coefficients(self._target).tolist()
        parts = []
        for adapter, delta, c in zip(self._inventory.adapters, factors.scaled(), coefficients, strict=True):
            magnitude = None
            if adapter in self._owners and adapter.targets[self._target].is_dora:
                magnitude = adapter.read_part(self._target, "lora_magnitude_vector", delta.a.dtype)
            parts.append(DoraPart(delta, magnitude, c))
        return parts


def merge_dora_weight(
    parts: Sequence[DoraPart], span: RowRange, blocks: Iterator[tuple[int, Tensor]]
) -> tuple[LowRank, Tensor]:
    """Return L and g of the merged weight g ⊙ W + L, with g (d_out,) a factor per row of ΔW.

    One DoRA is m/n ⊙ (W + sBA), n the row norms of W + sBA; so Σ c (m/n ⊙ (W + sBA) − W) + W has
    g = 1 + Σ c (m/n − 1) and L = Σ c m/n ⊙ sBA. Source: Liu et al. 2024 (arXiv:2402.09353), eq. 5.

    Args:
        parts: per adapter.
        span: the rows of the module.
        blocks: (first row, rows) of the base's tensor.
    """
    squares = [torch.zeros(row_count(parts[0]), dtype=torch.float64) for _ in parts]
    for start, block in blocks:
        for part, square in zip(parts, squares, strict=True):
            if part.magnitude is None:
                continue
            moved = block + low_rank_rows(part.delta, start, start + len(block), transposed=span.transposed)
            if span.transposed:
                square += moved.double().square().sum(0)
            else:
                square[start : start + len(block)] = moved.double().square().sum(1)
    gain = torch.ones(row_count(parts[0]), dtype=torch.float64)
    deltas = []
    for part, square in zip(parts, squares, strict=True):
        if part.magnitude is None:
            deltas.append(part.delta)
            continue
        scale = part.magnitude.double() / square.sqrt()
        gain += part.coefficient * (scale - 1)
        deltas.append(LowRank(part.delta.a, part.delta.b * scale.to(part.delta.b.dtype).unsqueeze(1)))
    return LowRank.concatenate(deltas, [p.coefficient for p in parts]), gain.to(parts[0].delta.b.dtype)


def row_count(part: DoraPart) -> int:
    """Return d_out."""
    return part.delta.shape[0]


def low_rank_rows(delta: LowRank, start: int, stop: int, *, transposed: bool) -> Tensor:
    """Return rows of ΔW, or of ΔWᵀ."""
    return delta.a[:, start:stop].mT @ delta.b.mT if transposed else delta.b[start:stop] @ delta.a


def add_rows(delta: LowRank, block: Tensor, start: int, *, transposed: bool) -> None:
    """Add rows of ΔW, or of ΔWᵀ, to a block, in the block's dtype."""
    stop = start + len(block)
    left, right = (delta.a[:, start:stop].mT, delta.b.mT) if transposed else (delta.b[start:stop], delta.a)
    block.addmm_(left.to(block.dtype), right.to(block.dtype))


def own_columns(matrix: MergedMatrix, start: int, stop: int, *, where: str) -> MergedMatrix:
    """Return the columns [start, stop) of a merged delta, all others of which are zero.

    They are zero in every adapter, and stay so in whatever combines deltas; a factorization leaves its rounding there.

    Args:
        matrix: ΔW.
        start: first column.
        stop: one past the last.
        where: tensor and target, for the error.

    Raises:
        PlanError: they are not.
    """

    def cut(rows: Tensor, sizes: Tensor) -> Tensor:
        own = rows[:, start:stop]
        outside = (rows.double().square().sum(1) - own.double().square().sum(1)).clamp_min(0)
        if bool((outside.sqrt() * sizes > _NEGLIGIBLE * (rows.double().norm(dim=1) * sizes).sum()).any()):
            raise PlanError(
                f"{where}: this method makes a group of the convolution read channels of others, which no grouped weight can "
                "hold. Take another method, or merge into an adapter."
            )
        return own

    if isinstance(matrix, LowRank):
        return LowRank(cut(matrix.a, matrix.b.double().norm(dim=0)), matrix.b)
    parts = [cut(block, torch.ones(len(block), dtype=torch.float64)) for _, block in matrix]
    own = torch.cat(parts)  # a group's part of a kernel is small
    return RowBlocks((matrix.shape[0], stop - start), lambda first, last: own[first:last], matrix.dtype)


def dense_rows(matrix: RowBlocks, scratch: Path, stack: ExitStack, *, transposed: bool) -> RowReader:
    """Return a dense delta as a function of rows, to be asked in ascending order.

    The transpose of a matrix that comes by rows needs all of them: a small one is held, a large one goes through a file.

    Args:
        matrix: ΔW.
        scratch: folder for that file, which has no name.
        stack: closes it.
        transposed: rows of ΔWᵀ are wanted.
    """
    if not transposed:
        return _AscendingRows(matrix)
    if matrix.shape[0] * matrix.shape[1] <= HOLD_ELEMENTS:
        turned = matrix.dense().mT
        return lambda start, stop: turned[start:stop]
    return _Spilled(matrix, stack.enter_context(tempfile.TemporaryFile(dir=scratch)))


class _AscendingRows:
    """Rows of a matrix that comes by blocks, asked for in ascending order; a step back begins a new pass."""

    def __init__(self, matrix: RowBlocks) -> None:
        self._matrix = matrix
        self._blocks = iter(matrix)
        self._start, self._held = 0, torch.empty(0, matrix.shape[1], dtype=matrix.dtype)

    def __call__(self, start: int, stop: int) -> Tensor:
        if start < self._start:
            self._blocks, self._start = iter(self._matrix), 0
            self._held = self._held[:0]
        parts = []
        while start < stop:
            while self._start + len(self._held) <= start:
                self._start, self._held = next(self._blocks)
            end = min(stop, self._start + len(self._held))
            parts.append(self._held[start - self._start : end - self._start])
            start = end
        return parts[0] if len(parts) == 1 else torch.cat(parts)


class _Spilled:
    """Columns of a matrix that was written to a file by rows."""

    def __init__(self, matrix: RowBlocks, file: IO[bytes]) -> None:
        self._shape, self._dtype, self._file = matrix.shape, matrix.dtype, file
        for _, block in matrix:
            self._file.write(block.contiguous().reshape(-1).view(torch.uint8).numpy().data)
        self._file.flush()

    def __call__(self, start: int, stop: int) -> Tensor:
        rows, columns = self._shape
        size = self._dtype.itemsize
        part = torch.empty(rows, stop - start, dtype=self._dtype)
        for row, target in enumerate(part.view(torch.uint8).numpy()):
            self._file.seek((row * columns + start) * size)
            target.data[:] = self._file.read(len(target))
        return part.mT
