"""A text that the model writes, compared with the target."""

from __future__ import annotations

import re
from typing import Annotated, ClassVar, Literal

from pydantic import Field

from plait.errors import TaskError
from plait.tasks.asking import Generated
from plait.tasks.normalizing import Normalization, check_reference, normalizer
from plait.tasks.schema import PromptedTask, TemplateText, kind

_ROUGE_SEES = re.compile("[a-z0-9]", re.IGNORECASE | re.ASCII)


@kind("generation")
class Generation(PromptedTask):
    """What the model writes, greedily, compared with the target."""

    metrics: ClassVar = ("exact_match", "wer", "cer", "rouge1", "rouge2", "rougeL")
    kind: Literal["generation"]
    metric: str = "exact_match"
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    stop: Annotated[tuple[TemplateText, ...], Field(description="Texts at which an answer ends; they are cut off.")] = ()
    normalize: Annotated[
        tuple[Normalization, ...],
        Field(description="Done to answer and target before they are compared; blanks at the ends go."),
    ] = ()

    @property
    def ask(self) -> Generated:
        """How answers are asked of a model."""
        return Generated(self.max_new_tokens, self.stop)

    def check_target(self, target: str) -> None:
        """Make sure that the metric is defined for a target.

        Raises:
            TaskError: it is not.
        """
        if self.metric in ("wer", "cer"):
            check_reference(target, normalizer(self.normalize), self.metric, self.where)
        if self.metric.startswith("rouge") and not _ROUGE_SEES.search(target):
            raise TaskError(
                f"{self.where}: target {target!r} has none of a–z and 0–9, all that rouge-score sees; use 'wer' or 'cer'."
            )
