"""What a model reads and the positions at which it answers: the same inputs for teachers, moments and learning.

Differentiable, unlike the log-likelihoods of `evaluation`, and without a cache. Short passages of a causal model are packed in
rows (see `packing`). Where that saves nothing, or a model cannot be read so, they are padded on the right without a mask, which
is exact (no position sees a later one) and faster than a mask. Prompts with images or sounds have a mask, which some of their
models must have, and share a batch where their inputs are of one form.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from plait.deferred import Tensor, torch
from plait.errors import TaskError
from plait.evaluation.model_calls import decoder_start, form_of, perceived_of, refused_inputs
from plait.evaluation.output_layer import only_positions
from plait.evaluation.packing import PackedRows, pack_apart, pack_shared, packed_keywords, why_not_packed, worth_packing
from plait.evaluation.vision import ClassTexts, class_vectors, likeness
from plait.notices import announce
from plait.tasks.perceiving import Perceived

PAD = 0  # any token: padded positions are masked
_BATCH_TEXTS = 64  # of classes, read at a time


@dataclass(frozen=True)
class Passage:
    """One text as tokens, with its images or sounds; or an image or a sound, and what is written of it as tokens.

    Attributes:
        prompt: read by the model, or by the encoder of an encoder-decoder model; empty only where an image or a sound is read
            in its place.
        answer: the tokens whose distributions are compared; empty where a head answers.
        lead: what a decoder of its own reads before the answer, after its start token; without a prompt that token too, since
            it is not always the first.
        segments: which text of a pair every token is of; empty where all are of one.
        places: at which tokens a head answers, or a model with CTC at which moments of a sound; empty where it answers once.
        perceived: what the model is given of the prompt's images or sounds, or of the one in its place.
        classes: the texts that an image is compared with, where a head has no part.
    """

    prompt: tuple[int, ...] = ()
    answer: tuple[int, ...] = ()
    lead: tuple[int, ...] = ()
    segments: tuple[int, ...] = ()
    places: tuple[int, ...] = ()
    perceived: Perceived | None = None
    classes: ClassTexts | None = None

    @property
    def positions(self) -> int:
        """How many distributions are compared: one per token of the answer or place of a head's answer, at least one."""
        return max(1, len(self.answer), len(self.places))

    @property
    def tokens(self) -> int:
        """How many tokens are read, besides an image or a sound."""
        return len(self.prompt) + len(self.lead) + len(self.answer)

    @property
    def form(self) -> str:
        """Names and sizes of the inputs of images or sounds, of which a batch has one form; empty for a text."""
        return form_of(self)

    @property
    def size(self) -> tuple[int, int]:
        """How much is read: numbers of images and sounds, and tokens."""
        return (0 if self.perceived is None else self.perceived.size), self.tokens


@dataclass(frozen=True, eq=False)
class _Input:
    """What a model is given, and where in its output the answers' distributions are, one after the other.

    Attributes:
        keywords: of its forward, besides `perceived`.
        rows: (Σ positions,) int64.
        columns: (Σ positions,) int64.
        perceived: what it is given of images or sounds.
    """

    keywords: dict[str, Any]
    rows: Tensor
    columns: Tensor
    perceived: dict[str, Tensor] = field(default_factory=dict)


class Reader:
    """Reads passages with a model of transformers.

    Args:
        model: causal, encoder-decoder, or one that reads texts as a whole (`head`).
        head: whether answers are a head's outputs, if any, rather than tokens.
    """

    def __init__(self, model: Any, *, head: bool = False) -> None:
        self._model = model
        self._head = head
        self._encoder_decoder = bool(getattr(model.config, "is_encoder_decoder", False))

    def logits(self, passages: Sequence[Passage]) -> Tensor:
        """Return the scores of the next token at every position of every answer, in order: (Σ positions, V) float32."""
        return self._ask(passages)[0]

    def states(self, passages: Sequence[Passage]) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the same scores, and the hidden states after every layer at the same positions, (Σ positions, d) each."""
        return self._ask(passages, output_hidden_states=True)

    def read(self, passages: Sequence[Passage]) -> None:
        """Run the model over every token once and over nothing else, for hooks that look at its layers.

        Args:
            passages: of one length and form, or ones that the model `reads_in_one_row`.
        """
        if (classes := passages[0].classes) is not None:
            self._likeness(passages, classes)
            return
        sequences = [self._sequence(p) for p in passages]
        one_row = len(set(map(len, sequences))) > 1
        given = self._packed_input(pack_apart(sequences), passages) if one_row else self._padded_input(passages)
        self._call(given)

    def reads_in_one_row(self, passages: Sequence[Passage]) -> bool:
        """Return whether the model reads passages of different lengths in one row as it reads each alone."""
        if self._head or self._encoder_decoder or any(p.perceived for p in passages):
            return False
        return self._packs(passages)

    def _ask(self, passages: Sequence[Passage], **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        groups = [*_of_one_form(passages)]
        if len(groups) == 1:
            return self._ask_together(passages, **more)
        parts = [self._ask_together([passages[i] for i in group], **more) for group in groups]
        places = [*itertools.accumulate((p.positions for p in passages), initial=0)]
        rows = [row for group in groups for i in group for row in range(places[i], places[i + 1])]
        back = torch.tensor(rows, device=parts[0][0].device).argsort()
        layers = zip(*(states for _, states in parts), strict=True)
        return torch.cat([logits for logits, _ in parts])[back], tuple(torch.cat(layer)[back] for layer in layers)

    def _ask_together(self, passages: Sequence[Passage], **more: Any) -> tuple[Tensor, tuple[Tensor, ...]]:
        if (classes := passages[0].classes) is not None:
            return self._likeness(passages, classes), ()
        given = self._input(passages)
        out, gathered = self._call(given, **more)
        if self._head and getattr(out, "logits", None) is None:
            raise TaskError(f"{type(self._model).__name__} has no head, and the task's labels are answered by one.")
        hidden = getattr(out, "decoder_hidden_states", None) or getattr(out, "hidden_states", None) or ()
        states = tuple(h[given.rows.to(h.device), given.columns.to(h.device)] for h in hidden[1:])
        if self._head and out.logits.ndim == 2:
            return out.logits.float(), states
        scores: Tensor = out.logits[0] if gathered else out.logits[given.rows, given.columns]
        return scores.float(), states

    def _likeness(self, passages: Sequence[Passage], classes: ClassTexts) -> Tensor:
        """Return how like each image is to each class, (B, classes) float32; images and texts are read with what acts."""
        (pixels,) = perceived_of(passages, self._model).values()
        return likeness(self._model, pixels, class_vectors(self._model, classes, _BATCH_TEXTS))

    def _call(self, given: _Input, **more: Any) -> tuple[Any, bool]:
        """Return the model's output, and whether it holds the logits of the wanted positions alone."""
        with self._gathering(given) as gathered, refused_inputs(self._model, given.perceived):
            return self._model(**given.keywords, **given.perceived, **more), bool(gathered)

    def _gathering(self, given: _Input) -> AbstractContextManager[Any]:
        return only_positions(self._model, given.rows, given.columns) if self._writes(given) else nullcontext()

    def _writes(self, given: _Input) -> bool:
        """Whether the model answers by tokens: by a head it does not, nor by a label for every moment of a sound (CTC)."""
        return not self._head and any(name.endswith("input_ids") for name in given.keywords)

    def _input(self, passages: Sequence[Passage]) -> _Input:
        if self._head or self._encoder_decoder or passages[0].perceived is not None:
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
        if passage.perceived is not None and not passage.prompt:
            return (*passage.lead, *answer)
        return (decoder_start(self._model), *passage.lead, *answer) if self._encoder_decoder else (*passage.prompt, *answer)

    def _padded_input(self, passages: Sequence[Passage]) -> _Input:
        sequences = [self._sequence(p) for p in passages]
        perceived = perceived_of(passages, self._model, max(map(len, sequences)))
        in_place = bool(perceived) and not passages[0].prompt
        if in_place and (self._head or not self._encoder_decoder):
            at = [(i, column) for i, p in enumerate(passages) for column in p.places or [0]]
            rows, columns = torch.tensor(at, device=self._model.device).unbind(1)
            return _Input({}, rows, columns, perceived)
        ids, mask = _padded(sequences, self._model.device)
        places = [(i, range(len(s))) for i, s in enumerate(sequences)]
        if self._head:
            keywords = {"input_ids": ids, "attention_mask": mask}
            if any(p.segments for p in passages):
                keywords["token_type_ids"] = _padded([p.segments or [0] * len(p.prompt) for p in passages], ids.device)[0]
            at = [(i, column) for i, p in enumerate(passages) for column in p.places or [len(p.prompt) - 1]]
            rows, columns = torch.tensor(at, device=ids.device).unbind(1)
            return _Input(keywords, rows, columns)
        keywords = {"input_ids": ids}
        if in_place:
            keywords = {"decoder_input_ids": ids}
        elif perceived:
            keywords["attention_mask"] = mask  # which some of these models must have
        elif self._encoder_decoder:
            prompts, mask = _padded([p.prompt for p in passages], ids.device)
            keywords = {"input_ids": prompts, "attention_mask": mask, "decoder_input_ids": ids}
        rows, columns = _answers(passages, places, ids.device)
        return _Input({**keywords, "use_cache": False}, rows, columns, perceived)

    def _packed_input(self, packed: PackedRows, passages: Sequence[Passage]) -> _Input:
        return _Input(packed_keywords(self._model, packed), *_answers(passages, packed.places, self._model.device))

    def _packs(self, passages: Sequence[Passage]) -> bool:
        reason = why_not_packed(self._model, [self._sequence(p) for p in passages])
        if reason is not None:
            name = type(self._model)
            announce(
                f"{name.__name__} reads every text completely, where several in one row would take less time: {reason}.",
                once=f"completely {name.__qualname__}",
            )
        return reason is None


def _of_one_form(passages: Sequence[Passage]) -> Iterator[list[int]]:
    """Yield the indices of passages that one pass reads: texts all, images and sounds of one form."""
    groups: dict[str, list[int]] = {}
    for i, passage in enumerate(passages):
        groups.setdefault(passage.form, []).append(i)
    yield from groups.values()


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


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Return tokens padded on the right, and which are real: (B, L) int64 each."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[PAD] * (width - len(row))] for row in rows], device=device)
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows], device=device)
    return ids, mask
