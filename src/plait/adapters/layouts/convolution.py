"""`torch.nn.Conv1d`, `Conv2d` and `Conv3d`, grouped or not."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self

from plait.adapters.layouts.base import Layout
from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch


@dataclass(frozen=True)
class Convolution(Layout):
    """One matrix per group, (output channels of the group, input channels × kernel size).

    PEFT's A, (r, input channels, *kernel size), reads all input channels whatever the groups; B, (output channels, r / groups,
    1, …), is grouped as the base. So the delta of a grouped convolution may read channels that its weight has no entries for.

    Attributes:
        kernel: (input channels, *kernel size).
    """

    kernel: tuple[int, ...] = ()

    kind = "conv"
    several = "grouped convolutions"
    is_stored_transposed = False
    served_by_vllm = False

    @classmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Return whether A has a kernel."""
        return len(shapes.get(cls.a_part, ())) > 2

    @classmethod
    def _of(cls, a: tuple[int, ...], b: tuple[int, ...], rank: int) -> tuple[Self, int]:
        groups, rest = divmod(a[0], b[1]) if b[1] else (0, 1)
        if rest or groups < 1 or b[0] % groups or math.prod(b[2:]) != 1:
            raise ValueError(f"A is {list(a)} and B is {list(b)}; that is not a (grouped) convolution of rank {a[0]}")
        return cls(b[0] // groups, math.prod(a[1:]), groups, a[1:]), a[0] // groups

    @classmethod
    def of_module(cls, module: Any) -> Self | None:
        """Return the layout of factors on a convolution."""
        if not isinstance(module, torch.nn.Conv1d | torch.nn.Conv2d | torch.nn.Conv3d):
            return None
        kernel = (module.in_channels, *module.kernel_size)
        return cls(module.out_channels // module.groups, math.prod(kernel), module.groups, kernel)

    @classmethod
    def of_weight(cls, d_out: int, d_in: int, stack: int, shape: tuple[int, ...]) -> Self:
        """Return the layout of factors on a weight, every group of which reads the channels of all."""
        return cls(d_out, stack * d_in, stack, (stack * shape[1], *shape[2:]))

    @property
    def rank_unit(self) -> int:
        """How many ranks of PEFT's `r` make one rank of every matrix: r is split among the groups."""
        return self.stack

    @property
    def magnitude_shape(self) -> tuple[int, ...]:
        """Shape of DoRA's magnitudes on disk."""
        return (1, self.outputs, *self._ones)

    @property
    def fits_weight(self) -> bool:
        """Whether the base's weight has an entry for every entry of the delta."""
        return self.stack == 1

    @property
    def dense_shape(self) -> tuple[int, ...]:
        """Shape of the dense delta: that of an ungrouped convolution's weight."""
        return (self.outputs, *self.kernel)

    def stored_shape(self, *, transposed: bool) -> tuple[int, ...]:
        """Return the shape of the base's weight, were it not grouped."""
        return self.dense_shape

    def own_columns(self, shape: tuple[int, ...]) -> list[tuple[int, int]] | None:
        """Return the columns of every group's own channels, where the weight is of a grouped convolution."""
        channels, *size = self.kernel
        if self.stack == 1 or shape != (self.outputs, channels // self.stack, *size):
            return None
        width = self.d_in // self.stack
        return [(group * width, (group + 1) * width) for group in range(self.stack)]

    def matrices(self, weight: Tensor, *, transposed: bool) -> list[Tensor]:
        """Return an ungrouped convolution's weight as one matrix."""
        return [weight.flatten(1)]

    def as_matrix(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """Return output channels × the rest."""
        return shape[0], math.prod(shape[1:])

    def as_factors(self, slices: Sequence[LowRank]) -> list[LowRank]:
        """Return the groups' deltas reading all channels, those of other groups times zero."""
        found = []
        for group, delta in enumerate(slices):
            a = delta.a.new_zeros(delta.rank, self.stack, self.d_in // self.stack)
            a[:, group] = delta.a
            found.append(LowRank(a.flatten(1), delta.b))
        return found

    def unpack(self, a: Tensor, b: Tensor) -> list[LowRank]:
        """Take A and B separately: group-major, so that a group reads the rows of its own ranks."""
        of_a, of_b = a.reshape(self.stack, -1, self.d_in), b.reshape(self.stack, self.d_out, -1)
        return [LowRank(x, y) for x, y in zip(of_a, of_b, strict=True)]

    def pack(self, slices: Sequence[LowRank]) -> tuple[Tensor, Tensor]:
        """Put the groups' matrices back into A and B; all must have one rank."""
        a, b = torch.stack([s.a for s in slices]), torch.stack([s.b for s in slices])  # (groups, r, d_in), (groups, d_out, r)
        return a.reshape(-1, *self.kernel), b.reshape(self.outputs, -1, *self._ones)

    def packed_shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Return the shapes that `pack` yields for a rank."""
        return (self.stack * rank, *self.kernel), (self.outputs, rank, *self._ones)

    @property
    def _ones(self) -> tuple[int, ...]:
        return (1,) * (len(self.kernel) - 1)
