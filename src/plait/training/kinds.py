"""Kinds of model that are trained: one module each, from a job to the trainer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from plait.training import causal, classification
from plait.training.encoding import EncodedSplits
from plait.training.job import ResolvedJob, TrainingJob, TrainingKind


class TrainerKind(Protocol):
    """What a module of a kind offers.

    Attributes:
        LOADER: the class of transformers that loads such a model.
        TASK_TYPE: PEFT's name of it.
    """

    LOADER: str
    TASK_TYPE: str

    def settings_of(self, job: TrainingJob, out: Path) -> Any:
        """Return the configuration of the trainer, with checkpoints in `out`.

        Raises:
            RecipeError: an argument is not known, or they contradict each other.
        """

    def check_first(self, opened: ResolvedJob, config: Any) -> None:
        """Read the first example as training will: a template that is missing, or refuses it, must not be found hours later."""

    def encode_data(self, opened: ResolvedJob, config: Any) -> EncodedSplits:
        """Tokenize and label what is trained on, and what the loss is also measured on.

        Raises:
            PlaitError: an example cannot be encoded, or none is left.
        """

    def notes_of(self, opened: ResolvedJob, encoded: EncodedSplits) -> tuple[str, ...]:
        """Return which rows and examples were left out or cut."""

    def make_trainer(self, opened: ResolvedJob, config: Any, encoded: EncodedSplits) -> Any:
        """Load the model and make the trainer, which may change `config`.

        Raises:
            PlaitError: arguments that the model does not allow, layers that are not there.
        """


#: By the name in a job.
KINDS: Mapping[TrainingKind, TrainerKind] = {"causal": causal, "sequence_classification": classification}
