"""The lock of a result: everything from which anyone can make the same bytes again."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from plait.errors import AdapterError
from plait.folders import absolute, entries, file_in, file_name_problem
from plait.hub.download import Located
from plait.parsing import as_record, read_object, shown
from plait.records import Record
from plait.results.digests import sha256
from plait.results.versions import library_versions
from plait.version import __version__

LOCK = "plait.lock"
RUN_RECORD = "merge_metadata.json"
SUMMARY = "summary.json"
CARD = "README.md"
LEARNED_RECIPE, LEARNED_START = "recipe.yaml", "start"  # what a tuning of coefficients learned, and the adapter that it names
LOCK_VERSION = 1
ResultKind = Literal["merge", "bake", "extract", "train", "tune", "calibrate", "convert"]


def _digests(files: dict[str, str]) -> dict[str, str]:
    """Refuse names that are not those of files in a folder: a lock may come from elsewhere."""
    for name in files:
        if problem := file_name_problem(name):
            raise ValueError(f"the file name {name!r} {problem}")
    return files


FileDigests = Annotated[dict[str, str], AfterValidator(_digests)]


class LockedFile(Record):
    """A file next to an adapter that the merge read.

    Attributes:
        path: from the lock's own folder.
        sha256: of it.
        texts: task → digest of the texts that it was taken on, where the file names them.
    """

    path: str
    sha256: str
    texts: dict[str, str] | None = None


class LockedInput(Record):
    """An input, and how to find it again.

    Attributes:
        path: a folder, from the lock's own folder; on the Hub `org/repo@commit[/subfolder]`.
        repo: on the Hub; None for a local folder.
        commit: there.
        files: name → sha256.
        moments: its inputs' second moments, where the method used them.
        not_hashed: further files, of which no sha256 was taken: of a base that was baked with `--no-hash-base`.
    """

    path: str
    repo: str | None
    commit: str | None
    files: FileDigests
    moments: LockedFile | None = None
    not_hashed: tuple[str, ...] = ()


class Lock(Record):
    """Everything needed to make the same bytes again.

    Attributes:
        version: of this format.
        plait: version that made it.
        python: version.
        libraries: versions of what computes.
        machine: processor architecture.
        recipe: as asked for; the request of its kind where that is not a merge.
        inputs: adapter → where it is, where it came from, and sha256 of its files.
        outputs: file → sha256.
        kind: which command rebuilds it.
        options: what that command was given besides the recipe.
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
    kind: ResultKind = "merge"
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
            named = isinstance(adapters, list) and all(
                isinstance(a, dict) and isinstance(a.get("name"), str) and a["name"] for a in adapters
            )
            if not named or not isinstance(method, dict) or not isinstance(method.get("name"), str):
                raise ValueError("the recipe names no adapters, or no method")
            if lacking := [a["name"] for a in adapters or () if a["name"] not in self.inputs]:
                raise ValueError(f"the recipe's adapter {lacking[0]!r} is not among the inputs")
        elif self.kind == "extract":
            fields = all(isinstance(recipe.get(key), text) for key in ("base", "finetuned", "base_id"))
            if not fields or not {"base", "finetuned"} <= self.inputs.keys():
                raise ValueError("the request names no base and no fine-tune")
        elif self.kind == "convert":
            if not isinstance(recipe.get("adapter"), str) or not isinstance(recipe.get("to"), str) or len(self.inputs) != 1:
                raise ValueError("the request names no adapter, or no format")
        elif not isinstance(recipe.get("base"), str):
            raise ValueError("the request names no base model")
        return self

    @property
    def files(self) -> set[str]:
        """Names of all files that make up the result, lock and records included."""
        return {*self.outputs, CARD, LOCK, RUN_RECORD, SUMMARY}


def read_lock(folder: Path, *, advice: str = "Make the result again.") -> Lock:
    """Return the lock of a result; `advice` is the last sentence of a refusal.

    Raises:
        AdapterError: there is none, or it cannot be read.
    """
    path = folder / LOCK
    try:
        if not folder.is_dir():
            absolute(folder)  # or there is no working directory that it could be in
            raise AdapterError(f"{folder}: there is no such folder. Give the folder of a merge, a bake or an extraction.")
        if not os.path.lexists(path):
            held = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
            raise AdapterError(
                f"{folder}: there is no {LOCK}, so this is not a complete result of plait. It holds: {held}. Give the folder "
                "that `plait merge`, `bake`, `compress` or `extract` wrote."
            )
        data = read_object(file_in(folder, LOCK), AdapterError, advice=advice)
    except OSError as error:
        raise AdapterError(f"{path}: cannot be read ({error.strerror or error}). {advice}") from None
    if data.get("version", LOCK_VERSION) != LOCK_VERSION:
        raise AdapterError(f"{path}: a lock of version {shown(data['version'])}; this plait reads {LOCK_VERSION}. {advice}")
    return as_record(Lock, data, str(path), AdapterError, what="a lock", advice=advice)


def new_lock(
    kind: ResultKind,
    *,
    recipe: Mapping[str, Any],
    inputs: Mapping[str, LockedInput],
    outputs: Mapping[str, str],
    options: Mapping[str, Any] | None = None,
    base: LockedInput | None = None,
    versions: tuple[str, Mapping[str, str]] | None = None,
) -> Lock:
    """Make the lock of a finished result.

    Args:
        kind: which command makes it again.
        recipe: what that command was asked for.
        inputs: name → where it is and its hashes.
        outputs: file → sha256 (`output_digests`).
        options: what the command was given besides the recipe.
        base: the base model, where one was read.
        versions: of plait and of the libraries, where an earlier process made the bytes; this one's when None.
    """
    plait, libraries = versions or (__version__, library_versions())
    return Lock(
        version=LOCK_VERSION,
        plait=plait,
        python=platform.python_version(),
        libraries=dict(libraries),
        machine=platform.machine(),
        recipe=dict(recipe),
        inputs=dict(inputs),
        outputs=dict(outputs),
        kind=kind,
        options=dict(options or {}),
        base=base,
    )


def locked_input(place: Located, files: Mapping[str, str | None], folder: Path) -> LockedInput:
    """Describe an input so that it can be found again: a Hub place by its commit, a local folder from the lock's own folder.

    Args:
        place: where it was found.
        files: name → sha256; None of one that was not hashed.
        folder: where the lock will be, or a folder next to that.
    """
    if place.repo is None:
        path = relative_path(place.path, folder)
    else:
        path = f"{place.repo}@{place.commit}" + (f"/{place.subfolder}" if place.subfolder else "")
    hashed = {name: digest for name, digest in files.items() if digest is not None}
    not_hashed = tuple(name for name, digest in files.items() if digest is None)
    return LockedInput(path=path, repo=place.repo, commit=place.commit, files=hashed, not_hashed=not_hashed)


def relative_path(path: Path, folder: Path) -> str:
    """Return a path from a folder, links resolved: a tree can then move as a whole, and no home folder is published."""
    try:
        text = Path(os.path.relpath(path.resolve(), folder.resolve())).as_posix()
    except (ValueError, FileNotFoundError):  # another drive, or a working directory that does not exist any more
        return path.resolve().as_posix()
    return text if text.startswith("..") else f"./{text}"


def output_digests(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return sha256 of every file of a result but for lock and run record, by their path in it; `known` are not computed."""
    known = known or {}
    made = [name for name in sorted(entries(folder)) if name not in (LOCK, RUN_RECORD, SUMMARY)]
    return {name: known.get(name) or sha256(file_in(folder, name)) for name in made}
