"""Exact order statistics of magnitudes over arrays that are never in memory at once."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from plait.deferred import Tensor, np, torch

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bits = NDArray[np.unsignedinteger[Any]]

_DIGIT = 16  # bits that a pass settles
_STRIDE = 16  # one row in so many is the sample
_PIECE = 1 << 16  # entries looked at together: with what is made of them they stay in the cache
_SPREAD = 200  # rows of a delta of low rank differ by a third or so: the error of a sample, in leading digits, times √rows
_REACH = (3, 16)  # leading digits that are counted on either side of a sample's answer; each is less than 1 % of a float32


class MagnitudeSelect:
    """The k-th largest |x|, for several k and several rows at once, by radix selection on IEEE bit patterns.

    Non-negative floats sort like the integers their bits spell. The first pass is a sample, whose leading 16 bits show about
    where an answer is. The second counts the patterns around there one by one (float64: the next 16 of their bits), and how
    many entries are above. That settles float32; float64 takes two passes more, and so does a statistic of which the sample
    was wrong. Where few entries are around there, or in all, their patterns are kept instead, and the second pass settles
    either. The answer is exact, the memory bounded, and the order of the blocks without influence.

    Args:
        rows: number of rows (adapters); every row has its own statistics.
        wanted: maps the number of entries of a row to the ranks wanted, 1 for the largest. Rank 0 yields infinity (nothing is
            at least that large); ranks beyond the number of entries are clamped to it.
    """

    def __init__(self, rows: int, wanted: Callable[[int], Sequence[int]]) -> None:
        self._wanted = wanted
        self._sampling = True
        self._entries = self._lines = 0  # of a row, in this pass
        self._dtype: type[np.unsignedinteger[Any]] = np.uint32
        self._windows: list[list[_Window | None]] = [[] for _ in range(rows)]  # per statistic; None once it is known
        self._found: list[list[float]] = [[] for _ in range(rows)]
        self._lock = threading.Lock()

    @property
    def stride(self) -> int:
        """What this pass needs to see: one row in so many."""
        return _STRIDE if self._sampling else 1

    def observe(self, x: Tensor) -> None:
        """Count one block of a pass: x (rows, …), float32 or float64, the same blocks in every pass. Threads may share it."""
        with self._lock:
            self._entries += x[0].numel()
            self._lines += x.shape[1]
            if not self._windows[0]:
                self._dtype = np.uint32 if x.dtype == torch.float32 else np.uint64
                self._windows = [[_Window.of_all(self._dtype)] for _ in self._windows]
        magnitude = np.array(np.iinfo(self._dtype).max >> 1, dtype=self._dtype)  # all bits but the sign's
        room = tuple(np.empty(_PIECE, dtype) for dtype in (self._dtype, np.bool_, np.bool_))
        for row, windows in zip(x, self._windows, strict=True):
            open_windows = [window for window in windows if window is not None]
            patterns = row.flatten().numpy().view(self._dtype)
            for start in range(0, len(patterns) if open_windows else 0, _PIECE):
                piece = patterns[start : start + _PIECE]
                bits, *rest = (place[: len(piece)] for place in room)
                np.bitwise_and(piece, magnitude, out=bits)
                for window in open_windows:
                    window.count(bits, *rest)

    def end_pass(self) -> bool:
        """Close a pass; True when `values` are ready."""
        ranks = [min(rank, self._entries) for rank in self._wanted(self._entries)]
        if self._sampling:
            self._found = [[math.inf] * len(ranks) for _ in self._windows]
            least, most = _REACH
            reach = min(most, max(least, math.ceil(_SPREAD / math.sqrt(max(1, self._lines)))))
            self._windows = [
                [w.around(rank, reach) for rank in ranks for w in windows if w is not None] for windows in self._windows
            ]
        else:
            for windows, found in zip(self._windows, self._found, strict=True):
                for i, (window, rank) in enumerate(zip(windows, ranks, strict=True)):
                    if window is not None:
                        windows[i], found[i] = window.settle(rank)
        self._sampling, self._entries, self._lines = False, 0, 0
        return all(window is None for windows in self._windows for window in windows)

    @property
    def values(self) -> Tensor:
        """The thresholds, (rows, number of ranks), in the dtype of the blocks."""
        if self._sampling or any(window is not None for windows in self._windows for window in windows):
            raise AssertionError("values are read before the last pass has ended")
        return torch.tensor(self._found, dtype=torch.float32 if self._dtype == np.uint32 else torch.float64)


class _Window:
    """Counts the bit patterns [low, low + units · 2^shift), in steps of 2^shift, and what is above.

    Args:
        dtype: of the patterns.
        low: the first pattern.
        units: how many steps.
        shift: bits that are not distinguished.
    """

    def __init__(self, dtype: type[np.unsignedinteger[Any]], low: int, units: int, shift: int) -> None:
        self._dtype, self._low, self._units, self._shift = dtype, low, units, shift
        self._counts: NDArray[np.int64] | None = None
        self._kept: list[Bits] = []  # what is inside and not yet counted: adding up all the counters costs, too
        self._held = 0  # entries of these
        self._above = 0
        self._lock = threading.Lock()

    @staticmethod
    def of_all(dtype: type[np.unsignedinteger[Any]]) -> _Window:
        """Return the window in which every magnitude is, by leading digits."""
        return _Window(dtype, 0, 1 << (_DIGIT - 1), 8 * np.dtype(dtype).itemsize - _DIGIT)  # the sign bit is 0

    def count(self, bits: Bits, above: NDArray[np.bool_], inside: NDArray[np.bool_]) -> None:
        """Count an array; the others are room of its length."""
        np.greater_equal(bits, self._dtype(self._low + (self._units << self._shift)), out=above)
        np.greater_equal(bits, self._dtype(self._low), out=inside)
        np.not_equal(inside, above, out=inside)
        found = np.compress(inside, bits)  # several times faster than bits[inside]
        found -= self._dtype(self._low)
        more = int(np.count_nonzero(above))
        with self._lock:
            self._above += more
            self._kept.append(found)
            self._held += len(found)
            if self._held >= self._units:
                self._add_up()

    def around(self, rank: int, reach: int) -> _Window:
        """Return a finer window around where the rank-th largest entry of a sample is, give or take leading digits."""
        found = self._find(max(1, rank))
        few = self._counts is None and self._held * _STRIDE < self._units  # so that all can be kept in the next pass
        if found is None or few:
            return _Window.of_all(self._dtype)
        low = max(0, (found[0] >> self._shift) - reach) << self._shift
        return _Window(self._dtype, low, (2 * reach + 1) << _DIGIT, self._shift - _DIGIT)

    def settle(self, rank: int) -> tuple[_Window | None, float]:
        """Return the window of the next pass and infinity, or None and the rank-th largest magnitude."""
        if rank < 1:
            return None, math.inf
        found = self._find(rank)
        if found is None:
            return _Window.of_all(self._dtype), math.inf
        offset, unknown = found
        if unknown:
            return _Window(self._dtype, self._low + offset, 1 << _DIGIT, unknown - _DIGIT), math.inf
        bits = np.array(self._low + offset, dtype=self._dtype)
        return None, float(bits.view(f"f{bits.itemsize}"))

    def _find(self, rank: int) -> tuple[int, int] | None:
        """Return where above `low` the rank-th largest entry is, and how many of the last bits of that are not known yet.

        None when it is not in this window.
        """
        left = rank - self._above
        if self._counts is None:
            kept = np.concatenate(self._kept) if self._kept else np.empty(0, self._dtype)
            if not 1 <= left <= len(kept):
                return None
            return int(np.partition(kept, len(kept) - left)[len(kept) - left]), 0
        self._add_up()
        from_top = self._counts[::-1].cumsum()
        if not 1 <= left <= from_top[-1]:
            return None
        return (self._units - 1 - int(np.searchsorted(from_top, left))) << self._shift, self._shift

    def _add_up(self) -> None:
        if self._counts is None:
            self._counts = np.zeros(self._units, dtype=np.int64)
        if self._kept:
            steps = (np.concatenate(self._kept) >> self._dtype(self._shift)).astype(np.intp)
            self._counts += np.bincount(steps, minlength=self._units)
            self._kept, self._held = [], 0
