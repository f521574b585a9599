"""Sign election and disjoint averaging over a stack of arrays (T, p, q).

Masks are numbers, 0 and 1, in the dtype of what they mask: arithmetic on them is many times faster than selection by bool.
"""

from __future__ import annotations

from functools import reduce
from typing import Literal

from plait.deferred import Tensor, torch

Vote = Literal["total", "frequency"]
Divisor = Literal["count", "weight", "none"]
_CANCELED = 1e-6  # a sum of weights below this share of their magnitudes is round-off


def elect_sign(x: Tensor, vote: Vote) -> Tensor:
    """Return the elected sign of every entry, (p, q), in {−1, 0, 1}; 0 is a perfect tie.

    Args:
        x: (T, p, q).
        vote: `total` weighs every voter by its magnitude (TIES, Algorithm 1), `frequency` counts heads.
    """
    total: Tensor = reduce(torch.add, x if vote == "total" else x.sign())
    return total.sign()


def agreement(voters: Tensor, sign: Tensor) -> Tensor:
    """Return 1 for voters (T, p, q) that agree with the elected sign (p, q), else 0; a zero never agrees."""
    return (voters * sign).clamp_min_(0).sign_()


def merge_agreeing(x: Tensor, agrees: Tensor, weights: Tensor, divisor: Divisor) -> Tensor:
    """Sum `weights[t] · x[t]` over the adapters that agree, over what `divisor` says.

    Args:
        x: (T, p, q).
        agrees: (T, p, q), 0 or 1.
        weights: (T,).
        divisor: `count` of the agreeing adapters, their summed `weight`, or `none`. Weights that cancel do not divide.

    Returns:
        (p, q); 0 where none agrees.
    """
    masks = agrees.to(x.dtype)
    total = torch.zeros_like(x[0])
    for value, mask, weight in zip(x, masks, weights.tolist(), strict=True):
        total.addcmul_(value, mask, value=weight)
    if divisor == "none":
        return total
    if divisor == "count":
        return total.div_(reduce(torch.add, masks).clamp_min(1))
    share, size = weighted_sum(masks, weights), weighted_sum(masks, weights.abs())
    canceled = share.abs().sub_(size, alpha=_CANCELED).le_(0)
    return total.div_(share.mul_(1 - canceled).add_(canceled))


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weights[t] · x[t], (p, q), for x (T, p, q)."""
    total = torch.zeros_like(x[0])
    for value, weight in zip(x, weights.tolist(), strict=True):
        total.add_(value, alpha=weight)
    return total
