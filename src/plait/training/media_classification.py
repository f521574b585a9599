"""A job on a model of images or of sounds with a classification head → transformers' `Trainer`.

The head belongs to the task: it is drawn at random, trained and saved completely with the LoRA (`modules_to_save`), as is all
else that the checkpoint lacks. PEFT has no task type of such models.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlanError
from plait.extras import optional
from plait.libraries.transformers.conversion import newly_made
from plait.libraries.transformers.layers import MEDIA_HEADS
from plait.tasks.examples import Examples
from plait.training import media
from plait.training.classification import load_with_labels
from plait.training.data import LoadedData
from plait.training.encoding import EncodedData, EncodedSplits
from plait.training.job import LoraSettings, ResolvedJob, TrainingJob
from plait.training.settings import get_adapted, lora_config


@dataclass(frozen=True)
class MediaClassification:
    """Classifiers of images, or of sounds; see `TrainerKind` for what its methods do."""

    LOADER: str
    PIPELINE: str
    TASK_TYPE: str | None = None

    def settings_of(self, job: TrainingJob, out: Path) -> Any:
        """Return the job's `TrainingArguments`."""
        return media.media_settings(job, out)

    def lora_of(self, lora: LoraSettings, model: Any, fresh: Sequence[str] = ()) -> Any:
        """Return PEFT's configuration, with the head and what else is new saved."""
        heads = [name for name in MEDIA_HEADS if hasattr(model, name)]
        if not heads:
            raise PlanError(f"{type(model).__name__} has no head of a known name ({', '.join(MEDIA_HEADS)}).")
        asked = (*(lora.modules_to_save or ()), *heads)
        more = [path for path in fresh if not any(part in asked for part in path.split("."))]
        saved = tuple(dict.fromkeys((*asked, *more)))
        config = lora_config(lora.model_copy(update={"modules_to_save": saved}), self.TASK_TYPE)
        config.exclude_modules = [*heads, *more]  # what is trained completely needs no LoRA too
        return config

    def check_first(self, opened: ResolvedJob, config: Any, evaluated: Examples | None) -> None:
        """Prepare the first example, and look at how long sounds are."""
        model, processor = media.outline(opened, self.LOADER), media.processor_of(opened)
        encoded, _ = self.encode_data(opened, config)
        media.check_batch(model, _Batches(processor, torch.float32)(encoded.items[:1]))
        media.check_evaluated(model, processor, evaluated)

    def encode_data(self, opened: ResolvedJob, config: Any) -> EncodedSplits:
        """Number the labels."""
        if not opened.job.labels or opened.job.lora is None:
            raise PlanError("a classifier is trained as a LoRA on a task with labels.")
        model, processor, labels = media.outline(opened, self.LOADER), media.processor_of(opened), opened.job.labels

        def encoded(data: LoadedData) -> EncodedData:
            heard = media.perceivable(model, processor, data)
            items = tuple({"example": e, "labels": labels.index(e.target)} for e in heard.kept)
            return EncodedData(items, (), left_out=len(data.examples) - len(items), reasons=heard.notes)

        return encoded(opened.data), None if opened.eval_data is None else encoded(opened.eval_data)

    def notes_of(self, opened: ResolvedJob, encoded: EncodedSplits) -> tuple[str, ...]:
        """Return which examples were left out."""
        return media.notes_of(opened, encoded)

    def make_trainer(self, opened: ResolvedJob, config: Any, encoded: EncodedSplits) -> Any:
        """Load the model, with a new head of the job's labels."""
        transformers, processor = optional("transformers", "train", "training"), media.processor_of(opened)
        transformers.set_seed(config.seed)  # head and A are drawn below
        model, report = load_with_labels(getattr(transformers, self.LOADER), opened)
        fresh = sorted({key.rpartition(".")[0] for key in newly_made(report)})
        lora, (train, held) = opened.job.lora, encoded
        if lora is None:
            raise AssertionError("checked before")
        return transformers.Trainer(
            model=get_adapted(model, self.lora_of(lora, model, fresh), opened.job.base),
            args=config,
            train_dataset=list(train.items),
            eval_dataset=list(held.items) if held else None,
            processing_class=media.Readers(processor),
            data_collator=_Batches(processor, model.dtype),
        )


class _Batches:
    """Makes a batch of images or sounds and the numbers of their labels."""

    def __init__(self, processor: Any, dtype: torch.dtype) -> None:
        self._processor, self._dtype = processor, dtype

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a model's inputs, and `labels` (items,) int64."""
        batch = media.inputs_of(self._processor, [item["example"] for item in items])
        return {**media.in_dtype(batch, self._dtype), "labels": torch.tensor([item["labels"] for item in items])}


IMAGES = MediaClassification("AutoModelForImageClassification", "image-classification")
SOUNDS = MediaClassification("AutoModelForAudioClassification", "audio-classification")
