"""A number, by a head of one output."""

from __future__ import annotations

from typing import ClassVar, Literal

from plait.tasks.asking import NumberHead
from plait.tasks.schema import NumberTask, kind


@kind("regression")
class Regression(NumberTask):
    """A number that a head of one output gives of a text or of two; heads belong to the task's own adapter."""

    metrics: ClassVar = ("pearson", "spearman", "mean_squared_error")
    kind: Literal["regression"]
    metric: str = "pearson"

    @property
    def ask(self) -> NumberHead:
        """How answers are asked of a model."""
        return NumberHead(max_tokens=self.max_tokens)
