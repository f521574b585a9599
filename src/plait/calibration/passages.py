"""What a model reads and the positions at which it answers: the same tokens for teachers, moments and learning.

Differentiable, unlike the log-likelihoods of `evaluation`, and without a cache. Short passages of a causal model are packed in
rows (see `packing`). Where that saves nothing, or a model cannot be read so, they are padded on the right without a mask, which
is exact (no position sees a later one) and faster than a mask.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from plait.calibration.packing import PackedRows, pack_apart, pack_shared, worth_packing
from plait.evaluation.likelihood import decoder_start
from plait.libraries import transformers as library
from plait.notices import announce

PAD = 0  # any token: padded positions are masked
_TRIED = 3  # passages on which it is tried whether a model can read packed rows
#: Mean deviation of scores, as a share of their standard deviation, up to which packed rows read as passages alone do.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_COARSE_ROUNDING = 0.05
_why_not_packed: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


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


@dataclass(frozen=True, eq=False)
class _Input:
    """What a model is given, and where in its output the answers' distributions are, one after the other.

    Attributes:
        keywords: of its forward.
        rows: (Σ positions,) int64.
        columns: (Σ positions,) int64.
    """

    keywords: dict[str, Any]
    rows: Tensor
    columns: Tensor


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
        return self._ask(self._input(passages))[0]

    def states(self, passages: Sequence[Passage]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the same scores, and the hidden states after every layer at the same positions, (Σ positions, d) each."""
        return self._ask(self._input(passages), output_hidden_states=True)

    def read(self, passages: Sequence[Passage]) -> None:
        """Run the model over every token once and over nothing else, for hooks that look at its layers.

        Args:
            passages: of one length, or ones that the model `reads_in_one_row`.
        """
        sequences = [self._sequence(p) for p in passages]
        one_row = len(set(map(len, sequences))) > 1
        self._ask(self._packed_input(pack_apart(sequences), passages) if one_row else self._padded_input(passages))

    def reads_in_one_row(self, passages: Sequence[Passage]) -> bool:
        """Return whether the model reads passages of different lengths in one row as it reads each alone."""
        return not self._head and not self._encoder_decoder and self._packs(passages)

    def _ask(self, given: _Input, **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        with _only(self._model, given.rows, given.columns) if not self._head else nullcontext() as gathered:
            out = self._model(**given.keywords, **more)
        hidden = getattr(out, "decoder_hidden_states", None) or getattr(out, "hidden_states", None) or ()
        states = tuple(h[given.rows.to(h.device), given.columns.to(h.device)] for h in hidden[1:])
        if self._head:
            return out.logits.float(), states
        scores: Tensor = out.logits[0] if gathered else out.logits[given.rows, given.columns]
        return scores.float(), states

    def _input(self, passages: Sequence[Passage]) -> _Input:
        if self._head or self._encoder_decoder:
            return self._padded_input(passages)
        sequences = [self._sequence(p) for p in passages]
        packed = pack_shared(sequences)
        if not worth_packing(packed, sequences) or not self._packs(passages):
            return self._padded_input(passages)
        return self._packed_input(packed, passages)

    def _sequence(self, passage: Passage) -> tuple[int, ...]:
        """Return the tokens that the model reads; the answer's distributions are at the last positions."""
        if self._head:
            return passage.prompt
        answer = passage.answer[:-1]
        return (decoder_start(self._model), *passage.lead, *answer) if self._encoder_decoder else (*passage.prompt, *answer)

    def _padded_input(self, passages: Sequence[Passage]) -> _Input:
        sequences = [self._sequence(p) for p in passages]
        ids, mask = _padded(sequences, self._model.device)
        places = [(i, range(len(s))) for i, s in enumerate(sequences)]
        if self._head:
            last = mask.sum(1) - 1
            return _Input({"input_ids": ids, "attention_mask": mask}, torch.arange(len(ids), device=ids.device), last)
        keywords = {"input_ids": ids}
        if self._encoder_decoder:
            prompts, mask = _padded([p.prompt for p in passages], ids.device)
            keywords = {"input_ids": prompts, "attention_mask": mask, "decoder_input_ids": ids}
        return _Input({**keywords, "use_cache": False}, *_answers(passages, places, ids.device))

    def _packed_input(self, packed: PackedRows, passages: Sequence[Passage]) -> _Input:
        device = self._model.device
        offset = library.reserved_positions(self._model)
        keywords = {
            "input_ids": packed.ids.to(device),
            "position_ids": packed.positions.to(device) + offset,
            "attention_mask": packed.mask(self._model.dtype).to(device),
            "use_cache": False,
        }
        return _Input(keywords, *_answers(passages, packed.places, device))

    def _packs(self, passages: Sequence[Passage]) -> bool:
        """Return whether the model reads packed rows as it reads passages alone: it is asked once, with a few of them."""
        reason = library.why_not_packed(self._model, max(p.tokens for p in passages))
        if reason is None:
            if self._model not in _why_not_packed:
                _why_not_packed[self._model] = self._try_packed(passages[:_TRIED])
            reason = _why_not_packed[self._model]
        if reason is not None:
            name = type(self._model)
            announce(
                f"{name.__name__} reads every text completely, where several in one row would take less time: {reason}.",
                once=f"completely {name.__qualname__}",
            )
        return reason is None

    def _try_packed(self, passages: Sequence[Passage]) -> str | None:
        """Return why packed rows do not read as passages alone do; None where they do."""
        packed = pack_shared([self._sequence(p) for p in passages])
        with torch.no_grad():
            alone = torch.cat([self._ask(self._padded_input([p]))[0] for p in passages])
            try:
                together = self._ask(self._packed_input(packed, passages))[0]
            except torch.OutOfMemoryError:
                raise
            except (TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
                return f"reading them fails ({type(error).__name__}: {' '.join(str(error).split())[:200]})"
        deviation = float((together - alone).abs().mean() / alone.std(-1).mean())
        fits = deviation <= _ROUNDING.get(self._model.dtype, _COARSE_ROUNDING)
        return None if fits else "in one row, they are not what they are alone"


def _answers(
    passages: Sequence[Passage], places: Sequence[tuple[int, Sequence[int]]], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return row and column of every compared distribution: the last `positions` tokens of each passage.

    Args:
        passages: that were read.
        places: the row and the columns of each one's tokens.
        device: of the result.
    """
    pairs = [(row, column) for p, (row, columns) in zip(passages, places, strict=True) for column in columns[-p.positions :]]
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
