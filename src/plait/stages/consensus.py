"""Entry-wise combines that ask how many adapters want an entry, or which wants it most."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, Literal

from pydantic import Field

from plait.deferred import Tensor, torch
from plait.linalg.elect import elect_sign, merge_agreeing
from plait.records import Record
from plait.stages.base import Block, EntryCombine, Scope, StageParams, Survey, register_stage
from plait.stages.surveys import sums
from plait.stages.surveys import total as count

Threshold = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Boost = Annotated[float, Field(ge=0, le=100, description="r of RAM+: how much an adapter's own entries are enlarged.")]


class ElectByEnergyFields(Record):
    """Parameters of `elect_by_energy` and of SCE."""

    divisor: Annotated[
        Literal["share", "none"], Field(description="Divide by the agreeing adapters' summed share, or not at all.")
    ] = "share"
    zero_sign: Annotated[Literal["drop", "plus"], Field(description="A perfect tie drops the entry, or counts as plus.")] = (
        "drop"
    )


@register_stage
class ElectByEnergy(ElectByEnergyFields, StageParams, EntryCombine):
    """Elect a sign per entry and average those that agree, each by its share of the module's energy (SCE, calculate and erase).

    ηₜ = ‖wₜ xₜ‖² / Σₛ ‖wₛ xₛ‖² over a module; the merge is Σ ηₜ wₜ xₜ over the adapters whose sign is that of Σ wₜ xₜ.
    """

    name: Literal["elect_by_energy"] = "elect_by_energy"

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for every adapter's energy in the module."""
        return (sums(lambda block: torch.linalg.vector_norm(block.weighted(), dim=-1, dtype=torch.float64).square()),)

    def combine(self, block: Block) -> Tensor:
        """Return the weighted mean of those that agree, (p, q)."""
        x, energy = block.weighted(), block.statistics[0]
        share = energy / energy.sum() if energy.sum() > 0 else torch.full_like(energy, 1 / len(energy))
        sign = elect_sign(x, "total")
        if self.zero_sign == "plus":
            sign = torch.where(sign == 0, 1, sign)
        return merge_agreeing(x, x, sign, share, "weight" if self.divisor == "share" else "none")


class ConsensusFields(Record):
    """Parameters of `consensus`, the stage and the method."""

    threshold: Annotated[
        Threshold | tuple[Threshold, ...],
        Field(description="λ: the lower, the more entries an adapter wants. One number, or one per adapter in their order."),
    ] = 0.4
    wanted_by: Annotated[
        int, Field(ge=0, le=4096, description="Adapters that must want an entry; at most all of them. 0 keeps every entry.")
    ] = 2


@register_stage
class Consensus(ConsensusFields, StageParams, EntryCombine):
    """Sum, and keep the entries that several adapters want: |τₜ| > λₜ |Σₛ τₛ − τₜ| with τₜ = wₜ xₜ (Consensus TA, §4)."""

    name: Literal["consensus"] = "consensus"

    def problems(self, space: str, adapters: int) -> list[str]:
        """Refuse thresholds of another number than the adapters."""
        if isinstance(self.threshold, float) or len(self.threshold) == adapters:
            return []
        return [f"threshold has {len(self.threshold)} numbers for {adapters} adapters; give one, or one for each"]

    def combine(self, block: Block) -> Tensor:
        """Return the sum where enough adapters want it, (p, q)."""
        x = block.weighted()
        merged = reduce(torch.add, x)
        thresholds = (self.threshold,) * len(x) if isinstance(self.threshold, float) else self.threshold
        wants = [v.abs() > (merged - v).abs() * bound for v, bound in zip(x, thresholds, strict=True)]
        return torch.where(torch.stack(wants).sum(0) >= min(self.wanted_by, len(x)), merged, 0)


class AverageSharedFields(Record):
    """Parameters that `average_shared` shares with RAM+."""

    boost: Boost = 0.0
    cap: Annotated[float, Field(ge=0, le=1e6, description="α of RAM+: the largest ratio of shared to own entries.")] = 0.2


@register_stage
class AverageShared(AverageSharedFields, StageParams, EntryCombine):
    """Average an entry over the adapters in which it is not zero; one that is a single adapter's own is kept in full (RAM, §4).

    With `boost` > 0 an adapter's own entries are enlarged by 1 + boost · min(shared / own, cap), shared and own being its
    numbers of such entries (RAM+).
    """

    name: Literal["average_shared"] = "average_shared"
    scope: Annotated[Scope, Field(description="Count over the complete model, or within each module.")] = "model"

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for every adapter's numbers of shared and own entries."""
        return (count(self.scope, _shared_and_own),) if self.boost > 0 else ()

    def combine(self, block: Block) -> Tensor:
        """Return the averages and the enlarged own entries, (p, q)."""
        x = block.weighted()
        gain = torch.ones(len(x), dtype=torch.float64)
        if self.boost > 0:
            shared, own = block.statistics[0]
            gain += self.boost * (shared / own.clamp(min=1)).clamp(max=self.cap)
        owners = (x != 0).sum(0)
        merged = reduce(torch.add, x) / owners.clamp(min=1)
        enlarged = reduce(torch.add, (v * g for v, g in zip(x, gain.tolist(), strict=True)))
        return torch.where(owners == 1, enlarged, merged)


@register_stage
class Largest(StageParams, EntryCombine):
    """Per entry, the adapter that moved farthest: wₜ xₜ of largest magnitude (MagMax, eq. 4); equals are averaged."""

    name: Literal["largest"] = "largest"

    def combine(self, block: Block) -> Tensor:
        """Return the values of largest magnitude, (p, q)."""
        x = block.weighted()
        size = x.abs()
        winners = size == size.amax(0)
        total: Tensor = reduce(torch.add, torch.where(winners, x, 0))
        return total / winners.sum(0)


def _shared_and_own(block: Block) -> Tensor:
    """Return (2, T): how many non-zero entries an adapter shares with others, and how many are its own."""
    active = block.weighted() != 0
    owners = active.sum(0)
    return torch.stack([(active & (owners > 1)).sum((1, 2)), (active & (owners == 1)).sum((1, 2))])
