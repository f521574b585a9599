"""What a model reads and the positions at which it answers: the same tokens for teachers, moments and learning.

Differentiable, unlike the log-likelihoods of `evaluation`, and without a cache: every passage is read completely. Passages of a
causal model are padded on the right without a mask, which is exact (no position sees a later one) and faster than a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.evaluation.likelihood import decoder_start

PAD = 0  # any token: padded positions are masked


@dataclass(frozen=True)
class Passage:
    """One text as tokens.

    Attributes:
        prompt: read by the model, or by the encoder of an encoder-decoder model; never empty.
        answer: the tokens whose distributions are compared; empty for a classification head.
        lead: what a decoder of its own reads before the answer, after its start token.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()

    @property
    def positions(self) -> int:
        """How many distributions are compared: one per token of the answer, at least one."""
        return max(1, len(self.answer))

    @property
    def tokens(self) -> int:
        """How many tokens are read."""
        return len(self.prompt) + len(self.lead) + len(self.answer)


class Reader:
    """Reads passages with a model of transformers.

    Args:
        model: causal, encoder-decoder, or with a classification head (`head`).
        head: whether answers are a classification head's outputs rather than tokens.
    """

    def __init__(self, model: Any, *, head: bool = False) -> None:
        self._model = model
        self._head = head
        self._encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

    def logits(self, passages: Sequence[Passage]) -> Tensor:
        """Return the scores of the next token at every position of every answer, in order: (Σ positions, V) float32."""
        return self._run(passages)[0]

    def states(self, passages: Sequence[Passage]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the same scores, and the hidden states after every layer at the same positions, (Σ positions, d) each."""
        return self._run(passages, output_hidden_states=True)

    def _run(self, passages: Sequence[Passage], **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        if self._head:
            ids, mask = _padded([p.prompt for p in passages], self._model.device)
            out = self._model(input_ids=ids, attention_mask=mask, **more)
            last = mask.sum(1) - 1
            hidden = getattr(out, "decoder_hidden_states", None) or getattr(out, "hidden_states", None) or ()
            return out.logits.float(), tuple(h[torch.arange(len(h), device=h.device), last] for h in hidden[1:])
        sequences = [self._sequence(p) for p in passages]
        ids, _ = _padded(sequences, self._model.device)
        rows, columns = _answers(passages, [len(s) for s in sequences], ids.device)
        with _only(self._model, rows, columns) as gathered:
            out = self._model(**self._inputs(passages, ids), use_cache=False, **more)
        hidden = getattr(out, "decoder_hidden_states", None) or getattr(out, "hidden_states", None) or ()
        scores: Tensor = out.logits[0] if gathered else out.logits[rows, columns]
        return scores.float(), tuple(h[rows.to(h.device), columns.to(h.device)] for h in hidden[1:])

    def read(self, passages: Sequence[Passage]) -> None:
        """Run the model over passages of one length, for hooks that look at its layers."""
        self.logits(passages)

    def _sequence(self, passage: Passage) -> tuple[int, ...]:
        """Return the tokens that the model reads; the answer's distributions are at the last positions."""
        answer = passage.answer[:-1]
        return (decoder_start(self._model), *passage.lead, *answer) if self._encoder_decoder else (*passage.prompt, *answer)

    def _inputs(self, passages: Sequence[Passage], ids: Tensor) -> dict[str, Tensor]:
        if not self._encoder_decoder:
            return {"input_ids": ids}
        prompts, mask = _padded([p.prompt for p in passages], ids.device)
        return {"input_ids": prompts, "attention_mask": mask, "decoder_input_ids": ids}


def _answers(passages: Sequence[Passage], lengths: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return row and column of every compared distribution: the last `positions` tokens of each sequence."""
    pairs = [
        (i, n - p.positions + k) for i, (p, n) in enumerate(zip(passages, lengths, strict=True)) for k in range(p.positions)
    ]
    rows, columns = zip(*pairs, strict=True)
    return torch.tensor(rows, device=device), torch.tensor(columns, device=device)


@contextmanager
def _only(model: Any, rows: Tensor, columns: Tensor) -> Iterator[bool]:
    """Let the output layer see some positions only, as (1, N, width); the value is whether it can be done.

    Scores of all positions over the vocabulary are by far the largest tensor of a forward pass, and nearly all unused.
    """
    layer = model.get_output_embeddings()
    if layer is None:
        yield False
        return

    def pick(_: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (inputs[0][rows, columns].unsqueeze(0), *inputs[1:])

    hook = layer.register_forward_pre_hook(pick)
    try:
        yield True
    finally:
        hook.remove()


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens padded on the right, and which are real: (B, L) int64 each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
