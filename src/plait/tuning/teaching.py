"""What is learnt from: each task's texts as tokens, and what its own adapter answers to them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from plait.calibration.passages import Passage, Reader
from plait.calibration.teachers import Answers, ask
from plait.calibration.texts import Texts
from plait.errors import TaskError
from plait.evaluation.generation import generate_tokens
from plait.evaluation.likelihood import check_lengths, log_likelihoods
from plait.mixture import Mixture
from plait.tasks.encoding import Encoder, Question
from plait.tasks.schema import Generation, Perplexity, SequenceClassification

_SPOKEN = 32  # tokens of a free answer that are compared, at most


@dataclass(frozen=True, eq=False)
class Lesson:
    """One task's passages and its own adapter's answers.

    Attributes:
        task: its name.
        adapter: whose answers they are.
        head: whether the answers are a classification head's.
        passages: what is read.
        answers: what the adapter says there, one row per position.
        base: mean KL(adapter ‖ base) over the positions, in nats: what knowing nothing costs.
    """

    task: str
    adapter: str
    head: bool
    passages: tuple[Passage, ...]
    answers: Answers
    base: float

    def batch(self, wanted: Sequence[int]) -> tuple[list[Passage], Answers]:
        """Return some passages, with the answers to them."""
        starts = self._starts()
        rows = [r for i in wanted for r in range(starts[i], starts[i] + self.passages[i].positions)]
        return [self.passages[i] for i in wanted], self.answers.rows(rows)

    def divergence(self, model: Any, wanted: Sequence[int]) -> torch.Tensor:
        """Return KL(own adapter ‖ what acts now) per position of some passages, nats; gradients reach what acts."""
        passages, answers = self.batch(wanted)
        return answers.divergence(Reader(model, head=self.head).logits(passages))

    def _starts(self) -> list[int]:
        starts = [0]
        for passage in self.passages:
            starts.append(starts[-1] + passage.positions)
        return starts


def passages_of(mixture: Mixture, texts: Texts, adapter: str) -> tuple[Passage, ...]:
    """Return a task's texts as tokens, with the answers whose distributions are compared.

    Those are the tokens of the label that the task's own adapter finds likeliest, of its greedy answer where the answer is
    free (up to 32 tokens), and of the text itself for a perplexity task. No label of the data is read.

    Args:
        mixture: the base with the adapters.
        texts: of the task.
        adapter: the task's own.

    Raises:
        TaskError: the base has no tokenizer, or a text is longer than its context.
    """
    task, tokenizer = texts.task, mixture.tokenizer
    if tokenizer is None:
        raise TaskError("the base model has no tokenizer; only tasks of text can be calibrated on.")
    model: Any = mixture.model
    if isinstance(task, SequenceClassification):
        cut: dict[str, Any] = {"truncation": task.max_tokens is not None, "max_length": task.max_tokens}
        rows = tokenizer([str(p) for p in texts.prompts], **cut)["input_ids"]
        check_lengths(model, [len(r) for r in rows])
        return tuple(Passage(tuple(r)) for r in rows)
    encoder = Encoder(tokenizer, task, apart=bool(model.config.is_encoder_decoder))
    questions = encoder.encode(texts.prompts, texts.choices)
    longest = [len(q.prompt) + max([_SPOKEN, *map(len, q.answers)]) for q in questions]
    check_lengths(model, longest)
    if isinstance(task, Perplexity):
        return tuple(_passage(q, q.answers[0]) for q in questions)
    with mixture.active({adapter: 1.0}) as acting:
        if isinstance(task, Generation):
            return tuple(
                _passage(q, said) for q, said in zip(questions, _spoken(acting, tokenizer, questions, task), strict=True)
            )
        return tuple(_passage(q, best) for q, best in zip(questions, _likeliest(acting, questions), strict=True))


def lesson_of(
    mixture: Mixture, texts: Texts, passages: Sequence[Passage], adapter: str, report: Callable[[int], object]
) -> Lesson:
    """Ask a task's own adapter, and the base, about passages."""
    head = isinstance(texts.task, SequenceClassification)
    with mixture.active({adapter: 1.0}) as model:
        answers = ask(model, passages, head=head, report=report)
    with mixture.active(None, heads=adapter if head else False) as model, torch.inference_mode():
        base = divergence_over(Lesson(texts.task.name, adapter, head, tuple(passages), answers, 0.0), model)
    return Lesson(texts.task.name, adapter, head, tuple(passages), answers, base)


def divergence_over(lesson: Lesson, model: Any, *, batch_size: int = 16) -> float:
    """Return the mean KL(own adapter ‖ what acts now) over all positions of a lesson, in nats."""
    order = sorted(range(len(lesson.passages)), key=lambda i: (lesson.passages[i].tokens, i))
    with torch.inference_mode():
        parts = [lesson.divergence(model, order[at : at + batch_size]) for at in range(0, len(order), batch_size)]
    return float(torch.cat(parts).double().mean())


def _passage(question: Question, answer: Sequence[int]) -> Passage:
    return Passage(tuple(question.prompt), tuple(answer), tuple(question.lead))


def _likeliest(model: Any, questions: Sequence[Question]) -> list[list[int]]:
    """Return the answer of every question that a model finds likeliest; where they begin alike, by all their tokens."""
    scores = log_likelihoods(model, questions, batch_size=16)
    return [q.answers[row.index(max(row))] for q, row in zip(questions, scores, strict=True)]


def _spoken(model: Any, tokenizer: Any, questions: Sequence[Question], task: Generation) -> list[list[int]]:
    """Return the first tokens of every greedy answer."""
    return generate_tokens(model, tokenizer, questions, max_new_tokens=min(_SPOKEN, task.max_new_tokens), batch_size=16)
