"""What happened: the run record, its summary, and the lock from which anyone can rebuild the result."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from plait.adapters.adapter import CONFIG
from plait.merging.inventory import Inventory
from plait.merging.plan import Result
from plait.recipes.schema import Recipe
from plait.records import Record

LOCK = "plait.lock"
RECORD = "merge_metadata.json"
SUMMARY = "summary.json"
_LIBRARIES = ("torch", "safetensors", "numpy")


class ModuleRecord(Record):
    """What happened to one target module.

    Attributes:
        target: its path.
        rank: written.
        result: `exact`, `truncated`, or `dense`.
        energy: ‖ΔW‖²_F of the merge before truncation; None when nothing was truncated.
        kept: share of it that was kept, in [0, 1].
    """

    target: str
    rank: int | None
    result: Result
    energy: float | None
    kept: float


class RunRecord(Record):
    """What a merge did. Everything in it is a function of the recipe and the inputs, but for `seconds` and `finished`.

    Attributes:
        plait: version.
        recipe: as run, every default spelt out.
        sources: per adapter: name, path or Hub place, ranks, sha256 of the tensor file.
        method: name.
        space: name.
        result: the worst over the modules.
        rank: of the written adapter (PEFT's r); None for a dense delta.
        max_lora_rank: smallest value of vLLM's setting that holds it; None when none does.
        kept: share of ‖ΔW‖²_F kept over all modules.
        lowest_kept: the smallest share of a module.
        modules: one record each.
        notes: of the plan.
        finished: local time, ISO 8601.
        seconds: wall time.
    """

    plait: str
    recipe: dict[str, Any]
    sources: tuple[dict[str, Any], ...]
    method: str
    space: str
    result: Result
    rank: int | None
    max_lora_rank: int | None
    kept: float
    lowest_kept: float
    modules: tuple[ModuleRecord, ...]
    notes: tuple[str, ...]
    finished: str
    seconds: float


class Lock(Record):
    """Everything needed to make the same bytes again.

    Attributes:
        version: of this format.
        plait: version that made it.
        python: version.
        libraries: versions of what computes.
        machine: processor architecture.
        recipe: as run.
        inputs: adapter → where it came from and sha256 of its files.
        outputs: file → sha256.
    """

    version: int
    plait: str
    python: str
    libraries: dict[str, str]
    machine: str
    recipe: dict[str, Any]
    inputs: dict[str, dict[str, Any]]
    outputs: dict[str, str]


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return a recipe as plain values, with every default."""
    data: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True)
    return data


def overall_kept(modules: tuple[ModuleRecord, ...]) -> float:
    """Return the share of energy kept over the modules that were truncated; 1 when none was."""
    total = sum(m.energy or 0.0 for m in modules)
    return sum((m.energy or 0.0) * m.kept for m in modules) / total if total else 1.0


def input_digests(inventory: Inventory) -> list[str]:
    """Return sha256 of every adapter's tensor file, in the recipe's order."""
    return [a.sha256() for a in inventory.adapters]


def sources(inventory: Inventory, digests: list[str]) -> tuple[dict[str, Any], ...]:
    """Describe where the adapters came from."""
    rows = []
    for entry, adapter, place, digest in zip(
        inventory.recipe.adapters, inventory.adapters, inventory.located, digests, strict=True
    ):
        rows.append(
            {
                "name": adapter.name,
                "path": entry.path,
                "weight": entry.weight,
                "repo": place.repo,
                "commit": place.commit,
                "ranks": list(adapter.ranks),
                "sha256": digest,
            }
        )
    return tuple(rows)


def make_lock(inventory: Inventory, digests: list[str], folder: Path, plait_version: str) -> Lock:
    """Make the lock of a finished folder; hashes every file that is a function of the recipe."""
    inputs = {}
    for entry, adapter, place, digest in zip(
        inventory.recipe.adapters, inventory.adapters, inventory.located, digests, strict=True
    ):
        inputs[adapter.name] = {
            "path": entry.path,
            "repo": place.repo,
            "commit": place.commit,
            "files": {adapter.file.path.name: digest, CONFIG: sha256(adapter.config.path)},
        }
    made = sorted(p for p in folder.rglob("*") if p.is_file() and p.name not in (LOCK, RECORD, SUMMARY))
    return Lock(
        version=1,
        plait=plait_version,
        python=platform.python_version(),
        libraries=_versions(),
        machine=platform.machine(),
        recipe=recipe_json(inventory.recipe),
        inputs=inputs,
        outputs={p.relative_to(folder).as_posix(): sha256(p) for p in made},
    )


def write_json(path: Path, value: Record | Mapping[str, Any]) -> None:
    """Write a record as indented JSON."""
    data = value.model_dump(mode="json") if isinstance(value, Record) else value
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def summary(record: RunRecord) -> dict[str, Any]:
    """Return the few numbers one looks at first."""
    return {
        "method": record.method,
        "space": record.space,
        "adapters": [s["name"] for s in record.sources],
        "weights": [s["weight"] for s in record.sources],
        "target_modules": len(record.modules),
        "result": record.result,
        "rank": record.rank,
        "energy_kept": record.kept,
        "lowest_energy_kept": record.lowest_kept,
        "vllm_max_lora_rank": record.max_lora_rank,
        "finished": record.finished,
        "seconds": record.seconds,
    }


def sha256(path: Path) -> str:
    """Return the hex digest of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _versions() -> dict[str, str]:
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
