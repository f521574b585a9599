"""Take an adapter out of a baked model again: a bake with the negative weight, and how far the result is from the original.

It is not an exact inverse. The bake rounded W + ΔW once to the stored dtype, and this rounds once more, so that an entry of a
16-bit model comes back to within one unit in the last place of the larger of the two numbers. What an
adapter holds in full took the place of something that the model does not have any more, and stays.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from pathlib import Path

from plait.adapters.adapter import Adapter
from plait.baking.full import parameter_of
from plait.baking.pipeline import BakeResult, run_bake
from plait.baking.plan import BakeOptions
from plait.checkpoints.checkpoint import BaseCheckpoint
from plait.checkpoints.distance import tensor_distance
from plait.errors import AdapterError, PlanError, RecipeError
from plait.hub.download import resolve, resolve_model
from plait.hub.references import parse_reference
from plait.parsing import as_record
from plait.recipes.loading import build_recipe
from plait.recipes.schema import Recipe
from plait.records import Record, ShortRepr
from plait.results.digests import sha256
from plait.results.lock import LOCK, read_lock
from plait.results.progress import Progress
from plait.tensorfiles.reader import TensorFile

_GIVE_WEIGHT = "Give the weight to take out: --weight."
_PLAIN = ("linear", "cat", "task_arithmetic")  # a weight there is the coefficient


class Residual(Record):
    """What is left between a model that an adapter was taken out of, and the original.

    Attributes:
        tensors: that differ.
        unequal: entries that differ.
        entries: of all tensors.
        largest: |Δ|.
        where: the tensor with it; None when nothing differs.
    """

    tensors: int
    unequal: int
    entries: int
    largest: float
    where: str | None


@dataclass(frozen=True, repr=False)
class UnbakeResult(ShortRepr):
    """A model without the adapter.

    Attributes:
        bake: folder and record.
        weight: that was taken out.
        remaining: against the original, where that was given.
        left: the adapter's full tensors, which are left in the model as they are there.
    """

    bake: BakeResult
    weight: float
    remaining: Residual | None
    left: tuple[str, ...] = ()


def run_unbake(
    model: str,
    adapter: str,
    *,
    out: Path,
    weight: float | None = None,
    original: str | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
) -> UnbakeResult:
    """Subtract an adapter from a baked model; arguments as `plait.unbake` has them, references as text.

    Raises:
        PlanError: the adapter is DoRA; or the model's lock says that it was not baked in, with another weight, or not by a
            weighted sum.
        PlaitError: as a bake.
    """
    if weight is not None and (not math.isfinite(weight) or weight == 0):
        raise RecipeError(f"weight is {weight}; give the number that the adapter was baked with, such as 0.7.")
    before = None if original is None else _original(original, BaseCheckpoint.open(model))
    opened = Adapter.open(resolve(parse_reference(adapter)).path, "adapter")
    if any(target.is_dora for target in opened.targets.values()):
        raise PlanError(
            f"{adapter}: DoRA scales rows by the norms that they had before the bake, which the model no longer holds. "
            "It cannot be subtracted; keep the model that it was baked into."
        )
    weight = _weight_of_lock(model, opened) if weight is None else weight
    recipe = build_recipe({"adapters": [{"path": adapter, "weight": -weight}], "base_model": model, "method": "linear"})
    bake = run_bake(recipe, BakeOptions(full_tensors=False), out=out, force=force, workers=workers, progress=progress)
    remaining = None if before is None else _remaining(BaseCheckpoint.open(str(out.absolute())), before)
    # copies of layers that LoRA adapts are not tensors of its own
    left = tuple(parameter_of(path) for path in opened.full_tensors if ".base_layer." not in path)
    return UnbakeResult(bake, weight, remaining, left)


def _weight_of_lock(model: str, adapter: Adapter) -> float:
    """Return the weight that the adapter was baked with, as far as the model's own lock knows; else 1.

    Raises:
        AdapterError: the lock cannot be read.
        PlanError: the adapter is not in it; its weight is another than 1, or not a plain coefficient: then it must be given.
    """
    folder = resolve_model(model, files=("*.safetensors", "*.json", LOCK), any_form=True).folder
    has_lock = os.path.lexists(folder / LOCK)
    lock = read_lock(folder, advice=_GIVE_WEIGHT) if has_lock else None
    if lock is None or lock.kind != "bake":
        return 1.0
    file, digest = adapter.file.path.name, sha256(adapter.file.path)
    name = next((n for n, entry in lock.inputs.items() if entry.files.get(file) == digest), None)
    if name is None:
        raise PlanError(
            f"{model}: the inputs in its {LOCK} are {', '.join(map(repr, lock.inputs))}, and {adapter.folder} is not one of "
            "these. To subtract it all the same, give --weight."
        )
    recipe = as_record(Recipe, lock.recipe, str(folder / LOCK), AdapterError, what="a recipe", advice=_GIVE_WEIGHT)
    if recipe.method_name not in _PLAIN or recipe.weights is not None or recipe.transforms:
        raise PlanError(
            f"{model}: its {LOCK} says that {name!r} was not baked in as a plain weighted delta (method "
            f"{recipe.method_name!r}); subtracting the adapter does not undo that. To do so all the same, give --weight."
        )
    found = next(a.weight for a in recipe.adapters if a.name == name) * recipe.factor
    if found != 1:
        raise PlanError(f"{model}: its {LOCK} says that {name!r} was baked in with weight {found:g}; give --weight {found:g}.")
    return 1.0


def _original(text: str, baked: BaseCheckpoint) -> BaseCheckpoint:
    """Open the original.

    Raises:
        PlanError: it is not of the baked model's architecture and dtype.
    """
    before = BaseCheckpoint.open(text)
    other = sorted(n for n in {*baked.home, *before.home} if _described(baked, n) != _described(before, n))
    if other:
        raise PlanError(
            f"{text} is not what {baked.folder} was before the bake: {len(other)} tensors are in one alone, or of another "
            f"shape or dtype, such as {other[0]!r}. Give the right --original, or none."
        )
    return before


def _remaining(after: BaseCheckpoint, before: BaseCheckpoint) -> Residual:
    """Compare two models of the same tensors."""
    distances = {n: tensor_distance(_file(after, n), _file(before, n), n) for n in sorted(after.home)}
    unequal_tensors = {n: distance for n, distance in distances.items() if distance.unequal}
    where = max(unequal_tensors, key=lambda n: unequal_tensors[n].largest, default=None)
    return Residual(
        tensors=len(unequal_tensors),
        unequal=sum(g.unequal for g in unequal_tensors.values()),
        entries=sum(g.entries for g in distances.values()),
        largest=unequal_tensors[where].largest if where is not None else 0.0,
        where=where,
    )


def _described(checkpoint: BaseCheckpoint, name: str) -> tuple[object, ...]:
    return checkpoint.info(name)[:2] if name in checkpoint.home else ()


def _file(checkpoint: BaseCheckpoint, name: str) -> TensorFile:
    return checkpoint.home[name].file
