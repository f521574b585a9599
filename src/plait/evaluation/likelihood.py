"""How likely a model finds given continuations of prompts.

What all prompts begin with is read once; each prompt is read once, however many continuations it has; the first token of
every continuation is read off the prompt's last position, and only longer continuations are read at all. Padding is on the
left of a prompt and masked, with positions counted without it, so that a batch says what its rows would say alone.

Models whose memory of the past cannot be copied and continued so (sliding windows shorter than the text, state spaces) are
given every prompt with every continuation, whole. Encoder-decoder models read every prompt once, in their encoder.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.evaluation.output_layer import plain_states
from plait.tasks.encoding import Question

_SHORTEST_PREFIX = 4  # tokens; below, a pass of its own costs more than it saves
_MOST_POSITIONS = 4096  # whose logits are held at a time


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
        TaskError: a text is longer than the model's context, or what the model says is no number.
    """
    apart = model.config.is_encoder_decoder
    check_lengths(model, [_length(q, apart=apart) for q in questions])
    found: list[list[float]] = [[] for _ in questions]
    with torch.inference_mode(), plain_states(model):
        reader = _EncoderDecoder(model) if apart else _reader(model, questions)
        for batch in _batches(questions, batch_size):
            for i, row in zip(batch, reader([questions[i] for i in batch]), strict=True):
                check_numbers(model, row)
                found[i] = row
            report(len(batch))
    return found


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Make sure that texts fit a model's context.

    Raises:
        TaskError: some do not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = None if limit is None else limit - reserved_positions(model)
    too_long = [n for n in lengths if limit is not None and n > limit]
    if too_long:
        raise TaskError(
            f"{len(too_long)} of {len(lengths)} texts are longer than the model's context of {limit} tokens (the longest has "
            f"{max(too_long)}). Leave them out, or let prompts lose their beginning with 'max_tokens' in the task."
        )


def reserved_positions(model: Any) -> int:
    """Return how many of a model's positions no token has: RoBERTa and its kin count from behind the padding's."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            return int(module.padding_idx) + 1
    return 0


def check_numbers(model: Any, scores: Sequence[float]) -> None:
    """Make sure that a model says numbers, of which one can be the largest.

    Raises:
        TaskError: one is NaN.
    """
    if any(map(math.isnan, scores)):
        raise TaskError(
            f"the model's outputs are NaN (computed in {model.dtype}). A weight is broken, or the dtype too narrow: try "
            "--load-dtype float32 (dtype='float32')."
        )


def _length(question: Question, *, apart: bool) -> int:
    """Return how many positions a question takes: of the longer side, where prompt and answer are read apart."""
    prompt, longest = len(question.prompt), max(map(len, question.answers))
    return max(prompt, 1 + len(question.lead) + longest) if apart else prompt + longest


def _reader(model: Any, questions: Sequence[Question]) -> _Cached | _Whole:
    return _Cached(model, questions) if _can_continue(model, questions) else _Whole(model)


def _can_continue(model: Any, questions: Sequence[Question]) -> bool:
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None)
    longest = max(len(q.prompt) + max(map(len, q.answers)) for q in questions)
    slides = "sliding_attention" in kinds or (not kinds and getattr(config, "use_sliding_window", True))
    fits = not (slides and window) or longest < window
    plain = kinds <= {"full_attention", "sliding_attention"} and bool(getattr(model, "_supports_cache_class", True))
    # they would have to be told positions that start elsewhere
    plain = plain and not reserved_positions(model)
    return fits and plain and "past_key_values" in inspect.signature(model.forward).parameters


def _batches(questions: Sequence[Question], batch_size: int) -> Iterator[list[int]]:
    """Group questions of like length, so that there is little padding; long continuations make small batches."""
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    batch: list[int] = []
    rows = width = 0
    for i in order:
        q = questions[i]
        more, wider = len(q.answers), max(width, max(map(len, q.answers)))
        if batch and (len(batch) == batch_size or (rows + more) * wider > _MOST_POSITIONS):
            yield batch
            batch, rows, wider = [], 0, max(map(len, q.answers))
        batch.append(i)
        rows, width = rows + more, wider
    if batch:
        yield batch


class _Cached:
    """Reads what all prompts share once, then every prompt once, then the rest of longer continuations."""

    def __init__(self, model: Any, questions: Sequence[Question]) -> None:
        self._model = model
        self._takes = set(inspect.signature(model.forward).parameters)
        prompts = [q.prompt for q in questions]
        shared = _shared(prompts) if len(prompts) > 1 and self._finds_its_place() else 0
        self._shared = shared if shared >= _SHORTEST_PREFIX else 0
        self._read: Any = None
        if self._shared:
            ids = torch.tensor([prompts[0][: self._shared]], device=model.device)
            self._read = model(input_ids=ids, use_cache=True, **self._only_last()).past_key_values

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        rests = [q.prompt[self._shared :] for q in questions]
        longer = [(i, answer) for i, q in enumerate(questions) for answer in q.answers if len(answer) > 1]
        ids, mask = _left_padded(rests, self._model.device)
        seen = torch.cat([mask.new_ones(len(rests), self._shared), mask], 1)
        past = copy.deepcopy(self._read)
        if past is not None:
            past.reorder_cache(torch.zeros(len(rests), dtype=torch.long, device=ids.device))
        out = self._forward(ids, seen, past, use_cache=bool(longer), last=True)
        first = out.logits[:, -1].float().log_softmax(-1)
        tails = iter(self._tails(out.past_key_values, seen, longer)) if longer else iter(())
        return [
            [float(first[i, answer[0]].double()) + (next(tails) if len(answer) > 1 else 0.0) for answer in q.answers]
            for i, q in enumerate(questions)
        ]

    def _finds_its_place(self) -> bool:
        """Whether padding may stand between a shared beginning and the rest of a prompt.

        Not where the model counts the distance of two tokens by where they lie in its memory: ALiBi without positions (MPT),
        local attention (GPT-Neo).
        """
        return "position_ids" in self._takes and "local" not in (getattr(self._model.config, "attention_layers", None) or ())

    def _tails(self, past: Any, seen: Tensor, longer: Sequence[tuple[int, list[int]]]) -> list[float]:
        """Return the log-likelihood of each continuation after its first token."""
        rows = torch.tensor([i for i, _ in longer], device=seen.device)
        past.reorder_cache(rows)
        ids, mask = _right_padded([answer[:-1] for _, answer in longer], seen.device)
        logits = self._forward(ids, torch.cat([seen[rows], mask], 1), past, use_cache=True, last=False).logits
        return [_sum(logits[row], answer[1:]) for row, (_, answer) in enumerate(longer)]

    def _forward(self, ids: Tensor, seen: Tensor, past: Any, *, use_cache: bool, last: bool) -> Any:
        extra: dict[str, Any] = self._only_last() if last else {}
        if "position_ids" in self._takes:
            extra["position_ids"] = (seen.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self._model(input_ids=ids, attention_mask=seen, past_key_values=past, use_cache=use_cache, **extra)

    def _only_last(self) -> dict[str, Any]:
        return {"logits_to_keep": 1} if "logits_to_keep" in self._takes else {}


class _Whole:
    """Reads every prompt with every continuation, from the beginning."""

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        return [[self._one(q.prompt, answer) for answer in q.answers] for q in questions]

    def _one(self, prompt: list[int], answer: list[int]) -> float:
        ids = torch.tensor([prompt + answer[:-1]], device=self._model.device)
        logits = self._model(input_ids=ids, use_cache=False).logits
        return _sum(logits[0, len(prompt) - 1 :], answer)


class _EncoderDecoder:
    """Reads every prompt once in the encoder, and every continuation in the decoder."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = decoder_start(model)

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        device = self._model.device
        ids, mask = _right_padded([q.prompt for q in questions], device)
        read = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        asked = [(i, q.lead, answer) for i, q in enumerate(questions) for answer in q.answers]
        rows = torch.tensor([i for i, _, _ in asked], device=device)
        said, said_mask = _right_padded([[self._start, *lead, *answer[:-1]] for _, lead, answer in asked], device)
        logits = self._model(
            encoder_outputs=(read[rows],),
            attention_mask=mask[rows],
            decoder_input_ids=said,
            decoder_attention_mask=said_mask,
            use_cache=False,
        ).logits
        sums = iter([_sum(logits[row, len(lead) :], answer) for row, (_, lead, answer) in enumerate(asked)])
        return [[next(sums) for _ in q.answers] for q in questions]


def decoder_start(model: Any) -> int:
    """Return the token that an encoder-decoder model's decoder begins with.

    Raises:
        TaskError: its configuration names none.
    """
    for config in (getattr(model, "generation_config", None), model.config):
        token = getattr(config, "decoder_start_token_id", None)
        if token is not None:
            return int(token)
    raise TaskError(f"{type(model).__name__}: the configuration names no decoder_start_token_id; answers cannot begin.")


def _sum(logits: Tensor, tokens: Sequence[int]) -> float:
    """Return Σ log p of tokens; logits (≥ n, V), of which the first n say them."""
    chosen = torch.tensor(tokens, device=logits.device)
    scores = logits[: len(tokens)].float().log_softmax(-1).gather(1, chosen[:, None])
    return float(scores.double().sum())


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common, leaving every prompt at least one of its own."""
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)


def _left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(r)) + list(r) for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)
    return ids, mask


def _right_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    width = max(map(len, rows))
    ids = torch.tensor([list(r) + [0] * (width - len(r)) for r in rows], device=device)
    mask = torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows], device=device)
    return ids, mask
