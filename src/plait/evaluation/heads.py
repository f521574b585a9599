"""Outputs of a classification head for texts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from plait.errors import TaskError
from plait.evaluation.model_calls import check_lengths, check_numbers, vocabulary
from plait.hub.pretrained import refuse_failures
from plait.tasks.encoding import check_tokens


def classify(
    model: Any,
    tokenizer: Any,
    texts: Sequence[str],
    *,
    labels: int,
    max_tokens: int | None,
    batch_size: int,
    report: Callable[[int], object] = lambda done: None,
) -> list[list[float]]:
    """Return the head's outputs for every text, float32.

    Args:
        model: a sequence classifier of transformers.
        tokenizer: its tokenizer.
        texts: what is classified.
        labels: how many outputs the head must have.
        max_tokens: longer texts lose their end; None: they are an error.
        batch_size: texts at a time.
        report: called with the number of texts finished since it was last called.

    Raises:
        TaskError: the model has no head of that many outputs, its output is NaN, or a text is too long.
    """
    cut: dict[str, Any] = {"truncation": max_tokens is not None, "max_length": max_tokens}
    with refuse_failures(getattr(tokenizer, "name_or_path", ""), "the tokenizer cannot read the texts", TaskError):
        rows = tokenizer(list(texts), **cut)["input_ids"]
    check_tokens(rows, vocabulary(model))
    lengths = [len(row) for row in rows]
    check_lengths(model, lengths)
    if model.config.pad_token_id is None:  # a decoder with a head looks for the last token that is not padding
        model.config.pad_token_id = tokenizer.pad_token_id
    order = sorted(range(len(texts)), key=lambda i: (lengths[i], i))
    found: list[list[float]] = [[] for _ in texts]
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        tokens = tokenizer([texts[i] for i in batch], return_tensors="pt", padding=True, padding_side="right", **cut)
        with torch.inference_mode():
            logits = model(**tokens.to(model.device)).logits
        if logits.ndim != 2 or logits.shape[1] != labels:
            raise TaskError(f"the model's head has outputs {list(logits.shape[1:])}; the task has {labels} labels.")
        for i, row in zip(batch, logits.float().tolist(), strict=True):
            check_numbers(model, row)
            found[i] = row
        report(len(batch))
    return found
