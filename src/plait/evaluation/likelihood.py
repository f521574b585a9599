"""Log-likelihoods of given continuations of prompts.

The common prefix of all prompts is read once, and each prompt once, however many continuations it has. The first token of a
continuation is scored at the prompt's last position; only longer continuations are read at all. Short prompts are packed in
rows (see `packing`). Others are padded on the left and masked, and positions are counted without the padding, so that a row's
result does not depend on its batch; continuations are read from a cache. Models that count positions by a token's index in the
cache get prompts of one length at a time instead, without padding.

Prompts with images or sounds are read once too, those of one length and form together, and answers at the positions that the
model itself gives what comes after them; whether that is what it makes of the complete text is tried once.

Models whose cache cannot be copied and continued (state spaces) read every prompt together with every continuation of several
tokens, in batches; this is announced. Encoder-decoder models read every prompt once, in their encoder.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from plait.evaluation.model_calls import ModelCall, NotContinuedError, check_lengths, check_numbers, form_of
from plait.evaluation.output_layer import plain_states
from plait.evaluation.packing import MOST_NODES, why_not_packed
from plait.evaluation.readers import (
    MOST_POSITIONS,
    CachedReader,
    EncoderDecoderReader,
    PackedReader,
    Stems,
    UncachedReader,
    log_likelihood_of,
    shared_tokens,
    uncached_reader,
    why_not_read_on,
)
from plait.libraries.transformers import reading
from plait.tasks.encoding import Question

_LEAST_READ = 256  # tokens of a batch: below, a processor spends more on reading the weights than on the tokens
_LEAST_READ_ELSEWHERE = 4096  # as an accelerator has it
_MOST_PADDING = 0.1  # of what is read, in a batch of more tokens than that


def log_likelihoods(
    model: Any, questions: Sequence[Question], *, batch_size: int, report: Callable[[int], object] = lambda done: None
) -> list[list[float]]:
    """Return log p(continuation | prompt) in nats, summed over the continuation's tokens.

    Args:
        model: a causal language model of transformers, or an encoder-decoder model with a language head.
        questions: prompts and continuations as tokens.
        batch_size: prompts read at a time, at most.
        report: called with the number of questions finished since it was last called.

    Returns:
        One number per continuation of every question, in their order; sums are float64 of float32 log-probabilities.

    Raises:
        TaskError: a text is longer than the model's context, or the model's output is NaN.
    """
    encoder_decoder = model.config.is_encoder_decoder
    check_lengths(model, [_length(q, encoder_decoder=encoder_decoder) for q in questions])
    found: list[list[float]] = [[] for _ in questions]
    with torch.inference_mode(), plain_states(model):
        reader = EncoderDecoderReader(model) if encoder_decoder else _reader(model, questions, batch_size)
        least = _LEAST_READ if model.device.type == "cpu" else _LEAST_READ_ELSEWHERE
        least = sys.maxsize if isinstance(reader, PackedReader) else least  # nothing is padded
        for batch in _batches(questions, batch_size, aligned=reader.aligned, shared=reader.shared, least=least):
            for i, row in zip(batch, reader([questions[i] for i in batch]), strict=True):
                check_numbers(model, row)
                found[i] = row
            report(len(batch))
    return found


def likeliest_answers(
    model: Any,
    questions: Sequence[Question],
    *,
    batch_size: int,
    keep: Callable[[int, Tensor], object],
    report: Callable[[int], object] = lambda done: None,
) -> list[int] | None:
    """Return which answer to every question is likeliest, and pass on the scores at its positions, from one pass over both.

    Args:
        model: a causal language model of transformers.
        questions: prompts and answers as tokens.
        batch_size: prompts read at a time, at most.
        keep: called with a question's index and the logits that predict the tokens of its likeliest answer,
            (tokens, V) float32, in the order in which questions are read.
        report: called with the number of questions finished since it was last called.

    Returns:
        One index per question, the first of equally likely ones; None, and nothing is read, where texts do not fit packed rows
        or the model cannot read them.

    Raises:
        TaskError: a text is longer than the model's context, or the model's output is NaN.
    """
    check_lengths(model, [_length(q, encoder_decoder=False) for q in questions])
    chosen = [0] * len(questions)
    with torch.inference_mode(), plain_states(model):
        reader = _packed_reader(model, questions)
        if reader is None:
            return None
        for batch in _batches(questions, batch_size, aligned=False, shared=0, least=sys.maxsize):
            for i, spans in zip(batch, reader.spans([questions[i] for i in batch]), strict=True):
                scores = [log_likelihood_of(span, answer) for span, answer in zip(spans, questions[i].answers, strict=True)]
                check_numbers(model, scores)
                chosen[i] = scores.index(max(scores))
                keep(i, spans[chosen[i]].float())
            report(len(batch))
    return chosen


def _length(question: Question, *, encoder_decoder: bool) -> int:
    """Return how many positions a question takes: of the longer side in an encoder-decoder model."""
    prompt, longest = len(question.prompt), max(map(len, question.answers))
    return max(prompt, 1 + len(question.lead) + longest) if encoder_decoder else prompt + longest


def _reader(model: Any, questions: Sequence[Question], batch_size: int) -> CachedReader | UncachedReader | PackedReader:
    if _reads_less_packed(questions) and (packed := _packed_reader(model, questions)) is not None:
        return packed
    forward, reason = ModelCall(model), reading.why_not_continued(model)
    if reason is None and not forward.masks:
        reason = "its forward takes no mask of padding"
    if reason is None and reading.cache_argument(model) is None and not forward.may_cache():
        reason = "its forward takes no cache of what it has read"
    if reason is None and any(q.perceived is not None for q in questions):
        reason = why_not_read_on(model, questions)
    if reason is not None:
        return uncached_reader(model, questions, batch_size, reason)
    try:
        return CachedReader(model, questions, batch_size)
    except NotContinuedError as error:
        return uncached_reader(model, questions, batch_size, str(error), padded=False)


def _packed_reader(model: Any, questions: Sequence[Question]) -> PackedReader | None:
    if not _fit_rows(questions) or any(q.perceived is not None for q in questions):
        return None
    texts = [[*q.prompt, *max(q.answers, key=len)] for q in questions]
    return PackedReader(model) if why_not_packed(model, texts) is None else None


def _fit_rows(questions: Sequence[Question]) -> bool:
    """Whether no text fills a row by itself: its mask grows with its square."""
    shared = shared_tokens([q.prompt for q in questions]) if len(questions) > 1 else 0
    return shared + max(_length(q, encoder_decoder=False) for q in questions) <= MOST_NODES


def _reads_less_packed(questions: Sequence[Question]) -> bool:
    """Whether packed rows hold less than padded batches, where longer continuations cost a copy of the cache as well."""
    shared = shared_tokens([q.prompt for q in questions]) if len(questions) > 1 else 0
    stems = [Stems(q.answers).read for q in questions]
    prompts = sum(len(q.prompt) - shared for q in questions)
    longer = sum(len(stem) for of in stems for stem in of)
    packed = (prompts + longer) * MOST_NODES / max(1, MOST_NODES - shared)
    return packed <= prompts * (1 + _MOST_PADDING) + 2 * longer


def _batches(questions: Sequence[Question], batch_size: int, *, aligned: bool, shared: int, least: int) -> Iterator[list[int]]:
    """Group questions of like length (of one length when aligned), so that there is little padding; long answers, few rows.

    Args:
        questions: to be grouped.
        batch_size: of a group, at most.
        aligned: whether nothing may be padded.
        shared: first tokens of every prompt that are not read again.
        least: tokens that are read before a group ends for its padding.
    """
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), form_of(questions[i]), i))
    batch: list[int] = []
    rows = width = tokens = 0
    for i in order:
        q = questions[i]
        own = len(q.prompt) - shared
        more, wider = len(q.answers), max(width, max(map(len, q.answers)))
        first = questions[batch[0]] if batch else q
        other = (aligned and len(q.prompt) != len(first.prompt)) or form_of(q) != form_of(first)
        wasted = tokens >= least and tokens + own < (1 - _MOST_PADDING) * (len(batch) + 1) * own
        if batch and (other or wasted or len(batch) == batch_size or (rows + more) * wider > MOST_POSITIONS):
            yield batch
            batch, rows, tokens, wider = [], 0, 0, max(map(len, q.answers))
        batch.append(i)
        rows, width, tokens = rows + more, wider, tokens + own
    if batch:
        yield batch
