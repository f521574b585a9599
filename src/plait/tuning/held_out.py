"""Texts that are held out: how far a merge is from each task's own adapter on them, and what of it is kept."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from pydantic import Field
from torch import nn

from plait.calibration.search import LEAST_DIVERGENCE
from plait.calibration.teachers import mean_divergence, mean_of
from plait.errors import PlanError
from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec
from plait.records import Record
from plait.tuning.learners import Learner
from plait.tuning.objectives import OBJECTIVES, Objective, ReferenceLosses
from plait.tuning.selection import selection_score
from plait.tuning.teaching import Lesson

_BATCH = 16  # texts read at a time
_FEWEST_HELD = 4  # texts of a task that may choose scale and step without being learned from


class HeldOutScore(Record):
    """How far a merge is from each task's own adapter on texts that it did not learn from.

    Attributes:
        step: of the loop; 0 before the first.
        divergence: task → mean KL(own adapter ‖ merge), nats.
        share: mean over the tasks of divergence / KL(own adapter ‖ base), the latter at least 0.01 nats: 0 is the adapters
            themselves, 1 the base.
        kept: task → what is kept of what the own adapter has over the base, 1 for all: of the divergence, or of the loss on
            labels, as the recipe judges.
        score: the recipe's criterion over these; larger is better.
        texts: task → per text that is looked at, what is kept on it, and over how many positions; `kept` is their mean.
    """

    step: int
    divergence: dict[str, float]
    share: float
    kept: dict[str, float] = Field(default_factory=dict)
    score: float = 0.0
    texts: dict[str, tuple[tuple[float, int], ...]] = Field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SplitLessons:
    """The lessons, and which of their texts are held out.

    Attributes:
        lessons: one per task.
        learn: task → texts that are learned from.
        held: task → texts that are only looked at, to choose the scale and the step; those learned from where there are few.
        base: task → mean KL(own adapter ‖ base) over the positions of those, in nats: what knowing nothing costs.
        learned: losses of base and own adapters on the texts that are learned from, where the objective needs them.
        judged: the same on the texts that are held out, where labels judge.
        own: task → per text that is learned from, sum and count of the own adapter's loss; where regrets need it.
    """

    lessons: tuple[Lesson, ...]
    learn: Mapping[str, tuple[int, ...]]
    held: Mapping[str, tuple[int, ...]]
    base: Mapping[str, float] = field(default_factory=dict)
    learned: ReferenceLosses = field(default_factory=lambda: ReferenceLosses({}, {}))
    judged: ReferenceLosses = field(default_factory=lambda: ReferenceLosses({}, {}))
    own: Mapping[str, Mapping[int, tuple[float, int]]] = field(default_factory=dict)

    def only(self, tasks: Sequence[str]) -> SplitLessons:
        """Return the lessons of some of the tasks."""
        return replace(self, lessons=tuple(x for x in self.lessons if x.task in tasks))


def split_off(lessons: Sequence[Lesson], *, share: float, most: int, seed: int) -> SplitLessons:
    """Hold out a share of every task's texts, at most `most`; where that is fewer than 4 texts, look at all of them instead.

    Two or three texts are too few to choose a step: their best look is chance, and often an early one at a high rate.
    """
    learn, held = {}, {}
    for lesson in lessons:
        order = list(range(len(lesson.passages)))
        random.Random(f"held {seed} {lesson.task}").shuffle(order)
        count = min(most, round(share * len(order)))
        count = count if count >= _FEWEST_HELD else 0
        held[lesson.task] = tuple(sorted(order[:count] or order))
        learn[lesson.task] = tuple(sorted(order[count:]))
    return SplitLessons(tuple(lessons), learn, held)


def with_references(mixture: Mixture, taught: SplitLessons, spec: TuneSpec) -> SplitLessons:
    """Measure the base's divergence on the held-out texts, and the losses of base and own adapters that the objective, its task
    weights or the judge need.

    Raises:
        PlanError: in no task does the own adapter have a smaller loss than the base, so that there is nothing to regret.
    """
    divergence = {}
    for lesson in taught.lessons:
        with mixture.active(None, heads=lesson.adapter if lesson.head else False) as model:
            divergence[lesson.task] = lesson.divergence(model, taught.held[lesson.task])
    taught = replace(taught, base=divergence)
    objective = OBJECTIVES[spec.objective]
    needs_learned = objective.coupled or spec.task_weights == "baseline_normalized"
    if objective.needs != "labels" or not (needs_learned or spec.judge == "loss"):
        return taught
    found: dict[str, dict[str, float]] = {key: {} for key in ("base", "own", "held base", "held own")}
    own: dict[str, dict[int, tuple[float, int]]] = {}
    for lesson in taught.lessons:
        head = lesson.adapter if lesson.head else False
        some = taught.learn[lesson.task]
        fixed = some[: spec.baseline_batches * spec.prompts]
        base_model = partial(mixture.active, None, heads=head)
        own_model = partial(mixture.active, {lesson.adapter: 1.0})
        own[lesson.task] = text_losses(lesson, own_model, objective, spec, some)
        found["own"][lesson.task] = mean_loss(own[lesson.task], fixed)
        found["base"][lesson.task] = mean_loss(text_losses(lesson, base_model, objective, spec, fixed), fixed)
        if spec.judge == "loss":
            held = taught.held[lesson.task]
            found["held base"][lesson.task] = mean_loss(text_losses(lesson, base_model, objective, spec, held), held)
            found["held own"][lesson.task] = mean_loss(text_losses(lesson, own_model, objective, spec, held), held)
    learned, judged = ReferenceLosses(found["base"], found["own"]), ReferenceLosses(found["held base"], found["held own"])
    if objective.coupled and not any(learned.base[t] - learned.own[t] > spec.regret_eps for t in learned.base):
        listed = ", ".join(f"{t}: {learned.base[t]:.3g} and {learned.own[t]:.3g}" for t in learned.base)
        raise PlanError(f"regret_smoothmax: no adapter has a smaller loss on its labels than the base ({listed}, in nats).")
    return replace(taught, learned=learned, judged=judged, own=own)


def text_losses(
    lesson: Lesson,
    acting: Callable[[], AbstractContextManager[nn.Module]],
    objective: Objective,
    spec: TuneSpec,
    wanted: Sequence[int],
) -> dict[int, tuple[float, int]]:
    """Return text → (sum of the loss, over how many positions), of some texts with what `acting` makes act."""
    order = sorted(wanted, key=lambda i: (lesson.passages[i].tokens, i))
    found = {}
    with torch.no_grad(), acting() as model:
        for at in range(0, len(order), _BATCH):
            batch = order[at : at + _BATCH]
            values = objective.loss(lesson.outputs(model, batch), spec).double().cpu()
            sizes = [loss_count(lesson, objective, i) for i in batch]
            for i, part in zip(batch, torch.split(values, sizes), strict=True):
                found[i] = (float(part.sum()), len(part))
    return found


def loss_count(lesson: Lesson, objective: Objective, text: int) -> int:
    """Return over how many losses of a text a mean is taken."""
    return 1 if objective.per == "text" and not lesson.head else lesson.passages[text].positions


def evaluate_held_out(
    learner: Learner,
    taught: SplitLessons,
    step: int,
    spec: TuneSpec | None = None,
    earlier: Sequence[Mapping[str, float]] = (),
) -> HeldOutScore:
    """Measure the divergence on the held-out texts, and what is kept; `earlier` is what was kept at earlier looks."""
    spec = spec or TuneSpec()
    found, kept, texts = {}, {}, {}
    for lesson in taught.lessons:
        held = taught.held[lesson.task]
        acting = partial(learner.acting, lesson.adapter if lesson.head else None)
        with torch.no_grad(), acting() as model:
            sums = lesson.divergences(model, held)
        found[lesson.task] = mean = mean_divergence(sums)
        base = gain = max(taught.base[lesson.task], LEAST_DIVERGENCE)
        if spec.judge == "loss":
            sums = text_losses(lesson, acting, OBJECTIVES[spec.objective], spec, held)
            base, mean = taught.judged.base[lesson.task], mean_loss(sums, held)
            gain = max(base - taught.judged.own[lesson.task], spec.regret_eps)
        texts[lesson.task] = tuple(((base - total / count) / gain, count) for total, count in (sums[i] for i in held))
        kept[lesson.task] = (base - mean) / gain
    shares = [found[x.task] / max(taught.base[x.task], LEAST_DIVERGENCE) for x in taught.lessons]
    share = sum(shares) / len(shares)
    score = selection_score(kept, spec.criterion, earlier)
    return HeldOutScore(step=step, divergence=found, share=share, kept=kept, score=score, texts=texts)


def mean_loss(losses: Mapping[int, tuple[float, int]], texts: Sequence[int]) -> float:
    """Return the mean per position of some texts' losses, given text → (sum, count)."""
    return mean_of(losses[i] for i in texts)
