"""Greedy generation, in batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from plait.evaluation.model_calls import check_lengths, decoder_start, padded
from plait.evaluation.output_layer import plain_states
from plait.notices import announce
from plait.tasks.encoding import Question


def generate(
    model: Any,
    tokenizer: Any,
    questions: Sequence[Question],
    *,
    max_new_tokens: int,
    stop: Sequence[str],
    batch_size: int,
    report: Callable[[int], object] = lambda done: None,
) -> list[str]:
    """Return the greedy answer to every prompt, without special tokens, cut at the first stop text.

    Args:
        model: a causal language model of transformers, or an encoder-decoder model with a language head.
        tokenizer: its tokenizer.
        questions: prompts as tokens; their answers are not looked at.
        max_new_tokens: longest answer.
        stop: texts at which an answer ends.
        batch_size: prompts answered at a time.
        report: called with the number of prompts finished since it was last called.

    Raises:
        TaskError: a prompt and its answer may be longer than the model's context.
    """
    answers = [""] * len(questions)
    for batch, tokens in _answered(model, tokenizer, questions, max_new_tokens, stop, batch_size):
        for i, text in zip(batch, tokenizer.batch_decode(tokens, skip_special_tokens=True), strict=True):
            answers[i] = text[: min((at for s in stop if (at := text.find(s)) >= 0), default=len(text))]
        report(len(batch))
    return answers


def generate_tokens(
    model: Any, tokenizer: Any, questions: Sequence[Question], *, max_new_tokens: int, batch_size: int
) -> list[list[int]]:
    """Return the greedy answer to every prompt as tokens, up to and with the end token.

    Args:
        model: as `generate` takes it.
        tokenizer: its tokenizer.
        questions: prompts as tokens; their answers are not looked at.
        max_new_tokens: longest answer.
        batch_size: prompts answered at a time.

    Raises:
        TaskError: as `generate`.
    """
    ends = _ends(model, tokenizer)
    answers: list[list[int]] = [[] for _ in questions]
    for batch, rows in _answered(model, tokenizer, questions, max_new_tokens, (), batch_size):
        for i, row in zip(batch, rows.tolist(), strict=True):
            end = next((at for at, token in enumerate(row) if token in ends), len(row) - 1)
            answers[i] = row[: end + 1]
    return answers


def _ends(model: Any, tokenizer: Any) -> frozenset[int]:
    """Return the tokens that end an answer."""
    # the model's own settings may ask for sampling, or punish repetition; only its end tokens are wanted
    ends = getattr(model.generation_config, "eos_token_id", None)
    ends = tokenizer.eos_token_id if ends is None else ends
    return frozenset(ends if isinstance(ends, (list, tuple)) else [] if ends is None else [ends])


def _answered(
    model: Any, tokenizer: Any, questions: Sequence[Question], max_new_tokens: int, stop: Sequence[str], batch_size: int
) -> Iterator[tuple[list[int], Tensor]]:
    """Yield batches of questions by their places, with the tokens of their answers, padded on the right."""
    encoder_decoder = bool(model.config.is_encoder_decoder)
    prompts = [len(q.prompt) for q in questions]
    check_lengths(model, [max(n, 1 + max_new_tokens) if encoder_decoder else n + max_new_tokens for n in prompts])
    pad = 0 if tokenizer.pad_token_id is None else tokenizer.pad_token_id  # masked; any token will do
    begins = {"decoder_start_token_id": decoder_start(model)} if encoder_decoder else {}
    if encoder_decoder and (first := getattr(model.generation_config, "forced_bos_token_id", None)) is not None:
        begins["forced_bos_token_id"] = first  # that some models must begin with
    transformers = import_module("transformers")
    criteria = transformers.StoppingCriteriaList
    config = transformers.GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=False,
        num_beams=1,
        eos_token_id=sorted(_ends(model, tokenizer)) or None,
        pad_token_id=pad,
        **begins,
    )
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    for at in range(0, len(order), batch_size):
        batch = order[at : at + batch_size]
        rows = [questions[i].prompt for i in batch]
        ids, mask = padded(rows, model.device, pad, left=not encoder_decoder)
        start = 1 if encoder_decoder else ids.shape[1]  # where the generated tokens begin
        with torch.inference_mode(), plain_states(model), _configured(model, config), announced_rereading(model):
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                generation_config=config,
                stopping_criteria=criteria([_StopTexts(tokenizer, stop, start)]),
            )
        yield batch, out[:, start:]


@contextmanager
def announced_rereading(model: Any) -> Iterator[None]:
    """Announce it where a model reads the complete text again for every token that it generates within the block."""
    calls = 0

    def count(_: Any, given: Any, keywords: Mapping[str, Any]) -> None:
        nonlocal calls
        ids = keywords.get("decoder_input_ids")
        ids = keywords.get("input_ids") if ids is None else ids
        calls += 1
        if calls > 1 and ids is not None and ids.shape[1] > 1:
            name = type(model).__name__
            announce(
                f"{name} generates the slower way, the complete text read again for every token: its generation keeps no "
                "cache of what it has read.",
                once=f"rereading {type(model).__qualname__}",
            )

    handle = model.register_forward_pre_hook(count, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _configured(model: Any, config: Any) -> Iterator[None]:
    """Replace the model's generation configuration, from which `generate` takes what is not given."""
    own, model.generation_config = model.generation_config, config
    try:
        yield
    finally:
        model.generation_config = own


@dataclass(frozen=True, eq=False)
class _StopTexts:
    """Finds the rows that have generated a stop text; transformers' own criterion accepts some kinds of tokenizer only."""

    tokenizer: Any
    stop: Sequence[str]
    start: int

    def __call__(self, ids: Tensor, scores: Any, **_: Any) -> Tensor:
        done = [False] * len(ids)
        if self.stop:
            texts = self.tokenizer.batch_decode(ids[:, self.start :], skip_special_tokens=True)
            done = [any(s in text for s in self.stop) for text in texts]
        return torch.tensor(done, device=ids.device)
