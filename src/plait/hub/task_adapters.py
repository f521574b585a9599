"""An adapter by the name of its task, as the earlier framework kept them: the best run in a registry of runs.

    artifacts/<task>/adapters/<kind>/runs_registry.json         {"runs": [{"run_id": "run_…", "is_best": true, …}, …]}
    artifacts/<task>/adapters/<kind>/runs/<run_id>/             the adapter
    artifacts/<task>/adapters/<kind>/best → runs/<run_id>

That framework knew <kind> from the task's settings; here it must be the only one. Whatever else could be meant is refused.
"""

from __future__ import annotations

from pathlib import Path

from plait.errors import AddressError, listed
from plait.folders import absolute, file_name_problem
from plait.notices import announce
from plait.parsing import read_object

ARTIFACTS, ADAPTERS, REGISTRY = "artifacts", "adapters", "runs_registry.json"
#: Where `plait train` writes adapters: `phases/<name>/adapter`.
PHASES, ADAPTER = "phases", "adapter"
_SHOWN = 6


def task_adapter(task: str, base: Path | None = None) -> Path | None:
    """Return the folder of a task's best adapter, which is announced; None where no such task is known.

    Args:
        task: a word; a folder of that name comes first.
        base: where `artifacts/` is looked for, and in the folders above it; the working directory when None.

    Raises:
        AddressError: the task is known, and its registry names no adapter, or more than one.
    """
    if not task or file_name_problem(task) or "/" in task:
        return None
    start = absolute(task, base).parent
    if (start / task).exists():
        return None
    folders = (place / ARTIFACTS / task / ADAPTERS for place in (start, *start.parents))
    adapters = next((folder for folder in folders if folder.is_dir()), None)
    if adapters is None:
        return None
    found = _best_run(task, adapters)
    announce(f"{task!r} is not a folder and is taken for a task: its adapter is {found}, the best run in {REGISTRY}.")
    return found


def task_of(parts: list[str]) -> str | None:
    """Return the task, or phase of `plait train`, whose adapter a path leads to, by its folders' names; else None."""
    if len(parts) > 2 and (parts[-3], parts[-1]) == (PHASES, ADAPTER):
        return parts[-2]
    places = [i for i in range(len(parts) - 3) if parts[i] == ARTIFACTS and parts[i + 2] == ADAPTERS]
    return parts[places[-1] + 1] if places else None


def _best_run(task: str, adapters: Path) -> Path:
    registries = sorted(adapters.glob(f"*/{REGISTRY}"))
    if len(registries) != 1:
        what = listed([file.parent.name for file in registries], _SHOWN) or "none"
        raise AddressError(
            f"task {task!r}: one folder in {adapters} must have a {REGISTRY}, got {what}. Give the adapter's own folder."
        )
    (registry,) = registries
    runs = read_object(registry, AddressError, advice="Give the adapter's own folder.").get("runs")
    entries = [run for run in runs if isinstance(run, dict)] if isinstance(runs, list) else []
    best = [run.get("run_id") for run in entries if run.get("is_best") is True]
    if len(best) != 1 or not isinstance(best[0], str) or file_name_problem(best[0]) or "/" in best[0]:
        got = listed(map(str, best), _SHOWN) or "none"
        raise AddressError(
            f"{registry}: one run must be the best (is_best) and have a run_id, got {got}. Give the adapter's own folder."
        )
    places = [registry.parent / "runs" / best[0], registry.parent / "best"]
    found = {place.resolve(): place for place in reversed(places) if place.is_dir()}
    if not found:
        raise AddressError(f"{registry}: the best run is {best[0]!r}, and {places[0]} is not a folder.")
    if len(found) > 1:
        raise AddressError(
            f"task {task!r}: {REGISTRY} has {best[0]!r} as its best run, and {places[1]} is another folder: "
            f"{places[1].resolve()}. Give the adapter's own folder."
        )
    return next(iter(found.values()))
