"""The loop: what learns minimizes an objective on the texts of all tasks.

By default min Σₜ KL(pₜ(· | x) ‖ p(· | x; A, B)) / T over the factors A, B of a merge, on unlabeled x of task t: distillation
from several teachers (Hinton et al. 2015, arXiv:1503.02531, at temperature 1; SAMerging 2025, arXiv:2512.21288, and Expert
Merging 2025, arXiv:2509.25712, learn coefficients from the same divergence). See `objectives` for the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from plait.errors import PlanError
from plait.linalg.finite import all_finite
from plait.mixture import Mixture
from plait.recipes.tuning import TuneSpec
from plait.tuning.held_out import HeldOutScore, SplitLessons, evaluate_held_out, loss_count, mean_loss, text_losses
from plait.tuning.learners import Learner
from plait.tuning.objectives import OBJECTIVES, Objective, regret_weights, regrets, smooth_maximum
from plait.tuning.sampling import draw_texts
from plait.tuning.selection import is_clearly_worse
from plait.tuning.teaching import Hidden, Lesson, outputs_of
from plait.tuning.working import WorkingState

_AVERAGES = ("exp_avg", "exp_avg_sq")  # that AdamW keeps of a parameter
_TOKENS = 1024  # padded tokens of several tasks' texts in one pass, at most


@dataclass
class LearningRun:
    """A loop, as far as it has come.

    Attributes:
        looks: at the held-out texts.
        losses: the objective at every step.
        step: updates made.
        best: the look with the largest score.
        kept: the look whose parameters are kept.
        waited: looks without a gain.
        ended: whether it has ended.
    """

    looks: list[HeldOutScore]
    losses: list[float]
    step: int
    best: HeldOutScore
    kept: HeldOutScore
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
    """Run the loop, and leave the parameters as they were at the look that is kept, or in the end.

    That is the last one that is neither clearly worse than the best (`is_clearly_worse`) nor worse than the start: the rate
    falls to 0, so that a later step is the better one where a few held-out texts do not tell.

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
    run, kept_state = LearningRun([start], [], 0, start, start), learner.state()
    if working is not None and (found := working.load(name, partial(_resume, learner, optimizer))) is not None:
        run, kept_state = found
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
                run.best, run.waited = held, 0
            elif step > spec.stop_warmup:
                run.waited += 1
            worse = is_clearly_worse(held.texts, run.best.texts, spec.criterion, spec.tolerance)
            if held is run.best or (held.score >= start.score and not worse):
                run.kept, kept_state = held, learner.state()
            run.ended = bool(spec.patience) and run.waited >= spec.patience and step >= spec.min_steps
            if working is not None:
                working.save(name, *_saved(learner, optimizer, run, kept_state))
        report(step, run.losses[-1], held)
    if spec.restore_best:
        learner.load(kept_state)
    else:
        run.kept = run.looks[-1]
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
        if group and (size > _TOKENS or any(p.lesson.is_alone for p in joined)):
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
        losses[lesson.task] = mean_loss(text_losses(lesson, acting, objective, spec, texts), texts)
        own[lesson.task] = mean_loss(taught.own[lesson.task], texts)
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
    learner: Learner, optimizer: torch.optim.Optimizer, run: LearningRun, kept: Mapping[str, Tensor]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return everything that a loop continues from."""
    tensors: dict[str, Tensor] = {f"kept.{name}": value for name, value in kept.items()}
    for name, p in learner.named().items():
        tensors[f"now.{name}"] = p
        tensors |= {f"{key}.{name}": optimizer.state[p][key] for key in _AVERAGES if p in optimizer.state}
    info = {
        "looks": [h.model_dump(mode="json") for h in run.looks],
        "losses": run.losses,
        "step": run.step,
        "updates": {name: int(optimizer.state[p]["step"]) for name, p in learner.named().items() if p in optimizer.state},
        "best": run.best.step,
        "kept": run.kept.step,
        "waited": run.waited,
        "ended": run.ended,
    }
    return tensors, info


def _resume(
    learner: Learner, optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor], info: Mapping[str, Any]
) -> tuple[LearningRun, dict[str, Tensor]]:
    """Put a saved state in place; return the loop, and the parameters that are kept.

    Raises:
        LookupError, TypeError, ValueError: it is not a state of this learner, which is as it was then.
    """
    looks = [HeldOutScore.model_validate(h) for h in info["looks"]]
    best, kept = (next((h for h in looks if h.step == info[key]), None) for key in ("best", "kept"))
    counts = (info["step"], info["waited"], len(info["losses"]))
    counted = all(isinstance(n, int) and n >= 0 for n in counts) and info["step"] == len(info["losses"])
    if best is None or kept is None or not counted:
        raise ValueError(info)
    losses = [float(loss) for loss in info["losses"]]
    run = LearningRun(looks, losses, info["step"], best, kept, info["waited"], bool(info["ended"]))
    parts: dict[str, dict[str, Tensor]] = {}
    updates = {name: info["updates"].get(name, 0) for name in learner.named()}  # none where no text reaches a parameter
    if any(not isinstance(n, int) or not 0 <= n <= info["step"] for n in updates.values()):
        raise ValueError(updates)
    for name, p in learner.named().items():
        keys = ("now", "kept", *(_AVERAGES if updates[name] else ()))
        parts[name] = {key: tensors[f"{key}.{name}"].to(p.device) for key in keys}
        if any(t.shape != p.shape or t.dtype != p.dtype or not all_finite(t) for t in parts[name].values()):
            raise ValueError(name)
    learner.load({name: part["now"] for name, part in parts.items()})
    for name, p in learner.named().items():
        if updates[name]:
            averages = {key: parts[name][key] for key in _AVERAGES}
            optimizer.state[p] = {"step": torch.tensor(float(updates[name])), **averages}
    return run, {name: part["kept"] for name, part in parts.items()}
