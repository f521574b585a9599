"""Norms and measures of adapters as texts, for the sentences and for what draws them. Without torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from plait.inspection.geometry import SymmetricMatrix


def norm_text(value: float) -> str:
    """Write a norm with three significant digits, from 1000 on as a whole number."""
    return f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def span(ends: Sequence[str]) -> str:
    """Join the two ends of a range, or return one of them where they are equal."""
    return "–".join(dict.fromkeys(ends))


def below_diagonal(matrix: SymmetricMatrix) -> list[float]:
    """Return the defined values below the diagonal, row by row: one for every pair of adapters."""
    return [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]
