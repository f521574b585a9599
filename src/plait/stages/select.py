"""Which entries are kept by the values of all adapters there, or by how large they are."""

from __future__ import annotations

from functools import reduce
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.deferred import Tensor, torch
from plait.linalg.sparsify import kept_count
from plait.records import Record
from plait.stages.base import Block, EntryStage, Scope, StageParams, Survey, register_stage
from plait.stages.surveys import magnitudes


class KeepVariedFields(Record):
    """Parameters that `keep_varied` shares with SCE."""

    density: Annotated[
        float, Field(gt=0, le=1, description="Share of entries kept: those in which the adapters differ most. 1 keeps all.")
    ] = 0.1


@register_stage
class KeepVaried(KeepVariedFields, StageParams, EntryStage):
    """Keep the entries in which the adapters differ most, wₜ xₜ by variance over t; the same entries of all (SCE, select)."""

    name: Literal["keep_varied"] = "keep_varied"
    scope: Annotated[Scope, Field(description="Rank within each module, or over the complete model.")] = "module"

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for the smallest variance that is kept."""
        if self.density >= 1:
            return ()
        return (magnitudes(self.scope, lambda entries: [kept_count(entries, self.density, "floor")], _variance, rows=1),)

    def apply(self, block: Block) -> Tensor:
        """Return the entries of large variance, (T, p, q); where no entry varies, all."""
        if self.density >= 1:
            return block.x
        return torch.where(_variance(block) >= block.statistics[0].view(1, 1, 1), block.x, 0)


@register_stage
class Cutoff(StageParams, EntryStage):
    """Drop entries whose magnitude is at most a number: an absolute threshold, as mergekit's `ram` has (scale matters)."""

    name: Literal["cutoff"] = "cutoff"
    weighs: ClassVar[bool] = False
    above: Annotated[float, Field(ge=0, allow_inf_nan=False, description="Entries with |x| above this are kept.")] = 1e-5

    def apply(self, block: Block) -> Tensor:
        """Return the larger entries, (T, p, q)."""
        return torch.where(block.x.abs() > self.above, block.x, 0)


def _variance(block: Block) -> Tensor:
    """Return T times the variance of wₜ xₜ over the adapters, (1, p, q); one entry's value depends on that entry alone."""
    x = block.weighted()
    mean = reduce(torch.add, x) / len(x)
    spread: Tensor = reduce(torch.add, ((value - mean).square() for value in x))
    return spread.unsqueeze(0)
