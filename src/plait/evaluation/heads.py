"""Texts that a model reads as a whole: outputs of heads, and vectors."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.evaluation.model_calls import StepListener, check_lengths, check_numbers, padded
from plait.tasks.asking import Pooling
from plait.tasks.encoding import Question


def _nobody(done: int) -> None:
    """Hear nothing."""


def head_outputs(
    model: Any, tokenizer: Any, texts: Sequence[Question], *, outputs: int, batch_size: int, report: StepListener = _nobody
) -> list[list[float]]:
    """Return a head's outputs for every text, float32.

    Args:
        model: with a head of transformers.
        tokenizer: its tokenizer.
        texts: what is read.
        outputs: how many the head must have.
        batch_size: texts at a time.
        report: called with the number of texts finished since it was last called.

    Raises:
        TaskError: the model has no head of that many outputs, its output is NaN, or a text is too long.
    """
    found: list[list[float]] = [[] for _ in texts]
    for batch, out, _ in _read(model, tokenizer, texts, batch_size):
        logits = logits_of(model, out, 2, outputs)
        for i, row in zip(batch, logits.float().tolist(), strict=True):
            check_numbers(model, row)
            found[i] = row
        report(len(batch))
    return found


def word_labels(
    model: Any, tokenizer: Any, texts: Sequence[Question], *, outputs: int, batch_size: int, report: StepListener = _nobody
) -> list[list[int]]:
    """Return the largest of a head's outputs at the first token of every word; arguments and errors as `head_outputs`."""
    found: list[list[int]] = [[] for _ in texts]
    for batch, out, _ in _read(model, tokenizer, texts, batch_size):
        logits = logits_of(model, out, 3, outputs).float()
        for row, i in enumerate(batch):
            own = logits[row, texts[i].places]
            check_numbers(model, own.flatten().tolist())
            found[i] = own.argmax(-1).tolist()
        report(len(batch))
    return found


def text_vectors(
    model: Any, tokenizer: Any, texts: Sequence[Question], *, pooling: Pooling, batch_size: int, report: StepListener = _nobody
) -> Tensor:
    """Return a vector for every text, (texts, d) float32: the mean of its tokens' last hidden states, or that of the first.

    Arguments as `head_outputs`.

    Raises:
        TaskError: the model gives no hidden states, one is NaN, or a text is too long.
    """
    found: list[Tensor | None] = [None] * len(texts)
    for batch, out, mask in _read(model, tokenizer, texts, batch_size):
        states = getattr(out, "last_hidden_state", None)
        if states is None:
            raise TaskError(
                f"{type(model).__name__} gives no vectors but what it makes of them; similarity is asked of a model without a "
                "head: adapters of task_type FEATURE_EXTRACTION."
            )
        states = states.float()
        share = (mask / mask.sum(1, keepdim=True)).unsqueeze(-1)
        vectors = states[:, 0] if pooling == "first" else (states * share).sum(1)
        for i, vector in zip(batch, vectors.cpu(), strict=True):
            check_numbers(model, vector.tolist())
            found[i] = vector
        report(len(batch))
    return torch.stack([v for v in found if v is not None])


def _read(model: Any, tokenizer: Any, texts: Sequence[Question], batch_size: int) -> Iterator[tuple[list[int], Any, Tensor]]:
    """Yield which texts were read, the model's output and the attention mask; texts of like length together."""
    lengths = [len(text.prompt) for text in texts]
    check_lengths(model, lengths)
    if model.config.pad_token_id is None:  # a decoder with a head looks for the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
    segmented = any(text.segments for text in texts)
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        ids, mask = padded([texts[i].prompt for i in batch], model.device, tokenizer.pad_token_id or 0)
        given = {"input_ids": ids, "attention_mask": mask}
        if segmented:
            rows = [texts[i].segments or [0] * lengths[i] for i in batch]
            given["token_type_ids"] = padded(rows, model.device)[0]
        with torch.inference_mode():
            yield batch, model(**given), mask


def logits_of(model: Any, out: Any, axes: int, outputs: int) -> Tensor:
    """Return a head's outputs, of so many axes and so many per answer.

    Raises:
        TaskError: the model has none such.
    """
    logits: Tensor | None = getattr(out, "logits", None)
    if logits is None or logits.ndim != axes or logits.shape[-1] != outputs:
        has = f"outputs {list(logits.shape[1:])}" if logits is not None else "none"
        raise TaskError(f"the model's head ({type(model).__name__}) has {has}; the task has {_wanted(axes, outputs)}.")
    return logits


def _wanted(axes: int, outputs: int) -> str:
    return f"{outputs} labels{' per word' if axes > 2 else ''}" if outputs > 1 else "one number"
