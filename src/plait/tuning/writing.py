"""What a tuning has learned → the adapter; for coefficients that a recipe can hold, also the recipe and its start."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from torch import Tensor

from plait.adapters.lowrank import LowRank
from plait.merging.adapter_output import MergedAdapter
from plait.merging.engine import MergedModule
from plait.merging.heads import write_heads
from plait.merging.inventory import Inventory, take_inventory
from plait.merging.plan import make_plan
from plait.merging.record import input_digests
from plait.merging.truncation import OutputFactors
from plait.recipes.schema import Dtype, Heads
from plait.recipes.writing import to_yaml
from plait.results.lock import LEARNED_RECIPE, LEARNED_START, relative_path
from plait.results.progress import SilentProgress
from plait.results.threads import worker_count
from plait.tensorfiles.writer import write_tensors
from plait.tuning.coefficients import CoefficientColumns, LearnedCoefficients, learned_recipe, needed_rank
from plait.tuning.learning import LearningRun
from plait.tuning.start import merged_modules_of

DIRECTIONS = "coefficients.safetensors"


@dataclass(frozen=True, eq=False)
class LearnedMerge:
    """What a tuning came to.

    Attributes:
        run: of the loop.
        deltas: target → what was learned, where no recipe holds it.
        sources: the columns, where coefficients were learned.
        values: Λ over them.
        coefficients: the same for the record.
        tree: per node of a hierarchy, its children.
        notes: what is to be known.
    """

    run: LearningRun
    deltas: Mapping[str, tuple[LowRank, ...]]
    sources: CoefficientColumns | None = None
    values: Tensor | None = None
    coefficients: LearnedCoefficients | None = None
    tree: tuple[tuple[tuple[str, ...], ...], ...] = ()
    notes: tuple[str, ...] = ()


def with_deltas(merged: Sequence[MergedModule], deltas: Mapping[str, tuple[LowRank, ...]]) -> list[MergedModule]:
    """Return merged modules with the factors that were learned, balanced."""
    return [
        MergedModule(m.target, OutputFactors(tuple(s.canonical().padded(s.rank) for s in deltas[m.target])), None, m.bias, None)
        for m in merged
        if m.target in deltas
    ]


@dataclass(frozen=True, eq=False)
class WrittenTuning:
    """What was written.

    Attributes:
        inventory: what the adapter is a merge of.
        rank: of the adapter.
        deltas: that were written.
        known: file → sha256.
        digests: of inputs besides the adapters.
    """

    inventory: Inventory
    rank: int
    deltas: Mapping[str, tuple[LowRank, ...]]
    known: dict[str, str]
    digests: dict[Path, str]


def write_learned(
    inventory: Inventory,
    learned: LearnedMerge,
    closed: Sequence[MergedModule],
    before: Mapping[str, tuple[LowRank, ...]],
    place: Path,
) -> WrittenTuning:
    """Write the adapter; for coefficients that a recipe can hold, also the recipe and the start that it names."""
    spec, found = inventory.recipe.tune, learned.sources
    if found is None or learned.values is None:
        rank, known = _write_adapter(inventory, with_deltas(closed, learned.deltas), place)
        return WrittenTuning(inventory, rank, learned.deltas, known, {})
    wanted = inventory.recipe.output.rank
    rank = int(wanted) if wanted != "auto" else needed_rank(learned.deltas)
    if spec.used_granularity == "direction":
        deltas = {t: tuple(s.truncated(rank)[0].padded(rank) for s in slices) for t, slices in learned.deltas.items()}
        written, known = _write_adapter(inventory, with_deltas(closed, deltas), place)
        write_tensors(place / DIRECTIONS, {"coefficients": learned.values.contiguous()})
        return WrittenTuning(inventory, written, deltas, known, {})
    paths = {a.name: str(located.path) for a, located in zip(inventory.adapters, inventory.located, strict=True)}
    public = {
        a.name: relative_path(located.path, place)
        if located.repo is None
        else f"{located.repo}@{located.commit}" + (f"/{located.subfolder}" if located.subfolder else "")
        for a, located in zip(inventory.adapters, inventory.located, strict=True)
    }
    digests: dict[Path, str] = {}
    if found.start is not None:
        (place / LEARNED_START).mkdir()
        _write_adapter(inventory, with_deltas(closed, before), place / LEARNED_START, heads=False, dtype="float32")
        paths[found.start] = str(place / LEARNED_START)
        public[found.start] = f"./{LEARNED_START}"
    made = take_inventory(learned_recipe(inventory.recipe, found, learned.values, rank, paths))
    digests = input_digests(made)
    plan = make_plan(made, workers=1)
    merged = list(merged_modules_of(made, plan, worker_count(), SilentProgress()))
    written, known = _write_adapter(made, merged, place)
    recipe = learned_recipe(inventory.recipe, found, learned.values, rank, public)
    (place / LEARNED_RECIPE).write_text(to_yaml(recipe), encoding="utf-8")
    deltas = {m.target: m.factors.slices for m in merged if m.factors is not None}
    named = [
        at.model_copy(update={"folder": place / LEARNED_START}) if a.name == found.start else at
        for a, at in zip(made.adapters, made.located, strict=True)
    ]
    return WrittenTuning(replace(made, recipe=recipe, located=tuple(named)), written, deltas, known, digests)


def _write_adapter(
    inventory: Inventory, merged: Sequence[MergedModule], place: Path, *, heads: bool = True, dtype: Dtype | None = None
) -> tuple[int, dict[str, str]]:
    """Write the adapter, and each source's heads next to it; return its rank, and the sha256 of its tensor file by name."""
    if heads:
        write_heads(inventory.adapters, inventory.recipe.heads, place)
    else:
        inventory = replace(inventory, recipe=inventory.recipe.model_copy(update={"heads": Heads()}))
    if dtype is not None:
        output = inventory.recipe.output.model_copy(update={"dtype": dtype})
        inventory = replace(inventory, recipe=inventory.recipe.model_copy(update={"output": output}))
    adapter = MergedAdapter(inventory, {m.target: m.factors.rank for m in merged if m.factors is not None})
    return adapter.rank, adapter.write(place, map(adapter.tensors, merged))
