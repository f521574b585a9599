"""Sounds that a model hears: its inputs in batches, and outputs of heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.evaluation.heads import logits_of
from plait.evaluation.model_calls import StepListener, check_numbers
from plait.hub.pretrained import refuse_failures
from plait.libraries.transformers.senses import fewest_samples
from plait.tasks.examples import Examples
from plait.tasks.hearing import check_longest, rows_named, sample_counts, window
from plait.tasks.sounds import samples


def sound_outputs(
    model: Any, extractor: Any, examples: Examples, *, outputs: int, batch_size: int, report: StepListener
) -> list[list[float]]:
    """Return a head's outputs for every sound, float32.

    Args:
        model: with a head of transformers.
        extractor: what makes the model's input of samples.
        examples: with sounds.
        outputs: how many the head must have.
        batch_size: sounds at a time.
        report: called with the number of sounds finished since it was last called.

    Raises:
        TaskError: the model has no head of that many outputs, its output is NaN, or a sound is too long or too short for it.
    """
    found: list[list[float]] = [[] for _ in examples.items]
    for batch, given in heard(model, extractor, examples, batch_size):
        with torch.inference_mode():
            out = model(**{extractor.model_input_names[0]: given})
        for i, row in zip(batch, logits_of(model, out, 2, outputs).float().tolist(), strict=True):
            check_numbers(model, row)
            found[i] = row
        report(len(batch))
    return found


def heard(model: Any, extractor: Any, examples: Examples, batch_size: int) -> Iterator[tuple[list[int], Tensor]]:
    """Yield which sounds are in a batch, and the model's input of them in its dtype.

    Sounds of one length share a batch, so that none is padded beyond what the model itself does (Whisper: to 30 seconds); and
    such with one text before them, where there is one.

    Raises:
        TaskError: whether the extractor cuts sounds is not known, or one is too long or too short for the model.
    """
    sounds = [e.audio or b"" for e in examples.items]
    counts = sample_counts(extractor, sounds)
    check_lengths(model, extractor, examples, counts)
    groups: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, (example, count) in enumerate(zip(examples.items, counts, strict=True)):
        groups[example.text or "", 0 if window(extractor) else count].append(i)
    for _, group in sorted(groups.items()):
        for at in range(0, len(group), batch_size):
            batch = group[at : at + batch_size]
            given = sound_inputs(extractor, [sounds[i] for i in batch])
            yield batch, given[extractor.model_input_names[0]].to(model.device, model.dtype)


def sound_inputs(extractor: Any, sounds: Sequence[bytes], **keywords: Any) -> Mapping[str, Tensor]:
    """Return a model's inputs of sounds by their names, as the extractor makes them.

    Args:
        extractor: of the model.
        sounds: encoded; of one length, unless the extractor pads.
        **keywords: of the extractor, such as `padding`.

    Raises:
        TaskError: it cannot prepare them.
    """
    rate = int(extractor.sampling_rate)
    with refuse_failures("the base", "the feature extractor cannot prepare the sounds", TaskError):
        given: Mapping[str, Tensor] = extractor(
            [samples(data, rate) for data in sounds], sampling_rate=rate, return_tensors="pt", **keywords
        )
    return given


def check_lengths(model: Any, extractor: Any, examples: Examples, counts: Sequence[int]) -> None:
    """Refuse sounds that the model would cut, or cannot hear.

    Args:
        model: of transformers; its weights are not used.
        extractor: of the model.
        examples: with sounds.
        counts: samples of each, as `sample_counts` has them.

    Raises:
        TaskError: one is too long or too short.
    """
    check_longest(extractor, examples, counts)
    least, rate = fewest_samples(model), int(extractor.sampling_rate)
    if short := [i for i, n in enumerate(counts) if n < least]:
        named = rows_named(examples, short, lambda i: f"{counts[i]} samples")
        raise TaskError(
            f"{len(short)} of {len(counts)} sounds are shorter than the {least} samples that the model's convolutions need "
            f"at {rate} Hz ({named}); leave them out."
        )
