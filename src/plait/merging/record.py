"""What happened: the run record, its summary, and the lock from which anyone can rebuild the result."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from plait.adapters.adapter import CONFIG
from plait.errors import AdapterError, collect
from plait.folders import entries, file_in, name_problem
from plait.hub.download import Located
from plait.merging.inventory import Inventory
from plait.merging.plan import Result
from plait.parsing import as_record, read_object, shown
from plait.recipes.schema import Recipe
from plait.records import Record

LOCK = "plait.lock"
RECORD = "merge_metadata.json"
SUMMARY = "summary.json"
CARD = "README.md"
LOCK_VERSION = 1
Kind = Literal["merge", "bake", "extract", "train", "tune"]
_HASHED_AT_ONCE = 4
_LIBRARIES = ("torch", "safetensors", "numpy")


def _digests(files: dict[str, str]) -> dict[str, str]:
    """Refuse names that are not those of files in a folder: a lock may come from elsewhere."""
    for name in files:
        if problem := name_problem(name):
            raise ValueError(f"the file name {name!r} {problem}")
    return files


FileDigests = Annotated[dict[str, str], AfterValidator(_digests)]


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
        notes: of the plan, and what stages said while they ran.
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


class LockedFile(Record):
    """A file beside an adapter that the merge read.

    Attributes:
        path: from the lock's own folder.
        sha256: of it.
    """

    path: str
    sha256: str


class LockedInput(Record):
    """An input, and how to find it again.

    Attributes:
        path: a folder, from the lock's own folder; on the Hub `org/repo@commit[/subfolder]`.
        repo: on the Hub; None for a local folder.
        commit: there.
        files: name → sha256.
        moments: its inputs' second moments, where the method used them.
    """

    path: str
    repo: str | None
    commit: str | None
    files: FileDigests
    moments: LockedFile | None = None


class Lock(Record):
    """Everything needed to make the same bytes again.

    Attributes:
        version: of this format.
        plait: version that made it.
        python: version.
        libraries: versions of what computes.
        machine: processor architecture.
        recipe: as asked for; the request of its kind where that is no merge.
        inputs: adapter → where it lies, where it came from, and sha256 of its files.
        outputs: file → sha256.
        kind: which command rebuilds it.
        options: what that command was told besides the recipe.
        base: the base model, as an input is described; None where none was read.
    """

    version: int
    plait: str
    python: str
    libraries: dict[str, str]
    machine: str
    recipe: dict[str, Any]
    inputs: dict[str, LockedInput]
    outputs: FileDigests
    kind: Kind = "merge"
    options: dict[str, Any] = Field(default_factory=dict)
    base: LockedInput | None = None

    @property
    def has_adapters(self) -> bool:
        """Whether its inputs are the adapters of a recipe."""
        return self.kind in ("merge", "bake", "tune")

    @model_validator(mode="after")
    def _names_its_sources(self) -> Self:
        """Refuse a recipe without what every reader of a lock asks it for."""
        recipe, text = self.recipe, (str, type(None))
        if self.has_adapters:
            adapters, method = recipe.get("adapters"), recipe.get("method")
            named = isinstance(adapters, list) and all(isinstance(a, dict) and isinstance(a.get("name"), str) for a in adapters)
            if not named or not isinstance(method, dict) or not isinstance(method.get("name"), str):
                raise ValueError("the recipe names no adapters, or no method")
            if lacking := [a["name"] for a in adapters or () if a["name"] not in self.inputs]:
                raise ValueError(f"the recipe's adapter {lacking[0]!r} is not among the inputs")
        elif self.kind == "extract":
            fields = all(isinstance(recipe.get(key), text) for key in ("base", "finetuned", "base_id"))
            if not fields or not {"base", "finetuned"} <= self.inputs.keys():
                raise ValueError("the request names no base and no fine-tune")
        elif not isinstance(recipe.get("base"), str):
            raise ValueError("the job names no base model")
        return self

    @property
    def files(self) -> set[str]:
        """Names of all files that make up the result, lock and records included."""
        return {*self.outputs, CARD, LOCK, RECORD, SUMMARY}


def read_lock(folder: Path, *, advice: str = "Make the result again.") -> Lock:
    """Return the lock of a result; `advice` is the last sentence of a refusal.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    path = folder / LOCK
    if not folder.is_dir():
        raise AdapterError(f"{folder}: there is no such folder. Give the folder of a merge, a bake or an extraction.")
    if not os.path.lexists(path):
        held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        raise AdapterError(
            f"{folder}: there is no {LOCK}, so this is not a whole result of plait. It holds: {held}. Give the folder that "
            "`plait merge`, `bake`, `compress` or `extract` wrote."
        )
    try:
        data = read_object(file_in(folder, LOCK), AdapterError, advice=advice)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    if data.get("version", LOCK_VERSION) != LOCK_VERSION:
        raise AdapterError(f"{path}: a lock of version {shown(data['version'])}; this plait reads {LOCK_VERSION}. {advice}")
    return as_record(Lock, data, str(path), AdapterError, what="a lock", advice=advice)


def recipe_json(recipe: Recipe) -> dict[str, Any]:
    """Return what a merge depends on as plain values, with every default; how it is evaluated is no part of that."""
    data: dict[str, Any] = recipe.model_dump(mode="json", by_alias=True, exclude={"tasks", "eval", "tune"})
    return data


def overall_kept(modules: tuple[ModuleRecord, ...]) -> float:
    """Return the share of energy kept over the modules that were truncated; 1 when none was."""
    total = sum(m.energy or 0.0 for m in modules)
    return sum((m.energy or 0.0) * m.kept for m in modules) / total if total else 1.0


def input_digests(inventory: Inventory) -> dict[Path, str]:
    """Return sha256 of the large files that a merge reads: adapters, second moments, the base model; several at a time."""
    paths = [a.file.path for a in inventory.adapters]
    paths += [file.path for file in inventory.moments.files.values()] if inventory.moments is not None else []
    paths += weight_files(inventory.base_located.folder) if inventory.base_located is not None else []
    with ThreadPoolExecutor(_HASHED_AT_ONCE, "plait-sha256") as pool:
        return dict(zip(paths, pool.map(sha256, paths), strict=True))


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
    plait_version: str,
    *,
    final: Path | None = None,
    kind: Kind = "merge",
    options: Mapping[str, Any] | None = None,
    known: Mapping[str, str] | None = None,
) -> Lock:
    """Make the lock of a finished folder; hashes every file that is a function of the recipe.

    Args:
        inventory: what was merged.
        digests: of the inputs (`input_digests`).
        folder: the finished files.
        plait_version: that made them.
        final: the name that the folder will have; needed where that is in another folder.
        kind: which command makes it again.
        options: what that command was told besides the recipe.
        known: files of the folder whose sha256 is known already.
    """
    home = folder if final is None else final
    base, adapters = inventory.base_located, [digests[a.file.path] for a in inventory.adapters]
    return Lock(
        version=LOCK_VERSION,
        plait=plait_version,
        python=platform.python_version(),
        libraries=library_versions(),
        machine=platform.machine(),
        recipe=recipe_json(inventory.recipe),
        inputs=adapter_inputs(inventory, adapters, home, digests),
        outputs=output_digests(folder, known),
        kind=kind,
        options=dict(options or {}),
        base=None if base is None else locked_input(base, {p.name: digests[p] for p in weight_files(base.folder)}, home),
    )


def adapter_inputs(
    inventory: Inventory, digests: list[str], home: Path, known: Mapping[Path, str] | None = None
) -> dict[str, LockedInput]:
    """Describe the adapters, and their files of second moments, so that they can be found again.

    Args:
        inventory: what was merged.
        digests: of the adapters' tensor files.
        home: where the lock will stand.
        known: sha256 of other files, where it is known.
    """
    known = known or {}
    inputs = {
        adapter.name: locked_input(place, {adapter.file.path.name: digest, CONFIG: sha256(adapter.config.path)}, home)
        for adapter, place, digest in zip(inventory.adapters, inventory.located, digests, strict=True)
    }
    for name, file in inventory.moments.files.items() if inventory.moments is not None else ():
        moments = LockedFile(path=relative_path(file.path, home), sha256=known.get(file.path) or sha256(file.path))
        inputs[name] = inputs[name].model_copy(update={"moments": moments})
    return inputs


def locked_input(place: Located, files: Mapping[str, str], folder: Path) -> LockedInput:
    """Describe an input so that it can be found again: a Hub place by its commit, a local folder from the lock's own folder.

    Args:
        place: where it was found.
        files: name → sha256.
        folder: where the lock will stand, or a folder beside that.
    """
    if place.repo is None:
        path = relative_path(place.folder, folder)
    else:
        path = f"{place.repo}@{place.commit}" + (f"/{place.subfolder}" if place.subfolder else "")
    return LockedInput(path=path, repo=place.repo, commit=place.commit, files=dict(files))


def relative_path(path: Path, folder: Path) -> str:
    """Return a path from a folder, links resolved: a tree can then move as a whole, and no home folder is published."""
    try:
        text = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except ValueError:  # another drive
        return path.resolve().as_posix()
    return text if text.startswith("..") else f"./{text}"


def output_digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return sha256 of every file of a result but for lock and run record, by their path in it; `known` are not computed."""
    known = known or {}
    made = [name for name in sorted(entries(folder)) if name not in (LOCK, RECORD, SUMMARY)]
    return {name: known.get(name) or sha256(file_in(folder, name)) for name in made}


def weight_digests(folder: Path) -> dict[str, str]:
    """Return sha256 of a model's files of weights."""
    return {p.name: sha256(p) for p in weight_files(folder)}


def weight_files(folder: Path) -> list[Path]:
    """Return a model's files of weights, sorted: those of safetensors, or where there is none, `pytorch_model*.bin`.

    Raises:
        AdapterError: one of them is a link that leads nowhere, a folder, a pipe or a device.
    """
    found = sorted(folder.glob("*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))
    odd = [f"{path}: this is not a file that can be read. Fetch the model again." for path in found if not path.is_file()]
    collect(AdapterError, odd, f"{folder}: the model is not whole")
    return found


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


def library_versions() -> dict[str, str]:
    """Return the versions of the libraries that compute."""
    found = {}
    for name in _LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "unknown"
    return found
