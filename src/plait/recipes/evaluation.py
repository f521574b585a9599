"""The part of a recipe that describes how its result is evaluated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from plait.records import Record

SplitName = Literal["train", "calibration", "validation", "test"]
PositiveInt = Annotated[int, Field(ge=1)]


class Subset(Record):
    """A fixed sample of a split: the same examples on every machine, and a larger one holds every smaller one of its label."""

    max_samples: Annotated[int | None, Field(ge=1, description="Examples per task, at most; all of them when not given.")] = (
        None
    )
    stratified: Annotated[bool, Field(description="Take every label in its share, where a task has fixed labels.")] = True
    seed: Annotated[int, Field(ge=0, description="Seed of the choice of the subset.")] = 0
    per_task: Annotated[
        dict[str, PositiveInt | None],
        Field(description="Examples of single tasks: task → number, or null for all."),
    ] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _limits_something(self) -> Subset:
        if self.max_samples is None and not self.per_task:
            raise ValueError("a subset needs max_samples, or per_task; leave it out for all examples")
        return self


class EvalSpec(Record):
    """How a result is evaluated."""

    split: Annotated[SplitName, Field(description="Split of the tasks whose examples are evaluated.")] = "test"
    subset: Annotated[Subset | None, Field(description="A fixed sample of the split; all of it without one.")] = None
    batch_size: Annotated[int, Field(ge=1, description="Prompts per batch.")] = 16
    draws: Annotated[int, Field(ge=100, description="Draws of the bootstrap that gives the intervals.")] = 2000
    seed: Annotated[int, Field(ge=0, description="Seed of the bootstrap.")] = 0
