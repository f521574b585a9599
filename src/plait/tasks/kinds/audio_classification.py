"""One of a fixed set of labels for a sound, by a classification head."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from plait.errors import TaskError
from plait.tasks.asking import LabelHead
from plait.tasks.inputs import FileColumn, Inputs, Row
from plait.tasks.schema import InputMaker, Labels, RowTask, TemplateText, kind
from plait.tasks.sounds import ENDINGS, sound_bytes


@kind("audio_classification")
class AudioClassification(RowTask):
    """One of a fixed set of labels, by a classification head on a model of sounds; heads belong to the task's own adapter."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    problems_shown: ClassVar = 50
    kind: Literal["audio_classification"]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    audio: Annotated[str, Field(min_length=1, description="The column: a path from the rows' file, or bytes.")] = "audio"
    target: Annotated[TemplateText, Field(description="Jinja2 template of the right label.")] = "{{ label }}"
    metric: str = "accuracy"

    @model_validator(mode="after")
    def _no_prompt(self) -> AudioClassification:
        if self.prompt is not None:
            raise ValueError("'prompt' has no place here: the sound is a column")
        return self

    @property
    def file_column(self) -> FileColumn:
        """The column with sounds."""
        return FileColumn(self.audio, "audio", ENDINGS)

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels

    @property
    def ask(self) -> LabelHead:
        """How answers are asked of a model."""
        return LabelHead(labels=self.labels)

    def inputs_of(self) -> InputMaker:
        """Return the sound of every row."""
        return lambda rows: [self._inputs(row) for row in rows]

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples: what decodes and resamples sounds."""
        return {"soundfile": version("soundfile"), "scipy": version("scipy")}

    def _inputs(self, row: Row) -> Inputs | TaskError:
        data = sound_bytes(row, self.file_column, self.where)
        return data if isinstance(data, TaskError) else {"audio": data}
