"""What `plait train` is asked for (`Phases`) and what it will do (`TrainingPlan`): frozen, nothing left open.

Independent of files: `reading` turns one into the other.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from plait.errors import RecipeError, did_you_mean, join_words
from plait.hub.task_adapters import ADAPTER, PHASES
from plait.recipes.evaluation import EvalSpec
from plait.recipes.problems import Origins, Problem
from plait.recipes.schema import Recipe, Weight
from plait.records import Record, ShortRepr
from plait.tasks.schema import Task
from plait.training.data import TrainingData
from plait.training.encoding import LongExamples
from plait.training.job import LoraSettings, TrainingJob

LOGS = "logs"


class Phase(Record):
    """One adapter: what it is trained on, what it is evaluated on, and in what it differs from the others."""

    name: Annotated[
        str,
        Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", description="Of the adapter; that of its task where none is given."),
    ]
    task: Annotated[
        str | None,
        Field(min_length=1, description="A task file: its train split is trained on, its test split is evaluated on."),
    ] = None
    data: Annotated[
        TrainingData | None,
        Field(description="Other data than the task's train split, or a part of it (`split`, `limit`)."),
    ] = None
    weight: Annotated[Weight, Field(description="Its coefficient in the merge.")] = 1.0
    lora: Annotated[
        LoraSettings, Field(description="Its own `dropout` or `init_seed`; all else is the same in all phases.")
    ] = LoraSettings()
    arguments: Annotated[dict[str, Any], Field(description="On top of the `arguments` of all phases.")] = Field(
        default_factory=dict
    )
    seed: Annotated[
        int | None, Field(ge=0, lt=2**32, description="Of data order and dropout; that of all phases otherwise.")
    ] = None

    @field_validator("data", mode="before")
    @classmethod
    def _place_by_text(cls, value: Any) -> Any:
        """Accept `data: rows.jsonl`."""
        return {"place": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _something_to_learn(self) -> Phase:
        data = self.data or TrainingData()
        if self.task is None and data.place is None:
            raise ValueError("give 'task' (a task file) or 'data' (rows to train on)")
        if data.task is not None:
            raise ValueError("'data.task' belongs to single runs; here it is 'task', next to 'data'")
        return self


class Phases(Record):
    """Everything that `plait train` does."""

    version: Literal[1] = 1
    base_model: Annotated[str, Field(min_length=1, description="A folder, or `org/repo[@revision]`: of all phases.")]
    base_name: Annotated[
        str | None,
        Field(min_length=1, description="What the adapters call it, where `base_model` is a folder: `org/repo`."),
    ] = None
    lora: Annotated[LoraSettings, Field(description="One LoRA configuration for all phases.")] = LoraSettings()
    arguments: Annotated[
        dict[str, Any],
        Field(description="Values of TRL's SFTConfig (transformers' TrainingArguments for classification and speech)."),
    ] = Field(default_factory=dict)
    model: Annotated[dict[str, Any], Field(description="Values of TRL's ModelConfig about loading, such as dtype.")] = Field(
        default_factory=dict
    )
    long_examples: Annotated[LongExamples, Field(description="What becomes of examples of more than `max_length` tokens.")] = (
        "drop"
    )
    phases: Annotated[tuple[Phase, ...], Field(min_length=1)]
    merge: Annotated[dict[str, Any], Field(description="Keys of a recipe: method, scale, output, ….")] = Field(
        default_factory=dict
    )
    eval: EvalSpec = EvalSpec()
    seed: Annotated[int, Field(ge=0, lt=2**32, description="Of all chance that has no seed of its own.")] = 0

    @field_validator("merge", mode="before")
    @classmethod
    def _method_by_text(cls, value: Any) -> Any:
        """Accept `merge: ties`."""
        return {"method": value} if isinstance(value, str) else value


@dataclass(frozen=True)
class PlannedPhase:
    """One phase with nothing left open.

    Attributes:
        name: of phase and adapter.
        job: what is trained.
        folder: where, absolute.
        task: what it is evaluated on; None when nothing.
    """

    name: str
    job: TrainingJob
    folder: Path
    task: Task | None

    @property
    def adapter(self) -> Path:
        """Where the finished adapter is."""
        return self.folder / ADAPTER

    @property
    def log(self) -> Path:
        """What its libraries printed, and the traceback of a failure; not in the folder, which is the run's own."""
        return self.folder.parents[1] / LOGS / f"{self.name}.txt"


@dataclass(frozen=True, repr=False)
class TrainingPlan(ShortRepr):
    """What a PHASES.yaml asks for.

    Attributes:
        source: the file's name, for messages.
        out: where everything is written, absolute.
        base: of all phases: an absolute folder, or a place on the Hub.
        phases: in the file's order.
        recipe: of the merge; all its paths are absolute.
        notes: what is right, and probably not meant.
        origins: the line of each part of the file.
    """

    source: str
    out: Path
    base: str
    phases: tuple[PlannedPhase, ...]
    recipe: Recipe
    notes: tuple[str, ...] = ()
    origins: Origins = field(default_factory=lambda: Origins("phases"), repr=False)

    def phase(self, name: str) -> PlannedPhase:
        """Return a phase by its name.

        Raises:
            RecipeError: there is none.
        """
        for phase in self.phases:
            if phase.name == name:
                return phase
        names = [p.name for p in self.phases]
        raise RecipeError(
            f"{self.source}: no phase is called {name!r}; there are {join_words(names)}.{did_you_mean(name, names)}"
        )

    def refuse(self, problems: Iterable[tuple[int, str, str]]) -> None:
        """Raise what is wrong with phases: (index, key, what); do nothing when there is nothing.

        Raises:
            RecipeError: there is a problem; all of them with their lines.
        """
        self.origins.refuse(Problem((PHASES, index, key), text) for index, key, text in problems)


def phase_seed(seed: int, name: str) -> int:
    """Return the seed of a phase's A: another for every name, whatever the order of the phases; in [0, 2³¹)."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4]) >> 1
