"""Images that a model sees: outputs of heads, and likeness to the texts of classes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.evaluation.heads import logits_of
from plait.evaluation.model_calls import StepListener, check_lengths, check_numbers
from plait.hub.pretrained import refuse_failures
from plait.libraries.transformers.senses import features_of
from plait.tasks.images import decoded


def image_outputs(
    model: Any, processor: Any, images: Sequence[bytes], *, outputs: int, batch_size: int, report: StepListener
) -> list[list[float]]:
    """Return a head's outputs for every image, float32.

    Args:
        model: with a head of transformers.
        processor: what makes the model's input of images.
        images: encoded.
        outputs: how many the head must have.
        batch_size: images at a time.
        report: called with the number of images finished since it was last called.

    Raises:
        TaskError: the model has no head of that many outputs, or its output is NaN.
    """
    found: list[list[float]] = []
    for pixels in seen(model, processor, images, batch_size):
        with torch.inference_mode():
            rows = logits_of(model, model(pixel_values=pixels), 2, outputs).float().tolist()
        for row in rows:
            check_numbers(model, row)
        found += rows
        report(len(rows))
    return found


def class_likeness(
    model: Any,
    tokenizer: Any,
    processor: Any,
    images: Sequence[bytes],
    texts: Sequence[Sequence[str]],
    *,
    batch_size: int,
    report: StepListener,
) -> list[list[float]]:
    """Return how like every image is to every class, times the model's scale: zero-shot classification.

    A class is the mean of its texts' vectors, each of length 1 (Radford et al. 2021, arXiv:2103.00020, §3.1.4).

    Args:
        model: with vectors of images and of texts, as CLIP.
        tokenizer: of the texts.
        processor: what makes the model's input of images.
        images: encoded.
        texts: per class, the same number of each.
        batch_size: images, and texts, at a time.
        report: called with the number of images finished since it was last called.

    Raises:
        TaskError: the model has no such vectors, one is NaN, or a text is too long.
    """
    wanted = class_texts(model, tokenizer, texts)
    with torch.inference_mode():
        classes = class_vectors(model, wanted, batch_size)
    found: list[list[float]] = []
    for pixels in seen(model, processor, images, batch_size):
        with torch.inference_mode():
            rows = likeness(model, pixels, classes).tolist()
        for row in rows:
            check_numbers(model, row)
        found += rows
        report(len(rows))
    return found


@dataclass(frozen=True)
class ClassTexts:
    """What classes are called, as tokens.

    Attributes:
        rows: the tokens of every text, class by class.
        per_class: texts of every class.
    """

    rows: tuple[tuple[int, ...], ...]
    per_class: int


def class_texts(model: Any, tokenizer: Any, texts: Sequence[Sequence[str]]) -> ClassTexts:
    """Return the texts of classes as tokens.

    Args:
        model: with vectors of images and of texts, as CLIP; its weights are not used.
        tokenizer: of the texts.
        texts: per class, the same number of each.

    Raises:
        TaskError: the model has no such vectors, there is no tokenizer, or a text is too long.
    """
    if not hasattr(model, "get_image_features") or not hasattr(model, "logit_scale"):
        raise TaskError(
            f"{type(model).__name__} does not compare images with texts; 'class_prompts' are for models like CLIP. Without "
            "them the task's own head is asked."
        )
    if tokenizer is None:
        raise TaskError("the base has no tokenizer, and class prompts must be read.")
    home = getattr(tokenizer, "name_or_path", "") or "the model"
    with refuse_failures(home, "the tokenizer cannot read the class prompts", TaskError):
        rows = tokenizer([text for some in texts for text in some])["input_ids"]
    check_lengths(model, [*map(len, rows)])
    return ClassTexts(tuple(map(tuple, rows)), len(texts[0]))


def class_vectors(model: Any, texts: ClassTexts, batch_size: int) -> Tensor:
    """Return a vector of length 1 per class, (classes, d) float32; gradients reach what acts.

    Texts of one length are read together, so that none is padded.
    """
    lengths: dict[int, list[int]] = defaultdict(list)
    for i, row in enumerate(texts.rows):
        lengths[len(row)].append(i)
    batches = [some[at : at + batch_size] for some in lengths.values() for at in range(0, len(some), batch_size)]
    found = []
    for batch in batches:
        ids = torch.tensor([texts.rows[i] for i in batch], device=model.device)
        out = model.get_text_features(input_ids=ids, attention_mask=torch.ones_like(ids))
        found.append(_unit(features_of(out).float()))
    back = torch.tensor([i for batch in batches for i in batch], device=model.device).argsort()
    return _unit(torch.cat(found)[back].reshape(-1, texts.per_class, found[0].shape[-1]).mean(1))


def likeness(model: Any, pixels: Tensor, classes: Tensor) -> Tensor:
    """Return how like every image is to every class, times the model's scale, (images, classes) float32."""
    vectors = _unit(features_of(model.get_image_features(pixel_values=pixels)).float())
    scores: Tensor = model.logit_scale.float().exp() * vectors @ classes.T
    return scores


def _unit(vectors: Tensor) -> Tensor:
    return torch.nn.functional.normalize(vectors, dim=-1)


def seen(model: Any, processor: Any, images: Sequence[bytes], batch_size: int) -> Iterator[Tensor]:
    """Yield a model's inputs of encoded images in turn, (B, channels, height, width) in its dtype."""
    for at in range(0, len(images), batch_size):
        yield image_inputs(processor, images[at : at + batch_size]).to(model.device, model.dtype)


def image_inputs(processor: Any, images: Sequence[bytes]) -> Tensor:
    """Return a model's input of encoded images, (images, channels, height, width) float32.

    Raises:
        TaskError: the processor cannot prepare them.
    """
    some = [decoded(data) for data in images]
    with refuse_failures("the base", "the image processor cannot prepare the images", TaskError):
        pixels: Tensor = processor(images=some, return_tensors="pt")["pixel_values"]
    return pixels
