"""Kinds of model that are trained: one module each, from a job to the trainer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from plait.tasks.examples import Examples
from plait.training import causal, classification, media_classification, speech
from plait.training.encoding import EncodedSplits
from plait.training.job import LoraSettings, ResolvedJob, TrainingJob, TrainingKind


class TrainerKind(Protocol):
    """What a module of a kind offers.

    Attributes:
        LOADER: the class of transformers that loads such a model.
        TASK_TYPE: PEFT's name of it; None where it has none.
        PIPELINE: what the Hub calls its use; None where that is left to the Hub.
    """

    @property
    def LOADER(self) -> str: ...  # noqa: D102
    @property
    def TASK_TYPE(self) -> str | None: ...  # noqa: D102
    @property
    def PIPELINE(self) -> str | None: ...  # noqa: D102

    def settings_of(self, job: TrainingJob, out: Path) -> Any:
        """Return the configuration of the trainer, with checkpoints in `out`.

        Raises:
            RecipeError: an argument is not known, or they contradict each other.
        """

    def lora_of(self, lora: LoraSettings, model: Any, fresh: Sequence[str] = ()) -> Any:
        """Return PEFT's configuration of an adapter.

        Args:
            lora: as asked for.
            model: that is adapted, with or without weights.
            fresh: modules that its checkpoint lacks, which are trained and saved completely.

        Raises:
            PlanError: the model has no head that can be trained.
        """

    def check_first(self, opened: ResolvedJob, config: Any, evaluated: Examples | None) -> None:
        """Read the first example as training will: a template that is missing, or refuses it, must not be found hours later.

        Args:
            opened: the job.
            config: of the trainer.
            evaluated: what is asked after the training; None for nothing.

        Raises:
            PlaitError: it cannot be read so.
        """

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
KINDS: Mapping[TrainingKind, TrainerKind] = {
    "causal": causal,
    "sequence_classification": classification,
    "image_classification": media_classification.IMAGES,
    "audio_classification": media_classification.SOUNDS,
    "speech_to_text": speech,
}
