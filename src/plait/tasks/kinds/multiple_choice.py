"""One of each row's own choices, as continuation of a prompt."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.errors import TaskError
from plait.tasks.inputs import Row
from plait.tasks.schema import ChoiceMaker, RankedTask, TemplateText, combine_texts, kind
from plait.tasks.templates import Template as Compiled


@kind("multiple_choice")
class MultipleChoice(RankedTask):
    """One of each row's own choices; the likeliest continuation of the prompt is the prediction."""

    metrics: ClassVar = ("accuracy",)
    kind: Literal["multiple_choice"]
    choices: Annotated[
        str | tuple[TemplateText, ...], Field(description="The column that lists them, or one template per choice.")
    ]
    metric: str = "accuracy"

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row before its target."""
        return super().sources() + ([] if isinstance(self.choices, str) else list(self.choices))

    def choices_of(self) -> ChoiceMaker:
        """Return the choices that every row lists, or that are made of it."""
        if isinstance(self.choices, str):
            column = self.choices
            return lambda rows: [self._listed(row, column) for row in rows]
        templates = [Compiled(t, f"{self.where}: choices") for t in self.choices]
        return lambda rows: combine_texts(templates, rows, self._distinct)

    def _listed(self, row: Row, column: str) -> tuple[str, ...] | TaskError:
        value = row.get(column)
        if not isinstance(value, (list, tuple)) or not all(isinstance(v, str) for v in value):
            return TaskError(f"{self.where}: choices: column {column!r} is not a list of texts; the row has {', '.join(row)}.")
        return self._distinct(tuple(value))

    def _distinct(self, choices: tuple[str, ...]) -> tuple[str, ...] | TaskError:
        if len(set(choices)) < max(2, len(choices)):
            return TaskError(f"{self.where}: choices: {list(choices)} are not two or more different texts.")
        return choices
