"""The public functions. They say the same things as the command line, and make the same bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from plait.errors import RecipeError
from plait.hub.references import parse_reference
from plait.merging.inspection import Inspection, inspect_adapters
from plait.merging.inventory import open_adapters
from plait.merging.pipeline import MergeResult, plan_recipe, run_recipe
from plait.merging.plan import MergePlan
from plait.merging.progress import Progress
from plait.recipes.request import read_request
from plait.recipes.schema import Recipe

Source = Recipe | str | Path | Sequence[str | Path] | Mapping[str, str | Path]


def merge(
    source: Source,
    *,
    out: str | Path | None = None,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    push_to: str | None = None,
    private: bool = False,
    **settings: Any,
) -> MergeResult:
    """Merge adapters into one.

    >>> plait.merge({"maths": "./a", "code": "org/repo@main"}, method="ties", density=0.3, out="merged")

    Args:
        source: adapters (references, or name → reference), the path of a recipe, or a `Recipe`.
        out: where to write; a new run folder in the workspace (`artifacts/`) when None.
        force: replace an adapter that stands at `out`.
        workers: modules worked on at a time; never changes a byte.
        progress: who listens.
        push_to: Hub repository to upload the result to.
        private: create that repository as private.
        **settings: keys of a recipe (`method`, `scale`, `seed`, `merge_mode`, `transforms`, `heads`, `base_model`), of its
            output (`kind`, `rank`, `dtype`, `layout`), `weights` (numbers in order, name → number, or a policy), and the
            method's own parameters (`space`, `density`, …).

    Returns:
        Folder, plan and run record.

    Raises:
        PlaitError: anything wrong with what was given, all of it at once; nothing is left at `out` then.
    """
    recipe, folder = _recipe(source, settings)
    return run_recipe(
        recipe,
        folder=folder,
        out=None if out is None else Path(out),
        force=force,
        workers=workers,
        progress=progress,
        push_to=push_to,
        private=private,
    )


def plan(source: Source, *, workers: int | None = None, **settings: Any) -> MergePlan:
    """Return what `merge` would do with the same arguments; reads headers, no tensor.

    Raises:
        PlaitError: as `merge`.
    """
    recipe, folder = _recipe(source, settings)
    return plan_recipe(recipe, folder=folder, workers=workers)


def compress(
    adapter: str | Path,
    *,
    rank: int | str,
    out: str | Path,
    force: bool = False,
    workers: int | None = None,
    progress: Progress | None = None,
    **settings: Any,
) -> MergeResult:
    """Write one adapter at a lower rank: the best approximation of its deltas, heads kept in place.

    Args:
        adapter: a reference.
        rank: a number, or `energy:0.99` for the lowest rank that keeps that share of ‖ΔW‖² in every module.
        out: where to write.
        force: replace an adapter that stands at `out`.
        workers: modules worked on at a time.
        progress: who listens.
        **settings: as `merge` (`dtype`, `layout`, `base_model`).

    Raises:
        PlaitError: as `merge`.
    """
    reference = parse_reference(str(adapter))
    name = reference.default_name()
    heads = {"policy": "from", "adapter": name}
    source = {name: reference.address}
    return merge(source, out=out, force=force, workers=workers, progress=progress, rank=rank, heads=heads, **settings)


def inspect(
    source: Sequence[str | Path] | Mapping[str, str | Path],
    *,
    base_model: str | None = None,
    workers: int | None = None,
    progress: Progress | None = None,
) -> Inspection:
    """Describe adapters and how they relate: exact, from their factors only.

    Args:
        source: references, or name → reference.
        base_model: the base model, when the adapters name it differently.
        workers: target modules looked at at the same time.
        progress: who listens.

    Raises:
        PlaitError: adapters cannot be found or opened; all of them at once.
    """
    pairs = source.items() if isinstance(source, Mapping) else [(None, reference) for reference in source]
    _, adapters = open_adapters([(name, str(text)) for name, text in pairs])
    return inspect_adapters(adapters, base_model=base_model, workers=workers, progress=progress)


def _recipe(source: Source, settings: Mapping[str, Any]) -> tuple[Recipe, Path | None]:
    if isinstance(source, Recipe):
        if settings:
            raise RecipeError(
                f"a Recipe is complete; put {', '.join(settings)} into it, or give adapters or a recipe file instead."
            )
        return source, None
    if isinstance(source, (str, Path)):
        return read_request(Path(source), [], settings)
    return read_request(None, source, settings)
