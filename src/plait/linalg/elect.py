"""Sign election and disjoint averaging over a stack of arrays (T, p, q)."""

from __future__ import annotations

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

Vote = Literal["total", "frequency"]
Divisor = Literal["count", "weight", "none"]
_CANCELLED = 1e-6  # a sum of weights below this share of their magnitudes is round-off


def elect_sign(x: Tensor, vote: Vote) -> Tensor:
    """Return the elected sign of every entry, (p, q), in {−1, 0, 1}; 0 is a perfect tie.

    Args:
        x: (T, p, q).
        vote: `total` weighs every voter by its magnitude (TIES, Algorithm 1), `frequency` counts heads.
    """
    total: Tensor = reduce(torch.add, x if vote == "total" else x.sign())
    return total.sign()


def agreement(voters: Tensor, sign: Tensor) -> Tensor:
    """Say which voters (T, p, q) agree with the elected sign (p, q); a zero agrees with nobody, and nobody with a zero."""
    return voters * sign > 0


def merge_agreeing(x: Tensor, agrees: Tensor, weights: Tensor, divisor: Divisor) -> Tensor:
    """Sum `weights[t] · x[t]` over the adapters that agree, over what `divisor` says.

    Args:
        x: (T, p, q).
        agrees: (T, p, q), bool.
        weights: (T,).
        divisor: `count` of the agreeing adapters, their summed `weight`, or `none`. Weights that cancel do not divide.

    Returns:
        (p, q); 0 where nobody agrees.
    """
    total, share, size = (torch.zeros_like(x[0]) for _ in range(3))
    for value, agreeing, weight in zip(x, agrees, weights.tolist(), strict=True):  # one adapter at a time stays in the cache
        mask = agreeing.to(x.dtype)
        total.addcmul_(value, mask, value=weight)
        share.add_(mask, alpha=1 if divisor == "count" else weight)
        if divisor == "weight":
            size.add_(mask, alpha=abs(weight))
    return total if divisor == "none" else total.div_(share.masked_fill_(share.abs() <= _CANCELLED * size, 1))


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weights[t] · x[t], (p, q), for x (T, p, q)."""
    total = torch.zeros_like(x[0])
    for value, weight in zip(x, weights.tolist(), strict=True):
        total.add_(value, alpha=weight)
    return total
