"""The start of a tuning: the recipe's merge in memory, with second moments from the texts where its method needs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import Tensor, nn

from plait.adapters.lowrank import LowRank
from plait.calibration.moments import MOST_ROWS, take_moments
from plait.calibration.passages import Passage
from plait.calibration.sequential import merge_layer_by_layer
from plait.errors import PlanError
from plait.linalg.finite import all_finite
from plait.merging.engine import Engine, MergedModule
from plait.merging.inventory import Inventory
from plait.merging.moments import Found, from_function
from plait.merging.plan import MergePlan, make_plan
from plait.merging.truncation import OutputFactors
from plait.methods import METHODS
from plait.mixture import Mixture
from plait.results.progress import Progress
from plait.tuning.teaching import Lesson, evenly_spread
from plait.tuning.working import WorkingState

MAX_MOMENT_BYTES = 4 << 30  # of second moments held at a time; more are taken in several passes over the texts


def needs_moments(inventory: Inventory) -> bool:
    """Return whether the recipe's method asks for second moments that the recipe does not name."""
    recipe = inventory.recipe
    return inventory.moments is None and METHODS[recipe.method_name].pipeline(recipe.method).needs_moments


def plan_start(inventory: Inventory) -> MergePlan:
    """Return what the start will be; moments that are still to be taken count as given.

    Raises:
        PlanError: it cannot be done.
    """
    if dora := [a.name for a in inventory.adapters if any(t.is_dora for t in a.targets.values())]:
        raise PlanError(
            f"{', '.join(dora)}: DoRA rescales the rows of the base's weights, so that its delta has full rank, and a tuning "
            "learns factors of low rank, or coefficients of such. Bake it, and extract a LoRA of that "
            "(plait bake, plait extract)."
        )
    return make_plan(_with(inventory, {}) if needs_moments(inventory) else inventory, workers=1)


@dataclass(frozen=True)
class ClosedForm:
    """The merge that a tuning begins at.

    Attributes:
        inventory: the adapters and the recipe.
        mixture: the base with them.
        lessons: whose passages, read with their own adapters, give the second moments.
        workers: modules merged at a time; never changes a bit.
        progress: receives stages and steps.
        working: where the result is kept, and the moments of finished layers, for a method that takes them layer by layer.
    """

    inventory: Inventory
    mixture: Mixture
    lessons: Sequence[Lesson]
    workers: int
    progress: Progress
    working: WorkingState

    def merged(self) -> tuple[MergedModule, ...]:
        """Merge in memory, and keep the result, so that a killed tuning does not take second moments again."""
        if (found := self.working.load("closed-form", partial(_from_tensors, self.inventory))) is not None:
            return found
        merged = self._computed(_untruncated(self.inventory))
        tensors: dict[str, Tensor] = {}
        for m in merged:
            if m.factors is None or m.magnitude is not None:
                return merged  # refused by what follows
            for i, s in enumerate(m.factors.slices):
                tensors |= {f"{i}.a.{m.target}": s.a, f"{i}.b.{m.target}": s.b}
            if m.bias is not None:
                tensors[f"bias.{m.target}"] = m.bias
        self.working.save("closed-form", tensors, {"targets": {m.target: len(m.factors.slices) for m in merged if m.factors}})
        return merged

    def _computed(self, inventory: Inventory) -> tuple[MergedModule, ...]:
        if not needs_moments(inventory):
            return tuple(merged_modules_of(inventory, make_plan(inventory, workers=self.workers), self.workers, self.progress))
        if inventory.recipe.is_sequential:
            return self._layer_by_layer(inventory)
        plan = plan_start(inventory)
        merged: list[MergedModule] = []
        for targets in _groups(inventory, [m.target for m in plan.modules]):
            found = _moments(self.mixture, self.lessons, targets, self.progress)
            part = plan.model_copy(update={"modules": tuple(m for m in plan.modules if m.target in set(targets))})
            merged += merged_modules_of(_with(inventory, found), part, self.workers, self.progress)
        return tuple(merged)

    def _layer_by_layer(self, inventory: Inventory) -> tuple[MergedModule, ...]:
        passages: dict[str, list[Passage]] = {}
        for lesson in self.lessons:
            passages.setdefault(lesson.adapter, []).extend(lesson.passages[i] for i in evenly_spread(len(lesson.passages)))
        heads = {lesson.adapter: lesson.head for lesson in self.lessons}
        merged = merge_layer_by_layer(
            inventory,
            self.mixture,
            passages,
            heads,
            tokens=MOST_ROWS,
            seed=0,
            workers=self.workers,
            progress=self.progress,
            parts=self.working.place / "layers",
        )
        return tuple(sorted(merged, key=lambda m: m.target))


def _untruncated(inventory: Inventory) -> Inventory:
    """Return the same with every rank kept, where coefficients are learned: the truncation comes after that."""
    output = inventory.recipe.output
    if inventory.recipe.tune.learns_factors or output.rank == "auto":
        return inventory
    recipe = inventory.recipe.model_copy(update={"output": output.model_copy(update={"rank": "auto"})})
    return replace(inventory, recipe=recipe)


def _from_tensors(inventory: Inventory, tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> tuple[MergedModule, ...]:
    """Return the start that was saved.

    Raises:
        LookupError, ValueError: it is not one of these adapters.
    """
    found = []
    for target, count in info["targets"].items():
        layout, bias = inventory.layouts[target], tensors.get(f"bias.{target}")
        slices = tuple(LowRank(tensors[f"{i}.a.{target}"], tensors[f"{i}.b.{target}"]) for i in range(count))
        values = [t for s in slices for t in (s.a, s.b)] + ([] if bias is None else [bias])
        shapes = [(layout.d_out, s.rank, s.rank, layout.d_in) for s in slices]
        if [(*s.b.shape, *s.a.shape) for s in slices] != shapes or count != layout.stack or not all(map(all_finite, values)):
            raise ValueError(target)
        found.append(MergedModule(target, OutputFactors(slices), None, bias, None))
    if not found:
        raise ValueError(info)
    return tuple(found)


def merged_modules_of(inventory: Inventory, plan: MergePlan, workers: int, progress: Progress) -> Iterator[MergedModule]:
    """Yield what a plan makes."""
    engine = Engine(inventory, plan, workers=workers, progress=progress)
    combiner = engine.prepare()
    yield from engine.run(combiner, engine.ranks(combiner))


def _moments(
    mixture: Mixture, lessons: Sequence[Lesson], targets: Sequence[str], progress: Progress
) -> dict[str, dict[str, Found]]:
    """Return adapter → target → E[x xᵀ], each adapter's over the texts of its tasks."""
    modules: Mapping[str, nn.Module] = {target: mixture.module(target) for target in targets}
    found: dict[str, dict[str, Found]] = {}
    read = {x.task: [x.passages[i] for i in evenly_spread(len(x.passages))] for x in lessons}
    progress.start("second moments", sum(map(len, read.values())), "texts")
    try:
        for name in dict.fromkeys(x.adapter for x in lessons):
            own = [x for x in lessons if x.adapter == name]
            passages = [p for x in own for p in read[x.task]]
            with mixture.active({name: 1.0}) as model:
                found[name] = take_moments(model, modules, passages, head=own[0].head, report=progress.advance).found()
    finally:
        progress.finish()
    return found


def _with(inventory: Inventory, found: Mapping[str, Mapping[str, Found]]) -> Inventory:
    targets = {a.name: a.targets for a in inventory.adapters}
    moments = from_function(lambda adapter, module: found[adapter].get(module), targets)
    return replace(inventory, moments=moments)


def _groups(inventory: Inventory, targets: Sequence[str]) -> Iterator[list[str]]:
    """Yield targets in groups whose second moments fit into memory together."""
    group: list[str] = []
    size = 0
    for target in targets:
        layout = inventory.layouts[target]
        own = 4 * layout.stack * layout.d_in * min(layout.d_in, MOST_ROWS) * len(inventory.adapters)
        if group and size + own > MAX_MOMENT_BYTES:
            yield group
            group, size = [], 0
        group.append(target)
        size += own
    if group:
        yield group
