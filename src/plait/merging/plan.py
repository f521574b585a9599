"""Inventory → plan: what will happen to every target module, known before a tensor is read."""

from __future__ import annotations

from collections.abc import Sequence

from plait.adapters.adapter import Adapter
from plait.adapters.layouts import Layout, uniform_rank
from plait.errors import PlanError, collect, listed
from plait.inspection.compatibility import activation_problems, excluded_spaces, replication_problems
from plait.inspection.doubts import adapter_doubts
from plait.inspection.shared_init import shared_init_pairs
from plait.linalg.blocks import HOLD_ELEMENTS, MATRIX_BLOCK_ELEMENTS, TOGETHER, TOGETHER_BELOW
from plait.merging.combine import pipeline_of
from plait.merging.heads import head_problems, main_head_bytes
from plait.merging.inventory import Inventory
from plait.merging.kept import FRAME_BYTES
from plait.merging.moments import moments_problems
from plait.merging.output_format import outgoing_merge, output_format, served_rank, writes_peft
from plait.merging.weighting import Towers, layer_problems, module_weights, policy_problems, towers_of
from plait.methods import METHODS
from plait.methods.base import Method
from plait.notices import announce
from plait.recipes.schema import Recipe
from plait.records import Record
from plait.results.records import Result
from plait.stages.pipeline import Pipeline
from plait.views import Viewed

DENSE_RANK_CAP = 256  # `auto` rank of a result that has no low rank of its own
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


class ModulePlan(Record):
    """What will happen to one target module.

    Attributes:
        target: its path.
        kind: how its factors are stored.
        shape: (d_out, d_in) of its matrix.
        stack: number of such matrices (experts, groups).
        ranks: adapter → rank; adapters without the module are not listed.
        weights: adapter → weight.
        missing: adapters without the module, which count as zero.
        exact_rank: the rank at which nothing is lost.
        rank: the rank written; None when an energy decides it at run time, or for a dense output.
        result: `exact`, `truncated`, or `dense`.
    """

    target: str
    kind: str
    shape: tuple[int, int]
    stack: int
    ranks: dict[str, int]
    weights: dict[str, float]
    missing: tuple[str, ...]
    exact_rank: int
    rank: int | None
    result: Result


class MergePlan(Viewed, Record):
    """What a merge will do.

    >>> [(m.target, m.exact_rank) for m in plait.plan(["./a", "./b"]).modules][:3]

    Attributes:
        method: name.
        space: name.
        equation: what the method computes.
        adapters: names, in order.
        modules: one plan per target module, sorted by path.
        left_out: target modules that `merge_mode: common` drops, with who lacks them.
        rank: the rank of the written adapter; None when an energy decides it, or for a dense output.
        result: the worst over the modules.
        pipeline: the stages of the method, followed by the scale where it is not 1.
        promises: what holds, known before running: `exact` (nothing is truncated), `rank` (the written rank is known),
            `deterministic` (same recipe, same bytes), `gauge_free` (a function of the deltas, whatever their factors).
        randomised: whether the method draws (keyed) random numbers.
        passes: passes over the factors, surveys included.
        output_bytes: of the tensor file but for its header; None when an energy decides it.
        peak_bytes: estimated working memory above the interpreter with torch.
        max_lora_rank: smallest value of vLLM's setting that serves the result; None when none is known to.
        notes: what else is worth knowing.
    """

    method: str
    space: str
    equation: str
    adapters: tuple[str, ...]
    modules: tuple[ModulePlan, ...]
    left_out: dict[str, tuple[str, ...]]
    rank: int | None
    result: Result
    pipeline: str
    promises: dict[str, bool]
    randomised: bool
    passes: int
    output_bytes: int | None
    peak_bytes: int
    max_lora_rank: int | None
    notes: tuple[str, ...]


def make_plan(inventory: Inventory, *, workers: int, written: bool = True) -> MergePlan:
    """Decide everything that can be decided from headers.

    Read are only a few modules' factors: to see that the adapters were trained, and three for methods that solve.

    Args:
        inventory: what there is to merge.
        workers: threads; they decide the memory estimate.
        written: the merge becomes files of an adapter's format, which must have a place for it; else it is baked, or acts.

    Raises:
        PlanError: with everything that does not fit, all at once.
    """
    recipe = inventory.recipe
    method, pipeline = METHODS[recipe.method_name], pipeline_of(recipe)
    kept, left_out = _select(inventory)
    space = recipe.space_name
    why = excluded_spaces(inventory.adapters).get(space)
    problems = [
        *_mode_problems(recipe, left_out),
        *policy_problems(recipe, list(inventory.layouts)),
        *([f"space {space!r} cannot be used for these adapters: {why}. Use 'delta', 'core' or 'knots'."] if why else []),
        *_dora_problems(inventory, pipeline, kept),
        *_moments_problems(inventory, pipeline),
        *layer_problems("method", method.layers(recipe.method), list(inventory.layouts)),
        *head_problems(inventory.adapters, recipe.heads),
    ]
    problems += _format_problems(inventory, kept) if written else []
    if recipe.output.kind == "delta" and recipe.heads.policy != "separate":
        problems.append("heads are full tensors, not deltas: with output.kind 'delta' they must be kept separate.")
    if recipe.output.kind == "delta":
        problems += [*activation_problems(inventory.adapters), *replication_problems(inventory.adapters)]
    if not kept and not problems:
        problems.append("no target module is left to merge; with merge_mode 'common' the adapters share none")
    collect(PlanError, problems, "this merge cannot be done")
    towers = towers_of(inventory.layouts)
    modules = tuple(_plan_module(inventory, method, pipeline, path, layout, towers) for path, layout in kept.items())
    ranks = {m.target: m.rank for m in modules if m.rank is not None}
    rank = uniform_rank(ranks, kept) if len(ranks) == len(modules) else None
    return MergePlan(
        method=method.name,
        space=space,
        equation=method.equation,
        adapters=tuple(a.name for a in inventory.adapters),
        modules=modules,
        left_out=left_out,
        rank=rank,
        result=max((m.result for m in modules), key=("exact", "truncated", "dense").index),
        pipeline=str(pipeline) if recipe.factor == 1 else f"{pipeline} → scale {recipe.factor:g}",
        promises={
            "exact": all(m.result != "truncated" for m in modules),
            "rank": all(m.rank is not None for m in modules),
            "deterministic": inventory.moments is None or bool(inventory.moments.files),
            "gauge_free": space != "factors",
        },
        randomised=method.randomised or pipeline.randomised,
        passes=_passes(recipe, pipeline),
        output_bytes=_output_bytes(inventory, kept, modules, rank),
        peak_bytes=_peak_bytes(inventory, pipeline, modules, workers),
        max_lora_rank=served_rank(inventory, rank),
        notes=(*_notes(inventory, left_out, written=written), *_data_notes(inventory, pipeline, list(kept))),
    )


def announce_zeros(recipe: Recipe, plan: MergePlan) -> None:
    """Announce that a merge is zero, whatever its adapters hold; what learns its coefficients may start there, and does not.

    Args:
        recipe: of the merge.
        plan: of it.
    """
    if recipe.factor == 0 or not any(weight for m in plan.modules for weight in m.weights.values()):
        what = "scale is 0" if recipe.factor == 0 else "every weight is 0"
        announce(f"{what}: the merged deltas are zero, and change nothing of the base model.", once="a merge of zeros")


def _format_problems(inventory: Inventory, kept: dict[str, Layout]) -> list[str]:
    """Return why the result has no place in the format that is written; components of a pipeline have none as dense deltas."""
    towers = sorted({t for a in inventory.adapters for t in a.towers})
    if inventory.recipe.output.kind == "delta":
        return [f"output.kind 'delta' is for one model; these adapters are of {listed(towers)} of a pipeline."] * bool(towers)
    if writes_peft(inventory) or not kept:
        return []
    outgoing = outgoing_merge(inventory, dict.fromkeys(kept, 1))
    chosen = output_format(inventory)
    if chosen.of_one_model and len(towers) > 1:
        return [
            f"--to {chosen.name}: adapters of {chosen.program} are of one model; these are of {listed(towers)} of a pipeline."
        ]
    return chosen.problems(outgoing)


def _select(inventory: Inventory) -> tuple[dict[str, Layout], dict[str, tuple[str, ...]]]:
    """Split the targets into those merged and those that not every adapter has (unless a union is wanted)."""
    kept, left_out = {}, {}
    for path, layout in inventory.layouts.items():
        missing = tuple(a.name for a in inventory.adapters if path not in a.targets)
        if missing and inventory.recipe.merge_mode != "union":
            left_out[path] = missing
        else:
            kept[path] = layout
    return kept, left_out


def _mode_problems(recipe: Recipe, left_out: dict[str, tuple[str, ...]]) -> list[str]:
    if recipe.merge_mode != "strict" or not left_out:
        return []
    lines = listed((f"{path} (not in {', '.join(missing)})" for path, missing in left_out.items()), 10)
    return [
        f"merge_mode is 'strict' and {len(left_out)} target modules are not in every adapter: {lines}. "
        "Use 'union' to count a missing module as a zero delta, or 'common' to leave it out."
    ]


def _dora_problems(inventory: Inventory, pipeline: Pipeline, kept: dict[str, Layout]) -> list[str]:
    if inventory.base is None:
        return []
    if not pipeline.is_linear or inventory.recipe.space_name == "factors":
        return [
            f"method {inventory.recipe.method_name!r} in space {inventory.recipe.space_name!r} on DoRA adapters: a DoRA delta "
            "has full rank, so only linear methods have an exact form (linear, uniform, weighted, …; not in 'factors')."
        ]
    if inventory.recipe.output.kind == "delta":
        return ["output.kind 'delta' is not supported for DoRA adapters; write an adapter."]
    names = [str(t.name) for t in inventory.recipe.transforms if t.name != "identity"]  # type: ignore[attr-defined]
    if names:
        return [f"transforms: {', '.join(names)} of DoRA adapters: their magnitudes belong to B A as it is. Take it out."]
    stacked = {path: layout.several for path, layout in kept.items() if layout.stack > 1}
    if not stacked:
        return []
    dora = ", ".join(repr(a.name) for a in inventory.adapters if any(t.is_dora for t in a.targets.values()))
    return [
        f"{dora}: DoRA applies to all of an adapter, and has no form on {' and '.join(sorted({*stacked.values()}))}, such as "
        f"{next(iter(stacked))!r}. Leave one of the adapters out."
    ]


def _moments_problems(inventory: Inventory, pipeline: Pipeline) -> list[str]:
    if not pipeline.needs_moments:
        return []
    recipe = inventory.recipe
    if recipe.is_sequential and inventory.moments is None:
        return [
            f"method {recipe.method_name!r} takes second moments layer by layer, with the layers below already merged: give "
            "--tasks (tasks=), on whose texts a merge takes them, and no moments"
        ]
    files = {} if inventory.moments is None else inventory.moments.files
    other = [n for n, f in files.items() if (f.origin is not None and f.origin.sequential) != recipe.is_sequential]
    if other and recipe.is_sequential:
        return [
            f"method {recipe.method_name!r} takes second moments layer by layer, with the layers below already merged; those "
            f"given of {', '.join(other)} were taken without a merge. Give --tasks (tasks=) in their place, or use 'regmean'"
        ]
    if other:
        return [
            f"the second moments given of {', '.join(other)} were taken by 'regmean_sequential', with the layers below already "
            f"merged; method {recipe.method_name!r} needs those of `plait calibrate`"
        ]
    if inventory.moments is None:
        return [
            f"method {inventory.recipe.method_name!r} needs second moments of the modules' inputs: give one file per adapter "
            "(adapters[].moments, --moments FOLDER, moments=…), made with `plait calibrate` or "
            "plait.save_moments; or --tasks, on whose texts they are taken"
        ]
    return moments_problems(inventory.moments, inventory.layouts)


def _plan_module(
    inventory: Inventory, method: Method, pipeline: Pipeline, path: str, layout: Layout, towers: Towers
) -> ModulePlan:
    recipe = inventory.recipe
    sources = {a.name: a.targets[path].rank for a in inventory.adapters if path in a.targets}
    shape = (layout.d_out, layout.d_in)
    low_rank = pipeline.low_rank(recipe.space_name)
    exact_rank = min(pipeline.rank(recipe.space_name, list(sources.values()), shape), layout.full_rank)
    rank = _written_rank(recipe, method, inventory.adapters, layout, exact_rank, low_rank=low_rank)
    result: Result = "dense" if recipe.output.kind == "delta" else "exact"
    if recipe.output.kind == "adapter" and (rank is None or rank < exact_rank):
        result = "truncated"
    return ModulePlan(
        target=path,
        kind=layout.kind,
        shape=shape,
        stack=layout.stack,
        ranks=sources,
        weights=dict(zip((a.name for a in recipe.adapters), module_weights(recipe, path, towers), strict=True)),
        missing=tuple(a.name for a in inventory.adapters if path not in a.targets),
        exact_rank=exact_rank,
        rank=rank,
        result=result,
    )


def _written_rank(
    recipe: Recipe, method: Method, adapters: Sequence[Adapter], layout: Layout, exact_rank: int, *, low_rank: bool
) -> int | None:
    wanted = recipe.output.rank
    if recipe.output.kind == "delta" or recipe.output.energy is not None:
        return None
    if isinstance(wanted, int):
        return min(wanted, exact_rank)
    largest = max(max(a.ranks, default=1) for a in adapters)
    if method.auto_rank == "largest":
        return min(largest, exact_rank)
    return exact_rank if low_rank else min(largest * len(adapters), DENSE_RANK_CAP, layout.full_rank)


def _passes(recipe: Recipe, pipeline: Pipeline) -> int:
    surveys = pipeline.surveys()
    return 1 + sum(2 if i == 0 else 1 for i, s in enumerate(surveys) if s.scope == "model") + (recipe.output.energy is not None)


def _output_bytes(
    inventory: Inventory, layouts: dict[str, Layout], modules: Sequence[ModulePlan], rank: int | None
) -> int | None:
    output, heads = inventory.recipe.output, main_head_bytes(inventory.adapters, inventory.recipe.heads)
    size = BYTES[output.dtype]
    if output.kind == "delta":
        return size * sum(layout.entries for layout in layouts.values())
    if rank is None:
        return None
    uniform = output.layout == "uniform" and writes_peft(inventory)
    per_rank = [(x := layouts[m.target], rank // x.rank_unit if uniform else m.rank or 0) for m in modules]
    targets = [a.targets[m.target] for a in inventory.adapters for m in modules if m.target in a.targets]
    vectors = any(t.has_bias for t in targets) + any(t.is_dora for t in targets)  # (d_out,) of every module
    return heads + size * sum(
        layout.stack * (r * (layout.d_out + layout.d_in) + vectors * layout.d_out) for layout, r in per_rank
    )


def _peak_bytes(inventory: Inventory, pipeline: Pipeline, modules: Sequence[ModulePlan], workers: int) -> int:
    """Estimate: per worker the factors of its module twice, its result, and for a dense space the blocks in flight.

    Besides, what is kept of coordinates between the passes of a merge.
    """
    adapters = len(inventory.adapters)

    def working(m: ModulePlan) -> int:
        both = sum(m.shape)
        values = m.stack * both * (2 * sum(m.ranks.values()) + 2 * (m.rank or 0))
        if not pipeline.low_rank(inventory.recipe.space_name):
            entries = m.shape[0] * m.shape[1]
            held = min(entries, HOLD_ELEMENTS) + 10 * both * min((m.rank or 0) + 16, min(m.shape))  # and a sketch
            together = 2 * TOGETHER if entries <= TOGETHER_BELOW else 1
            values += together * held + 3 * adapters * min(entries, MATRIX_BLOCK_ELEMENTS)
        elif not pipeline.is_linear:
            values += 4 * adapters * m.exact_rank * both
        if pipeline.needs_moments and inventory.moments is not None:
            values += inventory.moments.working(m.target, m.shape[1])
        return 4 * values

    coordinates = 0
    if pipeline.low_rank(inventory.recipe.space_name) and pipeline.asks_model:
        coordinates = min(2 * FRAME_BYTES, sum(4 * m.stack * (adapters + 1) * m.exact_rank * sum(m.shape) for m in modules))
    return coordinates + sum(sorted((working(m) for m in modules), reverse=True)[: max(1, workers)])


def _data_notes(inventory: Inventory, pipeline: Pipeline, paths: list[str]) -> list[str]:
    """Report what is probably a mistake in a merge that solves for its result, or that has data and does not."""
    notes = []
    if inventory.moments is not None and not pipeline.needs_moments:
        notes.append(f"method {inventory.recipe.method_name!r} uses no second moments; those given change nothing.")
    if pipeline.solves and (pairs := shared_init_pairs(inventory.adapters, paths)):
        text = ", ".join(f"{one} + {other}" for one, other in pairs)
        notes.append(
            f"the A matrices of {text} span nearly the same space, as one seed for all training runs gives (plait inspect "
            "says more). Solving amplifies noise then: keep the ridge, and compare with linear."
        )
    return notes


def _notes(inventory: Inventory, left_out: dict[str, tuple[str, ...]], *, written: bool) -> list[str]:
    recipe = inventory.recipe
    notes = adapter_doubts(inventory.adapters)
    if left_out:
        first, lacking = next(iter(left_out.items()))
        notes.append(f"merge_mode 'common' leaves {len(left_out)} modules out, such as {first} (not in {', '.join(lacking)}).")
    if written and not writes_peft(inventory) and recipe.output.kind == "adapter":
        chosen = output_format(inventory)
        one = ", where output.layout has no meaning" if recipe.output.layout != "uniform" else ""
        notes.append(f"the adapter is written in the format of {chosen.program} ({chosen.name}; docs/formats.md){one}.")
    notes += [f"{a.name!r}: {text}" for a in inventory.adapters for text in a.origin.notes]
    if recipe.space_name == "factors":
        notes.append("space 'factors' merges A and B separately, as PEFT does: the result is not a function of the deltas.")
    if any(t.has_bias for a in inventory.adapters for t in a.targets.values()):
        notes.append("lora_bias is merged as the weighted sum of the biases, whatever the method.")
    tasks = {a.name: a.config.raw.get("task_type") for a in inventory.adapters}
    if len(set(tasks.values())) > 1:
        text = ", ".join(f"{name} {task}" for name, task in tasks.items())
        notes.append(f"the adapters have different task types ({text}); the first is written.")
    with_full = [a.name for a in inventory.adapters if a.full_tensors]
    if with_full:
        done = {
            "separate": "are kept under heads/<name>/, not merged",
            "average": "are averaged with equal weights, as the recipe says",
            "from": f"are left out, but for those of {recipe.heads.adapter}",
        }[recipe.heads.policy]
        notes.append(f"heads and other full tensors of {', '.join(with_full)} {done}.")
    return notes
