"""What is learned from: each task's texts as tokens, and what its own adapter answers to them."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import islice
from typing import Any

import torch

from plait.calibration.passages import Reader
from plait.calibration.teachers import AnsweredTexts, answer_texts
from plait.calibration.texts import Texts
from plait.mixture import Mixture
from plait.tasks.asking import ClassPrompts, LabelHead, TagHead
from plait.tuning.objectives import BatchOutputs

Hidden = Sequence[torch.Tensor] | None  # per layer (positions, d)


@dataclass(frozen=True, eq=False, kw_only=True)
class Lesson(AnsweredTexts):
    """One task's passages and its own adapter's answers.

    Attributes:
        task: its name.
        adapter: whose answers they are.
        targets: per passage, the right outputs of a classification head, one per place; empty where they are tokens, or not
            read.
        labeled: whether the passages' answers are labels of the data, rather than what the adapter answers.
    """

    task: str
    adapter: str
    targets: tuple[tuple[int, ...], ...] = ()
    labeled: bool = False

    @property
    def is_alone(self) -> bool:
        """Whether a pass reads nothing but this lesson's: it has a head of its own, or images or sounds."""
        return self.head or self.passages[0].perceived is not None

    def outputs(self, model: Any, wanted: Sequence[int]) -> BatchOutputs:
        """Return what acts now answers to some passages, with everything that an objective may compare it with."""
        return outputs_of(model, [(self, wanted, None)])[0]

    def states(self, model: Any, wanted: Sequence[int]) -> tuple[torch.Tensor, ...]:
        """Return the hidden states after every layer of what acts now, at the positions of some passages; no gradients."""
        with torch.no_grad():
            return Reader(model, head=self.head).states(self.batch(wanted)[0])[1]

    def classes(self) -> list[Any]:
        """Return what every passage is counted as by samplers: its answer."""
        if not self.head:
            return [p.answer for p in self.passages]
        given = iter(self.answers.log_p.argmax(-1).tolist())
        return list(self.targets) if self.labeled else [tuple(islice(given, p.positions)) for p in self.passages]

    def _outputs_at(
        self, wanted: Sequence[int], logits: torch.Tensor, states: Sequence[torch.Tensor], hidden: Hidden
    ) -> BatchOutputs:
        """Return what was answered to some passages, given the scores and hidden states at their positions."""
        passages, answers = self.batch(wanted)
        starts = [0, *itertools.accumulate(p.positions for p in passages[:-1])]
        if self.head:  # every word of a text has an answer of its own
            starts = [*range(len(logits))]
        at = logits.device
        right = [t for i in wanted for t in self.targets[i]] if self.targets else [t for p in passages for t in p.answer]
        return BatchOutputs(
            logits,
            torch.tensor(starts, device=at),
            answers,
            torch.tensor(right, device=at) if self.labeled else None,
            _rectangle([self.labels[i] for i in wanted], at) if self.labels and not self.head else None,
            tuple(states),
            tuple(hidden or ()),
        )


def outputs_of(model: Any, parts: Sequence[tuple[Lesson, Sequence[int], Hidden]]) -> list[BatchOutputs]:
    """Return what acts now answers to passages of several lessons, read in one pass; gradients reach what acts.

    Args:
        model: with whatever acts on it.
        parts: lesson, which of its passages, and the own adapter's hidden states there (`Lesson.states`) where they are
            compared, in all of the parts or in none; a lesson of a classification head is one by itself.
    """
    reader = Reader(model, head=parts[0][0].head)
    passages = [lesson.passages[i] for lesson, wanted, _ in parts for i in wanted]
    logits, states = (reader.logits(passages), ()) if parts[0][2] is None else reader.states(passages)
    sizes = [sum(x.passages[i].positions for i in w) for x, w, _ in parts]
    found, at = [], 0
    for (lesson, wanted, hidden), size in zip(parts, sizes, strict=True):
        found.append(lesson._outputs_at(wanted, logits[at : at + size], [h[at : at + size] for h in states], hidden))
        at += size
    return found


def make_lesson(
    mixture: Mixture,
    texts: Texts,
    adapter: str,
    *,
    right: Sequence[str] | None = None,
    report: Callable[[int], object] = lambda done: None,
) -> Lesson:
    """Put texts into tokens, and ask the task's own adapter about them.

    Args:
        mixture: the base with the adapters.
        texts: of the task.
        adapter: the task's own.
        right: the right answer of every text, where labels are learned from.
        report: called with the number of texts read since it was last called.

    Raises:
        TaskError: a label is not one of the task's.
    """
    answered = answer_texts(mixture, texts, adapter, right=right, report=report)
    targets: tuple[tuple[int, ...], ...] = ()
    match texts.task.ask:
        case TagHead(labels=labels) if right is not None:
            targets = tuple(tuple(labels.index(tag) for tag in text.split()) for text in right)
        case LabelHead(labels=labels) | ClassPrompts(labels=labels) if right is not None:
            targets = tuple((labels.index(text),) for text in right)
    known = {f.name: getattr(answered, f.name) for f in fields(answered)}
    return Lesson(**known, task=texts.task.name, adapter=adapter, targets=targets, labeled=right is not None)


def evenly_spread(count: int, most: int = 64) -> range:
    """Return which of so many texts are read where a sample is enough: at most `most`."""
    return range(0, count, max(1, -(-count // most)))


def _rectangle(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Return rows filled up with -1, (B, C) int64."""
    width = max(map(len, rows))
    return torch.tensor([[*row, *[-1] * (width - len(row))] for row in rows], device=device)
