"""Log-likelihoods of given continuations of prompts.

The common prefix of all prompts is read once, and each prompt once, however many continuations it has. The first token of a
continuation is scored at the prompt's last position; only longer continuations are read at all. Short prompts are packed in
rows (see `packing`). Others are padded on the left and masked, and positions are counted without the padding, so that a row's
result does not depend on its batch; continuations are read from a cache. Models that count positions by a token's index in the
cache get prompts of one length at a time instead, without padding.

Models whose cache cannot be copied and continued (state spaces) read every prompt together with every continuation of several
tokens, in batches; this is announced. Encoder-decoder models read every prompt once, in their encoder.
"""

from __future__ import annotations

import copy
import math
import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from plait.errors import TaskError
from plait.evaluation.output_layer import only_positions, plain_states
from plait.evaluation.packing import MOST_NODES, pack_shared, packed_keywords, why_not_packed
from plait.libraries import transformers as library
from plait.notices import announce
from plait.tasks.encoding import Question

_SHORTEST_PREFIX = 4  # tokens; below, a pass of its own costs more than it saves
_MOST_POSITIONS = 4096  # whose logits are held at a time
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
        reader = _EncoderDecoder(model) if encoder_decoder else _reader(model, questions, batch_size)
        least = _LEAST_READ if model.device.type == "cpu" else _LEAST_READ_ELSEWHERE
        least = sys.maxsize if isinstance(reader, _Packed) else least  # nothing is padded
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
                scores = [_sum(span, answer) for span, answer in zip(spans, questions[i].answers, strict=True)]
                check_numbers(model, scores)
                chosen[i] = scores.index(max(scores))
                keep(i, spans[chosen[i]].float())
            report(len(batch))
    return chosen


def check_lengths(model: Any, lengths: Sequence[int]) -> None:
    """Make sure that texts fit a model's context.

    Raises:
        TaskError: some do not.
    """
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    limit = None if limit is None else limit - library.reserved_positions(model)
    too_long = [n for n in lengths if limit is not None and n > limit]
    if too_long:
        raise TaskError(
            f"{len(too_long)} of {len(lengths)} texts are longer than the model's context of {limit} tokens (the longest has "
            f"{max(too_long)}). Leave them out, or let prompts lose their beginning with 'max_tokens' in the task."
        )


def vocabulary(model: Any) -> int | None:
    """Return how many tokens a model has embeddings for; None where that is not known."""
    return getattr(model.get_input_embeddings(), "num_embeddings", None)


def check_numbers(model: Any, scores: Sequence[float]) -> None:
    """Refuse outputs that are NaN.

    Raises:
        TaskError: one is NaN.
    """
    if any(map(math.isnan, scores)):
        raise TaskError(
            f"the model's outputs are NaN (computed in {model.dtype}). A weight is broken, or the dtype too narrow: try "
            "--load-dtype float32 (dtype='float32')."
        )


def _length(question: Question, *, encoder_decoder: bool) -> int:
    """Return how many positions a question takes: of the longer side in an encoder-decoder model."""
    prompt, longest = len(question.prompt), max(map(len, question.answers))
    return max(prompt, 1 + len(question.lead) + longest) if encoder_decoder else prompt + longest


def _reader(model: Any, questions: Sequence[Question], batch_size: int) -> _Cached | _Uncached | _Packed:
    if _reads_less_packed(questions) and (packed := _packed_reader(model, questions)) is not None:
        return packed
    forward, reason = _ModelCall(model), library.why_not_continued(model)
    if reason is None and not forward.masks:
        reason = "its forward takes no mask of padding"
    if reason is None and library.cache_argument(model) is None and not forward.may_cache():
        reason = "its forward takes no cache of what it has read"
    if reason is not None:
        return _uncached(model, questions, batch_size, reason)
    try:
        return _Cached(model, questions, batch_size)
    except _NotContinuedError as error:
        return _uncached(model, questions, batch_size, str(error), padded=False)


def _packed_reader(model: Any, questions: Sequence[Question]) -> _Packed | None:
    if not _fit_rows(questions):
        return None
    texts = [[*q.prompt, *max(q.answers, key=len)] for q in questions]
    return _Packed(model) if why_not_packed(model, texts) is None else None


def _fit_rows(questions: Sequence[Question]) -> bool:
    """Whether no text fills a row by itself: its mask grows with its square."""
    shared = _shared([q.prompt for q in questions]) if len(questions) > 1 else 0
    return shared + max(_length(q, encoder_decoder=False) for q in questions) <= MOST_NODES


def _reads_less_packed(questions: Sequence[Question]) -> bool:
    """Whether packed rows hold less than padded batches, where longer continuations cost a copy of the cache as well."""
    shared = _shared([q.prompt for q in questions]) if len(questions) > 1 else 0
    stems = [_Stems(q.answers).read for q in questions]
    prompts = sum(len(q.prompt) - shared for q in questions)
    longer = sum(len(stem) for of in stems for stem in of)
    packed = (prompts + longer) * MOST_NODES / max(1, MOST_NODES - shared)
    return packed <= prompts * (1 + _MOST_PADDING) + 2 * longer


def _uncached(model: Any, questions: Sequence[Question], batch_size: int, reason: str, *, padded: bool = True) -> _Uncached:
    """Return the slower reader, and announce it where it is slower.

    Args:
        model: that reads the questions.
        questions: that it will read.
        batch_size: texts at a time.
        reason: why the faster reader does not suit it.
        padded: whether texts of different lengths may be read together.
    """
    if any(len(answer) > 1 for q in questions for answer in q.answers) or _shared([q.prompt for q in questions]) > 0:
        announce(
            f"{type(model).__name__} is evaluated the slower way, every prompt read again with each of its longer answers: "
            f"{reason}.",
            once=f"whole {type(model).__qualname__}",
        )
    return _Uncached(model, batch_size, padded=padded)


def _batches(questions: Sequence[Question], batch_size: int, *, aligned: bool, shared: int, least: int) -> Iterator[list[int]]:
    """Group questions of like length (of one length when aligned), so that there is little padding; long answers, few rows.

    Args:
        questions: to be grouped.
        batch_size: of a group, at most.
        aligned: whether nothing may be padded.
        shared: first tokens of every prompt that are not read again.
        least: tokens that are read before a group ends for its padding.
    """
    order = sorted(range(len(questions)), key=lambda i: (len(questions[i].prompt), i))
    batch: list[int] = []
    rows = width = tokens = 0
    for i in order:
        q = questions[i]
        own = len(q.prompt) - shared
        more, wider = len(q.answers), max(width, max(map(len, q.answers)))
        other = aligned and batch and len(q.prompt) != len(questions[batch[0]].prompt)
        wasted = tokens >= least and tokens + own < (1 - _MOST_PADDING) * (len(batch) + 1) * own
        if batch and (other or wasted or len(batch) == batch_size or (rows + more) * wider > _MOST_POSITIONS):
            yield batch
            batch, rows, tokens, wider = [], 0, 0, max(map(len, q.answers))
        batch.append(i)
        rows, width, tokens = rows + more, wider, tokens + own
    if batch:
        yield batch


class _NotContinuedError(Exception):
    """What a model has read cannot be continued; the message says why."""


class _ModelCall:
    """Calls a model with what its forward takes."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self._takes = set(library.forward_parameters(model))
        self._any = library.takes_any_keyword(model)
        self._offset = library.reserved_positions(model)
        self._argument: str | None = None
        self._continued = False

    @property
    def masks(self) -> bool:
        """Whether padding tokens can be recognized."""
        return "attention_mask" in self._takes or not self._takes - {"args", "kwargs"}

    def may_cache(self) -> bool:
        """Whether the forward can return a cache."""
        return self._any or "use_cache" in self._takes

    def read(self, ids: Tensor, mask: Tensor, *, keep: int | None = None) -> Any:
        """Read texts from their beginning, and keep nothing; `keep`: the last positions whose logits are wanted."""
        return self._call(ids, mask, keep=keep, use_cache=False)

    def begin(self, ids: Tensor, mask: Tensor, *, use_cache: bool) -> tuple[Any, Any]:
        """Read the beginning of texts; return the logits at the end and the cache, where one is wanted.

        Raises:
            _NotContinuedError: the model gives no cache that can be continued.
        """
        out = self._attempt(ids, mask, keep=1, use_cache=use_cache, **self._positions(ids, mask))
        return out.logits, self._cache(out) if use_cache else None

    def go_on(self, ids: Tensor, mask: Tensor, cache: Any, *, last: bool) -> tuple[Any, Any]:
        """Read on from a cache, which takes up what is read; return the logits and the cache.

        Args:
            ids: what is read (n, w).
            mask: 1 where a token is, (n, tokens in the cache + w).
            cache: of what was read.
            last: whether only the logits at the end are wanted.

        Raises:
            _NotContinuedError: the model does not take up the cache.
        """
        before = int(cache.get_seq_length())
        past = {str(self._argument): cache}
        out = self._attempt(ids, mask, keep=1 if last else None, use_cache=True, **past, **self._positions(ids, mask))
        if int(cache.get_seq_length()) != before + ids.shape[1]:
            raise _NotContinuedError(f"its forward takes '{self._argument}' but does not read on from it")
        self._continued = True
        return out.logits, cache

    def _attempt(self, ids: Tensor, mask: Tensor, **keywords: Any) -> Any:
        """Call the model; until it has read on from a cache once, a failure only means that it cannot."""
        try:
            return self._call(ids, mask, **keywords)
        except torch.OutOfMemoryError:
            raise
        except (TypeError, ValueError, AttributeError, RuntimeError) as error:
            if self._continued:
                raise
            words = " ".join(str(error).split())[:200]
            raise _NotContinuedError(f"reading on from what it has read fails ({type(error).__name__}: {words})") from error

    def _cache(self, out: Any) -> Any:
        found = library.cache_of(out)
        if found is None:
            raise _NotContinuedError("its output holds no cache that can be copied row by row")
        field, cache = found
        reason = library.why_cache_not_continued(cache)
        if reason is not None:
            raise _NotContinuedError(reason)
        if self._argument is None:
            named = field if field in self._takes else library.cache_argument(self._model)
            self._argument = named or (field if self._any else None)
        if self._argument is None:
            raise _NotContinuedError(f"its output holds a cache as '{field}', but its forward takes none")
        return cache

    def _positions(self, ids: Tensor, mask: Tensor) -> dict[str, Any]:
        if "position_ids" not in self._takes:
            return {}
        return {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :] + self._offset}

    def _call(self, ids: Tensor, mask: Tensor, *, keep: int | None, use_cache: bool, **more: Any) -> Any:
        if self.masks:
            more["attention_mask"] = mask
        if keep is not None and "logits_to_keep" in self._takes:
            more["logits_to_keep"] = keep
        if self.may_cache():
            more["use_cache"] = use_cache
        return self._model(input_ids=ids, **more)


class _Cached:
    """Reads what all prompts share once, then every prompt once, then the rest of longer continuations."""

    def __init__(self, model: Any, questions: Sequence[Question], batch_size: int) -> None:
        self._model = model
        self._forward = _ModelCall(model)
        self._batch_size = batch_size
        self._instead: _Uncached | None = None
        longest = max(len(q.prompt) + max(map(len, q.answers)) for q in questions)
        window = library.attention_window(model)
        self.aligned = library.counts_by_place(model) or (window is not None and longest >= window)
        prompts = [q.prompt for q in questions]
        shared = _shared(prompts) if len(prompts) > 1 else 0
        self.shared = shared if shared >= _SHORTEST_PREFIX else 0
        self._read: Any = None
        if self.shared:
            ids = torch.tensor([prompts[0][: self.shared]], device=model.device)
            self._read = self._forward.begin(ids, torch.ones_like(ids), use_cache=True)[1]

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        if self._instead is None:
            try:
                return self._ask(questions)
            except _NotContinuedError as error:
                self._instead = _uncached(self._model, questions, self._batch_size, str(error), padded=False)
        return self._instead(questions)

    def _ask(self, questions: Sequence[Question]) -> list[list[float]]:
        rests = [q.prompt[self.shared :] for q in questions]
        stems_of = [_Stems(q.answers) for q in questions]
        ids, mask = padded(rests, self._model.device, left=True)
        seen = torch.cat([mask.new_ones(len(rests), self.shared), mask], 1)
        continued = any(map(any, (stems.read for stems in stems_of)))
        if self.shared:
            past = copy.deepcopy(self._read)
            library.copy_rows(past, torch.zeros(len(rests), dtype=torch.long, device=ids.device))
            logits, past = self._forward.go_on(ids, seen, past, last=True)
        else:
            logits, past = self._forward.begin(ids, seen, use_cache=continued)
        first = logits[:, -1].float().log_softmax(-1)
        tails = self._tails(past, seen, stems_of) if continued else {}
        return [
            [
                float(first[i, answer[0]].double()) + (_sum(tails[i, stems.of(answer)], answer[1:]) if len(answer) > 1 else 0.0)
                for answer in q.answers
            ]
            for i, (q, stems) in enumerate(zip(questions, stems_of, strict=True))
        ]

    def _tails(self, past: Any, seen: Tensor, stems_of: Sequence[_Stems]) -> dict[tuple[int, int], Tensor]:
        """Read what continuations begin with; return the logits by row and beginning."""
        wanted = [(i, k, stem) for i, stems in enumerate(stems_of) for k, stem in enumerate(stems.read) if stem]
        rows = torch.tensor([i for i, _, _ in wanted], device=seen.device)
        library.copy_rows(past, rows)
        ids, mask = padded([stem for _, _, stem in wanted], seen.device)
        logits, _ = self._forward.go_on(ids, torch.cat([seen[rows], mask], 1), past, last=False)
        return {(i, k): row for (i, k, _), row in zip(wanted, logits, strict=True)}


class _Stems:
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


class _Uncached:
    """Reads every prompt with every continuation of several tokens, from the beginning; those of one token with any of them."""

    aligned, shared = False, 0

    def __init__(self, model: Any, batch_size: int, *, padded: bool) -> None:
        self._model = model
        self._forward = _ModelCall(model)
        self._batch_size = batch_size
        self._padded = padded and self._forward.masks

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        stems_of = [_Stems(q.answers) for q in questions]
        wanted = [(i, k, [*q.prompt, *stem]) for i, q in enumerate(questions) for k, stem in enumerate(stems_of[i].read)]
        wanted.sort(key=lambda one: len(one[2]))
        found = [[0.0] * len(q.answers) for q in questions]
        for texts in self._groups(wanted):
            ids, mask = padded([text for _, _, text in texts], self._model.device)
            width, shortest = ids.shape[1], min(len(questions[i].prompt) for i, _, _ in texts)
            logits = self._forward.read(ids, mask, keep=width - shortest + 1).logits
            cut = width - logits.shape[1]  # nothing where the model gives the logits of all positions
            for (i, k, _), row in zip(texts, logits, strict=True):
                own = row[len(questions[i].prompt) - 1 - cut :]
                for n, answer in enumerate(questions[i].answers):
                    if stems_of[i].of(answer) == k:
                        found[i][n] = _sum(own, answer)
        return found

    def _groups(self, wanted: Sequence[tuple[int, int, list[int]]]) -> Iterator[list[tuple[int, int, list[int]]]]:
        """Group texts, in ascending order of length, so that a batch has not too many rows nor too many logits."""
        group: list[tuple[int, int, list[int]]] = []
        for one in wanted:
            kept = len(one[2])
            other = not self._padded and group and kept != len(group[0][2])
            if group and (other or len(group) == self._batch_size or (len(group) + 1) * kept > _MOST_POSITIONS):
                yield group
                group = []
            group.append(one)
        if group:
            yield group


class _Packed:
    """Reads prompts with their longer continuations in packed rows."""

    aligned, shared = False, 0

    def __init__(self, model: Any) -> None:
        self._model = model

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        return [
            [_sum(span, answer) for span, answer in zip(spans, q.answers, strict=True)]
            for q, spans in zip(questions, self.spans(questions), strict=True)
        ]

    def spans(self, questions: Sequence[Question]) -> list[list[Tensor]]:
        """Return the logits that predict the tokens of every answer to every question, (tokens, V) each."""
        stems_of = [_Stems(q.answers) for q in questions]
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


class _EncoderDecoder:
    """Reads every prompt once in the encoder, and every continuation in the decoder."""

    aligned, shared = False, 0

    def __init__(self, model: Any) -> None:
        self._model = model
        self._start = decoder_start(model)

    def __call__(self, questions: Sequence[Question]) -> list[list[float]]:
        device = self._model.device
        ids, mask = padded([q.prompt for q in questions], device)
        read = self._model.get_encoder()(input_ids=ids, attention_mask=mask).last_hidden_state
        stems_of = [_Stems(q.answers) for q in questions]
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
            [_sum(found[i, stems.of(answer)], answer) for answer in q.answers]
            for i, (q, stems) in enumerate(zip(questions, stems_of, strict=True))
        ]


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
    """Return Σ log p of tokens; logits (≥ n, V), of which the first n predict them."""
    chosen = torch.tensor(tokens, device=logits.device)
    scores = logits[: len(tokens)].float().log_softmax(-1).gather(1, chosen[:, None])
    return float(scores.double().sum())


def _shared(prompts: Sequence[Sequence[int]]) -> int:
    """Return how many first tokens all prompts have in common, leaving every prompt at least one of its own."""
    same = sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, zip(*prompts, strict=False)))
    return min(same, min(map(len, prompts)) - 1)


def padded(rows: Sequence[Sequence[int]], device: torch.device, pad: int = 0, *, left: bool = False) -> tuple[Tensor, Tensor]:
    """Return tokens and attention mask, both (rows, longest row), int64; what is filled up is `pad`, with mask 0."""
    width = max(map(len, rows))
    ids, mask = torch.full((len(rows), width), pad), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        own = slice(width - len(row), None) if left else slice(len(row))
        ids[i, own], mask[i, own] = torch.tensor(row, dtype=torch.long), 1
    return ids.to(device), mask.to(device)
