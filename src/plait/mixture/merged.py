"""Merges in memory: what `plait merge` would write, acting on the live base, and no file."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from plait.adapters.lowrank import LowRank
from plait.adapters.writing import output_dtype
from plait.errors import AddressError, RecipeError
from plait.hub.download import resolve_model
from plait.merging.engine import Engine, MergedModule
from plait.merging.heads import main_heads
from plait.merging.inventory import Inventory, naming_base, take_inventory
from plait.merging.plan import MergePlan, make_plan
from plait.merging.truncation import rounded
from plait.mixture.loading import require_libraries
from plait.mixture.mixture import Mixture
from plait.mixture.swaps import FullTensorSet
from plait.recipes.request import base_from_here, check_one_base, read_request
from plait.recipes.schema import Recipe
from plait.results.progress import Progress, SilentProgress
from plait.results.threads import worker_count

_KEPT_ENTRIES = 1 << 24  # of a larger dense delta nothing is kept until it acts: all modules wait for that in memory


def merged_modules(
    inventory: Inventory, plan: MergePlan | None = None, *, workers: int | None = None, progress: Progress | None = None
) -> tuple[MergedModule, ...]:
    """Return every merged module of a recipe, rounded to the output's dtype as writing it would round.

    `Mixture.attached` makes them act; low-rank ones then give the saved adapter's outputs bit for bit in float32.

    Args:
        inventory: what there is to merge.
        plan: of it, where it has been made already.
        workers: modules merged at a time; never changes a bit.
        progress: receives stages and steps.

    Raises:
        PlanError: the merge cannot be done.
    """
    workers = worker_count(workers)
    plan = plan or make_plan(inventory, workers=workers)
    engine = Engine(inventory, plan, workers=workers, progress=progress or SilentProgress())
    combiner = engine.prepare()
    return tuple(_rounded(m, inventory.recipe) for m in engine.run(combiner, engine.ranks(combiner)))


def averaged_heads(inventory: Inventory) -> FullTensorSet | None:
    """Return the full tensors that a saved merge would hold in itself; None unless its recipe averages them."""
    if inventory.recipe.heads.policy != "average":
        return None
    tensors, declared = main_heads(inventory.adapters, inventory.recipe.heads)
    return FullTensorSet(tensors, declared.get("trainable_token_indices"))


@dataclass(frozen=True, eq=False)
class LiveMerge:
    """A base model on which a merge acts, until `close`, or to the end of a `with` block.

    Attributes:
        mixture: the base with the single adapters and the merge: `with live.mixture.active({"intent": 1.0}) as model:`
            puts one of them in the merge's place for a while. Closed, it is the bare base, bit for bit.
        recipe: what acts, every default spelled out.
    """

    mixture: Mixture
    recipe: Recipe
    _acting: ExitStack

    @property
    def model(self) -> nn.Module:
        """The model, merged; frozen and in evaluation mode."""
        return self.mixture.model

    @property
    def tokenizer(self) -> Any:
        """The base's tokenizer; None where it has none."""
        return self.mixture.tokenizer

    def close(self) -> None:
        """Take the merge off; the model is the bare base then."""
        self._acting.close()

    def __enter__(self) -> LiveMerge:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def load(
    source: Recipe | str | Path | Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base: str | Path | None = None,
    heads_of: str | None = None,
    load_dtype: str = "auto",
    device_map: Any = None,
    trust_remote_code: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> LiveMerge:
    """Load the base model and merge adapters on it, in memory: the model that `plait merge` and PEFT would give, no file.

    >>> from plait import mixture
    >>> with mixture.load({"intent": "./intent", "langid": "./langid"}, method="ties", density=0.3) as live:
    ...     live.model.generate(**live.tokenizer("…", return_tensors="pt"))

    Args:
        source: adapters (references, or name → reference), the path of a recipe, or a `Recipe`, as for `plait.merge`.
        base: the base model, a folder or `org/repo[@revision]`; the recipe's or the adapters' own when None.
        heads_of: whose heads, trained token rows and biases act, where the recipe keeps them separate (the base's when None);
            averaged ones, and those of the adapter that the recipe names, act by themselves.
        load_dtype: of the base in memory, as transformers takes it; `auto` is the checkpoint's.
        device_map: as transformers takes it; needs accelerate.
        trust_remote_code: let transformers run code from the folder of the weights.
        workers: modules merged at a time; never changes a bit.
        progress: receives stages and steps.
        **settings: as `plait.merge` (`method`, `weights`, `density`, …).

    Raises:
        PlaitError: as `plait.merge`; the base is not known or cannot be loaded, or an adapter does not fit it.
    """
    require_libraries(device_map)
    recipe, folder = _recipe(source, settings, base)
    with recipe.origins.named():
        inventory = take_inventory(recipe, folder)
    name = base or inventory.base_model
    if name is None:
        raise AddressError("the base model is not known: no adapter names it. Give base=, or base_model in the recipe.")
    with naming_base(recipe, inventory.adapters, given=base):
        place = resolve_model(str(name), base=None if base is not None or recipe.base_model is None else folder)
    chosen = averaged_heads(inventory) or recipe.heads.adapter or heads_of
    if heads_of not in (None, chosen):
        raise RecipeError(
            f"heads_of is {heads_of!r}, but the recipe's heads are {recipe.heads.policy!r}; leave one of them out."
        )
    with recipe.origins.named():
        modules = merged_modules(inventory, workers=workers, progress=progress)
    mixture = Mixture.load(
        place.folder, inventory.adapters, dtype=load_dtype, device_map=device_map, trust_remote_code=trust_remote_code
    )
    acting = ExitStack()
    acting.enter_context(mixture.attached(modules, heads=chosen))
    return LiveMerge(mixture, recipe, acting)


def _recipe(source: Any, settings: Mapping[str, Any], base: str | Path | None) -> tuple[Recipe, Path | None]:
    """Return the recipe, with the base that is given in place of its own, and the folder that its relative paths start from."""
    check_one_base(base, settings)
    if not isinstance(source, Recipe):
        is_file = isinstance(source, (str, Path))
        given = {**settings, **({} if base is None else {"base_model": str(base)})}
        return read_request(Path(source) if is_file else None, [] if is_file else source, given)
    if settings:
        raise RecipeError(f"a Recipe is complete; put {', '.join(settings)} into it, or give adapters or a recipe's file.")
    if base is not None:
        source = source.changed(base_model=base_from_here(str(base)) if source.folder else str(base))
    return source, source.folder


def _rounded(module: MergedModule, recipe: Recipe) -> MergedModule:
    dtype = output_dtype(recipe.output.dtype)
    for matrix in module.dense or ():
        if math.prod(matrix.shape) > _KEPT_ENTRIES:
            matrix.release()
    if module.factors is None or dtype == module.factors.slices[0].a.dtype:
        return module

    def cast(tensor: Tensor) -> Tensor:
        return rounded(module.target, tensor, dtype).to(tensor.dtype)

    slices = tuple(LowRank(cast(s.a), cast(s.b)) for s in module.factors.slices)
    bias = None if module.bias is None else cast(module.bias)
    return replace(module, factors=replace(module.factors, slices=slices), bias=bias)
