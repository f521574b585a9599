"""Readers: how a kind of model reads prompts and their continuations, each part of them once where it can.

A reader is called with questions and returns the log-likelihood of every answer. `aligned`: whether the prompts of a call must
have one length; `shared`: how many first tokens of every prompt it has read before.
"""

from __future__ import annotations

import copy
import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from plait.evaluation.model_calls import ModelCall, NotContinuedError, decoder_start, form_of, padded, perceived_of
from plait.evaluation.output_layer import only_positions
from plait.evaluation.packing import pack_shared, packed_keywords
from plait.libraries.transformers import reading
from plait.notices import announce
from plait.tasks.encoding import Question

MOST_POSITIONS = 4096  # whose logits are held at a time
_ROUNDING = {torch.float32: 1e-3, torch.float64: 1e-3}  # nats per token
_COARSE_ROUNDING = 0.1
_SHORTEST_PREFIX = 4  # tokens; below, a pass of its own costs more than it saves


_reasons: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


class CachedReader:
    """Reads what all prompts share once, then every prompt once, then the rest of longer continuations."""

    def __init__(self, model: Any, questions: Sequence[Question], batch_size: int) -> None:
        self._model = model
        self._forward = ModelCall(model)
        self._batch_size = batch_size
        self._instead: UncachedReader | None = None
        longest = max(len(q.prompt) + max(map(len, q.answers)) for q in questions)
        window = reading.attention_window(model)
        perceives = any(q.perceived is not None for q in questions)
        self.aligned = perceives or reading.counts_by_place(model) or (window is not None and longest >= window)
        prompts = [q.prompt for q in questions]
        shared = shared_tokens(prompts) if len(prompts) > 1 and not perceives else 0
        self.shared = shared if shared >= _SHORTEST_PREFIX else 0
        self._read: Any = None
        if self.shared:
            ids = torch.tensor([prompts[0][: self.shared]], device=model.device)
            self._read = self._forward.begin(ids, torch.ones_like(ids), use_cache=True)[1]

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood of every answer to every question."""
        if self._instead is None:
            try:
                return self._ask(questions)
            except NotContinuedError as error:
                self._instead = uncached_reader(self._model, questions, self._batch_size, str(error), padded=False)
        return self._instead(questions)

    def _ask(self, questions: Sequence[Question]) -> list[list[float]]:
        rests = [q.prompt[self.shared :] for q in questions]
        stems_of = [Stems(q.answers) for q in questions]
        ids, mask = padded(rests, self._model.device, left=True)
        seen = torch.cat([mask.new_ones(len(rests), self.shared), mask], 1)
        continued = any(map(any, (stems.read for stems in stems_of)))
        if self.shared:
            past = copy.deepcopy(self._read)
            reading.copy_rows(past, torch.zeros(len(rests), dtype=torch.long, device=ids.device))
            logits, past = self._forward.go_on(ids, seen, past, last=True)
            shift = None
        else:
            perceived = perceived_of(questions, self._model)
            logits, past, shift = self._forward.begin(ids, seen, use_cache=continued, perceived=perceived)
        first = logits[:, -1].float().log_softmax(-1)
        tails = self._tails(past, seen, stems_of, shift) if continued else {}
        return [
            [
                float(first[i, answer[0]].double())
                + (log_likelihood_of(tails[i, stems.of(answer)], answer[1:]) if len(answer) > 1 else 0.0)
                for answer in q.answers
            ]
            for i, (q, stems) in enumerate(zip(questions, stems_of, strict=True))
        ]

    def _tails(self, past: Any, seen: Tensor, stems_of: Sequence[Stems], shift: Tensor | None) -> dict[tuple[int, int], Tensor]:
        """Read what continuations begin with; return the logits by row and beginning."""
        wanted = [(i, k, stem) for i, stems in enumerate(stems_of) for k, stem in enumerate(stems.read) if stem]
        rows = torch.tensor([i for i, _, _ in wanted], device=seen.device)
        reading.copy_rows(past, rows)
        ids, mask = padded([stem for _, _, stem in wanted], seen.device)
        later = None if shift is None else shift[rows.to(shift.device)]
        logits, _ = self._forward.go_on(ids, torch.cat([seen[rows], mask], 1), past, last=False, shift=later)
        return {(i, k): row for (i, k, _), row in zip(wanted, logits, strict=True)}


def why_not_read_on(model: Any, questions: Sequence[Question]) -> str | None:
    """Return why answers after images or sounds are not read from the cache; None where they are as when all is read anew.

    It is asked once of a model, with the longest of the answers after the longest prompt: how many positions an image takes
    is known to the model alone.

    Args:
        model: causal.
        questions: with images or sounds.
    """
    asked = max(questions, key=lambda q: (max(map(len, q.answers)), len(q.prompt)))
    answer = max(asked.answers, key=len)
    if len(answer) == 1:
        return None
    if model not in _reasons:
        one = [replace(asked, answers=[answer])]
        quick, anew = CachedReader(model, one, 1)(one), UncachedReader(model, 1, padded=False)(one)
        deviation = abs(quick[0][0] - anew[0][0]) / len(answer)
        same = deviation <= _ROUNDING.get(model.dtype, _COARSE_ROUNDING) or math.isnan(deviation)  # which is refused later
        _reasons[model] = None if same else "read on from the images or sounds before them, its answers are not what they are"
    return _reasons[model]


def uncached_reader(
    model: Any, questions: Sequence[Question], batch_size: int, reason: str, *, padded: bool = True
) -> UncachedReader:
    """Return the slower reader, and announce it where it is slower.

    Args:
        model: that reads the questions.
        questions: that it will read.
        batch_size: texts at a time.
        reason: why the faster reader does not suit it.
        padded: whether texts of different lengths may be read together.
    """
    if any(len(answer) > 1 for q in questions for answer in q.answers) or shared_tokens([q.prompt for q in questions]) > 0:
        announce(
            f"{type(model).__name__} is evaluated the slower way, every prompt read again with each of its longer answers: "
            f"{reason}.",
            once=f"whole {type(model).__qualname__}",
        )
    return UncachedReader(model, batch_size, padded=padded)


class UncachedReader:
    """Reads every prompt with every continuation of several tokens, from the beginning; those of one token with any of them."""

    aligned, shared = False, 0

    def __init__(self, model: Any, batch_size: int, *, padded: bool) -> None:
        self._model = model
        self._forward = ModelCall(model)
        self._batch_size = batch_size
        self._padded = padded and self._forward.masks

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood of every answer to every question."""
        stems_of = [Stems(q.answers) for q in questions]
        wanted = [(i, k, [*q.prompt, *stem]) for i, q in enumerate(questions) for k, stem in enumerate(stems_of[i].read)]
        forms = [form_of(q) for q in questions]
        wanted.sort(key=lambda one: (len(one[2]), forms[one[0]]))
        found = [[0.0] * len(q.answers) for q in questions]
        for texts in self._groups(wanted, forms):
            ids, mask = padded([text for _, _, text in texts], self._model.device)
            perceived = perceived_of([questions[i] for i, _, _ in texts], self._model, ids.shape[1])
            width, shortest = ids.shape[1], min(len(questions[i].prompt) for i, _, _ in texts)
            logits = self._forward.read(ids, mask, keep=width - shortest + 1, perceived=perceived).logits
            cut = width - logits.shape[1]  # nothing where the model gives the logits of all positions
            for (i, k, _), row in zip(texts, logits, strict=True):
                own = row[len(questions[i].prompt) - 1 - cut :]
                for n, answer in enumerate(questions[i].answers):
                    if stems_of[i].of(answer) == k:
                        found[i][n] = log_likelihood_of(own, answer)
        return found

    def _groups(
        self, wanted: Sequence[tuple[int, int, list[int]]], forms: Sequence[str]
    ) -> Iterator[list[tuple[int, int, list[int]]]]:
        """Group texts, in ascending order of length, so that a batch has one form, not too many rows nor too many logits."""
        group: list[tuple[int, int, list[int]]] = []
        for one in wanted:
            kept = len(one[2])
            other = group and ((not self._padded and kept != len(group[0][2])) or forms[one[0]] != forms[group[0][0]])
            if group and (other or len(group) == self._batch_size or (len(group) + 1) * kept > MOST_POSITIONS):
                yield group
                group = []
            group.append(one)
        if group:
            yield group


class PackedReader:
    """Reads prompts with their longer continuations in packed rows."""

    aligned, shared = False, 0

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood of every answer to every question."""
        return [
            [log_likelihood_of(span, answer) for span, answer in zip(spans, q.answers, strict=True)]
            for q, spans in zip(questions, self.spans(questions), strict=True)
        ]

    def spans(self, questions: Sequence[Question]) -> list[list[Tensor]]:
        """Return the logits that predict the tokens of every answer to every question, (tokens, V) each."""
        stems_of = [Stems(q.answers) for q in questions]
        texts = [(i, k, [*q.prompt, *stem]) for i, q in enumerate(questions) for k, stem in enumerate(stems_of[i].read)]
        packed = pack_shared([text for _, _, text in texts])
        nodes: dict[tuple[int, int], int] = {}  # whose distributions are wanted → which of them
        found: dict[tuple[int, int], list[int]] = {}
        for (i, k, _), (row, columns) in zip(texts, packed.places, strict=True):
            wanted = columns[len(questions[i].prompt) - 1 :]
            found[i, k] = [nodes.setdefault((row, column), len(nodes)) for column in wanted]
        at = [torch.tensor(part, device=self._model.device) for part in zip(*nodes, strict=True)]
        with only_positions(self._model, *at) as gathered:
            logits = self._model(**packed_keywords(self._model, packed)).logits
        logits = logits[0] if gathered else logits[at[0], at[1]]
        return [
            [logits[found[i, stems.of(answer)][: len(answer)]] for answer in q.answers]
            for i, (q, stems) in enumerate(zip(questions, stems_of, strict=True))
        ]


class EncoderDecoderReader:
    """Reads every prompt once in the encoder, and every continuation in the decoder."""

    aligned, shared = False, 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = decoder_start(model)

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        """Return the log-likelihood of every answer to every question."""
        device = self._model.device
        ids, mask = padded([q.prompt for q in questions], device)
        read = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        stems_of = [Stems(q.answers) for q in questions]
        wanted = [(i, k, stem) for i, stems in enumerate(stems_of) for k, stem in enumerate(stems.read)]
        rows = torch.tensor([i for i, _, _ in wanted], device=device)
        decoder_ids, decoder_mask = padded([[self._start, *questions[i].lead, *stem] for i, _, stem in wanted], device)
        logits = self._model(
            encoder_outputs=(read[rows],),
            attention_mask=mask[rows],
            decoder_input_ids=decoder_ids,
            decoder_attention_mask=decoder_mask,
            use_cache=False,
        ).logits
        found = {(i, k): row[len(questions[i].lead) :] for (i, k, _), row in zip(wanted, logits, strict=True)}
        return [
            [log_likelihood_of(found[i, stems.of(answer)], answer) for answer in q.answers]
            for i, (q, stems) in enumerate(zip(questions, stems_of, strict=True))
        ]


class Stems:
    """What must be read of several continuations: all but the last token of each, once where one begins as another does."""

    def __init__(self, answers: Sequence[Sequence[int]]) -> None:
        self.read: list[tuple[int, ...]] = []  # in ascending order, where all that begin with a stem come right after it
        for stem in sorted({tuple(a[:-1]) for a in answers}, reverse=True):
            if not self.read or self.read[-1][: len(stem)] != stem:
                self.read.append(stem)
        self.read.reverse()

    def of(self, answer: Sequence[int]) -> int:
        """Return from which stem an answer is read."""
        return bisect_left(self.read, tuple(answer[:-1]))


def log_likelihood_of(logits: Tensor, tokens: Sequence[int]) -> float:
    """Return Σ log p of tokens; logits (≥ n, V), of which the first n predict them."""
    chosen = torch.tensor(tokens, device=logits.device)
    scores = logits[: len(tokens)].float().log_softmax(-1).gather(1, chosen[:, None])
    return float(scores.double().sum())


def shared_tokens(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common, leaving every prompt at least one of its own."""
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)
