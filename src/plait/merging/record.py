"""What a merge did: the run record, its summary, and its lock."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from plait.checkpoints.digests import weight_files
from plait.merging.engine import MergedModule
from plait.merging.inventory import Inventory
from plait.recipes.writing import recipe_json
from plait.results.digests import sha256
from plait.results.lock import (
    RUN_RECORD,
    SUMMARY,
    Lock,
    LockedFile,
    LockedInput,
    ResultKind,
    locked_input,
    new_lock,
    output_digests,
    relative_path,
)
from plait.results.older_keys import OlderKeysDropped, keys_of, with_older_keys
from plait.results.records import ModuleRecord, Result, write_json
from plait.views import Viewed

_HASHED_AT_ONCE = 4


class RunRecord(Viewed, OlderKeysDropped):
    """What a merge did. Everything in it is a function of the recipe and the inputs, but for `seconds` and `finished`.

    Attributes:
        plait: version.
        recipe: as run, every default spelled out.
        sources: per adapter: name, path or Hub place, ranks, sha256 of the tensor file.
        method: name.
        space: name.
        result: the worst over the modules.
        rank: of the written adapter (PEFT's r); None for a dense delta.
        max_lora_rank: smallest value of vLLM's setting that serves it; None when none is known to.
        kept: share of ‖ΔW‖²_F kept over all modules.
        lowest_kept: the smallest share of a module.
        modules: one record each.
        notes: of the plan, and the notes of stages while they ran.
        finished: local time, ISO 8601.
        seconds: wall time.
    """

    OLDER_KEYS: ClassVar[frozenset[str]] = keys_of(RUN_RECORD)

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


def input_digests(inventory: Inventory, known: Mapping[Path, str] | None = None) -> dict[Path, str]:
    """Return sha256 of the large files that a merge reads: adapters, second moments, the base model; several at a time.

    Args:
        inventory: what is merged.
        known: file → sha256, of files that need not be hashed.
    """
    known = known or {}
    paths = [a.file.path for a in inventory.adapters]
    paths += [file.path for file in inventory.moments.files.values()] if inventory.moments is not None else []
    paths += weight_files(inventory.base_located.folder) if inventory.base_located is not None else []
    with ThreadPoolExecutor(_HASHED_AT_ONCE, "plait-sha256") as pool:
        return dict(zip(paths, pool.map(lambda path: known.get(path) or sha256(path), paths), strict=True))


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


def make_lock(
    inventory: Inventory,
    digests: Mapping[Path, str],
    folder: Path,
    *,
    final: Path | None = None,
    kind: ResultKind = "merge",
    options: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
) -> Lock:
    """Make the lock of a finished folder; hashes every file that is a function of the recipe.

    Args:
        inventory: what was merged.
        digests: of the inputs (`input_digests`).
        folder: the finished files.
        final: the name that the folder will have; needed where that is in another folder.
        kind: which command makes it again.
        options: what that command was given besides the recipe.
        known: files of the folder whose sha256 is known already.
    """
    home = folder if final is None else final
    base, adapters = inventory.base_located, [digests[a.file.path] for a in inventory.adapters]
    return new_lock(
        kind,
        recipe=recipe_json(inventory.recipe),
        inputs=adapter_inputs(inventory, adapters, home, digests),
        outputs=output_digests(folder, known),
        options=options,
        base=None if base is None else locked_input(base, {p.name: digests[p] for p in weight_files(base.folder)}, home),
    )


def adapter_inputs(
    inventory: Inventory, digests: list[str], home: Path, known: Mapping[Path, str] | None = None
) -> dict[str, LockedInput]:
    """Describe the adapters, and their files of second moments, so that they can be found again.

    Args:
        inventory: what was merged.
        digests: of the adapters' tensor files.
        home: the folder of the lock.
        known: sha256 of other files, where it is known.
    """
    known = known or {}
    inputs = {
        adapter.name: locked_input(
            place, {adapter.file.path.name: digest} | {p.name: sha256(p) for p in adapter.files[1:]}, home
        )
        for adapter, place, digest in zip(inventory.adapters, inventory.located, digests, strict=True)
    }
    for name, file in inventory.moments.files.items() if inventory.moments is not None else ():
        moments = LockedFile(
            path=relative_path(file.path, home),
            sha256=known.get(file.path) or sha256(file.path),
            texts=file.origin.texts if file.origin is not None else None,
        )
        inputs[name] = inputs[name].model_copy(update={"moments": moments})
    return inputs


def write_records(folder: Path, record: RunRecord) -> None:
    """Write the run record and its summary."""
    data = record.model_dump(mode="json")
    write_json(folder / RUN_RECORD, with_older_keys(RUN_RECORD, data))
    write_json(folder / SUMMARY, with_older_keys(SUMMARY, data, merge_summary(record)))


def merge_summary(record: RunRecord) -> dict[str, Any]:
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


class WrittenMerge(NamedTuple):
    """What was written of a merge.

    Attributes:
        modules: what happened to every module.
        rank: of the adapter; None for a dense output.
        digests: sha256 of the tensor file by its name.
        notes: on modules.
    """

    modules: tuple[ModuleRecord, ...]
    rank: int | None
    digests: dict[str, str]
    notes: tuple[str, ...]


def module_record(merged: MergedModule, exact_rank: int) -> ModuleRecord:
    """Return what happened to one module of an adapter, whose merge has `exact_rank` at most."""
    factors = merged.factors
    if factors is None:
        raise AssertionError(f"{merged.target!r} has no factors")
    if factors.energy is None or factors.kept is None or factors.rank >= exact_rank:
        return ModuleRecord(target=merged.target, rank=factors.rank, result="exact", energy=None, kept=1.0)
    kept = min(1.0, factors.kept / factors.energy) if factors.energy else 1.0
    return ModuleRecord(target=merged.target, rank=factors.rank, result="truncated", energy=factors.energy, kept=kept)
