"""What all training on sounds and images shares: settings, what prepares inputs, what a batch of them is."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlanError, RecipeError, TaskError
from plait.evaluation.hearing import check_lengths, sound_inputs
from plait.evaluation.vision import image_inputs
from plait.extras import optional
from plait.hub.pretrained import load_config, load_feature_extractor, load_image_processor, refuse_failures
from plait.libraries.transformers.senses import fewest_samples
from plait.tasks.examples import Examples
from plait.tasks.hearing import sample_counts, window
from plait.training.data import LoadedData
from plait.training.encoding import EncodedSplits
from plait.training.formats import Perceived
from plait.training.job import ResolvedJob, TrainingJob
from plait.training.settings import loading, trainer_settings

_GENERATION = "generation_config.json"
_CHECKPOINTING = ("activation_checkpointing", "gradient_checkpointing")


@dataclass(frozen=True)
class Readers:
    """What makes a model's inputs, in the form of what a trainer saves with weights; no tokenizer where no text is read."""

    processor: Any
    tokenizer: Any = None

    def save_pretrained(self, folder: str) -> None:
        """Write the files of both."""
        for one in (self.processor, self.tokenizer):
            if one is not None:
                one.save_pretrained(folder)


def media_settings(job: TrainingJob, out: Path) -> Any:
    """Return a job's `TrainingArguments`.

    Raises:
        RecipeError: an argument is not known, they contradict each other, or examples would be cut.
    """
    if job.long_examples == "truncate":
        raise RecipeError("long_examples: sounds and images are not cut, since their labels are of the whole; use 'drop'.")
    kind = optional("transformers", "train", "training").TrainingArguments
    own: dict[str, Any] = {"include_num_input_tokens_seen": "no"}
    for asked in _CHECKPOINTING:
        if job.arguments.get(asked):  # what an encoder computes again has gradients only so, since its input needs none
            own[f"{asked}_kwargs"] = {"use_reentrant": False}
    arguments = {**own, **job.arguments, "remove_unused_columns": False, "label_names": ["labels"]}
    return trainer_settings(kind, job.model_copy(update={"arguments": arguments}), out)


def processor_of(opened: ResolvedJob) -> Any:
    """Return what makes the model's input of a job's examples.

    Raises:
        TaskError: the base has none, or an example is neither an image nor a sound.
    """
    trust = bool(loading(opened.job.model).get("trust_remote_code", False))
    load = load_image_processor if perceived(opened.data)[0].kind == "image" else load_feature_extractor
    return load(opened.base.folder, trust_remote_code=trust)


def outline(opened: ResolvedJob, kind: str) -> Any:
    """Return the model of a job without weights, with its settings of generation.

    Args:
        opened: the job.
        kind: the Auto class of transformers.

    Raises:
        PlanError: transformers does not know the model, or has no such class of it.
    """
    trust = bool(loading(opened.job.model).get("trust_remote_code", False))
    name, revision = opened.model
    config = load_config(name, revision=revision, trust_remote_code=trust, folder=opened.base.folder)
    transformers, why = optional("transformers", "train", "training"), "this model cannot be trained so"
    with refuse_failures(opened.job.base, why, PlanError, folder=opened.base.folder), torch.device("meta"):
        model = getattr(transformers, kind).from_config(config, trust_remote_code=trust)
        if (opened.base.folder / _GENERATION).is_file():
            model.generation_config = transformers.GenerationConfig.from_pretrained(opened.base.folder)
    return model


def inputs_of(processor: Any, examples: Sequence[Perceived]) -> dict[str, Tensor]:
    """Return a batch of a model's inputs by their names; sounds are filled up with silence, as the extractor does it."""
    files = [example.data for example in examples]
    if examples[0].kind == "image":
        return {"pixel_values": image_inputs(processor, files)}
    padding = {} if window(processor) else {"padding": True}
    return dict(sound_inputs(processor, files, **padding))


def in_dtype(batch: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Return a batch with its inputs in the dtype of the model; masks and labels are whole numbers."""
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in batch.items()}


def perceived(data: LoadedData) -> list[Perceived]:
    """Return a job's examples.

    Raises:
        TaskError: one is neither an image nor a sound.
    """
    found = [example for example in data.examples if isinstance(example, Perceived)]
    if len(found) < len(data.examples) or not found:
        raise TaskError(f"{data.summary}: an example is neither an image nor a sound; a job of another kind learns it.")
    return found


@dataclass(frozen=True)
class Heard:
    """Which examples a model can perceive, and why it cannot others.

    Attributes:
        kept: in their order.
        long: how many are longer than what it hears.
        short: how many are shorter than its convolutions need.
        seconds: that it hears; None for any.
    """

    kept: tuple[Perceived, ...]
    long: int = 0
    short: int = 0
    seconds: float | None = None

    @property
    def notes(self) -> tuple[str, ...]:
        """What is left out, in words."""
        found = {
            f"{self.long} sounds are left out: longer than the {self.seconds or 0:g} seconds that the model hears.": self.long,
            f"{self.short} sounds are left out: shorter than the model's convolutions need.": self.short,
        }
        return tuple(note for note, count in found.items() if count)


def perceivable(model: Any, processor: Any, data: LoadedData) -> Heard:
    """Return which examples are trained on: images all, sounds those that the model hears whole.

    Args:
        model: of transformers; its weights are not used.
        processor: of the model.
        data: of a job.

    Raises:
        TaskError: none is left, or whether the extractor cuts sounds is not known.
    """
    examples = perceived(data)
    if examples[0].kind == "image":
        return Heard(tuple(examples))
    counts, most, least = sample_counts(processor, [e.data for e in examples]), window(processor), fewest_samples(model)
    long = sum(bool(most) and n > (most or 0) for n in counts)
    short = sum(n < least for n in counts)
    kept = tuple(e for e, n in zip(examples, counts, strict=True) if n >= least and not (most and n > most))
    found = Heard(kept, long, short, most and most / processor.sampling_rate)
    if not kept:
        raise TaskError(f"{data.summary}: no example is left. {' '.join(found.notes)}")
    return found


def check_evaluated(model: Any, processor: Any, examples: Examples | None) -> None:
    """Make sure that what a phase is evaluated on after its training can be heard.

    Raises:
        TaskError: a sound is too long or too short.
    """
    if examples is not None and any(e.audio is not None for e in examples.items):
        check_lengths(model, processor, examples, sample_counts(processor, [e.audio or b"" for e in examples.items]))


def check_batch(model: Any, batch: Mapping[str, Tensor]) -> None:
    """Look at a first batch: Whisper reads one number of frames only.

    Raises:
        TaskError: the extractor makes another one.
    """
    if model.config.model_type == "whisper":
        wanted, made = 2 * int(model.config.max_source_positions), batch["input_features"].shape[-1]
        if made != wanted:
            raise TaskError(f"the feature extractor makes {made} frames of a sound; the model hears {wanted}.")


def notes_of(opened: ResolvedJob, encoded: EncodedSplits) -> tuple[str, ...]:
    """Return which examples were left out; see `TrainerKind`."""
    train, held = encoded
    return (*opened.data.notes, *train.reasons, *(f"held out: {note}" for note in (held.reasons if held else ())))
