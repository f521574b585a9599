"""Which entries of an array are kept: counts, thresholds and keep probabilities."""

from __future__ import annotations

import math
from typing import Literal

from plait.deferred import Tensor, np, torch

CountRule = Literal["floor", "ceil", "inclusive"]


def kept_count(entries: int, density: float, rule: CountRule) -> int:
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
    bounds = thresholds.to(x.dtype).numpy()
    below = np.nextafter(bounds, np.zeros_like(bounds)).tolist()
    out = torch.empty_like(x)
    for value, bound, place in zip(x, below, out, strict=True):
        torch.hardshrink(value, bound, out=place)
    return out


def drop_above(x: Tensor, limits: Tensor) -> Tensor:
    """Zero the entries of x (T, p, q) whose magnitude is above its row's limit (T,)."""
    out = torch.empty_like(x)
    for value, limit, place in zip(x, limits.tolist(), out, strict=True):
        torch.sub(value, torch.hardshrink(value, limit, out=place), out=place)
    return out


def row_ranks(x: Tensor) -> Tensor:
    """Return the rank of |x| within its row, 0 for the smallest; x (p, q), result (p, q) int64; equal entries from the left."""
    columns = x.shape[-1]
    if x.dtype == torch.float32:
        # magnitudes sort like their bits; with the column below them one sort of integers, three times faster, keeps places
        bits = columns.bit_length()
        packed = (x.abs().view(torch.int32).to(torch.int64) << bits).add_(torch.arange(columns))
        packed.numpy().sort(axis=-1)
        order = packed.bitwise_and_((1 << bits) - 1)
    else:
        order = x.abs().argsort(dim=-1, stable=True)
    ranks = torch.empty_like(order)
    return ranks.scatter_(-1, order, torch.arange(columns).expand_as(order))
