"""Coefficients of columns: what they act on, where they start, how they learn, and the plain recipe that they become."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from plait.errors import PlanError, collect
from plait.merging.combine import pipeline_of
from plait.merging.engine import MergedModule
from plait.merging.inventory import Inventory
from plait.merging.prepared import PreparedAdapters
from plait.merging.truncation import OutputFactors
from plait.merging.weighting import module_weights, towers_of
from plait.mixture import Mixture
from plait.mixture.columns import Columns
from plait.recipes.schema import Recipe
from plait.recipes.tuning import Granularity, TuneSpec
from plait.records import Record
from plait.results.progress import SilentProgress
from plait.stages.base import LinearCombine
from plait.tuning.held_out import HeldOutScore, SplitLessons, evaluate_held_out
from plait.tuning.hierarchy import levels, similarity
from plait.tuning.learners import CoefficientLearner
from plait.tuning.learning import LearningRun, run_loop
from plait.tuning.working import WorkingState

_ABOVE = 0.9  # where the nodes above the first level of a tree start: near 1, where tanh still has a gradient
_ROUND_OFF = 1e-6  # singular values below this share of the largest are not counted


class LearnedCoefficients(Record):
    """Λ as it was learned.

    Attributes:
        granularity: what a row is.
        columns: names; `start` is the closed form.
        rows: layers or modules; one row, `model`, per task; empty per direction, where a file holds the numbers.
        values: per row, one number per column.
        start: the same before the first step.
    """

    granularity: Granularity
    columns: tuple[str, ...]
    rows: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    start: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class CoefficientColumns:
    """What coefficients are learned over.

    Attributes:
        columns: on the live base.
        names: of the columns.
        start: name of the column that is the closed form; None where coefficients start from the recipe's own.
        values: Λ at the start.
        notes: what is to be known of it.
    """

    columns: Columns
    names: tuple[str, ...]
    start: str | None
    values: Tensor
    notes: tuple[str, ...]


def is_linear(recipe: Recipe) -> bool:
    """Return whether a recipe is a weighted sum, so that coefficients of the adapters alone start from its own."""
    pipeline = pipeline_of(recipe)
    return isinstance(pipeline.combine, LinearCombine) and pipeline.is_linear and recipe.space_name != "factors"


def check_coefficients(inventory: Inventory) -> None:
    """Refuse what coefficients cannot be learned of, before any work is done.

    Raises:
        PlanError: all of it.
    """
    recipe, spec, adapters = inventory.recipe, inventory.recipe.tune, inventory.adapters
    problems = []
    biased = [a.name for a in adapters if any(t.has_bias for t in a.targets.values())]
    if biased and spec.used_granularity == "direction":
        problems.append(f"{', '.join(biased)}: lora_bias is not a direction; use granularity 'module'")
    if not is_linear(recipe):
        if recipe.transforms:
            problems.append(
                f"transforms would change the start of method {recipe.method_name!r} too when the learned recipe is run; "
                "take them out, or start from method 'linear'"
            )
        if spec.used_link in ("softmax", "simplex_scaled") or spec.normalize:
            what = "normalized" if spec.normalize else f"on the link {spec.used_link!r}"
            problems.append(
                f"coefficients {what} have no place for a start of method {recipe.method_name!r}; use method 'linear'"
            )
        if spec.group_size:
            problems.append(
                f"'group_size' is a tree of adapters without a start; use method 'linear', not {recipe.method_name!r}"
            )
        if recipe.heads.policy == "average" and any(a.full_tensors for a in adapters):
            problems.append("heads: average: the start has no heads; keep them separate")
    collect(PlanError, problems, "these coefficients cannot be learned")


def coefficient_columns(
    inventory: Inventory, mixture: Mixture, closed: Sequence[MergedModule], scale: float, *, random: int | None = None
) -> CoefficientColumns:
    """Put the adapters, as the recipe prepares them, and the closed form side by side on the base.

    Args:
        inventory: the adapters and the recipe.
        mixture: the base.
        closed: the closed form at its scale; only its target modules are used.
        scale: of the closed form, which the recipe's own coefficients are multiplied with.
        random: a seed: random deltas of equal norms in place of all columns, as a control.
    """
    spec, recipe = inventory.recipe.tune, inventory.recipe
    targets = [m.target for m in closed]
    found: dict[str, Iterable[MergedModule]] = dict(_leaves(inventory, targets))
    names = ("start", "closed_form", "start-of-the-tuning")
    start = None if is_linear(recipe) else next(name for name in names if name not in found)
    if start is not None:
        found = {start: closed, **found}
    if random is not None:
        drawn = torch.Generator().manual_seed(random)
        found = {name: [random_like(m, drawn) for m in modules] for name, modules in found.items()}
    direction = spec.used_granularity == "direction"
    columns = mixture.columns(found, factors="canonical" if direction else "stored")
    per_module, notes = _first(inventory, targets, scale, leading=start is not None), []
    values, spread = _at(columns, per_module, spec.used_granularity)
    if spread > 1e-9:
        notes.append(
            f"the recipe's weights differ within a row of coefficients per {spec.used_granularity}; their mean is the start."
        )
    return CoefficientColumns(columns, tuple(found), start, values.float(), tuple(notes))


def make_learner(mixture: Mixture, sources: CoefficientColumns, spec: TuneSpec) -> CoefficientLearner:
    """Return what learns: Λ over the columns, with the start's own coefficient free of the link."""
    free = 1 if sources.start is not None and spec.used_granularity != "direction" else 0
    return CoefficientLearner(mixture, sources.columns, spec.used_granularity, sources.values, spec, free=free)


def learn_in_tree(
    mixture: Mixture,
    sources: CoefficientColumns,
    taught: SplitLessons,
    spec: TuneSpec,
    start: HeldOutScore,
    report: Callable[..., object],
    *,
    working: WorkingState | None = None,
) -> tuple[CoefficientLearner, LearningRun, tuple[tuple[tuple[str, ...], ...], ...]]:
    """Learn node by node, from the leaves up, then all coefficients together from the product.

    Returns:
        The learner with the result, the loop of the polish with the nodes' losses before it, and per node its children.
    """
    size = spec.group_size or 2
    leaves = len(sources.names)
    product = sources.values.clone()
    losses: list[float] = []
    tree = []
    for height, level in enumerate(levels(similarity(sources.columns.gram()), size)):
        lower = product if height else torch.ones_like(product)
        result = product.clone()
        for number, children in enumerate(level):
            below = sorted(leaf for child in children for leaf in child)
            groups = torch.tensor([next((c for c, child in enumerate(children) if t in child), 0) for t in range(leaves)])
            inside = torch.tensor([float(t in below) for t in range(leaves)])
            first = torch.stack([product[..., list(child)].mean(-1) for child in children], -1)
            first = first if height == 0 else torch.full_like(first, _ABOVE)
            node = CoefficientLearner(
                mixture, sources.columns, spec.used_granularity, first, spec, fixed=lower * inside, groups=groups
            )
            part = taught.only([x.task for x in taught.lessons if sources.names.index(x.adapter) in below])
            name = f"node-{height}-{number}"
            run = run_loop(
                mixture, node, part, spec, evaluate_held_out(node, part, 0, spec), report, working=working, name=name
            )
            losses += run.losses
            result = torch.where(inside > 0, node.values().detach(), result)
            tree.append(tuple(tuple(sources.names[leaf] for leaf in child) for child in children))
        product = result
    learner = CoefficientLearner(mixture, sources.columns, spec.used_granularity, product, spec)
    done = len(losses)
    first_look = evaluate_held_out(learner, taught, 0, spec)
    run = run_loop(mixture, learner, taught, spec, first_look, report, steps=spec.polish_steps, working=working, name="polish")
    polished = [h.model_copy(update={"step": h.step + done}) for h in run.looks]
    kept = next(h for h in polished if h.step == run.kept.step + done)
    if start.score >= kept.score and spec.restore_best:  # nothing was won
        learner.load(CoefficientLearner(mixture, sources.columns, spec.used_granularity, sources.values, spec).state())
        kept = start
    return learner, LearningRun([start, *polished], [*losses, *run.losses], done + run.step, kept, kept), tuple(tree)


def learned_recipe(
    recipe: Recipe, sources: CoefficientColumns, values: Tensor, rank: int | str, paths: Mapping[str, str]
) -> Recipe:
    """Return the plain recipe that makes the same merge: a weighted sum of the columns.

    Args:
        recipe: what was tuned.
        sources: the columns.
        values: Λ; not per direction.
        rank: of the adapter.
        paths: where each column is.
    """
    rows = dict(zip(_rows(sources.columns, recipe.tune.used_granularity), _table(values), strict=True))
    weights: dict[str, Any]
    numbers = {row: dict(zip(sources.names, line, strict=True)) for row, line in rows.items()}
    match recipe.tune.used_granularity:
        case "task":
            weights = {"policy": "per_adapter", "adapters": numbers["model"]}
        case "layer":
            weights = {"policy": "per_layer", "layers": {row: line for row, line in numbers.items() if row}}
            weights |= {"default": numbers[""]} if "" in numbers else {}
        case _:
            weights = {"policy": "per_module", "modules": numbers}
    kept = {"base_model", "merge_mode", "transforms", "heads", "output", "seed"} & recipe.model_fields_set
    data = recipe.model_dump(mode="json", by_alias=True, include=kept)
    data["output"] = {**data.get("output", {}), "rank": rank}
    entries = [{"name": name, "path": paths[name]} for name in sources.names]
    return Recipe.model_validate({**data, "adapters": entries, "method": "linear", "weights": weights})


def describe_coefficients(
    sources: CoefficientColumns, granularity: Granularity, values: Tensor, start: Tensor
) -> LearnedCoefficients:
    """Return Λ for the record."""
    if granularity == "direction":
        return LearnedCoefficients(granularity=granularity, columns=sources.names, rows=(), values=(), start=())
    return LearnedCoefficients(
        granularity=granularity,
        columns=sources.names,
        rows=tuple(_rows(sources.columns, granularity)),
        values=tuple(_table(values)),
        start=tuple(_table(start)),
    )


def needed_rank(merged: Mapping[str, Sequence[Any]]) -> int:
    """Return the rank at which no matrix of a merge loses more than rounding: columns that span the same need no more."""
    most = 1
    for slices in merged.values():
        for delta in slices:
            sizes = delta.singular_values()
            if len(sizes) and float(sizes[0]) > 0:
                most = max(most, int((sizes > _ROUND_OFF * sizes[0]).sum()))
    return most


def random_like(module: MergedModule, drawn: torch.Generator) -> MergedModule:
    """Return random factors of the same shapes and the same norm of every matrix."""
    if module.factors is None:
        raise AssertionError(f"{module.target!r} has no factors")
    slices = []
    for s in module.factors.slices:
        other = type(s)(
            torch.randn(s.a.shape, generator=drawn, dtype=torch.float32),
            torch.randn(s.b.shape, generator=drawn, dtype=torch.float32),
        )
        size = other.energy()
        slices.append(other.scaled((s.energy() / size) ** 0.5 if size else 0.0))
    return MergedModule(module.target, OutputFactors(tuple(slices)), None, module.bias, None)


def _leaves(inventory: Inventory, targets: Sequence[str]) -> dict[str, list[MergedModule]]:
    """Return every adapter's deltas as a merge sees them, transforms applied, without weights."""
    prepared = PreparedAdapters(inventory, SilentProgress())
    found: dict[str, list[MergedModule]] = {a.name: [] for a in inventory.adapters}
    for target in targets:
        matrices = [m.scaled() for m in prepared.read(target)]
        for t, adapter in enumerate(inventory.adapters):
            if target in adapter.targets:
                entry = adapter.targets[target]
                bias = adapter.read_part(target, "lora_B.bias", torch.float32) * entry.scaling if entry.has_bias else None
                emitted = OutputFactors(tuple(row[t] for row in matrices))
                found[adapter.name].append(MergedModule(target, emitted, None, bias, None))
    return found


def _first(inventory: Inventory, targets: Sequence[str], scale: float, *, leading: bool) -> dict[str, Tensor]:
    """Return target → Λ at the start, (T,) float64: 1 for a start and 0 for the adapters, or the recipe's coefficients."""
    recipe, combine = inventory.recipe, pipeline_of(inventory.recipe).combine
    given = recipe.tune.initial
    count = len(inventory.adapters)
    if leading:
        row = torch.tensor([1.0, *[given or 0.0] * count], dtype=torch.float64)
        return dict.fromkeys(targets, row)
    if given is not None:
        return dict.fromkeys(targets, torch.full((count,), given, dtype=torch.float64))
    if not isinstance(combine, LinearCombine):
        raise AssertionError(f"{recipe.method_name} is not a weighted sum")
    towers = towers_of(inventory.layouts)
    weights = {t: torch.tensor(module_weights(recipe, t, towers), dtype=torch.float64) for t in targets}
    return {t: combine.coefficients(w, t) * scale for t, w in weights.items()}


def _at(columns: Columns, per_module: Mapping[str, Tensor], granularity: Granularity) -> tuple[Tensor, float]:
    """Return Λ of a granularity from coefficients per module, and how far those are from it, at most."""
    table = torch.stack([per_module[path] for path in columns.axes.modules])
    if granularity == "direction":
        values = torch.zeros(columns.axes.shape("direction"), dtype=torch.float64)
        for k, row in enumerate(columns.deltas.values()):
            ranks = torch.tensor([0 if d is None else d.rank for d in row])
            line = table[k].repeat_interleave(ranks)
            values[k, : len(line)] = line
        return values, 0.0
    if granularity == "module":
        return table, 0.0
    rows = columns.row_of_module() if granularity == "layer" else torch.zeros(len(table), dtype=torch.int64)
    count = len(columns.axes.layers) if granularity == "layer" else 1
    sums = torch.zeros(count, table.shape[1], dtype=torch.float64).index_add(0, rows, table)
    values = sums / torch.bincount(rows, minlength=count).unsqueeze(1)
    spread = float((table - values[rows]).abs().max())
    return (values if granularity == "layer" else values[0]), spread


def _rows(columns: Columns, granularity: Granularity) -> list[str]:
    return {"task": ["model"], "layer": list(columns.axes.layers), "module": list(columns.axes.modules)}[granularity]


def _table(values: Tensor) -> list[tuple[float, ...]]:
    rows = values.detach().cpu().reshape(-1, values.shape[-1])
    return [tuple(line) for line in rows.tolist()]
