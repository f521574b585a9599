"""Parameter competition balancing: entries of an adapter compete with each other, and adapters compete for an entry."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal

from pydantic import Field

from plait.deferred import Tensor, torch
from plait.records import Record
from plait.stages.base import Block, EntryCombine, Scope, StageParams, Survey, register_stage
from plait.stages.surveys import extremes, magnitudes, total

Reading = Literal["paper", "code"]
_FIXED_POINT = 2.0**24  # terms of the softmax' sum as integers: a sum of them does not depend on their order
_CLAMPED = 1e-4  # the code's share of entries clamped at both ends


class CompeteFields(Record):
    """Parameters of `compete` and of PCB."""

    reading: Annotated[Reading, Field(description="The paper's softmax, or the authors' products and clamps.")] = "paper"
    density: Annotated[float, Field(gt=0, le=1, description="Share of entries that an adapter keeps (the paper's r).")] = 0.1
    scope: Annotated[Scope, Field(description="Normalize and rank over the complete model, or within each module.")] = "model"


@register_stage
class Compete(CompeteFields, StageParams, EntryCombine):
    """Weigh every entry by how large it is in its adapter and how the others see it, and keep the best (PCB-Merging, eq. 2–5).

    β = intra ⊙ inter, of which each adapter keeps its `density` largest; ΔW = Σ β̂ₜ wₜ τₜ / Σ β̂ₜ. Two readings:

    - `paper`: intra = exp(T · norm(τₜ²)), inter = Σₛ softmax(norm(τₜ τₛ)) over the entries, β̂ = β / max β;
    - `code`: intra = exp(T · norm(|τₜ|)²), inter = τₜ Σₛ τₛ, β̂ = (β − kept) / (max β − kept) with the smallest β kept, and |τ|
      is clamped to its range without 0.01 % at both ends.

    norm maps the smallest to 0 and the largest to 1. The code takes tanh of its products, which for entries below 0.03 changes
    nothing in float32 and for larger ones would make the result depend on their unit; here there is none. Entries that are zero
    do not count, nor those whose β is negative.
    """

    name: Literal["compete"] = "compete"

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for the ranges that are normalized by, and for the largest and the smallest β that is kept."""
        best = magnitudes(self.scope, self._ranks, self._beta)
        if self.reading == "code":
            return magnitudes(self.scope, _clamps), best
        return extremes(self.scope, _product_range), total(self.scope, _softmax_terms), best

    def combine(self, block: Block) -> Tensor:
        """Return the balanced mean, (p, q)."""
        beta = self._beta(block)
        largest, smallest = block.statistics[-1].unbind(1)
        kept = (beta >= smallest.view(-1, 1, 1)) & (beta > 0)
        low = smallest if self.reading == "code" else torch.zeros_like(smallest)
        share = torch.where(kept, _normed(beta, low, largest), 0)
        x = block.x if self.reading == "paper" else _clamped(block)
        total_share = reduce(torch.add, share)
        merged = reduce(torch.add, (v * s * w for v, s, w in zip(x, share, block.weights.tolist(), strict=True)))
        return torch.where(total_share > 0, merged / torch.where(total_share > 0, total_share, 1), 0)

    def _ranks(self, entries: int) -> tuple[int, int]:
        return 1, max(1, entries - int(round((1 - self.density) * entries, 9)))

    def _beta(self, block: Block) -> Tensor:
        beta = _by_paper(block) if self.reading == "paper" else _by_code(block)
        return torch.where(block.x != 0, beta.clamp(min=0), 0)


def _by_paper(block: Block) -> Tensor:
    """Return β up to a factor per adapter, which its normalization takes out again, (T, p, q)."""
    x, adapters, sums = block.x, len(block.x), block.statistics[1]
    rows = []
    for t in range(adapters):
        intra = torch.exp(adapters * (_norm_of_product(block, t, t) - 1))
        inter = (torch.exp(_norm_of_product(block, t, s)) * float(sums[t, t] / sums[t, s]) for s in range(adapters))
        rows.append(intra * reduce(torch.add, inter))
    return torch.stack(rows).to(x.dtype)


def _by_code(block: Block) -> Tensor:
    """Return β up to a factor, (T, p, q)."""
    high, low = block.statistics[0].unbind(1)
    size = _normed(_clamped(block).abs(), low, high)
    beta: Tensor = torch.exp(len(block.x) * (size.square() - 1)) * (block.x * reduce(torch.add, block.x))
    return beta


def _clamped(block: Block) -> Tensor:
    high, low = (bound.view(-1, 1, 1) for bound in block.statistics[0].unbind(1))
    return block.x.sign() * block.x.abs().clamp(low, high)


def _clamps(entries: int) -> tuple[int, int]:
    """Return the ranks of the largest and smallest magnitude that is not clamped."""
    return entries - int(entries * (1 - _CLAMPED) - 1), entries - int(entries * _CLAMPED)


def _normed(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Return (x − low) / (high − low), for x (T, p, q) and bounds (T,); 1 where there is no range."""
    low, high = (bound.to(x.dtype).view(-1, 1, 1) for bound in (low, high))
    return torch.where(high > low, (x - low) / torch.where(high > low, high - low, 1), 1)


def _norm_of_product(block: Block, t: int, s: int) -> Tensor:
    """Return norm(τₜ τₛ), (p, q)."""
    low, high = block.statistics[0][:, t, s]
    product = block.x[t] * block.x[s]
    return (product - low) / (high - low) if high > low else torch.zeros_like(product)


def _product_range(block: Block) -> tuple[Tensor, Tensor]:
    """Return the smallest and largest τₜ τₛ, (T, T) each."""
    ranges = torch.stack([torch.stack([torch.stack((a * b).aminmax()) for b in block.x]) for a in block.x])  # (T, T, 2)
    return ranges[..., 0], ranges[..., 1]


def _softmax_terms(block: Block) -> Tensor:
    """Return Σ exp(norm(τₜ τₛ)) over the block, (T, T), in fixed point."""
    adapters = range(len(block.x))
    terms = [
        [(torch.exp(_norm_of_product(block, t, s)).double() * _FIXED_POINT).round().long().sum() for s in adapters]
        for t in adapters
    ]
    return torch.stack([torch.stack(row) for row in terms])
