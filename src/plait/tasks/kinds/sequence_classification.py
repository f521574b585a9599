"""One of a fixed set of labels, by a classification head."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.tasks.asking import LabelHead
from plait.tasks.schema import Labels, ReadTask, kind


@kind("sequence_classification")
class SequenceClassification(ReadTask):
    """One of a fixed set of labels, by a classification head on the model; heads belong to the task's own adapter."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    kind: Literal["sequence_classification"]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    metric: str = "accuracy"

    @property
    def ask(self) -> LabelHead:
        """How answers are asked of a model."""
        return LabelHead(labels=self.labels, max_tokens=self.max_tokens)

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels
