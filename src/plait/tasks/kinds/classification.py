"""One of a fixed set of labels, as continuation of a prompt."""

from __future__ import annotations

from typing import ClassVar, Literal

from plait.tasks.schema import Labels, RankedTask, kind


@kind("classification")
class Classification(RankedTask):
    """One of a fixed set of labels; the likeliest continuation of the prompt is the prediction."""

    metrics: ClassVar = ("accuracy", "macro_f1")
    kind: Literal["classification"]
    labels: Labels
    metric: str = "accuracy"

    @property
    def closed_labels(self) -> tuple[str, ...]:
        """All possible answers."""
        return self.labels
