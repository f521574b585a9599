"""The part of a recipe that says how its result learns from texts."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.recipes.evaluation import SplitName
from plait.records import Record


class TuneSpec(Record):
    """How a merge is tuned: what it sees, and how it learns."""

    texts: Annotated[
        Literal["split", "lines", "template"] | None,
        Field(
            description="A split of each task, generic lines that plait ships, or the bare prompt; a file where one is given."
        ),
    ] = None
    files: Annotated[dict[str, str], Field(description="Task → file of its texts, in place of `texts`.")] = Field(
        default_factory=dict
    )
    count: Annotated[int, Field(ge=1, description="Texts per task, at most.")] = 128
    split: Annotated[
        SplitName | None, Field(description="Of the tasks; `calibration` where there is one, else `train`, when not given.")
    ] = None
    steps: Annotated[int, Field(ge=0, description="Updates of the factors; 0 for the closed form at its best scale.")] = 48
    prompts: Annotated[int, Field(ge=1, description="Texts of every task per step.")] = 4
    learning_rate: Annotated[float, Field(gt=0, le=1)] = 5e-4
    held_out: Annotated[float, Field(ge=0, lt=1, description="Share of the texts that are only looked at; 0 for none.")] = 0.2
    look_every: Annotated[int, Field(ge=1, description="Steps between two looks at them.")] = 12
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
