"""What is minimized: every objective as pure functions of what models answer, and the one list of them.

With Lₜ the loss of task t, every objective is J = Σₜ wₜ Lₜ, whose weights wₜ no gradient passes: constants, or functions of the
losses themselves (`regret_smoothmax`, whose ∇J is exactly that). All losses are taken at the positions that *predict* an
answer's tokens (the tokens before them), which `Reader.logits` returns.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from plait.calibration.teachers import OutputDistributions
from plait.recipes.tuning import TuneSpec


@dataclass(frozen=True, eq=False)
class BatchOutputs:
    """What a model answers to some texts of a task, and what an objective may compare it with.

    Attributes:
        logits: (N, V) float32, at every position that predicts a token of an answer; texts one after the other.
        first: (B,) int64, which of them are the first of each text.
        teacher: the own adapter's distributions there.
        targets: (N,) int64, the answers' tokens: labels where the objective reads labels.
        labels: (B, C) int64, first tokens of the labels that the task offers, -1 where there are fewer; None where answers
            are free.
        hidden: per layer (N, d), hidden states at the positions.
        wanted: the same of the own adapter.
    """

    logits: Tensor
    first: Tensor
    teacher: OutputDistributions | None = None
    targets: Tensor | None = None
    labels: Tensor | None = None
    hidden: tuple[Tensor, ...] = ()
    wanted: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class ReferenceLosses:
    """Mean losses per task with fixed models, where an objective needs them.

    Attributes:
        base: of the base alone.
        own: of the task's own adapter, by its name.
    """

    base: Mapping[str, float]
    own: Mapping[str, float]


def distill_loss(outputs: BatchOutputs, spec: TuneSpec) -> Tensor:
    """KL(p ‖ q) + λ T² KL(pᵀ ‖ qᵀ) per position, (N,) nats: p of the own adapter, q of the merge (Hinton et al. 2015,
    arXiv:1503.02531).

    pᵀ and qᵀ are p and q at temperature T, over the likeliest outcomes of p (`OutputDistributions.softened_divergence`). Where
    an adapter is nearly certain, KL(p ‖ q) has next to no gradient; there they tell by how much.
    """
    if outputs.teacher is None:
        raise AssertionError("no teacher")
    loss = outputs.teacher.divergence(outputs.logits)
    if weight := spec.used_soft_weight:
        loss = loss + weight * outputs.teacher.softened_divergence(outputs.logits, spec.soft_temperature)
    return loss


def hidden_loss(outputs: BatchOutputs, spec: TuneSpec) -> Tensor:
    """‖h − h*‖² / ‖h*‖² per position, mean over the layers, (N,): the distance from the own adapter's hidden states h*."""
    parts = [
        (h.float() - w.float()).square().sum(-1) / w.float().square().sum(-1).clamp(min=1e-12)
        for h, w in zip(outputs.hidden, outputs.wanted, strict=True)
    ]
    return torch.stack(parts).mean(0)


def entropy_loss(outputs: BatchOutputs, spec: TuneSpec) -> Tensor:
    """H(softmax(z / τ)) per text, (B,) nats, at its first position (AdaMerging, Yang et al. 2024, arXiv:2310.02575).

    Over the first tokens of the task's labels, or over the vocabulary. No label is read.
    """
    z = outputs.logits[outputs.first]
    if outputs.labels is not None and spec.entropy_over == "labels":
        z = z.gather(-1, outputs.labels.clamp(min=0)).masked_fill(outputs.labels < 0, -torch.inf)
    log_p = (z / spec.entropy_temperature).log_softmax(-1)
    return -(log_p.exp() * log_p.clamp(min=-1e30)).sum(-1)


def cross_entropy_loss(outputs: BatchOutputs, spec: TuneSpec) -> Tensor:
    """−log p(y) per token of the answer, (N,) nats: (1 − ε) of the label and ε of the mean over the vocabulary."""
    if outputs.targets is None:
        raise AssertionError("no labels")
    return F.cross_entropy(outputs.logits, outputs.targets, reduction="none", label_smoothing=spec.label_smoothing)


Losses = Mapping[str, float]


def equal_weights(losses: Losses, references: ReferenceLosses, spec: TuneSpec) -> dict[str, float]:
    """1 / T."""
    return {task: 1 / len(losses) for task in losses}


def task_weights(losses: Losses, references: ReferenceLosses, spec: TuneSpec) -> dict[str, float]:
    """Equal; the recipe's, divided by their sum over these tasks; or 1 / (T · max(floor, Lₜ own)), at most the cap."""
    given = spec.task_weights
    if isinstance(given, Mapping):
        total = sum(given[task] for task in losses) or 1.0  # a group of a tree may have tasks without weight alone
        return {task: given[task] / total for task in losses}
    if given != "baseline_normalized":
        return equal_weights(losses, references, spec)
    cap = spec.weight_cap or math.inf
    return {t: min(cap, 1 / (len(losses) * max(spec.baseline_floor, references.own[t]))) for t in losses}


def regrets(losses: Losses, own: Losses, references: ReferenceLosses, spec: TuneSpec) -> dict[str, float]:
    """Return rₜ = (Lₜ − Lₜ own) / (Lₜ base − Lₜ own + ε), of the tasks that have headroom.

    Args:
        losses: of the merge on a batch.
        own: of the own adapters on the same batch.
        references: base and own adapters on fixed batches, which set the scale.
        spec: holds ε.
    """
    headroom = {t: references.base[t] - references.own[t] for t in losses}
    return {t: (losses[t] - own[t]) / (headroom[t] + spec.regret_eps) for t in losses if headroom[t] > spec.regret_eps}


def smooth_maximum(values: Sequence[float], tau: float) -> float:
    """Return τ log Σ exp(v / τ)."""
    top = max(values)
    return top + tau * math.log(sum(math.exp((v - top) / tau) for v in values))


def regret_weights(losses: Losses, own: Losses, references: ReferenceLosses, spec: TuneSpec) -> dict[str, float]:
    """Return wₜ = softmax(r / τ)ₜ / (Lₜ base − Lₜ own + ε), so that Σ wₜ ∇Lₜ is the gradient of the smooth maximum of rₜ."""
    found = regrets(losses, own, references, spec)
    weights = dict.fromkeys(losses, 0.0)
    if found:
        top = max(found.values())
        raised = {t: math.exp((r - top) / spec.tau) for t, r in found.items()}
        for t, e in raised.items():
            weights[t] = e / sum(raised.values()) / (references.base[t] - references.own[t] + spec.regret_eps)
    return weights


@dataclass(frozen=True)
class Objective:
    """One objective.

    Attributes:
        name: in recipes.
        loss: per position, or per text.
        per: what the loss is per, and averaged over.
        weights: of the tasks in a step.
        needs: what it reads besides the texts: the own adapter's distributions or hidden states, or labels.
        coupled: the weights are `regret_weights` of the losses of the same texts: a pass without gradients goes before.
        summary: for people.
    """

    name: str
    loss: Callable[[BatchOutputs, TuneSpec], Tensor]
    per: Literal["position", "text"]
    needs: Literal["teacher", "hidden", "labels", "nothing"]
    summary: str
    weights: Callable[[Losses, ReferenceLosses, TuneSpec], dict[str, float]] = equal_weights
    coupled: bool = False


OBJECTIVES: dict[str, Objective] = {
    o.name: o
    for o in (
        Objective("distill", distill_loss, "position", "teacher", "KL from each task's own adapter"),
        Objective("hidden", hidden_loss, "position", "hidden", "relative distance of hidden states from the own adapter's"),
        Objective("adamerging", entropy_loss, "text", "nothing", "entropy of the first token of an answer"),
        Objective("gradient", cross_entropy_loss, "position", "labels", "cross-entropy of labels", task_weights),
        Objective("supermerge", cross_entropy_loss, "position", "labels", "cross-entropy of labels, link tanh", task_weights),
        Objective(
            "regret_smoothmax",
            cross_entropy_loss,
            "position",
            "labels",
            "smooth maximum of the tasks' regrets",
            equal_weights,
            coupled=True,
        ),
    )
}
