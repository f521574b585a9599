"""Which entries of each adapter are kept: by magnitude, at random, or both."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from plait.deferred import Tensor, torch
from plait.linalg.sparsify import CountRule, drop_above, keep_at_least, kept_count, row_ranks
from plait.records import Record
from plait.stages.base import Block, EntryStage, Scope, StageParams, Survey, register_stage
from plait.stages.surveys import magnitudes

Density = Annotated[float, Field(gt=0, le=1, description="Share of entries kept per adapter.")]
RankScope = Annotated[Scope, Field(description="Rank entries over the complete task vector (`model`), or within each module.")]


class TrimFields(Record):
    """Parameters of `trim` and of the methods that begin with it."""

    density: Density = 0.2
    scope: RankScope = "model"
    kept: Annotated[CountRule, Field(description="How density · entries becomes a count.")] = "floor"


@register_stage
class Trim(TrimFields, StageParams, EntryStage):
    """Keep each adapter's largest entries (TIES, Algorithm 1, step 1). Entries that tie with the threshold are all kept."""

    name: Literal["trim"] = "trim"
    weighs: ClassVar[bool] = False

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for the smallest magnitude that is kept."""
        return (magnitudes(self.scope, lambda entries: [kept_count(entries, self.density, self.kept)]),)

    def apply(self, block: Block) -> Tensor:
        """Return the largest entries, (T, p, q)."""
        return keep_at_least(block.x, block.statistics[0][:, 0])


class BandFields(Record):
    """Parameters of `band` and of Breadcrumbs."""

    density: Annotated[float, Field(gt=0, le=1, description="Share of entries kept: 1 − the shares dropped at both ends.")] = (
        0.9
    )
    gamma: Annotated[float, Field(ge=0, lt=1, description="Share of the largest entries that is dropped.")] = 0.01
    scope: RankScope = "module"

    @model_validator(mode="after")
    def _check_shares(self) -> Self:
        if self.density + self.gamma > 1:
            raise ValueError(f"density {self.density} and gamma {self.gamma} add up to more than 1")
        return self


@register_stage
class Band(BandFields, StageParams, EntryStage):
    """Drop each adapter's largest entries and its small ones (Model Breadcrumbs, §3)."""

    name: Literal["band"] = "band"
    weighs: ClassVar[bool] = False

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for the largest and the smallest magnitude that are kept."""
        return (magnitudes(self.scope, self._ranks),)

    def apply(self, block: Block) -> Tensor:
        """Return the entries of the band, (T, p, q)."""
        largest, smallest = block.statistics[0].unbind(1)
        return drop_above(keep_at_least(block.x, smallest), largest)

    def _ranks(self, entries: int) -> tuple[int, int]:
        top = min(int(self.gamma * entries), entries - 1)
        return top + 1, min(entries, top + kept_count(entries, self.density, "floor"))


class DropFields(Record):
    """Parameters of `drop` and of the methods that begin with it."""

    density: Annotated[float, Field(gt=0, le=1, description="Probability with which an entry is kept (1 − drop rate).")] = 0.5


@register_stage
class Drop(DropFields, StageParams, EntryStage):
    """Drop entries at random and rescale the rest: x ⊙ m / density, m ~ Bernoulli(density) (DARE, eq. 2–4)."""

    name: Literal["drop"] = "drop"
    randomised: ClassVar[bool] = True
    weighs: ClassVar[bool] = False

    def apply(self, block: Block) -> Tensor:
        """Return the survivors, rescaled, (T, p, q)."""
        if self.density >= 1:
            return block.x
        out = torch.empty_like(block.x)
        for t, (x, place) in enumerate(zip(block.x, out, strict=True)):
            mask = block.uniform(t).lt_(self.density)  # 0 and 1 as numbers, see `linalg.elect`
            torch.mul(x, mask, out=place).div_(self.density)
        return out


class DropByRankFields(Record):
    """Parameters of `drop_by_rank` and of DELLA."""

    density: Annotated[float, Field(gt=0, le=1, description="Mean probability with which an entry is kept (1 − p).")] = 0.7
    epsilon: Annotated[
        float,
        Field(ge=0, lt=0.5, description="The smallest entry of a row is kept with density − ε, the largest with + ε."),
    ] = 0.07

    @model_validator(mode="after")
    def _probabilities(self) -> Self:
        if not 0 < self.density - self.epsilon <= self.density + self.epsilon <= 1:
            raise ValueError(f"density ± epsilon is {self.density} ± {self.epsilon}; both ends must be in (0, 1]")
        return self


@register_stage
class DropByRank(DropByRankFields, StageParams, EntryStage):
    """Drop entries at random, the smaller of a row the likelier, and rescale the rest by 1 / probability (DELLA, §3)."""

    name: Literal["drop_by_rank"] = "drop_by_rank"
    randomised: ClassVar[bool] = True
    weighs: ClassVar[bool] = False

    def apply(self, block: Block) -> Tensor:
        """Return the survivors, rescaled, (T, p, q)."""
        out = torch.empty_like(block.x)
        for t, (x, place) in enumerate(zip(block.x, out, strict=True)):
            p = self.probabilities(x)
            mask = block.uniform(t).lt_(p)  # 0 and 1 as numbers, see `linalg.elect`
            torch.div(x, p, out=place).mul_(mask)
        return out

    def probabilities(self, x: Tensor) -> Tensor:
        """Return keep probabilities (p, q), linear in the rank of |x| within its row from density − ε to density + ε."""
        columns = x.shape[-1]
        if columns == 1:
            return torch.full_like(x, self.density)
        return row_ranks(x).to(x.dtype).mul_(2 * self.epsilon / (columns - 1)).add_(self.density - self.epsilon)
