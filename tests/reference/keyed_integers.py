"""SplitMix64 (Steele, Lea & Flood 2014, §5) in Python's own integers, and the masks that plait draws from it.

What a recipe's seed means is part of the promise "same recipe, same bytes": these few lines are the specification.
"""

from __future__ import annotations

import hashlib

import numpy as np

MASK = (1 << 64) - 1


def splitmix64(state: int, draws: int) -> list[int]:
    """Return the first outputs of the generator from a 64-bit state."""
    found = []
    for _ in range(draws):
        state = (state + 0x9E3779B97F4A7C15) & MASK
        z = state
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
        found.append(z ^ (z >> 31))
    return found


def key_state(seed: int, *words: str) -> int:
    """Return the state that (seed, words) name: 63 bits of a BLAKE2b digest of the words, joined by unit separators."""
    text = "\x1f".join([str(seed), *words]).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def uniforms(seed: int, words: tuple[str, ...], rows: int, columns: int) -> np.ndarray:
    """Return (rows, columns) numbers in [0, 1): the upper 24 bits of output number row · columns + column."""
    draws = splitmix64(key_state(seed, *words), rows * columns)
    return np.array([(z >> 40) * 2.0**-24 for z in draws]).reshape(rows, columns)


def mask(
    seed: int, adapter: str, module: str, shape: tuple[int, ...], density: np.ndarray | float, array: str = "delta"
) -> np.ndarray:
    """Return which entries an adapter keeps in a module of one matrix."""
    return uniforms(seed, (adapter, module, "0", array), *shape) < density
