"""Images and sounds of a task, as a model's inputs, and what the task's own adapter writes down of sounds.

Inputs and batches are evaluation's own. They are prepared once and kept, since a tuning reads each of them many times.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from plait.calibration.passages import Passage
from plait.calibration.texts import Texts
from plait.errors import TaskError
from plait.evaluation import hearing, vision
from plait.evaluation.transcribing import Transcript, beginning, transcript_tokens, writer_of, written
from plait.mixture import Mixture
from plait.tasks.asking import ClassPrompts, Transcribed
from plait.tasks.hearing import sample_counts
from plait.tasks.perceiving import Perceived
from plait.tasks.schema import files_of_chats

_BATCH = 16  # images or sounds at a time


def is_perceived(texts: Texts) -> bool:
    """Whether a task's texts are images or sounds in place of prompts; those in chats are read with the chats."""
    return texts.task.file_column is not None and files_of_chats(texts.task) is None


def check_perceived(mixture: Mixture, texts: Texts, *, right: Sequence[str] | None = None) -> None:
    """Make sure that a model takes a task's images or sounds, before it is given the first.

    Args:
        mixture: the base with the adapters.
        texts: of a task of images or sounds.
        right: the right transcript of every sound, where labels are learned from.

    Raises:
        TaskError: it is another kind of model, sounds do not fit it, or the base has no processor.
    """
    model: Any = mixture.model
    task = texts.task
    processor = _processor(mixture, texts)
    if any(e.audio is not None for e in texts.examples.items):
        counts = sample_counts(processor, [e.audio or b"" for e in texts.examples.items])
        hearing.check_lengths(model, processor, texts.examples, counts)
    if isinstance(task.ask, ClassPrompts):
        vision.class_texts(model, mixture.tokenizer, task.ask.texts)
        return
    if not isinstance(task.ask, Transcribed):
        if model.can_generate():
            name = type(model).__name__
            raise TaskError(f"{task.kind} asks for labels of a head, and {name} writes texts; its adapters need a head.")
        return
    writer_of(model, mixture.tokenizer, processor, texts.examples, task.ask)
    if not model.config.is_encoder_decoder:
        if right is not None:
            raise TaskError(
                f"{type(model).__name__} (CTC) labels every moment of a sound, and a transcript does not say which moment is "
                "which; use an objective that reads no label: distill, hidden."
            )
        return
    first = _beginnings(mixture, texts)
    for example, text in zip(texts.examples.items, right or (), strict=right is not None):
        lead = first[example.text or ""]
        _check_places(model, [*lead, *transcript_tokens(model, mixture.tokenizer, text, lead[-1])])


def perceived_passages(
    mixture: Mixture,
    texts: Texts,
    adapter: str,
    *,
    right: Sequence[str] | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> tuple[Passage, ...]:
    """Return what a model is given of a task's images or sounds; with sounds that are written down, what its decoder reads.

    That is the right transcript, or the one that the adapter writes, greedily: no label is read then. Learning to write what
    a teacher has written is sequence-level distillation (Kim and Rush 2016, arXiv:1606.07947). A model with CTC answers at
    every moment of a sound.

    Args:
        mixture: the base with the adapters.
        texts: of the task; they fit the base (`check_perceived`).
        adapter: the task's own.
        right: the right transcript of every sound, in place of the adapter's.
        report: called with the number of sounds written down since it was last called.

    Raises:
        TaskError: an image or a sound cannot be prepared, or the adapter's output is NaN.
    """
    media = _inputs(mixture, texts)
    model: Any = mixture.model
    ask, tokenizer = texts.task.ask, mixture.tokenizer
    if isinstance(ask, ClassPrompts):
        classes = vision.class_texts(model, tokenizer, ask.texts)
        return tuple(Passage(perceived=one, classes=classes) for one in media)
    if not isinstance(ask, Transcribed):
        return tuple(Passage(perceived=one) for one in media)
    if not model.config.is_encoder_decoder:
        moments = [len(one.tokens) for one in _written(mixture, texts, adapter, ask, report)]
        return tuple(Passage(perceived=one, places=tuple(range(n))) for one, n in zip(media, moments, strict=True))
    first, items = _beginnings(mixture, texts), texts.examples.items
    if right is not None:
        answers = [
            tuple(transcript_tokens(model, tokenizer, text, first[e.text or ""][-1]))
            for e, text in zip(items, right, strict=True)
        ]
    else:
        answers = [one.tokens for one in _written(mixture, texts, adapter, ask, report)]
    return tuple(
        Passage(answer=answer, lead=tuple(first[e.text or ""]), perceived=one)
        for e, answer, one in zip(items, answers, media, strict=True)
    )


def _written(
    mixture: Mixture, texts: Texts, adapter: str, ask: Transcribed, report: Callable[[int], object]
) -> list[Transcript]:
    """Return what an adapter writes down of every sound, greedily."""
    processor = _processor(mixture, texts)
    with mixture.active({adapter: 1.0}) as model:
        return written(
            model,
            mixture.tokenizer,
            processor,
            texts.examples,
            replace(ask, beams=1),
            batch_size=_BATCH,
            report=report,
            contender=adapter,
        )


def _inputs(mixture: Mixture, texts: Texts) -> list[Perceived]:
    """Return the model's input of every image or sound, in their order."""
    model: Any = mixture.model
    processor, items = _processor(mixture, texts), texts.examples.items
    images = [e.image for e in items if e.image is not None]
    if images:
        rows = (row for batch in vision.seen(model, processor, images, _BATCH) for row in batch.cpu())
        return [Perceived({"pixel_values": row[None]}) for row in rows]
    writes = isinstance(texts.task.ask, Transcribed) and model.config.is_encoder_decoder
    name = model.main_input_name if writes else processor.model_input_names[0]
    found = {}
    for batch, given in hearing.heard(model, processor, texts.examples, _BATCH):
        found.update({i: Perceived({name: row[None]}) for i, row in zip(batch, given.cpu(), strict=True)})
    return [found[i] for i in range(len(items))]


def _processor(mixture: Mixture, texts: Texts) -> Any:
    column = texts.task.file_column
    if column is None:
        raise AssertionError(f"{texts.task.name} has neither images nor sounds")
    return mixture.processor(column.kind)


def _beginnings(mixture: Mixture, texts: Texts) -> dict[str, list[int]]:
    """Return text that was spoken before → tokens that the decoder is given before a transcript."""
    ask = texts.task.ask
    if not isinstance(ask, Transcribed):
        raise AssertionError(f"{texts.task.name} asks for no transcripts")
    before = dict.fromkeys(e.text or "" for e in texts.examples.items)
    return {text: beginning(mixture.model, mixture.tokenizer, texts.task.where, ask, text) for text in before}


def _check_places(model: Any, tokens: Sequence[int]) -> None:
    config = getattr(model.config, "decoder", model.config)
    places = getattr(config, "max_target_positions", None) or getattr(config, "max_position_embeddings", None)
    if places is not None and len(tokens) - 1 > places:
        raise TaskError(
            f"a transcript has {len(tokens)} tokens with its beginning; the decoder has {places} places. Leave it out."
        )
