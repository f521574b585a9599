"""Exact order statistics of magnitudes over arrays that are never in memory at once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

_DIGIT = 16  # bits examined per pass


class MagnitudeSelect:
    """The k-th largest |x|, for several k and several rows at once, by radix selection on IEEE bit patterns.

    Non-negative floats sort like the integers their bits spell, so one histogram of 16 bits per pass narrows the answer down:
    2 passes for float32, 4 for float64, 64 k counters per statistic, exact, and independent of the order of the blocks.

    Args:
        rows: number of rows (adapters); every row has its own statistics.
        wanted: maps the number of entries of a row to the ranks wanted, 1 for the largest. Rank 0 yields infinity (nothing is
            at least that large); ranks beyond the number of entries are clamped to it.
    """

    def __init__(self, rows: int, wanted: Callable[[int], Sequence[int]]) -> None:
        self._rows = rows
        self._wanted = wanted
        self._entries = 0
        self._dtype: torch.dtype | None = None
        self._shift = 0
        self._ranks: list[list[int]] = []  # what is left of each rank, per row
        self._prefixes: list[list[int]] = []  # the bits found so far
        self._counts: list[list[Tensor]] = []
        self._values: Tensor | None = None
        self._lock = threading.Lock()

    def observe(self, x: Tensor) -> None:
        """Count one block of a pass: x (rows, …), float32 or float64, the same blocks in every pass. Threads may share it."""
        with self._lock:
            if self._dtype is None:
                self._dtype = x.dtype
                self._shift = torch.finfo(x.dtype).bits - _DIGIT
                self._counts = [[_zeros()] for _ in range(self._rows)]
            if not self._prefixes:
                self._entries += x[0].numel()
        integers = torch.int32 if x.dtype == torch.float32 else torch.int64
        for row in range(self._rows):
            bits = x[row].abs().view(integers).flatten()
            found = self._histograms(bits, self._prefixes[row] if self._prefixes else None)
            with self._lock:
                for counts, more in zip(self._counts[row], found, strict=True):
                    if more is not None:
                        counts += more

    def _histograms(self, bits: Tensor, prefixes: list[int] | None) -> list[Tensor | None]:
        """Count this pass's digit, among the entries that begin as each statistic does."""
        if prefixes is None:
            return [torch.bincount(bits >> self._shift, minlength=1 << _DIGIT)]
        lead = bits >> (self._shift + _DIGIT)
        digit = (bits >> self._shift).bitwise_and_((1 << _DIGIT) - 1)
        return [torch.bincount(digit[lead == p], minlength=1 << _DIGIT) if p >= 0 else None for p in prefixes]

    def end_pass(self) -> bool:
        """Close a pass; True when `values` are ready."""
        if not self._prefixes:
            ranks = [min(rank, self._entries) for rank in self._wanted(self._entries)]
            self._ranks = [list(ranks) for _ in range(self._rows)]
            self._prefixes = [[0 if rank > 0 else -1 for rank in ranks] for _ in range(self._rows)]
            self._counts = [counts * len(ranks) for counts in self._counts]
        for row in range(self._rows):
            for i, prefix in enumerate(self._prefixes[row]):
                if prefix >= 0:
                    digit, self._ranks[row][i] = _descend(self._counts[row][i], self._ranks[row][i])
                    self._prefixes[row][i] = (prefix << _DIGIT) | digit
        if self._shift == 0:
            self._values = self._decode()
            return True
        self._shift -= _DIGIT
        self._counts = [[_zeros() for _ in row] for row in self._prefixes]
        return False

    @property
    def values(self) -> Tensor:
        """The thresholds, (rows, number of ranks), in the dtype of the blocks."""
        if self._values is None:
            raise AssertionError("values are read before the last pass has ended")
        return self._values

    def _decode(self) -> Tensor:
        dtype = self._dtype or torch.float32
        integers = torch.int32 if dtype == torch.float32 else torch.int64
        found = torch.tensor([[max(p, 0) for p in row] for row in self._prefixes], dtype=integers).view(dtype)
        missing = torch.tensor([[p < 0 for p in row] for row in self._prefixes])
        return found.masked_fill(missing, math.inf)


def _zeros() -> Tensor:
    return torch.zeros(1 << _DIGIT, dtype=torch.int64)


def _descend(counts: Tensor, rank: int) -> tuple[int, int]:
    """Return the digit in which the rank-th largest lies, and its rank among the entries with that digit."""
    from_top = counts.flip(0).cumsum(0)
    position = int(torch.searchsorted(from_top, rank))
    above = int(from_top[position - 1]) if position else 0
    return len(counts) - 1 - position, rank - above
