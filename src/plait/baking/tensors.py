"""One tensor of the baked model from the base's values: read a block of rows, add, round once, write."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from plait.adapters.lowrank import LowRank
from plait.baking.changes import RowRange
from plait.baking.deltas import ModuleMerge, RowReader, add_rows, dense_rows, merge_dora_weight, own_columns
from plait.baking.shards import OutTensor
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.deferred import Tensor, torch
from plait.errors import PlanError
from plait.linalg.finite import all_finite
from plait.linalg.scratch import Scratch
from plait.tensorfiles.blocks import tensor_block_ranges
from plait.tensorfiles.reader import torch_dtype

Writer = Callable[[int, Tensor], None]  # puts values at a place in a file
Adder = Callable[[Tensor, int], None]  # adds to the rows of a block that starts at a row


@dataclass(frozen=True)
class ShardTensorBuilder:
    """Makes tensors.

    Attributes:
        checkpoint: the base.
        device: where blocks are added up.
        scratch: folder for what is too large for memory.
        memory: of blocks.
    """

    checkpoint: BaseCheckpoint
    device: torch.device
    scratch: Path
    memory: Scratch = field(default_factory=Scratch, repr=False)

    def make(self, tensor: OutTensor, merges: Mapping[str, ModuleMerge], write: Writer) -> None:
        """Write one tensor into a file.

        Args:
            tensor: what to make.
            merges: of its targets.
            write: puts values at a place in the file; their memory is used again when it has returned.

        Raises:
            PlanError: a value is NaN or infinite.
            AdapterError: the base cannot be read.
        """
        dtype = torch_dtype(tensor.dtype)
        source = torch_dtype(self.checkpoint.info(tensor.source).dtype) if tensor.source else None
        wide = torch.float64 in (dtype, source) or not dtype.is_floating_point
        exact = torch.float64 if wide else torch.float32
        with ExitStack() as stack:
            adders = [*self._ranges(tensor, merges, exact, stack), *self._biases(tensor, merges)]
            self._write(tensor, adders, exact, write)

    def _write(self, tensor: OutTensor, adders: Sequence[Adder], exact: torch.dtype, write: Writer) -> None:
        rows, columns = self._matrix(tensor)
        dtype = torch_dtype(tensor.dtype)
        position = tensor.start
        for start, stop in tensor_block_ranges(rows, columns):
            block = self._base(tensor, start * columns, (stop - start) * columns, exact).view(-1, columns)
            for add in adders:
                add(block, start)
            out = self._rounded(block, dtype)
            if not all_finite(out):
                self._check(tensor, block)
            write(position, out)
            position += out.nbytes

    def _rounded(self, block: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a block in the dtype that is written, here."""
        if block.dtype == dtype or self.device.type != "cpu":
            return block.to(dtype).cpu()
        return self.memory.take("rounded", dtype, *block.shape).copy_(block)

    def _matrix(self, tensor: OutTensor) -> tuple[int, int]:
        """Return the rows × columns that a tensor is seen as: a convolution's kernel belongs to its columns."""
        shape = tensor.shape
        if len(shape) < 2:
            return math.prod(shape), 1
        # ranges of a convolution count output channels, all others rows of the last dimension
        height = max((p.row + p.count for p in tensor.change.ranges), default=0)
        if tensor.change.ranges and height == shape[0]:
            return shape[0], math.prod(shape[1:])
        return math.prod(shape[:-1]), shape[-1]

    def _base(self, tensor: OutTensor, first: int, count: int, dtype: torch.dtype) -> Tensor:
        """Return values that deltas are added to, flat, in memory that the next call uses again; with trained token rows.

        Raises:
            AdapterError: the base cannot be read.
        """
        replaced, tokens = tensor.change.replaced, tensor.change.tokens
        if replaced is not None:
            found = replaced.values(first, count, dtype).clone().to(self.device)
        elif tensor.source is None:
            raise AssertionError(f"{tensor.name!r} has no values")
        elif self.device.type == "cpu":
            found = self.memory.take("block", dtype, count)
            self.checkpoint.fill(found, tensor.source, first, self.memory)
        else:
            found = self.checkpoint.values(tensor.source, first, count).to(self.device).to(dtype)  # as narrow as it is stored
        if tokens is not None:
            width = tensor.shape[-1]
            for number, row in enumerate(tokens.indices):
                if first <= (at := row * width) < first + count:
                    found[at - first : at - first + width] = tokens.values(number * width, width, dtype).to(self.device)
        return found

    def _ranges(
        self, tensor: OutTensor, merges: Mapping[str, ModuleMerge], dtype: torch.dtype, stack: ExitStack
    ) -> Iterator[Adder]:
        for span in tensor.change.ranges:
            merge = merges[span.target]
            if merge.is_dora:
                low_rank, gain = merge_dora_weight(merge.dora(), span, self._blocks(tensor, dtype))
                yield _scaled(gain.to(self.device), span)
                yield _low_rank(self._moved(low_rank), span)
                continue
            matrix = merge.matrices[span.matrix]
            if span.columns is not None:
                matrix = own_columns(matrix, *span.columns, where=f"{tensor.name} ({span.target})")
            if isinstance(matrix, LowRank):
                yield _low_rank(self._moved(matrix), span)
            else:
                yield _dense(dense_rows(matrix, self.scratch, stack, transposed=span.transposed), span)

    def _blocks(self, tensor: OutTensor, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        rows, columns = self._matrix(tensor)
        for start, stop in tensor_block_ranges(rows, columns):
            yield start, self._base(tensor, start * columns, (stop - start) * columns, dtype).view(-1, columns).cpu()

    def _moved(self, delta: LowRank) -> LowRank:
        return LowRank(delta.a.to(self.device), delta.b.to(self.device))

    def _biases(self, tensor: OutTensor, merges: Mapping[str, ModuleMerge]) -> Iterator[Adder]:
        for target in tensor.change.biases:
            bias = merges[target].bias().unsqueeze(1)

            def add(block: Tensor, start: int, bias: Tensor = bias) -> None:
                block += bias[start : start + len(block)].to(block)

            yield add

    def _check(self, tensor: OutTensor, block: Tensor) -> None:
        """See where NaN or infinite values come from; a tensor that is only cast may have had them.

        Raises:
            PlanError: from the dtype or the merge.
        """
        where = f" ({', '.join(tensor.change.targets)})" if tensor.change.targets else ""
        if bool(torch.isfinite(block).all()):
            raise PlanError(f"{tensor.name}{where}: values overflow in {tensor.dtype}. Bake with --dtype bfloat16 or float32.")
        if tensor.change.targets:
            raise PlanError(
                f"{tensor.name}{where}: the sum has NaN or infinite values: the base model has them, or the weights or the "
                "scale are too large."
            )


def _overlap(span: RowRange, block: Tensor, start: int) -> tuple[Tensor, int]:
    """Return the rows of a block that a span covers, and the first of them in the span."""
    low, high = max(span.row, start), min(span.row + span.count, start + len(block))
    return block[max(0, low - start) : max(0, high - start)], low - span.row


def _low_rank(delta: LowRank, span: RowRange) -> Adder:
    def add(block: Tensor, start: int) -> None:
        rows, first = _overlap(span, block, start)
        if len(rows):
            add_rows(delta, rows, span.first + first, transposed=span.transposed)

    return add


def _dense(rows_of: RowReader, span: RowRange) -> Adder:
    def add(block: Tensor, start: int) -> None:
        rows, first = _overlap(span, block, start)
        if len(rows):
            rows += rows_of(span.first + first, span.first + first + len(rows)).to(block)

    return add


def _scaled(gain: Tensor, span: RowRange) -> Adder:
    def scale(block: Tensor, start: int) -> None:
        rows, first = _overlap(span, block, start)
        rows *= (gain if span.transposed else gain[first : first + len(rows)].unsqueeze(1)).to(block.dtype)

    return scale
