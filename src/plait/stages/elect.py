"""Sign election: which adapters count in an entry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field

from plait.deferred import Tensor
from plait.linalg.elect import Divisor, Vote, agreeing_entries, elect_sign, merge_agreeing, weigh_agreeing
from plait.records import Record
from plait.stages.base import Block, EntryCombine, Scope, StageParams, Survey, register_stage
from plait.stages.surveys import total

ZeroSign = Literal["drop", "plus", "majority"]


class ElectFields(Record):
    """How a sign is elected per entry and who is averaged then; of `elect` and of the methods that end with it."""

    sign: Annotated[Vote, Field(description="Vote by magnitude (`total`) or by head (`frequency`).")] = "total"
    weighted_vote: Annotated[bool, Field(description="Multiply by the adapters' weights before the vote.")] = False
    zero_sign: Annotated[
        ZeroSign,
        Field(description="A perfect tie drops the entry, counts as plus, or takes the majority sign of the scope."),
    ] = "drop"
    divisor: Annotated[Divisor, Field(description="Divide by the agreeing adapters' count, summed weight, or not at all.")] = (
        "count"
    )


@register_stage
class Elect(ElectFields, StageParams, EntryCombine):
    """Elect a sign per entry and average the adapters that agree with it (TIES, Algorithm 1, steps 2 and 3)."""

    name: Literal["elect"] = "elect"
    scope: Annotated[Scope, Field(description="Whose majority a perfect tie takes: the model's, or the module's.")] = "model"

    def problems(self, space: str, adapters: int) -> list[str]:
        """Refuse to divide by weights that hold the scalings."""
        if self.divisor != "weight" or space != "factors":
            return []
        return [
            "divisor 'weight' (flavor 'mergekit') in space 'factors' would divide by √(weight · scaling) and so lose the "
            "scalings; use another divisor, or space 'delta'"
        ]

    def surveys(self) -> tuple[Survey, ...]:
        """Ask for the majority of the elected signs where perfect ties take it."""
        if self.zero_sign != "majority":
            return ()

        def signs(block: Block) -> Tensor:
            return elect_sign(self._voters(block), self.sign).sum()

        return (total(self.scope, signs, weighed=self.weighted_vote),)

    def combine(self, block: Block) -> Tensor:
        """Return the mean over those that agree, (p, q)."""
        voters, sign = self._elected(block)
        return merge_agreeing(block.x, voters, sign, block.weights, self.divisor)

    @property
    def weighs_last(self) -> bool:
        """Whether weights enter neither the vote nor the divisor."""
        return not self.weighted_vote and self.divisor != "weight"

    def unweighted(self, block: Block) -> tuple[Tensor, ...]:
        """Return the entries of those that agree, and their number."""
        return agreeing_entries(block.x, *self._elected(block), self.divisor)

    def weigh(self, unweighted: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return the mean over those that agree, (p, q)."""
        return weigh_agreeing(unweighted, weights)

    def _elected(self, block: Block) -> tuple[Tensor, Tensor]:
        """Return the voters (T, p, q) and the sign that they elect, (p, q)."""
        voters = self._voters(block)
        sign = elect_sign(voters, self.sign)
        if self.zero_sign == "plus":
            sign = _untied(sign, 1.0)
        elif self.zero_sign == "majority":
            sign = _untied(sign, float(block.statistics[0].sign()))
        return voters, sign

    def _voters(self, block: Block) -> Tensor:
        return block.x * block.weights.to(block.x.dtype).view(-1, 1, 1) if self.weighted_vote else block.x


def _untied(sign: Tensor, instead: float) -> Tensor:
    """Put −1, 0 or 1 in the place of every 0."""
    return sign.mul_(2).add_(instead).clamp_(-1, 1)
