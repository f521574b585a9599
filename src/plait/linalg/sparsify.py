"""Which entries of an array are kept: counts, thresholds and keep probabilities."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

Count = Literal["floor", "ceil", "inclusive"]


def kept_count(entries: int, density: float, rule: Count) -> int:
    """Return how many of `entries` a density keeps; at least 1 of a non-empty array.

    Args:
        entries: number of entries.
        density: share kept, in (0, 1].
        rule: `floor` and `ceil` round density · entries; `inclusive` keeps one more than `floor`, as code does that
            thresholds at the (entries − count)-th smallest magnitude and keeps what is at least that large.
    """
    # a product such as 0.3 · 10 = 3.0000000000000004 must not be rounded up to 4
    exact = round(density * entries, 9)
    count = math.ceil(exact) if rule == "ceil" else math.floor(exact) + (rule == "inclusive")
    return min(entries, max(1, count))


def keep_at_least(x: Tensor, thresholds: Tensor) -> Tensor:
    """Zero the entries of x (T, p, q) whose magnitude is below its row's threshold (T,)."""
    # hardshrink keeps what is strictly larger, in one pass: the next smaller number makes that "at least"
    below = torch.nextafter(thresholds.to(x.dtype), torch.zeros((), dtype=x.dtype)).tolist()
    return torch.stack([torch.nn.functional.hardshrink(value, bound) for value, bound in zip(x, below, strict=True)])


def row_ranks(x: Tensor) -> Tensor:
    """Return the rank of |x| within its row, 0 for the smallest; x (p, q), result (p, q) int64; equal entries from the left."""
    order = x.abs().argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(x.shape[-1]).expand_as(order))
