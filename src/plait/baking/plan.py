"""What a bake will do, known from headers alone: everything in its place, or everything that is wrong at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

from pydantic import ValidationError

from plait.baking.auxiliary_files import AuxiliaryFiles, gather_auxiliary_files
from plait.baking.changes import Placement
from plait.baking.full import effective_heads, full_tensors
from plait.baking.placement import place_deltas
from plait.baking.shards import OutShard, parse_size, plan_shards, shard_index
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.deferred import torch
from plait.errors import AddressError, PlanError, RecipeError, collect
from plait.inspection.compatibility import activation_problems, base_model_problems, replication_problems
from plait.linalg.devices import device_problem
from plait.merging.inventory import Inventory, naming_base, open_entries, take_inventory
from plait.merging.moments import MomentsOf
from plait.merging.plan import MergePlan, announce_zeros, make_plan
from plait.recipes.schema import Output, Recipe
from plait.records import Record
from plait.tensorfiles.blocks import SHORT, TENSOR_BLOCK_ELEMENTS

BakeDtype = Literal["float64", "float32", "float16", "bfloat16"]


class BakeOptions(Record):
    """What a bake needs besides the recipe.

    Attributes:
        dtype: of all float tensors; None keeps each one's own.
        shard_size: largest file, such as `5GB`; None keeps the base's files.
        device: where blocks are added up, as torch names it; another kind of device rounds its sums otherwise.
        dequantize: take a quantized base for the plain model that it encodes, where that can be done here.
        full_tensors: put adapters' heads, embeddings and other full tensors into the model, or under heads/; without, the
            base's stay. Taking an adapter out leaves them alone.
        hash_base: hash those of the base's files whose sha256 is not known; without, the lock says of which it is not.
    """

    dtype: BakeDtype | None = None
    shard_size: str | None = None
    device: str = "cpu"
    dequantize: bool = False
    full_tensors: bool = True
    hash_base: bool = True

    @property
    def kept(self) -> dict[str, Any]:
        """What of this the bytes depend on, as plain values: the kind of device, not which one of several."""
        return self.model_dump(mode="json", exclude={"hash_base"}) | {"device": torch.device(self.device).type}


def bake_options(**values: Any) -> BakeOptions:
    """Return options.

    Raises:
        RecipeError: a value is not allowed.
    """
    try:
        options = BakeOptions(**values)
    except ValidationError:
        raise RecipeError(
            f"dtype {values.get('dtype')!r} is not allowed; there are {', '.join(get_args(BakeDtype))}."
        ) from None
    if options.shard_size is not None:
        parse_size(options.shard_size)
    usable_device(options.device)
    return options


def usable_device(name: str) -> torch.device:
    """Return a device that can be computed on.

    Raises:
        RecipeError: torch knows no such device, or it is not here.
    """
    if problem := device_problem(name):
        raise RecipeError(f"device {name!r} cannot be used: {problem}. Use 'cpu', or an accelerator that torch sees here.")
    return torch.device(name)


class TensorPlan(Record):
    """What becomes of one tensor that is not copied.

    Attributes:
        name: of it.
        dtype: written.
        shape: written.
        targets: target modules whose deltas (or biases) are added.
        how: `added to`, `replaced` by an adapter's own, `rows replaced` (trained tokens), `new`, or `cast`.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    targets: tuple[str, ...]
    how: Literal["added to", "replaced", "rows replaced", "new", "cast"]


class ShardPlan(Record):
    """What becomes of one file.

    Attributes:
        name: of it.
        size: bytes.
        copied: bytes of tensors that are the base's.
        tensors: those that are not.
    """

    name: str
    size: int
    copied: int
    tensors: tuple[TensorPlan, ...]


class BakePlan(Record):
    """What a bake will do.

    Attributes:
        base: the base model's reference.
        form: in which the base, and so the result, lies on disk: `model`, `pipeline` or `single file`.
        method: name.
        space: name.
        adapters: names, in order.
        target_modules: how many find their place.
        shards: the files.
        carried: other files that are copied → where they come from.
        output_bytes: size of all shards.
        peak_bytes: estimated working memory above the interpreter with torch.
        notes: what else is worth knowing.
    """

    base: str
    form: str
    method: str
    space: str
    adapters: tuple[str, ...]
    target_modules: int
    shards: tuple[ShardPlan, ...]
    carried: dict[str, str]
    output_bytes: int
    peak_bytes: int
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Bake:
    """A bake that can be run.

    Attributes:
        recipe: as asked for, the base model spelled out.
        options: besides the recipe.
        inventory: the adapters.
        merge: the plan of the merge.
        checkpoint: the base.
        placement: where everything goes.
        shards: what is written.
        auxiliary: files that are copied with the weights.
        device: where blocks are added up.
        plan: all of this as a record.
    """

    recipe: Recipe
    options: BakeOptions
    inventory: Inventory
    merge: MergePlan
    checkpoint: BaseCheckpoint
    placement: Placement
    shards: tuple[OutShard, ...]
    auxiliary: AuxiliaryFiles
    device: torch.device
    plan: BakePlan


def prepare_bake(
    recipe: Recipe, options: BakeOptions, *, folder: Path | None = None, workers: int, moments: MomentsOf | None = None
) -> Bake:
    """Decide everything that can be decided from headers.

    Args:
        recipe: what is asked for.
        options: besides the recipe.
        folder: what relative paths are relative to; the current folder when None.
        workers: threads; they decide the memory estimate.
        moments: second moments of inputs, in place of files that the recipe names.

    Raises:
        PlaitError: with everything that is wrong, as far as the stages before it have passed.
    """
    limit = None if options.shard_size is None else parse_size(options.shard_size)
    device = usable_device(options.device)
    recipe, naming = _with_base(recipe, folder)
    with naming:
        checkpoint = _open_base(recipe, folder, dequantize=options.dequantize)
    inventory = take_inventory(recipe.model_copy(update={"output": Output()}), folder, moments)
    heads = effective_heads(inventory.adapters, recipe.heads)
    inventory = replace(inventory, recipe=inventory.recipe.model_copy(update={"heads": heads}))
    if not options.full_tensors:
        inventory = replace(inventory, adapters=tuple(replace(a, full_tensors={}) for a in inventory.adapters))
    merge = make_plan(inventory, workers=workers, written=False)
    announce_zeros(inventory.recipe, merge)
    full, problems = full_tensors(inventory.adapters, heads)
    problems += [*activation_problems(inventory.adapters), *replication_problems(inventory.adapters)]
    placement = place_deltas(inventory, merge, checkpoint, full)
    collect(PlanError, [*problems, *placement.problems], f"{checkpoint.folder}: this bake cannot be done")
    shards = plan_shards(checkpoint, placement, dtype=SHORT[options.dtype] if options.dtype else None, shard_size=limit)
    auxiliary = gather_auxiliary_files(checkpoint, inventory, placement, options.dtype, shard_index(checkpoint, shards))
    notes = (*_notes(recipe, merge), *checkpoint.notes, *placement.notes, *auxiliary.notes)
    plan = _plan(recipe, checkpoint, merge, shards, auxiliary, notes, workers)
    return Bake(recipe, options, inventory, merge, checkpoint, placement, shards, auxiliary, device, plan)


def _with_base(recipe: Recipe, folder: Path | None) -> tuple[Recipe, AbstractContextManager[None]]:
    """Return the recipe with its base model spelled out, its own or the adapters', and what names whose it is in a refusal."""
    if recipe.base_model is not None:
        return recipe, naming_base(recipe, ())
    _, adapters = open_entries(recipe, folder)
    collect(PlanError, base_model_problems(adapters, None), "")
    name = next((a.config.base_model for a in adapters if a.config.base_model), None)
    if name is None:
        raise RecipeError(
            "a bake needs the base model, and neither the recipe nor an adapter names one. Give it: --base-id, or base_model "
            "in a recipe; a folder or org/repo[@revision]."
        )
    return recipe.changed(base_model=name), naming_base(recipe, adapters)


def _open_base(recipe: Recipe, folder: Path | None, *, dequantize: bool) -> BaseCheckpoint:
    try:
        return BaseCheckpoint.open(recipe.base_model or "", base=folder, dequantize=dequantize)
    except AddressError as error:
        error.add_note("This is the base model of the bake; --base-id (base_model in a recipe) names another place.")
        raise


def _notes(recipe: Recipe, merge: MergePlan) -> list[str]:
    # the placement notes what becomes of heads, with more knowledge than a merge has
    notes = [note for note in merge.notes if not note.startswith("heads and other full tensors")]
    if recipe.output.rank != "auto":
        notes.append(
            f"output.rank {recipe.output.rank!r} is for adapters: the bake holds the complete merge. To bake the truncated "
            "adapter, write it first and bake that."
        )
    return notes


def _plan(
    recipe: Recipe,
    checkpoint: BaseCheckpoint,
    merge: MergePlan,
    shards: Sequence[OutShard],
    auxiliary: AuxiliaryFiles,
    notes: tuple[str, ...],
    workers: int,
) -> BakePlan:
    widest = max((math.prod(checkpoint.info(name).shape[1:]) for name in checkpoint.home), default=0)
    blocks = 4 * max(1, workers) * max(4 * TENSOR_BLOCK_ELEMENTS, widest)
    return BakePlan(
        base=recipe.base_model or "",
        form=checkpoint.form.kind,
        method=merge.method,
        space=merge.space,
        adapters=merge.adapters,
        target_modules=len(merge.modules),
        shards=tuple(_shard_plan(s) for s in shards),
        carried=auxiliary.origins,
        output_bytes=sum(s.size for s in shards),
        peak_bytes=merge.peak_bytes + blocks,
        notes=notes,
    )


def _shard_plan(shard: OutShard) -> ShardPlan:
    changed = [t for t in shard.tensors if not t.copied]
    tensors = []
    for t in changed:
        how: Literal["added to", "replaced", "rows replaced", "new", "cast"] = "added to" if t.change.targets else "cast"
        if t.change.replaced is not None:
            how = "replaced"
        elif t.change.tokens is not None:
            how = "rows replaced"
        if t.name != t.source:
            how = "new"
        tensors.append(TensorPlan(name=t.name, dtype=t.dtype, shape=t.shape, targets=t.change.targets, how=how))
    copied = sum(t.nbytes for t in shard.tensors if t.copied)
    return ShardPlan(name=shard.name, size=shard.size, copied=copied, tensors=tuple(tensors))
