"""One of a fixed set of labels, by a classification head."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.tasks.asking import Head
from plait.tasks.schema import Labels, RowTask, TemplateText, kind


@kind("sequence_classification")
class SequenceClassification(RowTask):
    """One of a fixed set of labels, by a classification head on the model; heads belong to the task's own adapter."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    kind: Literal["sequence_classification"]
    prompt: Annotated[TemplateText, Field(description="Jinja2 template of the text that is classified.")]
    target: Annotated[TemplateText | None, Field(description="Jinja2 template of the right label.")] = None
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    metric: str = "accuracy"
    max_tokens: Annotated[int | None, Field(ge=1, description="Longer texts lose their end; otherwise they are an error.")] = (
        None
    )

    @property
    def ask(self) -> Head:
        """How answers are asked of a model."""
        return Head(self.labels, self.max_tokens)

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels
