"""Sign election and disjoint averaging over a stack of arrays (T, p, q).

Masks are numbers, 0 and 1, in the dtype of what they mask: arithmetic on them is many times faster than selection by bool.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    if len(x) == 1:
        return x[0].sign()
    voices = x if vote == "total" else x.sign()
    total = voices[0] + voices[1]
    for more in voices[2:]:
        total.add_(more)
    return total.sign_()


def agreement(voters: Tensor, sign: Tensor, out: Tensor | None = None) -> Tensor:
    """Return 1 for voters (…, p, q) that agree with the elected sign (p, q), else 0; a zero never agrees."""
    return torch.mul(voters, sign, out=out).gt_(0)


def merge_agreeing(x: Tensor, voters: Tensor, sign: Tensor, weights: Tensor, divisor: Divisor) -> Tensor:
    """Sum `weights[t] · x[t]` over the adapters that agree with the elected sign, over what `divisor` says.

    Args:
        x: (T, p, q).
        voters: (T, p, q): an adapter agrees where its voter has the sign.
        sign: (p, q), in {−1, 0, 1}.
        weights: (T,).
        divisor: `count` of the agreeing adapters, their summed `weight`, or `none`. Weights that cancel do not divide.

    Returns:
        (p, q); 0 where none agrees.
    """
    total, agrees = torch.zeros_like(x[0]), torch.empty_like(sign)
    share = torch.zeros_like(total)  # the number of those that agree, or the sum of their weights
    size = torch.zeros_like(total) if divisor == "weight" else None
    for value, voter, weight in zip(x, voters, weights.tolist(), strict=True):  # one mask at a time: all stay in the cache
        agreement(voter, sign, out=agrees)
        total.addcmul_(value, agrees, value=weight)
        if size is not None:
            share.add_(agrees, alpha=weight)
            size.add_(agrees, alpha=abs(weight))
        elif divisor == "count":
            share.add_(agrees)
    if divisor == "none":
        return total
    if size is None:
        return total.div_(share.clamp_min_(1))
    canceled = share.abs().sub_(size, alpha=_CANCELED).le_(0)
    return total.div_(share.mul_(1 - canceled).add_(canceled))


def agreeing_entries(x: Tensor, voters: Tensor, sign: Tensor, divisor: Divisor) -> tuple[Tensor, ...]:
    """Return what `merge_agreeing` weighs where weights have no say in who agrees.

    `weigh_agreeing` of it gives the same bits, but for the signs of zeros.

    Args:
        x: (T, p, q).
        voters: (T, p, q).
        sign: (p, q), in {−1, 0, 1}.
        divisor: `count` or `none`.

    Returns:
        x with zeros where an adapter does not agree, (T, p, q), and for `count` the number of those that do, at least 1, uint8
        (1, p, q).
    """
    kept, count = torch.empty_like(x), torch.zeros_like(sign)
    for value, voter, place in zip(x, voters, kept, strict=True):
        count.add_(agreement(voter, sign, out=place))
        place.mul_(value)
    return (kept, count.clamp_min_(1).to(torch.uint8).unsqueeze(0)) if divisor == "count" else (kept,)


def weigh_agreeing(entries: Sequence[Tensor], weights: Tensor) -> Tensor:
    """Return Σ weights[t] · x[t] over the number of those that agree, (p, q), from rows of what `agreeing_entries` returned."""
    (first, *others), *count = entries
    weight, *weights_of_others = weights.tolist()
    total: Tensor = first * weight
    product = torch.empty_like(first)
    for value, weight in zip(others, weights_of_others, strict=True):
        total.add_(torch.mul(value, weight, out=product))  # rounded twice, as `merge_agreeing` does
    return total.div_(product.copy_(count[0][0])) if count else total


def weighted_sum(x: Tensor, weights: Tensor) -> Tensor:
    """Return Σ weights[t] · x[t], (p, q), for x (T, p, q)."""
    total = torch.zeros_like(x[0])
    for value, weight in zip(x, weights.tolist(), strict=True):
        total.add_(value, alpha=weight)
    return total
