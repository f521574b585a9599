"""What is put on the base model and asked: nothing, one adapter, a merge, or another model in its place.

Heads and other full tensors belong to a task. A classifier's head is the task's own adapter's for every candidate, or nothing
could be compared; of a language model, the base keeps its own, a single adapter brings its own, and a merge uses those of
the task's own adapter, which it keeps separate, unless its recipe averages them or takes one adapter's for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from secrets import token_hex
from typing import Any

from plait.adapters.adapter import Adapter
from plait.evaluation.loaded_base import LoadedBase
from plait.evaluation.scores import adapter_digest, digest, file_digest, model_digest
from plait.merging.inventory import Inventory, placed_recipe, take_inventory
from plait.merging.plan import make_plan
from plait.mixture import Mixture
from plait.mixture.merged import averaged_heads, merged_modules
from plait.mixture.placing import PlacedMerge
from plait.recipes.loading import build_recipe
from plait.recipes.writing import recipe_json
from plait.results.progress import Progress
from plait.results.threads import worker_count
from plait.tasks.asking import Head
from plait.tasks.schema import Task

HeadSource = Callable[[Task], str | None]
_NOT_HASHED = ("base_model", "tasks", "eval")  # keys of a recipe that its result does not depend on


@dataclass(frozen=True, eq=False)
class Candidate:
    """Something that answers.

    Attributes:
        name: for people.
        key: hash of everything about it that its answers depend on, the base and heads aside.
        heads: task → adapter whose full tensors act; None for the base's.
        act: puts it on the base, with the full tensors of the adapter of that name; the value is the model.
        kept: whether its answers are kept for later processes.
        described: returns it as plain data, of which `described_candidate` makes it in another process; None where there is
            no such data.
    """

    name: str
    key: str
    heads: HeadSource
    act: Callable[[LoadedBase, str | None], AbstractContextManager[Any]]
    kept: bool = True
    described: Callable[[], dict[str, Any]] | None = None


def base_candidate(adapters: Mapping[str, Adapter]) -> Candidate:
    """Return the base model."""

    def heads(task: Task) -> str | None:
        return _own(task, adapters) if isinstance(task.ask, Head) else None

    return Candidate("base", "base", heads, lambda live, owner: live.mixture.active(None, heads=owner or False), described=dict)


def single_candidate(name: str, adapters: Mapping[str, Adapter]) -> Candidate:
    """Return one adapter as it was trained."""

    def heads(task: Task) -> str | None:
        if isinstance(task.ask, Head):
            return _own(task, adapters)
        return name if adapters[name].full_tensors else None

    key = digest("adapter", adapter_digest(adapters[name]))
    return Candidate(
        name,
        key,
        heads,
        lambda live, owner: live.mixture.active({name: 1.0}, heads=owner or False),
        described=lambda: {"adapter": name},
    )


def saved_candidate(name: str, adapters: Mapping[str, Adapter]) -> Candidate:
    """Return a written merge, read from its files: not any task's own adapter."""
    own = name if adapters[name].full_tensors else None
    key = digest("adapter", adapter_digest(adapters[name]))
    return Candidate(
        name,
        key,
        lambda task: own or _own(task, adapters),
        lambda live, owner: live.mixture.active({name: 1.0}, heads=owner or False),
    )


def model_candidate(name: str, folder: Path) -> Candidate:
    """Return a full model that replaces the base."""
    return Candidate(name, digest("model", model_digest(folder)), lambda task: None, lambda live, owner: live.model(folder))


def merge_candidate(
    inventory: Inventory, adapters: Mapping[str, Adapter], *, workers: int | None, progress: Progress
) -> Candidate:
    """Return a merge, made in memory when it is first needed: the same factors that `plait merge` would write.

    Raises:
        PlanError: it cannot be done.
    """
    recipe = inventory.recipe
    plan = make_plan(inventory, workers=worker_count(workers))  # what cannot be done is refused now

    @cache  # it acts anew for every task, and for every part of one that is asked
    def placed(mixture: Mixture) -> PlacedMerge:
        return mixture.placed(merged_modules(inventory, plan, workers=workers, progress=progress))

    def heads(task: Task) -> str | None:
        match recipe.heads.policy:
            case "from":
                return recipe.heads.adapter
            case "average":
                return None  # of no adapter; they are part of the merge, and so of its key
            case "separate":
                return _own(task, adapters)

    def act(live: LoadedBase, owner: str | None) -> AbstractContextManager[Any]:
        return live.mixture.attached(placed(live.mixture), heads=owner or averaged_heads(inventory))

    def described() -> dict[str, Any]:
        base = None if inventory.base_located is None else str(inventory.base_located.folder.absolute())
        return {"merge": placed_recipe(recipe, inventory), "base": base, "config": dict(inventory.base_config)}

    return Candidate("merged", merge_key(inventory), heads, act, described=described)


def described_candidate(
    data: Mapping[str, Any], adapters: Mapping[str, Adapter], *, workers: int | None, progress: Progress
) -> Candidate:
    """Return the candidate that another process has described.

    Raises:
        PlanError: it cannot be made here.
    """
    if "merge" in data:
        base = None if data["base"] is None else Path(data["base"])
        inventory = take_inventory(build_recipe(data["merge"]), base_folder=base)
        return merge_candidate(replace(inventory, base_config=data["config"]), adapters, workers=workers, progress=progress)
    return single_candidate(data["adapter"], adapters) if "adapter" in data else base_candidate(adapters)


def live_candidate(
    name: str, state: Callable[[str | None], AbstractContextManager[Any]], adapters: Mapping[str, Adapter]
) -> Candidate:
    """Return what acts in a context, whose answers are asked for anew every time: nothing says what they depend on."""
    key = digest("live", token_hex(16))
    return Candidate(name, key, lambda task: _own(task, adapters), lambda live, owner: state(owner), kept=False)


def merge_key(inventory: Inventory) -> str:
    """Return a hash of a merge: its recipe without paths, and the content of every input."""
    recipe = {k: v for k, v in recipe_json(inventory.recipe).items() if k not in _NOT_HASHED}
    recipe["adapters"] = [
        {"name": e.name, "weight": e.weight, "digest": adapter_digest(a)}
        for e, a in zip(inventory.recipe.adapters, inventory.adapters, strict=True)
    ]
    moments = {} if inventory.moments is None else {n: file_digest(f.path) for n, f in sorted(inventory.moments.files.items())}
    base = None if inventory.base_located is None else model_digest(inventory.base_located.folder)
    return digest("merge", recipe, moments, base)


def _own(task: Task, adapters: Mapping[str, Adapter]) -> str | None:
    adapter = adapters.get(task.own_adapter)
    return task.own_adapter if adapter is not None and adapter.full_tensors else None
