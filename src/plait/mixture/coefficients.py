"""Λ: the tensor of coefficients of all adapters, and how a target reads its share of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from plait.errors import PlanError

Granularity = Literal["task", "layer", "module", "direction"]
GRANULARITIES: tuple[Granularity, ...] = ("task", "layer", "module", "direction")


@dataclass(frozen=True)
class Axes:
    """The axes of the entries.

    Attributes:
        tasks: the adapters' names, T.
        layers: L; the last one is `""` where some modules are in no numbered layer.
        modules: K.
        ranks: per module, the sum of its adapters' ranks; Λ per direction has max(ranks) columns, a module uses the first.
    """

    tasks: tuple[str, ...]
    layers: tuple[str, ...]
    modules: tuple[str, ...]
    ranks: tuple[int, ...]

    def shape(self, granularity: Granularity) -> tuple[int, ...]:
        """Return the shape of Λ."""
        match granularity:
            case "task":
                return (len(self.tasks),)
            case "layer":
                return (len(self.layers), len(self.tasks))
            case "module":
                return (len(self.modules), len(self.tasks))
            case "direction":
                return (len(self.modules), max(self.ranks, default=0))


@dataclass(frozen=True, eq=False)
class Coefficients:
    """Λ, read by every target at every forward pass.

    Attributes:
        values: Λ itself, not a copy, so that gradients reach it and writing into it is seen; one more dimension in front
            where every row of the batch has its own.
        granularity: the axes of the entries.
        first: of the adapters that act.
        last: one past the last of them.
        per_row: whether there is that dimension.
    """

    values: Tensor
    granularity: Granularity
    first: int = 0
    last: int = 0
    per_row: bool = False

    @staticmethod
    def of(values: Tensor, granularity: Granularity, axes: Axes, *, per_row: bool = False) -> Coefficients:
        """Check Λ.

        Raises:
            PlanError: a wrong shape or dtype.
        """
        if granularity not in GRANULARITIES:
            raise PlanError(f"granularity is {granularity!r}; it must be one of {', '.join(GRANULARITIES)}.")
        wanted = axes.shape(granularity)
        if tuple(values.shape[per_row:]) != wanted or values.ndim != len(wanted) + per_row:
            shown = ["batch"] * per_row + [str(n) for n in wanted]
            raise PlanError(f"coefficients are {list(values.shape)}; per {granularity} they are [{', '.join(shown)}] here.")
        if values.dtype not in (torch.float32, torch.float64):
            raise PlanError(f"coefficients are {values.dtype}; small steps vanish below float32. Give float32.")
        return Coefficients(values, granularity, 0, len(axes.tasks), per_row)

    def share(self, module: int, layer: int) -> Tensor:
        """Return a target's part: (…, T), or (…, R) per direction."""
        match self.granularity:
            case "task":
                return self.values
            case "layer":
                return self.values[..., layer, :]
            case _:
                return self.values[..., module, :]


@dataclass(eq=False)
class CoefficientState:
    """The coefficients that all hooks read, and that are exchanged in one place."""

    now: Coefficients


def span(weights: Sequence[float]) -> tuple[int, int]:
    """Return the smallest range that holds every adapter with a weight other than 0: (first, one past the last)."""
    used = [i for i, w in enumerate(weights) if w != 0]
    return (used[0], used[-1] + 1) if used else (0, 0)
