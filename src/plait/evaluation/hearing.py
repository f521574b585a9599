"""Sounds that a model hears: outputs of heads."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from plait.errors import TaskError
from plait.evaluation.heads import logits_of
from plait.evaluation.model_calls import StepListener, check_numbers
from plait.hub.pretrained import refuse_failures
from plait.notices import announce
from plait.tasks.sounds import sample_count, samples, sound_rate

_EXACT = ("Wav2Vec2FeatureExtractor", "WhisperFeatureExtractor")  # the first cuts nothing, the other what is known


def sound_outputs(
    model: Any, extractor: Any, sounds: Sequence[bytes], *, outputs: int, batch_size: int, report: StepListener
) -> list[list[float]]:
    """Return a head's outputs for every sound, float32.

    Sounds of one length share a batch, so that none is padded beyond what the model itself does (Whisper: to 30 seconds).

    Args:
        model: with a head of transformers.
        extractor: what makes the model's input of samples.
        sounds: encoded.
        outputs: how many the head must have.
        batch_size: sounds at a time.
        report: called with the number of sounds finished since it was last called.

    Raises:
        TaskError: the model has no head of that many outputs, its output is NaN, or a sound is too long or too short for it.
    """
    name = type(extractor).__name__
    if name not in _EXACT:
        raise TaskError(f"{name}: whether it cuts long sounds is not known; covered are {', '.join(_EXACT)}.")
    rate = int(extractor.sampling_rate)
    counts = [sample_count(data, rate) for data in sounds]
    _check_lengths(model, extractor, counts, rate)
    if others := sorted({sound_rate(data) for data in sounds} - {rate}):
        listed = ", ".join(map(str, others))
        announce(f"sounds of {listed} Hz are resampled to {rate} Hz, which the model hears.", once=f"resampled {rate}")
    groups: dict[int, list[int]] = defaultdict(list)
    for i, count in enumerate(counts):
        groups[0 if _window(extractor) else count].append(i)
    found: list[list[float]] = [[] for _ in sounds]
    for _, group in sorted(groups.items()):
        for at in range(0, len(group), batch_size):
            batch = group[at : at + batch_size]
            with refuse_failures("the base", "the feature extractor cannot prepare the sounds", TaskError):
                given = extractor([samples(sounds[i], rate) for i in batch], sampling_rate=rate, return_tensors="pt")
            key = extractor.model_input_names[0]
            with torch.inference_mode():
                out = model(**{key: given[key].to(model.device, model.dtype)})
            for i, row in zip(batch, logits_of(model, out, 2, outputs).float().tolist(), strict=True):
                check_numbers(model, row)
                found[i] = row
            report(len(batch))
    return found


def _window(extractor: Any) -> int | None:
    """Return how many samples a model hears of every sound, filled up with silence; None where of each as many as it has."""
    found: int | None = getattr(extractor, "n_samples", None)
    return found


def _check_lengths(model: Any, extractor: Any, counts: Sequence[int], rate: int) -> None:
    """Refuse sounds that the model would cut, or cannot hear."""
    window, least, config = _window(extractor), 1, model.config
    layers = zip(getattr(config, "conv_kernel", ()), getattr(config, "conv_stride", ()), strict=True)
    for kernel, stride in reversed([*layers]):
        least = (least - 1) * stride + kernel
    long, short = [n for n in counts if window and n > window], [n for n in counts if n < least]
    if long:
        raise TaskError(
            f"{len(long)} of {len(counts)} sounds are longer than the {(window or 0) / rate:g} seconds that the model hears "
            f"(the longest has {max(long) / rate:.1f}); nothing is cut in silence. Cut them, or leave them out."
        )
    if short:
        raise TaskError(
            f"{len(short)} of {len(counts)} sounds are shorter than the {least} samples that the model's convolutions need "
            f"(the shortest has {min(short)}, at {rate} Hz); leave them out."
        )
