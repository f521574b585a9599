"""Sign election and disjoint averaging over a stack of arrays (T, p, q)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Vote = Literal["total", "frequency"]
Divisor = Literal["count", "weight", "none"]


def elect_sign(x: Tensor, vote: Vote) -> Tensor:
    """Return the elected sign of every entry, (p, q), in {−1, 0, 1}; 0 is a perfect tie.

    Args:
        x: (T, p, q).
        vote: `total` weighs every voter by its magnitude (TIES, Algorithm 1), `frequency` counts heads.
    """
    return (x if vote == "total" else x.sign()).sum(0).sign()


def agreement(voters: Tensor, sign: Tensor) -> Tensor:
    """Say which voters (T, p, q) agree with the elected sign (p, q); a zero agrees with nobody, and nobody with a zero."""
    return (voters.sign() == sign) & (sign != 0)


def merge_agreeing(x: Tensor, agrees: Tensor, weights: Tensor, divisor: Divisor) -> Tensor:
    """Sum `weights[t] · x[t]` over the adapters that agree, over what `divisor` says.

    Args:
        x: (T, p, q).
        agrees: (T, p, q), bool.
        weights: (T,).
        divisor: `count` of the agreeing adapters, their summed `weight`, or `none`. A sum of weights that is 0 divides by 1.

    Returns:
        (p, q); 0 where nobody agrees.
    """
    w = weights.to(x.dtype).view(-1, 1, 1)
    total = torch.where(agrees, x, 0).mul_(w).sum(0)
    if divisor == "none":
        return total
    share = agrees.sum(0).to(x.dtype) if divisor == "count" else torch.where(agrees, w, 0).sum(0)
    return total / torch.where(share == 0, 1, share)
