"""What each task's own adapter answers to its texts: the distributions that a merge should keep."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from plait.calibration.inputs import is_encoder_decoder, naming, own_answers, passages_of, tokenize
from plait.calibration.passages import Passage, Reader
from plait.calibration.perceiving import is_perceived, perceived_passages
from plait.calibration.texts import Texts
from plait.deferred import Tensor, torch
from plait.errors import TaskError
from plait.evaluation.likelihood import likeliest_answers
from plait.evaluation.model_calls import BrokenOutputsError, check_numbers
from plait.mixture import Mixture
from plait.tasks.asking import ClassPrompts, Head, LabelHead
from plait.tasks.encoding import Question

_MOST_BYTES = 1 << 30  # of one task's distributions; above, only the largest entries are kept
_KEPT = 1024
_LIKELIEST = 16  # outcomes that are compared at a temperature: over all of them the sum of the unlikely ones decides
_BATCH = 16  # texts read at a time


@dataclass(frozen=True, eq=False)
class OutputDistributions:
    """Distributions over the vocabulary (or a head's labels), one row per position.

    Attributes:
        log_p: (N, V) float32, or (N, k + 1) where only the k largest are kept: the last column is then the rest's.
        index: (N, k) int64, which entries those are; None where all are.
    """

    log_p: Tensor
    index: Tensor | None = None

    def rows(self, wanted: Sequence[int]) -> OutputDistributions:
        """Return some of the rows."""
        at = torch.tensor(wanted, device=self.log_p.device)
        return OutputDistributions(self.log_p[at], None if self.index is None else self.index[at])

    def divergence(self, logits: Tensor) -> Tensor:
        """Return KL(these ‖ softmax(logits)) per row in nats, (N,).

        Where only the largest entries are kept, the rest counts as one outcome: a lower bound of the divergence.

        Args:
            logits: (N, V) float32.
        """
        log_q = logits.log_softmax(-1)
        if self.index is not None:
            kept = log_q.gather(-1, self.index)
            log_q = torch.cat([kept, _log_rest(kept)], -1)
        return _divergence(self.log_p, log_q)

    def softened_divergence(self, logits: Tensor, temperature: float) -> Tensor:
        """Return T² KL(pᵀ ‖ qᵀ) per row in nats, (N,), of the 16 likeliest outcomes of these alone.

        pᵀ ∝ p^(1/T) and qᵀ ∝ softmax(logits)^(1/T), each of sum 1 over those outcomes; the factor T² keeps gradients of one
        size (Hinton et al. 2015, arXiv:1503.02531, §2).

        Args:
            logits: (N, V) float32.
            temperature: T.
        """
        known = self.log_p if self.index is None else self.log_p[:, :-1]  # not the rest
        likeliest, at = known.topk(min(_LIKELIEST, known.shape[-1]), -1)
        own = logits.gather(-1, at if self.index is None else self.index.gather(-1, at))
        return temperature**2 * _divergence(*((x / temperature).log_softmax(-1) for x in (likeliest, own)))


def keep_distributions(logits: Tensor, *, positions: int) -> OutputDistributions:
    """Turn logits into distributions, (N, V); `positions` of a complete task decide whether all entries fit in memory."""
    log_p = logits.log_softmax(-1)
    if positions * log_p.shape[-1] * 4 <= _MOST_BYTES:
        return OutputDistributions(log_p)
    top = log_p.topk(_KEPT, -1)
    return OutputDistributions(torch.cat([top.values, _log_rest(top.values)], -1), top.indices)


@dataclass(frozen=True, eq=False)
class AnsweredTexts:
    """A task's texts as tokens, and what its own adapter answers to them.

    Attributes:
        passages: prompts with the adapter's answers, or with the right ones.
        answers: its distributions at their positions, one row per position.
        labels: per text, the first tokens of the labels that the task offers; empty where answers are free.
        head: whether the answers are a classification head's, or those of a model that compares images with texts.
    """

    passages: tuple[Passage, ...]
    answers: OutputDistributions
    labels: tuple[tuple[int, ...], ...] = ()
    head: bool = False

    def batch(self, wanted: Sequence[int]) -> tuple[list[Passage], OutputDistributions]:
        """Return some passages, with the answers to them."""
        starts = [0, *itertools.accumulate(p.positions for p in self.passages)]
        rows = [r for i in wanted for r in range(starts[i], starts[i + 1])]
        return [self.passages[i] for i in wanted], self.answers.rows(rows)

    def divergence(self, model: Any, wanted: Sequence[int]) -> float:
        """Return the mean KL(own adapter ‖ what acts now) over the positions of some passages, in nats."""
        return mean_divergence(self.divergences(model, wanted))

    def divergences(self, model: Any, wanted: Sequence[int]) -> dict[int, tuple[float, int]]:
        """Return passage → (sum of KL(own adapter ‖ what acts now) in nats, over how many positions), of some passages."""
        order = sorted(wanted, key=lambda i: (self.passages[i].tokens, i))
        reader, found = Reader(model, head=self.head), {}
        with torch.inference_mode():
            for at in range(0, len(order), _BATCH):
                chosen = order[at : at + _BATCH]
                passages, answers = self.batch(chosen)
                values = answers.divergence(reader.logits(passages)).double().cpu()
                for i, part in zip(chosen, torch.split(values, [p.positions for p in passages]), strict=True):
                    found[i] = (float(part.sum()), len(part))
        return found


@contextmanager
def _naming_adapter(mixture: Mixture, name: str) -> Iterator[None]:
    """Name an adapter, and where it is, in a refusal of what it answers."""
    try:
        yield
    except BrokenOutputsError as error:
        raise BrokenOutputsError(f"{mixture.with_folder(name)}: {error}") from None


def _unheard(done: int) -> None:
    """Hear nothing."""


def mean_of(sums: Iterable[tuple[float, int]]) -> float:
    """Return the mean per position, given (sum, count) of every text."""
    known = [*sums]
    return math.fsum(total for total, _ in known) / sum(count for _, count in known)


def mean_divergence(sums: Mapping[int, tuple[float, int]]) -> float:
    """Return the mean per position, given text → (sum, count); a divergence below 0 is so by rounding alone."""
    return max(0.0, mean_of(sums.values()))


def answer_texts(
    mixture: Mixture,
    texts: Texts,
    adapter: str,
    *,
    right: Sequence[str] | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> AnsweredTexts:
    """Let a task's own adapter answer its texts. No label of the data is read, unless `right`.

    A text is read once, with all its labels, where it fits packed rows and the model reads those; else once to choose the
    answer (`own_answers`), and once with it.

    Args:
        mixture: the base with the adapters.
        texts: of the task; they fit the base (`check_texts`).
        adapter: the task's own.
        right: the right answer of every text, in place of the adapter's, where labels are learned from.
        report: called with the number of texts read since it was last called.

    Raises:
        TaskError: the adapter cannot answer, such as with scores that are NaN.
    """
    ask = texts.task.ask
    head = isinstance(ask, (Head, ClassPrompts))
    with naming(texts), _naming_adapter(mixture, adapter):
        if is_perceived(texts):
            writes = not head and right is None
            passages = perceived_passages(mixture, texts, adapter, right=right, report=report if writes else _unheard)
            with mixture.active({adapter: 1.0}) as model:
                answers = teacher_distributions(model, passages, head=head, report=_unheard if writes else report)
            if isinstance(ask, LabelHead) and (outputs := answers.log_p.shape[-1]) != len(ask.labels):
                raise TaskError(f"the head of {adapter} has {outputs} outputs; the task has {len(ask.labels)} labels.")
            return AnsweredTexts(passages, answers, (), head)
        questions, labels = tokenize(mixture, texts, answered=True, right=right)
        if labels and right is None and not is_encoder_decoder(mixture):
            with mixture.active({adapter: 1.0}) as model:
                read = _likeliest(model, questions, report)
            if read is not None:
                return AnsweredTexts(passages_of(questions, read[0]), read[1], labels, head)
        chosen: Sequence[Sequence[int]] = (
            [q.answers[0] for q in questions]
            if right is not None and not head
            else own_answers(mixture, texts, adapter, questions, answered=True)
        )
    passages = passages_of(questions, chosen)
    with mixture.active({adapter: 1.0}) as model:
        return AnsweredTexts(passages, teacher_distributions(model, passages, head=head, report=report), labels, head)


def _likeliest(
    model: Any, questions: Sequence[Question], report: Callable[[int], object]
) -> tuple[list[Sequence[int]], OutputDistributions] | None:
    """Return every question's likeliest answer, and the distributions at its positions; None where not from one pass."""
    most = sum(max(map(len, q.answers)) for q in questions)
    found: dict[int, OutputDistributions] = {}

    def keep(i: int, logits: Tensor) -> None:
        found[i] = keep_distributions(logits, positions=most)

    chosen = likeliest_answers(model, questions, batch_size=_BATCH, keep=keep, report=report)
    if chosen is None:
        return None
    return [q.answers[k] for q, k in zip(questions, chosen, strict=True)], concatenated([found[i] for i in range(len(found))])


def teacher_distributions(
    model: Any,
    passages: Sequence[Passage],
    *,
    head: bool = False,
    batch_size: int = 16,
    report: Callable[[int], object] = lambda done: None,
) -> OutputDistributions:
    """Return a model's distributions at the answers of passages, in their order.

    Args:
        model: of transformers, with whatever acts on it.
        passages: read once each.
        head: whether the model answers by a classification head.
        batch_size: passages at a time.
        report: called with the number of passages read since it was last called.

    Raises:
        TaskError: the model's outputs are NaN.
    """
    reader = Reader(model, head=head)
    order = sorted(range(len(passages)), key=lambda i: (passages[i].tokens, i))
    total = sum(p.positions for p in passages)
    found: list[OutputDistributions | None] = [None] * len(passages)
    with torch.inference_mode():
        for at in range(0, len(order), batch_size):
            batch = order[at : at + batch_size]
            logits = reader.logits([passages[i] for i in batch])
            check_numbers(model, logits.amax(-1).tolist())
            distributions = keep_distributions(logits, positions=total)
            start = 0
            for i in batch:
                stop = start + passages[i].positions
                found[i] = distributions.rows(range(start, stop))
                start = stop
            report(len(batch))
    return concatenated([a for a in found if a is not None])


def concatenated(parts: Sequence[OutputDistributions]) -> OutputDistributions:
    """Return the rows of several, one after the other."""
    index = [a.index for a in parts if a.index is not None]
    return OutputDistributions(torch.cat([a.log_p for a in parts]), torch.cat(index) if index else None)


def _divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    p = log_p.exp()
    return (p * (log_p - log_q)).where(p > 0, 0).sum(-1)


def _log_rest(log_p: Tensor) -> Tensor:
    """Return log(1 − Σ p) of some entries, (N, 1), never −∞."""
    return torch.log1p(-log_p.exp().sum(-1, keepdim=True).clamp(max=1 - 1e-7))
