"""Plan → stream of merged modules: surveys first, then every target module, in order, on several threads.

One thread of torch per module: sums, QR and SVD give other bits on other numbers of threads, so modules are spread over
workers instead, and the bytes do not depend on how many there are.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

from plait.adapters.lowrank import LowRank
from plait.deferred import Tensor, torch
from plait.errors import PlaitError, PlanError
from plait.linalg.blocks import TOGETHER, TOGETHER_BELOW, RowBlocks
from plait.linalg.finite import all_finite
from plait.linalg.keyed import Key
from plait.merging import dora
from plait.merging.combine import Combiner, Statistics, pipeline_of
from plait.merging.inventory import Inventory
from plait.merging.plan import MergePlan, ModulePlan
from plait.merging.prepared import NeedsDouble, PreparedAdapters
from plait.merging.truncation import OutputFactors, as_blocks, rank_at_energy, truncate_module, truncate_modules
from plait.results.progress import Progress, SilentProgress
from plait.results.threads import InThisThread, ahead, one_thread_each
from plait.spaces import SPACES
from plait.spaces.base import MergedMatrix
from plait.stages.base import GramCombine, LinearCombine, Reduction, Survey

T = TypeVar("T")
R = TypeVar("R")
_APART = 32  # so far apart in the plan may modules be that are truncated at the same time


@dataclass(frozen=True)
class MergedModule:
    """One merged target module.

    Attributes:
        target: its path.
        factors: what is written, for an adapter.
        dense: one blocked matrix per slice, for a dense output.
        bias: (d_out,) of `lora_bias`, when the merged adapter has them.
        magnitude: (d_out,) of DoRA, when the merged adapter is one.
    """

    target: str
    factors: OutputFactors | None
    dense: tuple[RowBlocks, ...] | None
    bias: Tensor | None
    magnitude: Tensor | None


class Engine:
    """Runs a plan.

    Args:
        inventory: the adapters.
        plan: what to do.
        workers: modules worked on at a time; changes speed and memory, never a byte.
        progress: receives stages and steps.
    """

    def __init__(self, inventory: Inventory, plan: MergePlan, *, workers: int, progress: Progress) -> None:
        self._inventory = inventory
        self._plan = plan
        self._workers = workers
        self._progress = progress
        self._has_bias = any(t.has_bias for a in inventory.adapters for t in a.targets.values())
        self._side_by_side = is_side_by_side(inventory, plan)

    def prepare(self) -> Combiner:
        """Make the surveys over the complete model that transforms and method need."""
        try:
            return self._prepare(in_double=False)
        except NeedsDouble:
            return self._prepare(in_double=True)

    def _prepare(self, *, in_double: bool) -> Combiner:
        recipe, moments, pipeline = self._inventory.recipe, self._inventory.moments, pipeline_of(self._inventory.recipe)
        one_dtype = pipeline.asks_model
        prepare = partial(PreparedAdapters, is_exact=self._side_by_side, needs_one_dtype=one_dtype, in_double=in_double)
        with _pool(self._workers) as pool:
            prepared = pool.submit(prepare, self._inventory, self._progress).result()
            statistics: Statistics = ()
            first = Combiner(recipe, prepared, moments=moments, kept=self._inventory.kept)
            gram = self._gram(first, pool)  # of the deltas, so it waits for no survey
            for survey in pipeline.surveys():
                over_model = None
                if survey.scope == "model":
                    over_model = self._answer(survey, replace(first, statistics=statistics, gram=gram), pool)
                statistics = (*statistics, over_model)
        return replace(first, statistics=statistics, gram=gram)

    def ranks(self, combiner: Combiner) -> dict[str, int]:
        """Return the rank of every target: the planned one, or the one that an energy asks for (a pass of its own)."""
        planned = {m.target: m.rank for m in self._plan.modules}
        energy = self._inventory.recipe.output.energy
        if energy is None:
            return {target: rank or 0 for target, rank in planned.items()}

        def rank(module: ModulePlan) -> int:
            if self._inventory.base is not None:
                return dora.dora_rank_at_energy(*self._dora_sum(combiner, module.target), energy)
            with name_extreme_adapters(combiner, module.target):
                merged = _check_finite(module.target, combiner.merge(module.target))
            return rank_at_energy(merged, energy, self._key(module.target))

        with _pool(self._workers) as pool:
            found = list(self._each("ranks", rank, self._plan.modules, pool))
        return dict(zip(planned, found, strict=True))

    def run(self, combiner: Combiner, ranks: Mapping[str, int]) -> Iterator[MergedModule]:
        """Yield every merged module, in the plan's order."""
        return self.each(combiner, ranks, lambda merged: merged)

    def each(self, combiner: Combiner, ranks: Mapping[str, int], then: Callable[[MergedModule], R]) -> Iterator[R]:
        """Yield what `then` makes of every merged module, in the plan's order. It is called in the module's worker."""

        def work(group: Sequence[ModulePlan]) -> list[tuple[str, R]]:
            cut = self._cut_together(combiner, [m.target for m in group], ranks[group[0].target]) if len(group) > 1 else {}
            return [(m.target, self.one(combiner, m.target, ranks[m.target], then, cut)) for m in group]

        groups, order, ready = self._groups(combiner, ranks), deque(m.target for m in self._plan.modules), dict[str, R]()
        self._progress.start("merge", len(order))
        try:
            with _pool(self._workers) as pool:
                for found in self._each("merge", work, groups, pool, SilentProgress()):
                    ready.update(found)
                    while order and order[0] in ready:
                        yield ready.pop(order.popleft())
                        self._progress.advance()
        finally:
            self._progress.finish()

    def one(
        self,
        combiner: Combiner,
        target: str,
        rank: int,
        then: Callable[[MergedModule], R],
        cut: Mapping[str, OutputFactors] = MappingProxyType({}),
    ) -> R:
        """Return what `then` makes of one merged module, in this thread; `cut` holds what `_cut_together` returned."""
        with _named(combiner, target):
            return then(self._module(combiner, target, rank, cut))

    def _groups(self, combiner: Combiner, ranks: Mapping[str, int]) -> list[list[ModulePlan]]:
        """Return the modules of the plan in groups whose dense deltas are truncated at the same time: small ones of one shape.

        A group has no modules that are far apart in the plan, whose results would be waited for by all between them.
        """
        recipe, modules = self._inventory.recipe, self._plan.modules
        is_dense = recipe.output.kind == "adapter" and not combiner.pipeline.low_rank(recipe.space_name)
        groups: list[list[ModulePlan]] = []
        alike: dict[tuple[Any, ...], tuple[int, list[ModulePlan]]] = {}
        for place, module in enumerate(modules):
            key = module.shape, module.stack, ranks[module.target]
            first, group = alike.get(key, (place, []))
            small = math.prod(module.shape) <= TOGETHER_BELOW
            if not (group and is_dense and small and len(group) < TOGETHER and place - first < _APART):
                first, group = place, []
                groups.append(group)
            group.append(module)
            alike[key] = first, group
        return groups

    def _cut_together(self, combiner: Combiner, targets: Sequence[str], rank: int) -> dict[str, OutputFactors]:
        """Return what `_truncated` finds of modules before it is scaled, of those whose result is not kept."""
        lacking = []
        for target in targets:
            kept = combiner.kept is not None and combiner.kept.find(_cut_settings(combiner, target, rank), target)
            if not kept:
                with _named(combiner, target):
                    lacking.append((target, _check_finite(target, combiner.unscaled(target))))
        found = truncate_modules([merged for _, merged in lacking], rank, [self._key(target) for target, _ in lacking])
        return dict(zip((target for target, _ in lacking), found, strict=True))

    def _module(self, combiner: Combiner, target: str, rank: int, cut: Mapping[str, OutputFactors]) -> MergedModule:
        key = self._key(target)
        bias = self._bias(combiner, target) if self._has_bias else None
        if self._inventory.recipe.output.kind == "delta":
            dense = tuple(as_blocks(m) for m in _check_finite(target, combiner.merge(target)))
            return MergedModule(target, None, dense, bias, None)
        if self._inventory.base is not None:
            return self._dora_module(combiner, target, rank, bias)
        if not combiner.pipeline.low_rank(self._inventory.recipe.space_name):
            return MergedModule(target, self._truncated(combiner, target, rank, cut), None, bias, None)
        emitted = truncate_module(_check_finite(target, combiner.merge(target)), rank, key)
        if self._side_by_side and not any(bool(s.b.any()) for s in emitted.slices):
            self._check_zero(combiner, target)
        return MergedModule(target, emitted, None, bias, None)

    def _truncated(self, combiner: Combiner, target: str, rank: int, cut: Mapping[str, OutputFactors]) -> OutputFactors:
        """Return what is written of a dense delta; truncated before it is scaled, so that merges at several scales share it."""

        def truncate() -> OutputFactors:
            if target in cut:
                return cut[target]
            return truncate_module(_check_finite(target, combiner.unscaled(target)), rank, self._key(target))

        def size(found: OutputFactors) -> int:
            return sum(s.a.nbytes + s.b.nbytes for s in found.slices)

        if combiner.kept is None:
            found = truncate()
        else:
            found = combiner.kept.result(_cut_settings(combiner, target, rank), target, truncate, size)
        scaled = found.scaled(self._inventory.recipe.factor)
        if not (scaled.energy or 0.0) ** 0.5 <= torch.finfo(torch.float32).max:  # else no entry overflows
            _check_finite(target, combiner.merge(target))
        return scaled

    def _check_zero(self, combiner: Combiner, target: str) -> None:
        """Make sure that a sum of factors side by side is zero because nothing is in it.

        Raises:
            PlanError: what is in it was lost in the multiplication with the weights.
        """
        for factors in combiner.prepared.read(target):
            for c, s, delta in zip(combiner.coefficients(target).tolist(), factors.scalings, factors.deltas, strict=True):
                if c * s != 0 and bool(delta.b.any()) and bool(delta.a.any()):
                    raise PlanError(
                        f"{target}: the weights or the scale are so small that the merged values vanish in float32."
                    )

    def _dora_module(self, combiner: Combiner, target: str, rank: int, bias: Tensor | None) -> MergedModule:
        weight, total, gain = self._dora_sum(combiner, target)
        emitted = truncate_module([total], rank, self._key(target))
        if emitted.energy is not None and emitted.kept is not None:  # of L; what it lost, ΔW has lost
            total_energy = dora.total_energy(weight, total, gain)
            emitted = replace(emitted, energy=total_energy, kept=max(0.0, total_energy - (emitted.energy - emitted.kept)))
        factors, magnitude = dora.peft_factors(weight, emitted.slices[0], gain)
        return MergedModule(target, replace(emitted, slices=(factors,)), None, bias, magnitude)

    def _dora_sum(self, combiner: Combiner, target: str) -> tuple[Tensor, LowRank, Tensor]:
        """Return the base's weight, L, and 1 + d (see `dora`)."""
        base = self._inventory.base
        if base is None:
            raise AssertionError("DoRA without a base passed the inventory")
        (factors,) = combiner.read(target)
        layout = self._inventory.layouts[target]
        transposed = any(a.config.flag("fan_in_fan_out") for a in self._inventory.adapters if target in a.targets)
        weight = base.matrix(target, layout, fan_in_fan_out=transposed, dtype=factors.deltas[0].a.dtype)
        magnitudes = [
            a.read_part(target, "lora_magnitude_vector", weight.dtype)
            if target in a.targets and a.targets[target].is_dora
            else None
            for a in self._inventory.adapters
        ]
        merged, gain = dora.merge_dora(target, weight, factors.scaled(), magnitudes, combiner.coefficients(target).tolist())
        _check_finite(target, [merged])
        return weight, merged, gain

    def _bias(self, combiner: Combiner, target: str) -> Tensor:
        layout = self._inventory.layouts[target]
        total = torch.zeros(layout.outputs, dtype=torch.float64)
        for adapter, c in zip(self._inventory.adapters, combiner.coefficients(target).tolist(), strict=True):
            if target in adapter.targets and adapter.targets[target].has_bias:
                total += c * adapter.targets[target].scaling * adapter.read_part(target, "lora_B.bias", torch.float64)
        return total.to(combiner.prepared.dtype)

    def _gram(self, combiner: Combiner, pool: Executor) -> Tensor | None:
        """Sum the inner products of the deltas over the model, where coefficients depend on them."""
        combine = combiner.pipeline.combine
        if not isinstance(combine, GramCombine) or combine.scope != "model":
            return None
        grams = self._each("inner products", lambda m: combiner.module_gram(m.target), self._plan.modules, pool)
        entries = torch.stack(list(grams)).flatten(1).mT.tolist()  # rounded once, so the order of modules makes no difference
        adapters = len(self._inventory.adapters)
        return torch.tensor([math.fsum(e) for e in entries], dtype=torch.float64).view(adapters, adapters)

    def _answer(self, survey: Survey, combiner: Combiner, pool: Executor) -> dict[str, Tensor]:
        """Return what a survey over the model finds; merges that share results ask once what does not depend on weights."""

        def ask() -> dict[str, Tensor]:
            return self._survey(combiner, survey.start, pool)

        if combiner.kept is None or survey.weighed:
            return ask()
        for module in self._plan.modules:  # what the passes refuse; with other weights there may be none
            combiner.prepared.check(module.target)
        asked = f"survey {len(combiner.statistics)} {combiner.without_weights}"
        return combiner.kept.result(asked, "", ask, lambda found: sum(x.nbytes for x in found.values()))

    def _survey(self, combiner: Combiner, start: Callable[[int], Reduction], pool: Executor) -> dict[str, Tensor]:
        names = SPACES[self._inventory.recipe.space_name].arrays
        reductions = {name: start(len(self._inventory.adapters)) for name in names}
        done = False
        while not done:
            for _ in self._each("survey", lambda m: combiner.observe(m.target, reductions), self._plan.modules, pool):
                pass
            done = all([r.end_pass() for r in reductions.values()])
        return {name: r.values for name, r in reductions.items()}

    def _key(self, target: str) -> Key:
        return Key(self._inventory.recipe.seed).child("truncation", target)

    def _each(
        self, stage: str, work: Callable[[T], R], items: Sequence[T], pool: Executor, progress: Progress | None = None
    ) -> Iterator[R]:
        """Run `work` on items in threads, a few ahead of the consumer, and yield results in order."""
        # a wide module in front leaves workers idle where few others are under way; dense results take room as they wait
        most = self._workers + 1 if self._inventory.recipe.output.kind == "delta" else 2 * self._workers + 2
        return ahead(stage, work, items, pool, most, progress or self._progress)


def _cut_settings(combiner: Combiner, target: str, rank: int) -> str:
    """Return all that a truncated module depends on besides the adapters."""
    return f"rank {rank} {combiner.settings(target)}"


@contextmanager
def _named(combiner: Combiner, target: str) -> Iterator[None]:
    """Name the module, and adapters with extreme values, in errors of its merge."""
    try:
        with name_extreme_adapters(combiner, target):
            yield
    except PlaitError:
        raise
    except Exception as error:
        error.add_note(f"while merging target module {target!r}")
        raise


def is_side_by_side(inventory: Inventory, plan: MergePlan) -> bool:
    """Whether factors are only put side by side, so that nothing depends on the square of a value."""
    recipe, pipeline = inventory.recipe, pipeline_of(inventory.recipe)
    linear = isinstance(pipeline.combine, LinearCombine) and pipeline.is_linear and recipe.space_name != "factors"
    # a sum of more directions than the matrix has is brought to its rank by an SVD, which squares
    fits = all(m.rank is not None and m.rank >= sum(m.ranks.values()) for m in plan.modules) and recipe.output.energy is None
    return linear and fits and not recipe.transforms and inventory.base is None


def _check_finite(target: str, merged: list[MergedMatrix]) -> list[MergedMatrix]:
    """Return merged deltas as they are.

    Raises:
        PlanError: a value overflowed.
    """
    for part in merged:
        if isinstance(part, LowRank):
            finite = all_finite(part.a) and all_finite(part.b)
        else:  # the energy is wanted anyway, and infinite when an entry is
            finite = math.isfinite(part.energy()) or all(all_finite(block) for _, block in part)
        if not finite or _above_float32(part):
            raise PlanError(f"{target}: the merged values overflow; the weights or the scale are too large.")
    return merged


@contextmanager
def name_extreme_adapters(combiner: Combiner, target: str) -> Iterator[None]:
    """Name the adapters with extreme values in errors about a target module that the block raises."""
    try:
        yield
    except PlanError as error:
        found = [str(e) for e in combiner.prepared.find_extremes(target)]
        if not found:
            raise
        raise PlanError(f"{str(error).removesuffix('.')}: {'; '.join(found)}.") from None


def _above_float32(part: MergedMatrix) -> bool:
    """Whether a delta that was computed in float64 has entries that no model in float32 can add."""
    most = torch.finfo(torch.float32).max
    if (part.b.dtype if isinstance(part, LowRank) else part.dtype) != torch.float64 or part.energy() ** 0.5 <= most:
        return False
    blocks = as_blocks(part)
    return any(float(block.abs().max()) > most for _, block in blocks)


@contextmanager
def _pool(workers: int) -> Iterator[Executor]:
    """Offer worker threads, or the caller's as the only one; torch uses one thread in each. The caller's number is put back."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        if workers == 1:
            yield InThisThread()
            return
        with one_thread_each(workers) as pool:
            yield pool
    finally:
        torch.set_num_threads(before)
