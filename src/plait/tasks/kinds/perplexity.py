"""How likely the model finds a text."""

from __future__ import annotations

from typing import ClassVar, Literal

from plait.errors import TaskError
from plait.tasks.asking import TargetLikelihood
from plait.tasks.schema import PromptedTask, kind


@kind("perplexity")
class Perplexity(PromptedTask):
    """How surprised the model is by the target, per token, after the prompt (which may be empty)."""

    metrics: ClassVar = ("perplexity",)
    kind: Literal["perplexity"]
    metric: str = "perplexity"

    @classmethod
    def needs_prompt(cls) -> bool:
        """Whether there must be a prompt."""
        return False

    @property
    def ask(self) -> TargetLikelihood:
        """How answers are asked of a model."""
        return TargetLikelihood()

    def sources(self) -> list[str]:
        """Return the templates that are filled from a row: the text itself, too."""
        return [*super().sources(), *([] if self.target is None else [self.target])]

    def check_target(self, target: str) -> None:
        """Make sure that there is a text.

        Raises:
            TaskError: it is empty.
        """
        if not target.strip():
            raise TaskError(f"{self.where}: target {target!r} is empty; {self.metric} needs one.")
