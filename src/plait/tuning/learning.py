"""The loop: a merge's factors learn to answer as each task's own adapter does on that task's texts.

min over A, B of Σₜ KL(pₜ(· | x) ‖ p(· | x; A, B)) / T on unlabelled x of task t: distillation from several teachers (Hinton et
al. 2015, arXiv:1503.02531, at temperature 1; SAMerging 2025, arXiv:2512.21288, and Expert Merging 2025, arXiv:2509.25712, learn
coefficients from the same divergence; here the factors themselves are learnt, from a closed form).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from plait.mixture import Mixture
from plait.mixture.factors import LearntFactors
from plait.recipes.tuning import TuneSpec
from plait.records import Record
from plait.tuning.teaching import Lesson, divergence_over

_BETAS = (0.9, 0.99)
_CLIP = 1.0
_WIDEST = 4.0  # scales that are tried: at most this
_FIRST = (1.0, 1.4)


class Held(Record):
    """How far a merge is from each task's own adapter on texts that it did not learn from.

    Attributes:
        step: of the loop; 0 before the first.
        divergence: task → mean KL(own adapter ‖ merge), nats.
        share: mean over the tasks of divergence / KL(own adapter ‖ base): 0 is the adapters themselves, 1 the base.
    """

    step: int
    divergence: dict[str, float]
    share: float


@dataclass(frozen=True, eq=False)
class Class:
    """The lessons, and which of their texts are held out.

    Attributes:
        lessons: one per task.
        learn: task → texts that are learnt from.
        held: task → texts that are only looked at, to choose the scale and the step; those learnt from where there are few.
    """

    lessons: tuple[Lesson, ...]
    learn: Mapping[str, tuple[int, ...]]
    held: Mapping[str, tuple[int, ...]]


def split_off(lessons: Sequence[Lesson], *, share: float, most: int, seed: int) -> Class:
    """Hold out a share of every task's texts, from 2 to `most`; with a share of 0, or fewer than 8 texts, look at all."""
    learn, held = {}, {}
    for lesson in lessons:
        order = list(range(len(lesson.passages)))
        random.Random(f"held {seed} {lesson.task}").shuffle(order)
        count = min(most, max(2, round(share * len(order)))) if share > 0 and len(order) >= 8 else 0
        held[lesson.task] = tuple(sorted(order[:count] or order))
        learn[lesson.task] = tuple(sorted(order[count:]))
    return Class(tuple(lessons), learn, held)


def look(mixture: Mixture, factors: LearntFactors, taught: Class, step: int) -> Held:
    """Measure the divergence on the held-out texts."""
    found = {}
    for lesson in taught.lessons:
        part = _part(lesson, taught.held[lesson.task])
        with mixture.learning(factors, heads=lesson.adapter if lesson.head else None) as model:
            found[lesson.task] = divergence_over(part, model)
    shares = [found[x.task] / max(x.base, 1e-6) for x in taught.lessons]
    return Held(step=step, divergence=found, share=sum(shares) / len(shares))


def best_scale(
    mixture: Mixture, factors: LearntFactors, taught: Class, report: Callable[[float, Held], object] = lambda s, h: None
) -> tuple[float, Held]:
    """Find the factor on the merge that brings it nearest to the adapters, and leave the factors so; no label is read.

    The share of KL (see `Held`) has one minimum in the scale in all that was measured; it is bracketed from 1 and 1.4 by steps
    of 1.4, and found by a parabola in log scale.
    """
    known: dict[float, Held] = {}
    start = factors.state()

    def at(scale: float) -> float:
        if scale not in known:
            factors.load(start)
            factors.scale(scale)
            known[scale] = look(mixture, factors, taught, 0)
            report(scale, known[scale])
        return known[scale].share

    low, high = _FIRST
    step = high / low
    if at(low) < at(high):
        low, high, step = high, low, low / high
    while at(high) <= at(low) and 1 / _WIDEST < high < _WIDEST:  # go on downhill
        low, high = high, high * step
    middle, left, right = (low, low / step, high) if at(high) > at(low) else (high, low, high * step)
    at(left), at(right)
    scale = _vertex([(math.log(s), at(s)) for s in (left, middle, right)])
    at(scale)
    best = min(known, key=lambda s: known[s].share)
    factors.load(start)
    factors.scale(best)
    return best, known[best]


def learn(
    mixture: Mixture,
    factors: LearntFactors,
    taught: Class,
    spec: TuneSpec,
    start: Held,
    report: Callable[[int, float, Held | None], object],
) -> tuple[list[Held], list[float]]:
    """Run the loop, and leave the factors as they were where the held-out divergence was smallest.

    Every step reads `spec.prompts` texts of every task. AdamW without decay, rate linear up over the first steps and down to 0,
    gradients clipped to norm 1. The order of texts is a function of the seed, the task and the step.

    Returns:
        The held-out divergences, and the mean KL of every step, nats.
    """
    optimizer = torch.optim.AdamW(factors.parameters(), lr=spec.learning_rate, betas=_BETAS, weight_decay=0.0)
    warm = max(1, min(5, spec.steps // 5))
    best, best_state = start, factors.state()
    seen, losses = [start], []
    for step in range(1, spec.steps + 1):
        rate = spec.learning_rate * min(step / warm, (spec.steps - step + 1) / max(1, spec.steps - warm + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        losses.append(_step(mixture, factors, taught, spec, step, optimizer))
        held = None
        if step % spec.look_every == 0 or step == spec.steps:
            held = look(mixture, factors, taught, step)
            seen.append(held)
            if held.share < best.share:
                best, best_state = held, factors.state()
        report(step, losses[-1], held)
    factors.load(best_state)
    return seen, losses


def _step(
    mixture: Mixture, factors: LearntFactors, taught: Class, spec: TuneSpec, step: int, optimizer: torch.optim.Optimizer
) -> float:
    """Make one update; return the mean over the tasks of the KL before it, nats."""
    optimizer.zero_grad(set_to_none=True)
    factors.refresh()
    total = 0.0
    for lesson in taught.lessons:
        wanted = _drawn(taught.learn[lesson.task], spec.prompts, step, f"{spec.seed} {lesson.task}")
        with mixture.learning(factors, heads=lesson.adapter if lesson.head else None) as model:
            loss = lesson.divergence(model, wanted).mean() / len(taught.lessons)
            loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    torch.nn.utils.clip_grad_norm_(factors.parameters(), _CLIP)
    optimizer.step()
    factors.refresh()
    return total


def _drawn(items: Sequence[int], count: int, step: int, key: str) -> list[int]:
    """Return the texts of a step: a new order for every time that all have been read."""
    count = min(count, len(items))
    first, drawn = (step - 1) * count, []
    for position in range(first, first + count):
        round_, at = divmod(position, len(items))
        order = list(items)
        random.Random(f"{key} {round_}").shuffle(order)
        drawn.append(order[at])
    return drawn


def _part(lesson: Lesson, wanted: Sequence[int]) -> Lesson:
    passages, answers = lesson.batch(wanted)
    return Lesson(lesson.task, lesson.adapter, lesson.head, tuple(passages), answers, lesson.base)


def _vertex(points: Sequence[tuple[float, float]]) -> float:
    """Return e to the abscissa of the lowest point of the parabola through three points, kept between the outer two."""
    (x0, y0), (x1, y1), (x2, y2) = sorted(points)
    below = (x1 - x0) * (y1 - y2) - (x1 - x2) * (y1 - y0)
    if below == 0:
        return math.exp(x1)
    vertex = x1 - 0.5 * ((x1 - x0) ** 2 * (y1 - y2) - (x1 - x2) ** 2 * (y1 - y0)) / below
    return math.exp(min(max(vertex, x0), x2))
