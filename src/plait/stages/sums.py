"""Weighted sums, the simplest way to combine: exact on factors, whatever the ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.deferred import Tensor
from plait.records import Record
from plait.stages.base import LinearCombine, StageParams, register_stage


class _Factor(Record):
    factor: Annotated[float, Field(allow_inf_nan=False, description="Factor on every weight.")] = 1.0


@register_stage
class Sum(_Factor, StageParams, LinearCombine):
    """Add the deltas up, each times its weight: Σ wₜ ΔWₜ."""

    name: Literal["sum"] = "sum"

    def coefficients(self, weights: Tensor, module: str) -> Tensor:
        """Return the weights, times the factor."""
        return weights * self.factor


@register_stage
class Mean(_Factor, StageParams, LinearCombine):
    """Average the deltas, each times its weight: (1/T) Σ wₜ ΔWₜ."""

    name: Literal["mean"] = "mean"

    def coefficients(self, weights: Tensor, module: str) -> Tensor:
        """Return the weights over T, times the factor."""
        return weights * (self.factor / len(weights))
