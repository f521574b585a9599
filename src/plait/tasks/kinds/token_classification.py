"""One of a fixed set of labels for every word, by a classification head."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from plait.errors import TaskError
from plait.tasks.asking import TagHead
from plait.tasks.inputs import Inputs, Row, Words, inputs_of
from plait.tasks.schema import InputMaker, Labels, RowTask, TargetMaker, kind

_SPAN_LABEL = re.compile("O|[BIES]-.+")


@kind("token_classification")
class TokenClassification(RowTask):
    """A label for every word, by a classification head at the word's first token; heads belong to the task's own adapter."""

    metrics: ClassVar = ("entity_f1", "word_accuracy")
    kind: Literal["token_classification"]
    labels: Annotated[Labels, Field(description="In the order of the head's outputs.")]
    words: Annotated[
        str, Field(pattern=r"^[A-Za-z_]\w*$", description="The column that lists the words; a text is cut at its blanks.")
    ] = "words"
    tags: Annotated[
        str, Field(min_length=1, description="The column that lists a label per word, or its number among `labels`.")
    ] = "tags"
    metric: str = "entity_f1"

    @model_validator(mode="after")
    def _labels_suit(self) -> TokenClassification:
        given = [name for name in ("prompt", "target") if getattr(self, name) is not None]
        if given:
            raise ValueError(f"{given[0]!r} has no place here: words and labels are columns, named by 'words' and 'tags'")
        if broken := [label for label in self.labels if label.split() != [label]]:
            raise ValueError(f"labels: {broken[0]!r} has a blank; a label per word must have none")
        if self.metric == "entity_f1" and (other := [label for label in self.labels if not _SPAN_LABEL.fullmatch(label)]):
            raise ValueError(
                f"labels: {other[0]!r} is not O, B-…, I-…, E-… or S-…, of which 'entity_f1' makes entities; use 'word_accuracy'"
            )
        return self

    @classmethod
    def needs_target(cls) -> bool:
        """Whether the right answer is a template's."""
        return False

    @property
    def ask(self) -> TagHead:
        """How answers are asked of a model."""
        return TagHead(labels=self.labels)

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row before its target."""
        return [f"{{{{ {self.words} }}}}"]

    def inputs_of(self) -> InputMaker:
        """Return the words of every row."""
        return lambda rows: [self._inputs(row) for row in rows]

    def targets_of(self) -> TargetMaker:
        """Return the labels of every row's words, divided by blanks."""
        return lambda rows: [self._target(row) for row in rows]

    def _inputs(self, row: Row) -> Inputs | TaskError:
        words = self._words(row)
        return words if isinstance(words, TaskError) else inputs_of(Words(words))

    def _words(self, row: Row) -> tuple[str, ...] | TaskError:
        value = row.get(self.words)
        words = value.split() if isinstance(value, str) else value
        if not isinstance(words, (list, tuple)) or not words or not all(isinstance(w, str) and w.strip() for w in words):
            return TaskError(
                f"{self.where}: words: column {self.words!r} is not a list of words; the row has {', '.join(row)}."
            )
        return tuple(words)

    def _target(self, row: Row) -> str | TaskError:
        words, value = self._words(row), row.get(self.tags)
        if isinstance(words, TaskError):
            return words
        tags = value.split() if isinstance(value, str) else value
        if not isinstance(tags, (list, tuple)):
            return TaskError(f"{self.where}: tags: column {self.tags!r} is not a list of labels; the row has {', '.join(row)}.")
        if len(tags) != len(words):
            return TaskError(f"{self.where}: tags: {len(tags)} labels of {len(words)} words.")
        named = [_label(tag, self.labels) for tag in tags]
        if None in named:
            known = ", ".join(map(repr, self.labels))
            return TaskError(f"{self.where}: tags: {tags[named.index(None)]!r} is none of {known}, nor the number of one.")
        return " ".join(map(str, named))


def _label(tag: object, labels: Sequence[str]) -> str | None:
    """Return the label that is meant, by itself or by its number; None where there is no such label."""
    if isinstance(tag, int) and not isinstance(tag, bool):
        return labels[tag] if 0 <= tag < len(labels) else None
    return tag if isinstance(tag, str) and tag in labels else None
