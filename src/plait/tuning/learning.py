"""The loop: what learns minimizes an objective on the texts of all tasks.

By default min Σₜ KL(pₜ(· | x) ‖ p(· | x; A, B)) / T over the factors A, B of a merge, on unlabeled x of task t: distillation
from several teachers (Hinton et al. 2015, arXiv:1503.02531, at temperature 1; SAMerging 2025, arXiv:2512.21288, and Expert
Merging 2025, arXiv:2509.25712, learn coefficients from the same divergence). See `objectives` for the others.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.calibration.search import LEAST_DIVERGENCE, search_scale
from plait.errors import PlanError
from plait.linalg.finite import all_finite
from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec
from plait.records import Record
from plait.tuning.learners import FactorLearner, Learner
from plait.tuning.objectives import OBJECTIVES, Objective, ReferenceLosses, regret_weights, regrets, smooth_maximum
from plait.tuning.sampling import draw_texts
from plait.tuning.selection import selection_score
from plait.tuning.teaching import Hidden, Lesson, outputs_of
from plait.tuning.working import WorkingState

_BATCH = 16  # texts read at a time without gradients
_FEWEST_HELD = 4  # texts of a task that may choose scale and step without being learned from
_TOKENS = 1024  # padded tokens of several tasks' texts in one pass, at most


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
    """

    step: int
    divergence: dict[str, float]
    share: float
    kept: dict[str, float] = Field(default_factory=dict)
    score: float = 0.0


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
        found["own"][lesson.task] = _mean(own[lesson.task], fixed)
        found["base"][lesson.task] = _mean(text_losses(lesson, base_model, objective, spec, fixed), fixed)
        if spec.judge == "loss":
            held = taught.held[lesson.task]
            found["held base"][lesson.task] = _mean(text_losses(lesson, base_model, objective, spec, held), held)
            found["held own"][lesson.task] = _mean(text_losses(lesson, own_model, objective, spec, held), held)
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
    return 1 if objective.per == "text" or lesson.head else lesson.passages[text].positions


def evaluate_held_out(
    learner: Learner,
    taught: SplitLessons,
    step: int,
    spec: TuneSpec | None = None,
    earlier: Sequence[Mapping[str, float]] = (),
) -> HeldOutScore:
    """Measure the divergence on the held-out texts, and what is kept; `earlier` is what was kept at earlier looks."""
    spec = spec or TuneSpec()
    found, kept = {}, {}
    for lesson in taught.lessons:
        held = taught.held[lesson.task]
        acting = partial(learner.acting, lesson.adapter if lesson.head else None)
        with torch.no_grad(), acting() as model:
            found[lesson.task] = lesson.divergence(model, held)
        kept[lesson.task] = 1 - found[lesson.task] / max(taught.base[lesson.task], LEAST_DIVERGENCE)
        if spec.judge == "loss":
            base, own = taught.judged.base[lesson.task], taught.judged.own[lesson.task]
            loss = _mean(text_losses(lesson, acting, OBJECTIVES[spec.objective], spec, held), held)
            kept[lesson.task] = (base - loss) / max(base - own, spec.regret_eps)
    shares = [found[x.task] / max(taught.base[x.task], LEAST_DIVERGENCE) for x in taught.lessons]
    share = sum(shares) / len(shares)
    score = selection_score(kept, spec.criterion, earlier)
    return HeldOutScore(step=step, divergence=found, share=share, kept=kept, score=score)


def best_scale(
    learner: FactorLearner,
    taught: SplitLessons,
    spec: TuneSpec,
    report: Callable[[float, HeldOutScore], object],
) -> tuple[float, HeldOutScore]:
    """Find the factor on the merge with the smallest share of KL (see `HeldOutScore`), and leave the factors so."""
    known: dict[float, HeldOutScore] = {}
    start = learner.state()

    def at(scale: float) -> float:
        if scale not in known:
            learner.load(start)
            learner.factors.scale(scale)
            known[scale] = evaluate_held_out(learner, taught, 0, spec)
            report(scale, known[scale])
        return known[scale].share

    best = search_scale(at)
    learner.load(start)
    learner.factors.scale(best)
    return best, known[best]


@dataclass
class LearningRun:
    """A loop, as far as it has come.

    Attributes:
        looks: at the held-out texts.
        losses: the objective at every step.
        step: updates made.
        best: the look whose parameters are kept.
        waited: looks without a gain.
        ended: whether it has ended.
    """

    looks: list[HeldOutScore]
    losses: list[float]
    step: int
    best: HeldOutScore
    waited: int = 0
    ended: bool = False


def run_loop(
    mixture: Mixture,
    learner: Learner,
    taught: SplitLessons,
    spec: TuneSpec,
    start: HeldOutScore,
    report: Callable[[int, float, HeldOutScore | None], object] = lambda step, loss, held: None,
    *,
    steps: int | None = None,
    working: WorkingState | None = None,
    name: str = "state",
) -> LearningRun:
    """Run the loop, and leave the parameters as they were where the held-out score was best, or as they are in the end.

    Every step reads `spec.prompts` × `spec.accumulate` texts of every task. AdamW without decay; gradients clipped. Which texts
    are read is a function of the seed, the task and the step.

    Args:
        mixture: base and adapters.
        learner: what learns.
        taught: from what.
        spec: how.
        start: the look before the first step.
        report: called after every step with its number, the objective before it, and the look, where there was one.
        steps: updates; the recipe's when None.
        working: where the state is kept, and found again.
        name: of this loop's state there.

    Raises:
        PlanError: the objective is not a finite number any more.
    """
    steps = spec.steps if steps is None else steps
    optimizer = torch.optim.AdamW(learner.parameters(), lr=spec.used_rate, betas=spec.betas, weight_decay=0.0)
    run, best_state = LearningRun([start], [], 0, start), learner.state()
    if working is not None and (found := working.load(name, partial(_resume, learner, optimizer))) is not None:
        run, best_state = found
        report(run.step, math.nan, None)
    while run.step < steps and not run.ended:
        step = run.step = run.step + 1
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(spec, step, steps)
        run.losses.append(_step(mixture, learner, taught, spec, step, optimizer))
        held = None
        if step % spec.look_every == 0 or step == steps:
            held = evaluate_held_out(learner, taught, step, spec, [look.kept for look in run.looks])
            run.looks.append(held)
            if held.score > run.best.score + spec.threshold:
                run.best, run.waited, best_state = held, 0, learner.state()
            elif step > spec.stop_warmup:
                run.waited += 1
            run.ended = bool(spec.patience) and run.waited >= spec.patience and step >= spec.min_steps
            if working is not None:
                working.save(name, *_saved(learner, optimizer, run, best_state))
        report(step, run.losses[-1], held)
    if spec.restore_best:
        learner.load(best_state)
    else:
        run.best = run.looks[-1]
    return run


def learning_rate(spec: TuneSpec, step: int, steps: int) -> float:
    """Return the learning rate of a step: linear up over the warm-up, then as the schedule has it."""
    warm = max(1, min(5, steps // 5)) if spec.warmup is None else spec.warmup
    rise = min(1.0, step / warm) if warm else 1.0
    left = steps - step + 1
    match spec.schedule:
        case "linear":
            return spec.used_rate * min(rise, left / max(1, steps - warm + 1))
        case "cosine":
            past = max(0, step - warm) / max(1, steps - warm + 1)
            return spec.used_rate * min(rise, 0.5 * (1 + math.cos(math.pi * past)))
        case _:
            return spec.used_rate * rise


def _step(
    mixture: Mixture, learner: Learner, taught: SplitLessons, spec: TuneSpec, step: int, optimizer: torch.optim.Optimizer
) -> float:
    """Make one update; return the objective before it."""
    objective = OBJECTIVES[spec.objective]
    optimizer.zero_grad(set_to_none=True)
    learner.settle()
    drawn = {x.task: _drawn(x, taught, spec, step) for x in taught.lessons}
    if objective.coupled:
        weights, value = _regretted(learner, taught, spec, drawn)
    else:
        weights, value = objective.weights(dict.fromkeys(drawn, 0.0), taught.learned, spec), None
    parts = []
    for lesson in taught.lessons:
        texts, weight = drawn[lesson.task], weights[lesson.task]
        count = sum(loss_count(lesson, objective, i) for i in texts)
        if weight:
            batches = (texts[at : at + spec.prompts] for at in range(0, len(texts), spec.prompts))
            parts += [_Batch(lesson, batch, weight / count) for batch in batches]
    total = sum(_backward(mixture, learner, objective, spec, group) for group in _together(parts))
    value = total if value is None else value
    if not math.isfinite(value):
        raise PlanError(
            f"tune: the objective is {value} in step {step}; the learning rate {spec.used_rate:g} is too large. "
            "Lower tune.learning_rate."
        )
    if spec.clip is not None:
        torch.nn.utils.clip_grad_norm_(learner.parameters(), spec.clip)
    optimizer.step()
    learner.settle()
    return value


@dataclass(frozen=True, eq=False)
class _Batch:
    """Texts of one task whose losses are summed.

    Attributes:
        lesson: of the task.
        texts: of the lesson.
        factor: on the sum.
    """

    lesson: Lesson
    texts: Sequence[int]
    factor: float

    @property
    def width(self) -> int:
        """Tokens of the longest text."""
        return max(self.lesson.passages[i].tokens for i in self.texts)


def _together(parts: Sequence[_Batch]) -> Iterator[list[_Batch]]:
    """Yield parts in groups that one pass reads: short texts of several tasks together cost less than apart."""
    group: list[_Batch] = []
    for part in parts:
        joined = [*group, part]
        size = sum(len(p.texts) for p in joined) * max(p.width for p in joined)
        if group and (size > _TOKENS or any(p.lesson.head for p in joined)):
            yield group
            joined = [part]
        group = joined
    if group:
        yield group


def _backward(mixture: Mixture, learner: Learner, objective: Objective, spec: TuneSpec, group: Sequence[_Batch]) -> float:
    """Add the gradient of the summed losses of a group, each times its factor; return that sum."""
    hidden = [_own_states(mixture, p) if objective.needs == "hidden" else None for p in group]
    head = group[0].lesson.adapter if group[0].lesson.head else None
    with learner.acting(head) as model, _memory(model, spec), _computing(model, spec):
        outputs = outputs_of(model, [(p.lesson, p.texts, h) for p, h in zip(group, hidden, strict=True)])
        loss = torch.stack([p.factor * objective.loss(x, spec).sum() for p, x in zip(group, outputs, strict=True)]).sum()
        loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())


def _own_states(mixture: Mixture, part: _Batch) -> Hidden:
    with mixture.active({part.lesson.adapter: 1.0}) as model:
        return part.lesson.states(model, part.texts)


def _regretted(
    learner: Learner, taught: SplitLessons, spec: TuneSpec, drawn: Mapping[str, Sequence[int]]
) -> tuple[dict[str, float], float]:
    """Return the tasks' weights, and the smooth maximum of their regrets, from a pass over the same texts."""
    objective = OBJECTIVES[spec.objective]
    losses, own = {}, {}
    for lesson in taught.lessons:
        texts = drawn[lesson.task]
        acting = partial(learner.acting, lesson.adapter if lesson.head else None)
        losses[lesson.task] = _mean(text_losses(lesson, acting, objective, spec, texts), texts)
        own[lesson.task] = _mean(taught.own[lesson.task], texts)
    found = regrets(losses, own, taught.learned, spec)
    return regret_weights(losses, own, taught.learned, spec), smooth_maximum(list(found.values()), spec.tau)


def _drawn(lesson: Lesson, taught: SplitLessons, spec: TuneSpec, step: int) -> list[int]:
    items = taught.learn[lesson.task]
    classes = lesson.classes()
    return draw_texts(
        items,
        [classes[i] for i in items],
        spec.samplers.get(lesson.task, spec.sampler),
        spec.prompts * spec.accumulate,
        step,
        f"{spec.seed} {lesson.task}",
    )


@contextmanager
def _memory(model: nn.Module, spec: TuneSpec) -> Iterator[None]:
    """Let layers keep no activations but compute them again, where that is wanted; dropout stays off.

    transformers does so in layers that are in training mode, which is set on those modules alone: what is in them stays in
    evaluation mode.

    Raises:
        PlanError: the model has no such layers.
    """
    if not spec.checkpointing:
        yield
        return
    layers = [m for m in model.modules() if hasattr(type(m), "gradient_checkpointing")]
    if not layers:
        raise PlanError(f"tune.checkpointing: {type(model).__name__} has no layers that can compute their activations again.")
    again = partial(checkpoint, use_reentrant=False)
    before = [dict(vars(m)) for m in layers]
    try:
        for m in layers:
            rates = {name: 0.0 for name, value in vars(m).items() if "dropout" in name and isinstance(value, float)}
            vars(m).update(rates, training=True, gradient_checkpointing=True, _gradient_checkpointing_func=again)
        yield
    finally:
        for m, attributes in zip(layers, before, strict=True):
            vars(m).clear()
            vars(m).update(attributes)


def _computing(model: Any, spec: TuneSpec) -> AbstractContextManager[Any]:
    if spec.compute_dtype == "auto":
        return nullcontext()
    device = next(model.parameters()).device.type
    return torch.autocast(device, getattr(torch, spec.compute_dtype), enabled=spec.compute_dtype != "float32")


def _saved(
    learner: Learner, optimizer: torch.optim.Optimizer, run: LearningRun, best: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything that a loop continues from."""
    tensors: dict[str, Tensor] = {f"best.{name}": value for name, value in best.items()}
    for name, p in learner.named().items():
        tensors[f"now.{name}"] = p
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in ("exp_avg", "exp_avg_sq")}
    info = {
        "looks": [h.model_dump(mode="json") for h in run.looks],
        "losses": run.losses,
        "step": run.step,
        "best": run.best.step,
        "waited": run.waited,
        "ended": run.ended,
    }
    return tensors, info


def _resume(
    learner: Learner, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> tuple[LearningRun, dict[str, Tensor]]:
    """Put a saved state in place; return the loop, and the best parameters.

    Raises:
        LookupError, TypeError, ValueError: it is not a state of this learner, which is as it was then.
    """
    looks = [HeldOutScore.model_validate(h) for h in info["looks"]]
    best = next((h for h in looks if h.step == info["best"]), None)
    counts = (info["step"], info["waited"], len(info["losses"]))
    if best is None or not all(isinstance(n, int) and n >= 0 for n in counts) or info["step"] != len(info["losses"]):
        raise ValueError(info)
    run = LearningRun(looks, [float(loss) for loss in info["losses"]], info["step"], best, info["waited"], bool(info["ended"]))
    parts: dict[str, dict[str, Tensor]] = {}
    for name, p in learner.named().items():
        parts[name] = {key: tensors[f"{key}.{name}"].to(p.device) for key in ("now", "best", "exp_avg", "exp_avg_sq")}
        if any(t.shape != p.shape or t.dtype != p.dtype or not all_finite(t) for t in parts[name].values()):
            raise ValueError(name)
    learner.load({name: part["now"] for name, part in parts.items()})
    for name, p in learner.named().items():
        averages = {key: parts[name][key] for key in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(float(run.step)), **averages}
    return run, {name: part["best"] for name, part in parts.items()}


def _mean(losses: Mapping[int, tuple[float, int]], texts: Sequence[int]) -> float:
    return math.fsum(losses[i][0] for i in texts) / sum(losses[i][1] for i in texts)
