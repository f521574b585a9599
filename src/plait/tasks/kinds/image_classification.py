"""One of a fixed set of labels for an image, by a classification head, or by the likeness of an image and a text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, model_validator

from plait.errors import TaskError
from plait.tasks.asking import ClassPrompts, LabelHead
from plait.tasks.attached import column_of, decoders
from plait.tasks.images import image_bytes
from plait.tasks.inputs import FileColumn, Inputs, Row
from plait.tasks.schema import InputMaker, Labels, RowTask, TemplateText, kind
from plait.tasks.templates import Template as Compiled


def _listed(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


@kind("image_classification")
class ImageClassification(RowTask):
    """One of a fixed set of labels: the largest output of the task's own head, or the text that is nearest to the image."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    kind: Literal["image_classification"]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs, or what class prompts are filled with.")]
    image: Annotated[str, Field(min_length=1, description="The column: a path from the rows' file, or bytes.")] = "image"
    target: Annotated[TemplateText, Field(description="Jinja2 template of the right label.")] = "{{ label }}"
    class_prompts: Annotated[
        tuple[TemplateText, ...],
        BeforeValidator(_listed),
        Field(description="Jinja2 templates over `label`: of a model like CLIP, the label with the nearest texts is taken."),
    ] = ()
    metric: str = "accuracy"

    @model_validator(mode="after")
    def _no_prompt(self) -> ImageClassification:
        if self.prompt is not None:
            raise ValueError("'prompt' has no place here: the image is a column, and texts of classes are 'class_prompts'")
        return self

    @property
    def file_column(self) -> FileColumn:
        """The column with images."""
        return column_of(self.image, "image")

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels

    @property
    def ask(self) -> LabelHead | ClassPrompts:
        """How answers are asked of a model.

        Raises:
            TaskError: a template of a class's text does not take its label.
        """
        if not self.class_prompts:
            return LabelHead(labels=self.labels)
        rows = [{"label": label} for label in self.labels]
        texts = [self._filled(template, rows) for template in self.class_prompts]
        return ClassPrompts(labels=self.labels, texts=tuple(zip(*texts, strict=True)))

    def inputs_of(self) -> InputMaker:
        """Return the image of every row."""
        return lambda rows: [self._inputs(row) for row in rows]

    def own_digest(self) -> Mapping[str, Any]:
        """Return what answers depend on besides the fields and the examples: what decodes images."""
        return decoders("image")

    def _filled(self, template: str, rows: Sequence[Row]) -> list[str]:
        found = []
        for text in Compiled(template, f"{self.where}: class_prompts").each(rows):
            if isinstance(text, TaskError):
                raise text
            found.append(text)
        return found

    def _inputs(self, row: Row) -> Inputs | TaskError:
        data = image_bytes(row, self.file_column, self.where)
        return data if isinstance(data, TaskError) else {"image": data}
