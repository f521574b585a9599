"""The part of a recipe that names the texts on which second moments, and a scale, are taken."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from plait.recipes.evaluation import SplitName
from plait.records import Record


class TextsSpec(Record):
    """Which texts of its own task every adapter reads."""

    texts: Annotated[
        Literal["split", "lines", "template"] | None,
        Field(
            description="A split of each task, generic lines that plait ships, or the bare prompt; when not given: a file "
            "where `files` names one, else a split where the task has `calibration` or `train`, else lines."
        ),
    ] = None
    files: Annotated[dict[str, str], Field(description="Files of single tasks' texts, in place of `texts`: task → file.")] = (
        Field(default_factory=dict)
    )
    count: Annotated[
        int | None,
        Field(ge=1, description="Texts per task that are read, at most; 128, or all generic lines, when not given."),
    ] = None
    split: Annotated[
        SplitName | None,
        Field(description="Split that texts are taken from; `calibration` where there is one, else `train`, when not given."),
    ] = None


class CalibrationSpec(TextsSpec):
    """What every adapter reads, with its own task's prompt, when its inputs are looked at. No label is read."""

    count: Annotated[int, Field(ge=1, description="Texts per task that are read, at most.")] = 32
    tokens: Annotated[
        int,
        Field(
            ge=16,
            description="Inputs kept per module at most, evenly spread; narrower modules keep their sum, over twice as many.",
        ),
    ] = 2048
    seed: Annotated[int, Field(ge=0, lt=2**63, description="Seed of the choice of texts and tokens.")] = 0
