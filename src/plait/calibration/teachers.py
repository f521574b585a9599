"""What each task's own adapter answers to its texts: the distributions that a merge should keep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.calibration.passages import Passage, Reader

_MOST_BYTES = 1 << 30  # of one task's distributions; above, only the largest entries are kept
_KEPT = 1024


@dataclass(frozen=True, eq=False)
class OutputDistributions:
    """Distributions over the vocabulary (or a head's labels), one row per position.

    Attributes:
        log_p: (N, V) float32, or (N, k + 1) where only the k largest are kept: the last column is then the rest's.
        index: (N, k) int64, which entries those are; None where all are.
    """

    log_p: Tensor
    index: Tensor | None = None

    def rows(self, wanted: Sequence[int]) -> OutputDistributions:
        """Return some of the rows."""
        at = torch.tensor(wanted, device=self.log_p.device)
        return OutputDistributions(self.log_p[at], None if self.index is None else self.index[at])

    def divergence(self, logits: Tensor) -> Tensor:
        """Return KL(these ‖ softmax(logits)) per row in nats, (N,).

        Where only the largest entries are kept, the rest counts as one outcome: a lower bound of the divergence.

        Args:
            logits: (N, V) float32.
        """
        log_q = logits.log_softmax(-1)
        if self.index is not None:
            kept = log_q.gather(-1, self.index)
            log_q = torch.cat([kept, _log_rest(kept)], -1)
        p = self.log_p.exp()
        return (p * (self.log_p - log_q)).where(p > 0, 0).sum(-1)


def keep_distributions(logits: Tensor, *, positions: int) -> OutputDistributions:
    """Turn logits into distributions, (N, V); `positions` of a complete task decide whether all entries fit in memory."""
    log_p = logits.log_softmax(-1)
    if positions * log_p.shape[-1] * 4 <= _MOST_BYTES:
        return OutputDistributions(log_p)
    top = log_p.topk(_KEPT, -1)
    return OutputDistributions(torch.cat([top.values, _log_rest(top.values)], -1), top.indices)


def teacher_distributions(
    model: Any,
    passages: Sequence[Passage],
    *,
    head: bool = False,
    batch_size: int = 16,
    report: Callable[[int], object] = lambda done: None,
) -> OutputDistributions:
    """Return a model's distributions at the answers of passages, in their order.

    Args:
        model: of transformers, with whatever acts on it.
        passages: read once each.
        head: whether the model answers by a classification head.
        batch_size: passages at a time.
        report: called with the number of passages read since it was last called.
    """
    reader = Reader(model, head=head)
    order = sorted(range(len(passages)), key=lambda i: (passages[i].tokens, i))
    total = sum(p.positions for p in passages)
    found: list[OutputDistributions | None] = [None] * len(passages)
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            distributions = keep_distributions(reader.logits([passages[i] for i in batch]), positions=total)
            start = 0
            for i in batch:
                stop = start + passages[i].positions
                found[i] = distributions.rows(range(start, stop))
                start = stop
            report(len(batch))
    return concatenated([a for a in found if a is not None])


def concatenated(parts: Sequence[OutputDistributions]) -> OutputDistributions:
    """Return the rows of several, one after the other."""
    index = [a.index for a in parts if a.index is not None]
    return OutputDistributions(torch.cat([a.log_p for a in parts]), torch.cat(index) if index else None)


def _log_rest(log_p: Tensor) -> Tensor:
    """Return log(1 − Σ p) of some entries, (N, 1), never −∞."""
    return torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
