"""How far two sets of logits are apart. Pure; independent of models."""

from __future__ import annotations

from collections.abc import Sequence

from plait.deferred import Tensor, torch
from plait.records import Record


class Parity(Record):
    """How far one model's logits are from a reference's.

    Attributes:
        positions: at how many the distributions were compared.
        max_difference: the largest |Δlogit|.
        mean_kl: the mean over positions of KL(reference ‖ other), in nats.
        top1: share of positions where both have the same largest logit.
    """

    positions: int
    max_difference: float
    mean_kl: float
    top1: float


def compare_logits(reference: Tensor, other: Tensor) -> Parity:
    """Compare two sets of logits in float64.

    Args:
        reference: (…, classes); every leading index is a position.
        other: of the same shape.

    Raises:
        ValueError: shapes that differ, or nothing to compare.
    """
    if reference.shape != other.shape or reference.ndim == 0 or not reference.numel():
        raise ValueError(f"logits of shapes {list(reference.shape)} and {list(other.shape)} cannot be compared")
    one, two = (x.detach().reshape(-1, x.shape[-1]).double() for x in (reference, other))
    p, q = one.log_softmax(-1), two.log_softmax(-1)
    divergence = (p.exp() * (p - q)).sum(-1).clamp_min(0)  # it is not negative but for rounding
    return Parity(
        positions=len(one),
        max_difference=float((one - two).abs().max()),
        mean_kl=float(divergence.mean()),
        top1=float((one.argmax(-1) == two.argmax(-1)).double().mean()),
    )


def pool_parity(parts: Sequence[Parity]) -> Parity:
    """Return the parity over all positions of several comparisons."""
    count = torch.tensor([p.positions for p in parts], dtype=torch.float64)

    def mean(values: list[float]) -> float:
        return float((torch.tensor(values, dtype=torch.float64) * count).sum() / count.sum())

    return Parity(
        positions=int(count.sum()),
        max_difference=max(p.max_difference for p in parts),
        mean_kl=mean([p.mean_kl for p in parts]),
        top1=mean([p.top1 for p in parts]),
    )
