"""The parts of a recipe that say how its result is evaluated."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.records import Record

SplitName = Literal["train", "calibration", "validation", "test"]
Count = Annotated[int, Field(ge=1)]


class Subset(Record):
    """A fixed sample of a split: the same examples on every machine, and a larger one holds every smaller one of its label."""

    max_samples: Annotated[int, Field(ge=1, description="Per task; smaller splits are taken whole.")]
    stratified: Annotated[bool, Field(description="Every label in its share, where a task has fixed labels.")] = True
    seed: Annotated[int, Field(ge=0)] = 0
    per_task: Annotated[dict[str, Count], Field(description="Task → its own number in place of max_samples.")] = Field(
        default_factory=dict
    )


class EvalSpec(Record):
    """How a result is evaluated."""

    split: Annotated[SplitName, Field(description="Of every task.")] = "test"
    subset: Subset | None = None
    batch_size: Annotated[int, Field(ge=1, description="Prompts at a time.")] = 16
    draws: Annotated[int, Field(ge=100, description="Of the bootstrap behind the intervals.")] = 2000
    seed: Annotated[int, Field(ge=0, description="Of the bootstrap.")] = 0
