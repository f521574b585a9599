"""Where two states of a model would write something else: token by token, over a text that one of them wrote."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from plait.evaluation.model_calls import ModelCall, decoder_start
from plait.evaluation.output_layer import plain_states
from plait.records import Record

_TOP = 5  # tokens that are named at every place


class TokenView(Record):
    """One token of a reply, and what two models would have written in its place.

    Attributes:
        text: of the token.
        kl: KL(adapter ‖ merge) of the distributions over its place, in nats.
        adapter: the adapter's likeliest tokens with their probabilities.
        merge: the merge's.
    """

    text: str
    kl: float
    adapter: tuple[tuple[str, float], ...]
    merge: tuple[tuple[str, float], ...]


def log_probabilities(model: Any, prompt: Sequence[int], reply: Sequence[int]) -> Tensor:
    """Return log p over the vocabulary at every place of a reply, given all before it; (tokens, V) float32, on the processor.

    Args:
        model: of transformers, as it acts now.
        prompt: tokens.
        reply: tokens, at least one.
    """
    with torch.inference_mode(), plain_states(model):
        if model.config.is_encoder_decoder:
            ids = torch.tensor([list(prompt)], device=model.device)
            begun = torch.tensor([[decoder_start(model), *reply[:-1]]], device=model.device)
            logits = model(input_ids=ids, decoder_input_ids=begun, use_cache=False).logits
        else:
            ids = torch.tensor([[*prompt, *reply[:-1]]], device=model.device)
            logits = ModelCall(model).read(ids, torch.ones_like(ids), keep=len(reply)).logits[:, -len(reply) :]
        found: Tensor = logits[0].float().log_softmax(-1).cpu()
    return found


def compare(tokenizer: Any, reply: Sequence[int], adapter: Tensor, merge: Tensor) -> tuple[TokenView, ...]:
    """Return every token of a reply with what adapter and merge have in its place.

    Args:
        tokenizer: of the model.
        reply: tokens.
        adapter: log p of the adapter, (tokens, V).
        merge: log p of the merge, (tokens, V).
    """
    divergence = (adapter.exp() * (adapter - merge)).nan_to_num(0.0).sum(-1).clamp(min=0.0)  # 0 · log 0 is 0

    def top(row: Tensor) -> tuple[tuple[str, float], ...]:
        values, tokens = row.topk(min(_TOP, len(row)))
        return tuple((tokenizer.decode([t]), p) for t, p in zip(tokens.tolist(), values.exp().tolist(), strict=True))

    return tuple(
        TokenView(text=text, kl=float(divergence[i]), adapter=top(adapter[i]), merge=top(merge[i]))
        for i, text in enumerate(_pieces(tokenizer, reply))
    )


def _pieces(tokenizer: Any, tokens: Sequence[int]) -> list[str]:
    """Return what each token adds to the text: by itself a token may lose the blank before it, or be a part of a character.

    A character of several tokens is the last one's.
    """
    found, before = list[str](), ""
    for i in range(1, len(tokens) + 1):
        after = tokenizer.decode(list(tokens[:i]))
        if after.endswith("\ufffd") and i < len(tokens):
            found.append("")
            continue
        found.append(after[len(before) :])
        before = after
    return found
