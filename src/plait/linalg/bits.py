"""Truth values as bits, and how many of them pairs of rows have in common."""

from __future__ import annotations

from typing import TYPE_CHECKING

from plait.deferred import np

if TYPE_CHECKING:
    import numpy.typing as npt

    Words = npt.NDArray[np.uint64]


def packed(flags: npt.NDArray[np.bool_]) -> Words:
    """Return the bits of every row, 64 to a word, (T, n) → (T, ⌈n / 64⌉); zeros fill the last word."""
    row_bytes = np.packbits(flags, axis=1)
    short = -row_bytes.shape[1] % 8
    return (np.pad(row_bytes, ((0, 0), (0, short))) if short else row_bytes).view(np.uint64)


def shared(words: Words) -> npt.NDArray[np.int64]:
    """Return how many bits rows i and j both have, (T, T); the diagonal has what each row has."""
    counts = np.zeros((len(words), len(words)), dtype=np.int64)
    for i, row in enumerate(words):
        counts[i, i:] = counts[i:, i] = _ones(words[i:] & row)
    return counts


def different(words: Words, where: Words | None = None) -> npt.NDArray[np.int64]:
    """Return how many bits differ between rows i and j, (T, T).

    Args:
        words: (T, n).
        where: bits of `where` that both rows must have for a difference to count, (T, n); all count when None.
    """
    counts = np.zeros((len(words), len(words)), dtype=np.int64)
    for i, row in enumerate(words[:-1]):
        differs = words[i + 1 :] ^ row
        if where is not None:
            differs &= where[i + 1 :] & where[i]
        counts[i, i + 1 :] = counts[i + 1 :, i] = _ones(differs)
    return counts


def _ones(words: Words) -> npt.NDArray[np.int64]:
    """Return the number of ones of every row."""
    counts: npt.NDArray[np.int64] = np.bitwise_count(words).sum(axis=1, dtype=np.int64)
    return counts
