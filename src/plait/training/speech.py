"""A job on a speech-to-text model with an encoder and a decoder → transformers' `Trainer`.

A transcript is learned as evaluation asks for it: after the tokens of language and task, and what was spoken before where the
task has a prompt. Loss is on the transcript and its end alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlanError, TaskError
from plait.evaluation.model_calls import padded
from plait.evaluation.transcribing import beginning, transcript_tokens, writer_of
from plait.extras import optional
from plait.hub.pretrained import load_model, load_tokenizer
from plait.libraries.transformers.kinds import writes_sounds_down
from plait.tasks.asking import Transcribed
from plait.tasks.examples import Examples
from plait.training import media
from plait.training.data import LoadedData
from plait.training.encoding import IGNORED, EncodedData, EncodedSplits
from plait.training.formats import Perceived
from plait.training.job import LoraSettings, ResolvedJob
from plait.training.settings import get_adapted, loading, lora_config

LOADER, TASK_TYPE, PIPELINE = "AutoModelForSpeechSeq2Seq", None, "automatic-speech-recognition"
settings_of, notes_of = media.media_settings, media.notes_of


def lora_of(lora: LoraSettings, model: Any, fresh: Sequence[str] = ()) -> Any:
    """Return PEFT's configuration; see `TrainerKind`."""
    return lora_config(lora, TASK_TYPE)


def check_first(opened: ResolvedJob, config: Any, evaluated: Examples | None) -> None:
    """Encode everything, prepare the first sound, and look at what is evaluated; see `TrainerKind`."""
    encoder = _Encoder(opened)
    encoded, _ = encode_data(opened, config)
    media.check_batch(encoder.model, _Batches(encoder.readers.processor, 0, torch.float32)(encoded.items[:1]))
    if evaluated is not None:
        media.check_evaluated(encoder.model, encoder.readers.processor, evaluated)
        ask = evaluated.task.ask
        if isinstance(ask, Transcribed):
            writer_of(encoder.model, encoder.readers.tokenizer, encoder.readers.processor, evaluated, ask)


def encode_data(opened: ResolvedJob, config: Any) -> EncodedSplits:
    """Tokenize transcripts; see `TrainerKind`."""
    if opened.job.lora is None:
        raise PlanError("a speech-to-text model is trained as a LoRA.")
    encoder = _Encoder(opened)
    held = None if opened.eval_data is None else encoder.encode_all(opened.eval_data)
    return encoder.encode_all(opened.data), held


def make_trainer(opened: ResolvedJob, config: Any, encoded: EncodedSplits) -> Any:
    """Load the model; see `TrainerKind`."""
    transformers, readers = optional("transformers", "train", "training"), _readers(opened)
    name, revision = opened.model
    model = load_model(
        getattr(transformers, LOADER),
        name,
        folder=opened.base.folder,
        revision=revision,
        **{"dtype": "float32", **loading(opened.job.model)},
    )
    transformers.set_seed(config.seed)  # A is drawn below
    train, held = encoded
    return transformers.Trainer(
        model=get_adapted(model, lora_of(_lora(opened), model), opened.job.base),
        args=config,
        train_dataset=list(train.items),
        eval_dataset=list(held.items) if held else None,
        processing_class=readers,
        data_collator=_Batches(readers.processor, readers.tokenizer.pad_token_id or 0, model.dtype),
        compute_loss_func=_loss(config.label_smoothing_factor),
    )


def _lora(opened: ResolvedJob) -> LoraSettings:
    if opened.job.lora is None:
        raise AssertionError("checked before")
    return opened.job.lora


def _readers(opened: ResolvedJob) -> media.Readers:
    name, revision = opened.model
    trust = bool(loading(opened.job.model).get("trust_remote_code", False))
    tokenizer = load_tokenizer(name, revision=revision, trust_remote_code=trust, folder=opened.base.folder)
    return media.Readers(media.processor_of(opened), tokenizer)


class _Encoder:
    """Makes what the decoder reads and learns of transcripts.

    Attributes:
        model: without weights.
        readers: of the base.
    """

    def __init__(self, opened: ResolvedJob) -> None:
        self._ask = Transcribed(language=opened.job.language, task=opened.job.speech_task)
        self.model = media.outline(opened, LOADER)
        if not writes_sounds_down(self.model.config.model_type):
            raise PlanError(f"{opened.job.base}: training is for speech-to-text models with an encoder and a decoder.")
        self.readers = _readers(opened)
        decoder = getattr(self.model.config, "decoder", self.model.config)
        places = (getattr(decoder, key, None) for key in ("max_target_positions", "max_position_embeddings"))
        self._places: int | None = next(filter(None, places), None)
        self._before: dict[str, list[int]] = {}

    def encode_all(self, data: LoadedData) -> EncodedData:
        """Return sounds and tokens of all examples whose sounds are heard whole and whose transcripts have room.

        Raises:
            TaskError: none is left, or the model does not take the task's options.
        """
        heard = media.perceivable(self.model, self.readers.processor, data)
        items = [self._item(example, data.summary) for example in heard.kept]
        fitting = [item for item in items if self._places is None or len(item["labels"]) <= self._places]
        left = len(items) - len(fitting)
        reasons = heard.notes
        if left:
            reasons += (f"{left} transcripts are left out: more tokens than the decoder's {self._places} places.",)
        if not fitting:
            raise TaskError(f"{data.summary}: no example is left. {' '.join(reasons)}")
        return EncodedData(tuple(fitting), (), left_out=len(data.examples) - len(fitting), reasons=reasons)

    def _item(self, example: Perceived, where: str) -> dict[str, Any]:
        if example.before not in self._before:
            self._before[example.before] = beginning(self.model, self.readers.tokenizer, where, self._ask, example.before)
        before = self._before[example.before]
        ids = [*before, *transcript_tokens(self.model, self.readers.tokenizer, example.target, before[-1])]
        labels = [IGNORED] * (len(before) - 1) + ids[len(before) :]
        return {"example": example, "decoder_input_ids": ids[:-1], "labels": labels}


class _Batches:
    """Makes a batch of sounds and tokens."""

    def __init__(self, extractor: Any, pad: int, dtype: torch.dtype) -> None:
        self._extractor, self._pad, self._dtype = extractor, pad, dtype

    def __call__(self, items: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
        """Return a model's inputs, and `labels` (items, longest) int64, -100 where nothing is learned."""
        batch = media.in_dtype(media.inputs_of(self._extractor, [item["example"] for item in items]), self._dtype)
        here = torch.device("cpu")
        for name, pad in (("decoder_input_ids", self._pad), ("labels", IGNORED)):
            batch[name] = padded([item[name] for item in items], here, pad)[0]
        return batch


def _loss(smoothing: float) -> Callable[..., Tensor]:
    """Return cross entropy per learned token; models themselves take the labels to be shifted or not, by their version."""

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits = outputs["logits"].flatten(0, 1).float()
        count = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        total = torch.nn.functional.cross_entropy(
            logits, labels.flatten(), ignore_index=IGNORED, reduction="sum", label_smoothing=smoothing
        )
        return total / count

    return loss
