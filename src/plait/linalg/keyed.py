"""Randomness that is a function of a key and a position, and of nothing else.

A random number here depends on (seed, names, row, column): not on the order of work, the size of a block, the number of
workers, the device, or what was drawn before. The generator is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable
pseudorandom number generators", §5) read at a counter, in wrapping 64-bit integer arithmetic.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass

from plait.deferred import Tensor, np, torch

_GAMMA = 0x9E3779B97F4A7C15
_MIX_1 = 0xBF58476D1CE4E5B9
_MIX_2 = 0x94D049BB133111EB


@dataclass(frozen=True)
class Key:
    """Names one random stream: (seed, words...)."""

    seed: int
    words: tuple[str, ...] = ()

    def child(self, *words: str) -> Key:
        """Return the key of a stream below this one."""
        return Key(self.seed, (*self.words, *words))

    def state(self) -> int:
        """Return 63 bits that name this stream; equal in every process and on every machine."""
        text = "\x1f".join((str(self.seed), *self.words))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def uniform(key: Key, start: int, rows: int, columns: int) -> Tensor:
    """Return (rows, columns) float32 uniform on [0, 1): rows start, start + 1, … of an endless matrix named by `key`.

    Args:
        key: names the matrix.
        start: first row; the numbers of a row do not depend on where a block begins.
        rows: how many rows.
        columns: width of the matrix.
    """
    z = np.arange(1, rows * columns + 1, dtype=np.uint64)  # numpy's unsigned integers are faster than torch's signed ones
    z *= np.uint64(_GAMMA)
    z += np.uint64((key.state() + start * columns * _GAMMA) % (1 << 64))
    shifted = np.empty_like(z)
    for bits, factor in ((30, _MIX_1), (27, _MIX_2)):
        z ^= np.right_shift(z, np.uint64(bits), out=shifted)
        z *= np.uint64(factor)
    z >>= np.uint64(40)  # the generator's last step, z ^= z >> 31, does not reach these 24 bits
    return torch.from_numpy(z.view(np.int64)).to(torch.float32).mul_(2.0**-24).view(rows, columns)


def normal(key: Key, rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Return (rows, columns) standard normal numbers by the Box–Muller transform of two keyed uniforms."""
    radius = (1 - uniform(key.child("radius"), 0, rows, columns)).log_().mul_(-2).sqrt_()
    angle = uniform(key.child("angle"), 0, rows, columns).mul_(2 * math.pi)
    return radius.mul_(angle.cos_()).to(dtype)
