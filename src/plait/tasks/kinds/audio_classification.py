"""One of a fixed set of labels for a sound, by a classification head."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from plait.tasks.asking import LabelHead
from plait.tasks.heard import HeardTask
from plait.tasks.schema import Labels, TemplateText, kind


@kind("audio_classification")
class AudioClassification(HeardTask):
    """One of a fixed set of labels, by a classification head on a model of sounds; heads belong to the task's own adapter."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    kind: Literal["audio_classification"]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    target: Annotated[TemplateText, Field(description="Jinja2 template of the right label.")] = "{{ label }}"
    metric: str = "accuracy"

    @model_validator(mode="after")
    def _no_prompt(self) -> AudioClassification:
        if self.prompt is not None:
            raise ValueError("'prompt' has no place here: the sound is a column")
        return self

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels

    @property
    def ask(self) -> LabelHead:
        """How answers are asked of a model."""
        return LabelHead(labels=self.labels)
