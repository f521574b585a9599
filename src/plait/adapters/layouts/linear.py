"""`torch.nn.Linear`: a weight (d_out, d_in)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from plait.adapters.layouts.base import Layout
from plait.adapters.layouts.conv1d import may_be_conv1d
from plait.deferred import torch


@dataclass(frozen=True)
class Linear(Layout):
    """A (r, d_in), B (d_out, r). An adapter stores those of a Conv1D alike, so its targets are read as this one."""

    kind = "linear"

    @classmethod
    def claims(cls, shapes: Mapping[str, tuple[int, ...]], *, is_parameter: bool) -> bool:
        """Claim what no other kind has claimed."""
        return True

    @classmethod
    def of_module(cls, module: Any) -> Self | None:
        """Return the layout of factors on a `torch.nn.Linear`."""
        return cls(module.out_features, module.in_features) if isinstance(module, torch.nn.Linear) else None

    def is_transposed(self, target: str, *, stored: tuple[int, ...] | None, conv1d: bool | None, flag: bool) -> bool:
        """Return whether it is a Conv1D in the base: by the shape of the weight; where that is square, by name and model."""
        if stored is not None and self.d_out != self.d_in:
            return stored[-2:] == (self.d_in, self.d_out)
        return may_be_conv1d(target) and (flag if conv1d is None else conv1d)

    def __str__(self) -> str:
        return str(list(self.dense_shape))
