"""How each kind of layer stores A and B, and how those become plain matrices and back.

Every layout here has a linear delta. A layer is one matrix, except `stacked` ones (fused experts, grouped convolutions),
which are several matrices of one shape: their factors are interleaved on disk and must be taken apart before ranks are
joined, or the experts mix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.adapters.lowrank import LowRank

Kind = Literal["linear", "embedding", "conv", "experts"]


@dataclass(frozen=True)
class Layout:
    """The storage of one target's factors.

    Attributes:
        kind: `linear` (also Conv1D, whose factors are stored alike), `embedding`, `conv`, or `experts`.
        d_out: rows of one matrix.
        d_in: columns of one matrix; for a convolution input channels × kernel size.
        stack: how many matrices: experts, or groups of a convolution.
        kernel: (input channels, *kernel size) of a convolution, else ().
    """

    kind: Kind
    d_out: int
    d_in: int
    stack: int = 1
    kernel: tuple[int, ...] = ()

    @staticmethod
    def of(kind: Kind, a: tuple[int, ...], b: tuple[int, ...], config_rank: int) -> tuple[Layout, int]:
        """Recognize a layout from the shapes of A and B; return it with the rank of one matrix.

        Args:
            kind: what the names and the configuration say it is.
            a: shape of A on disk.
            b: shape of B on disk.
            config_rank: the configured rank, which alone tells experts from ranks.

        Raises:
            ValueError: the shapes contradict each other; the text says how.
        """
        if len(a) != len(b) or len(a) < 2:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; both need the same number of dimensions, at least 2")
        if kind == "experts":
            if a[0] != b[1] or a[0] % config_rank:
                raise ValueError(f"A is {list(a)} and B is {list(b)}; both need experts × rank {config_rank} in common")
            return Layout("experts", b[0], a[1], a[0] // config_rank), config_rank
        if len(a) > 2:
            groups, rest = divmod(a[0], b[1]) if b[1] else (0, 1)
            if rest or groups < 1 or b[0] % groups or math.prod(b[2:]) != 1:
                raise ValueError(f"A is {list(a)} and B is {list(b)}; that is no (grouped) convolution of rank {a[0]}")
            return Layout("conv", b[0] // groups, math.prod(a[1:]), groups, a[1:]), a[0] // groups
        if a[0] != b[1]:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; the rank must be A's first and B's second dimension")
        return Layout(kind, b[0], a[1]), a[0]

    @property
    def rank_unit(self) -> int:
        """How many ranks of PEFT's `r` make one rank of every matrix: a grouped convolution splits r among its groups."""
        return self.stack if self.kind == "conv" else 1

    @property
    def entries(self) -> int:
        """Number of entries of the dense delta."""
        return self.stack * self.d_out * self.d_in

    @property
    def full_rank(self) -> int:
        """The largest rank a delta can have."""
        return min(self.d_out, self.d_in)

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense delta as rows × columns (× stack in front), or of the convolution's weight."""
        if self.kind == "conv":
            return (self.stack * self.d_out, *self.kernel)
        return (self.d_out, self.d_in) if self.kind != "experts" else (self.stack, self.d_out, self.d_in)

    def unpack(self, a: Tensor, b: Tensor) -> list[LowRank]:
        """Take the stored A and B apart into one `LowRank` per matrix of the stack."""
        if self.kind == "conv":
            a = a.reshape(self.stack, -1, self.d_in)  # group-major: group g reads the rows of its own ranks
            b = b.reshape(self.stack, self.d_out, -1)
        elif self.kind == "experts":
            a = a.reshape(self.stack, -1, self.d_in)  # expert-major
            b = b.reshape(self.d_out, -1, self.stack).permute(2, 0, 1)  # rank-major, expert-minor
        else:
            return [LowRank(a, b)]
        return [LowRank(x, y) for x, y in zip(a, b, strict=True)]

    def pack(self, slices: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """Put the matrices back into the stored A and B; all must have one rank."""
        if self.kind in ("linear", "embedding"):
            return slices[0].a, slices[0].b
        a = torch.stack([s.a for s in slices])  # (stack, r, d_in)
        b = torch.stack([s.b for s in slices])  # (stack, d_out, r)
        rank = a.shape[1]
        if self.kind == "experts":
            return a.reshape(-1, self.d_in), b.permute(1, 2, 0).reshape(self.d_out, -1)
        ones = (1,) * (len(self.kernel) - 1)
        return a.reshape(self.stack * rank, *self.kernel), b.reshape(self.stack * self.d_out, rank, *ones)

    def packed_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that `pack` yields for a rank."""
        if self.kind == "conv":
            ones = (1,) * (len(self.kernel) - 1)
            return (self.stack * rank, *self.kernel), (self.stack * self.d_out, rank, *ones)
        return (self.stack * rank, self.d_in), (self.d_out, self.stack * rank)


def uniform_rank(ranks: Mapping[str, int], layouts: Mapping[str, Layout]) -> int:
    """Return the smallest r that PEFT can give to all targets at once.

    Args:
        ranks: target → rank of one of its matrices.
        layouts: of these targets; a grouped convolution needs an r that its groups divide.
    """
    unit = math.lcm(*(layouts[t].rank_unit for t in ranks))
    return -(-max(rank * layouts[t].rank_unit for t, rank in ranks.items()) // unit) * unit
