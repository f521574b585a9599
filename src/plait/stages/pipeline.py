"""`Pipeline`: the stages of a merge in order, and what can be promised of them before anything is read."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from plait.deferred import Tensor
from plait.linalg.elect import weighted_sum
from plait.spaces import SPACES
from plait.stages.base import (
    Block,
    Combine,
    DeltaCombine,
    DeltaStage,
    EntryCombine,
    EntryStage,
    GramCombine,
    LinearCombine,
    MergedStage,
    Reduction,
    Stage,
    Survey,
)


@dataclass(frozen=True)
class Pipeline:
    """What a method does to one target module.

    Attributes:
        combine: many deltas → one.
        pre: what happens to deltas, and then to their coordinates, beforehand.
        post: what happens to the merged delta.
    """

    combine: Combine
    pre: tuple[DeltaStage | EntryStage, ...] = ()
    post: tuple[MergedStage, ...] = ()

    @property
    def stages(self) -> tuple[Stage, ...]:
        """All of them, in order."""
        return (*self.pre, self.combine, *self.post)

    @cached_property
    def on_deltas(self) -> tuple[DeltaStage, ...]:
        """The stages before the change to coordinates."""
        return tuple(s for s in self.pre if isinstance(s, DeltaStage))

    @cached_property
    def on_entries(self) -> tuple[EntryStage, ...]:
        """The stages between the change to coordinates and the combine."""
        return tuple(s for s in self.pre if isinstance(s, EntryStage))

    @property
    def is_linear(self) -> bool:
        """Whether the result is Σ cₜ ΔWₜ with coefficients known from the recipe."""
        return isinstance(self.combine, LinearCombine) and not self.pre and not self.post

    @property
    def randomised(self) -> bool:
        """Whether some stage draws random numbers."""
        return any(s.randomised for s in self.stages)

    @property
    def needs_moments(self) -> bool:
        """Whether some stage needs second moments of inputs."""
        return any(s.needs_moments for s in self.stages)

    @property
    def solves(self) -> bool:
        """Whether some stage solves a system of equations."""
        return any(s.solves for s in self.stages)

    @property
    def asks_model(self) -> bool:
        """Whether some stage must know something of the complete model: a pass of its own over it."""
        return any(survey.scope == "model" for survey in self.surveys())

    @property
    def weighs_model(self) -> bool:
        """Whether what a module becomes may depend on the weights in others: on what is asked of the model with them."""
        gram = isinstance(self.combine, GramCombine) and self.combine.scope == "model" and bool(self.on_deltas)
        return gram or any(survey.scope == "model" and survey.weighed for survey in self.surveys())

    def needs_coordinates(self, space: str) -> bool:
        """Return whether deltas are turned into a space's coordinates; `factors` are not a function of the deltas."""
        return isinstance(self.combine, EntryCombine) or bool(self.on_entries) or space == "factors"

    def low_rank(self, space: str) -> bool:
        """Return whether the result has an exact low-rank form."""
        return not self.needs_coordinates(space) or SPACES[space].low_rank

    def rank(self, space: str, ranks: Sequence[int], shape: tuple[int, int]) -> int:
        """Return the largest rank that the merge of deltas of these ranks can have."""
        span = shape
        for stage in self.on_deltas:
            ranks, span = stage.rank(ranks), stage.span(ranks, span)
        if self.needs_coordinates(space):
            found = SPACES[space].rank(ranks, span if SPACES[space].low_rank else shape)
        elif isinstance(self.combine, DeltaCombine):
            found = self.combine.rank(ranks, span)
        else:
            found = min(sum(ranks), *span)
        for after in self.post:
            found = after.rank(found)
        return found

    def problems(self, space: str, adapters: int) -> list[str]:
        """Return why these stages cannot run in this order, in this space, or with so many adapters."""
        found = [p for s in self.stages for p in s.problems(space, adapters)]
        entries = [str(s) for s in self.on_entries]
        order = [isinstance(s, EntryStage) for s in self.pre]
        if order != sorted(order):
            found.append(f"stages on deltas come before stages on entries ({', '.join(entries)})")
        if entries and isinstance(self.combine, DeltaCombine):
            found.append(f"{', '.join(entries)} act on entries, but {self.combine} combines matrices; use 'sum' or 'elect'")
        if self.post and not self.low_rank(space):
            words = ", ".join(str(s) for s in self.post)
            found.append(f"{words} after a merge in space {space!r}, which is dense; use space 'core' or 'knots'")
        if space == "factors" and (self.on_deltas or self.post or not isinstance(self.combine, (LinearCombine, EntryCombine))):
            found.append("space 'factors' has no deltas for these stages to act on; use 'core', 'knots' or 'delta'")
        return found

    def surveys(self) -> tuple[Survey, ...]:
        """Return what the stages on entries need to know; each is shown what the stages before it have made."""
        return tuple(
            Survey(
                survey.scope,
                lambda adapters, at=at, survey=survey: _After(self, at, survey.start(adapters)),  # type: ignore[misc]
                weighed=survey.weighed or bool(self.on_deltas) or any(s.weighs for s in self.on_entries[:at]),
            )
            for at, stage in enumerate(self._entrywise)
            for survey in stage.surveys()
        )

    def combine_block(self, block: Block) -> Tensor:
        """Return the merged entries (p, q) of a block that carries the results of all `surveys`.

        The block's weights are the coefficients where the combine is linear.
        """
        changed = self.reach(block, len(self.on_entries))
        if isinstance(self.combine, EntryCombine):
            return self.combine.combine(changed)
        return weighted_sum(changed.x, changed.weights)

    @cached_property
    def weighs_last(self) -> bool:
        """Whether weights enter after all else that is done entry by entry: `unweighted` can be kept for other weights."""
        seen = bool(self.on_deltas) or any(s.weighs for s in self.on_entries) or any(s.weighed for s in self.surveys())
        return not seen and (self.combine.weighs_last if isinstance(self.combine, EntryCombine) else True)

    def unweighted(self, block: Block) -> tuple[Tensor, ...]:
        """Return what is made of a block before weights enter, (…, p, q) each; asked where `weighs_last`."""
        changed = self.reach(block, len(self.on_entries))
        return self.combine.unweighted(changed) if isinstance(self.combine, EntryCombine) else (changed.x,)

    def weigh(self, unweighted: Sequence[Tensor], weights: Tensor) -> Tensor:
        """Return what `combine_block` does, bit for bit, from rows of what `unweighted` returned, and the block's weights."""
        if isinstance(self.combine, EntryCombine):
            return self.combine.weigh(unweighted, weights)
        return weighted_sum(unweighted[0], weights)

    def reach(self, block: Block, at: int) -> Block:
        """Return the block as the `at`-th stage on entries sees it: changed by those before it, with its own statistics."""
        statistics, x = block.statistics, block.x
        for stage, count in zip(self.on_entries[:at], self._counts, strict=False):
            x, statistics = stage.apply(block.of(x, statistics[:count])), statistics[count:]
        return block.of(x, statistics[: self._counts[at]] if at < len(self._counts) else block.statistics)

    @property
    def _entrywise(self) -> tuple[EntryStage | EntryCombine, ...]:
        return (*self.on_entries, self.combine) if isinstance(self.combine, EntryCombine) else self.on_entries

    @cached_property
    def _counts(self) -> tuple[int, ...]:
        return tuple(len(stage.surveys()) for stage in self._entrywise)

    def __str__(self) -> str:
        return " → ".join(str(s) for s in self.stages)


class _After:
    """A reduction that is shown blocks as a later stage sees them."""

    def __init__(self, pipeline: Pipeline, at: int, reduction: Reduction) -> None:
        self._pipeline = pipeline
        self._at = at
        self._reduction = reduction

    @property
    def stride(self) -> int:
        return getattr(self._reduction, "stride", 1)

    def observe(self, block: Block) -> None:
        self._reduction.observe(self._pipeline.reach(block, self._at))

    def end_pass(self) -> bool:
        return self._reduction.end_pass()

    @property
    def values(self) -> Tensor:
        return self._reduction.values
