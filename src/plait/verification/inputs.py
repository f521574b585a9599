"""The inputs that a lock names: where they are now, and whether they are the same."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from plait.errors import PlaitError, RecipeError, did_you_mean
from plait.hub.download import resolve, resolve_model
from plait.hub.references import parse_reference
from plait.records import Record
from plait.results.digests import sha256
from plait.results.lock import Lock, LockedInput

BASE = "base_model"  # what the base model of a merge or bake is called among the inputs
_MODELS = ("extract",)  # kinds whose inputs are models, not adapters


class InputCheck(Record):
    """One input.

    Attributes:
        name: of the adapter; `base_model` for the base; `base` and `finetuned` of an extraction.
        path: where it was looked for.
        state: `unknown` where it cannot be found, or a file of it was not hashed when the result was made.
        detail: which files differ, or why it cannot be found, or which were not hashed.
        found: whether it is there.
    """

    name: str
    path: str
    state: Literal["equal", "changed", "unknown"]
    detail: str = ""
    found: bool = True


@dataclass(frozen=True)
class FoundInput:
    """An input on this machine.

    Attributes:
        folder: of it.
        moments: its second moments, where the merge used them.
        file: the file in the folder that it is; None where it is the folder.
        digests: file → sha256, of those that are as the lock has them.
    """

    folder: Path
    moments: Path | None
    file: str | None = None
    digests: Mapping[Path, str] = field(default_factory=dict)

    @property
    def path(self) -> Path:
        """The folder, or the file in it."""
        return self.folder if self.file is None else self.folder / self.file

    def located(self, entry: Mapping[str, Any]) -> dict[str, Any]:
        """Return an adapter's entry of a recipe with the place where it is."""
        return {**entry, "path": str(self.path), **({"moments": str(self.moments)} if self.moments is not None else {})}


def check_inputs(folder: Path, lock: Lock, given: Mapping[str, str]) -> tuple[tuple[InputCheck, ...], dict[str, FoundInput]]:
    """Find every input and compare its files with the lock.

    Args:
        folder: where the lock is; local paths in it start there.
        lock: of the result.
        given: name → reference, for inputs that are elsewhere now.

    Returns:
        one check each, and those that were found.

    Raises:
        RecipeError: a name is not that of an input.
    """
    locked = {**lock.inputs, **({BASE: lock.base} if lock.base is not None else {})}
    unknown = [name for name in given if name not in locked]
    if unknown:
        raise RecipeError(
            f"--input {unknown[0]}: no such input.{did_you_mean(unknown[0], locked)} There are: {', '.join(locked)}."
        )
    checks, found = [], {}
    for name, entry in locked.items():
        path = given.get(name) or (entry.path if entry.repo else _local(folder, entry.path))
        try:
            is_model = name == BASE or lock.kind in _MODELS
            located = resolve_model(path, any_form=name == BASE) if is_model else resolve(parse_reference(path))
            place = located.folder.resolve()
        except PlaitError as error:
            checks.append(InputCheck(name=name, path=path, state="unknown", detail=str(error), found=False))
            continue
        moments = _moments(folder, entry) if name not in given else _moments(folder, entry, place)
        differing = [f for f, digest in entry.files.items() if _digest(place / f) != digest]
        equal = {place / f: digest for f, digest in entry.files.items() if f not in differing}
        if moments is not None and entry.moments is not None and _digest(moments) != entry.moments.sha256:
            differing.append(moments.name)
        state: Literal["equal", "changed", "unknown"] = "changed" if differing else "equal"
        detail = ", ".join(differing)
        if entry.not_hashed and not differing:
            state, detail = "unknown", f"{', '.join(entry.not_hashed)} was not hashed when the result was made"
        checks.append(InputCheck(name=name, path=path, state=state, detail=detail))
        found[name] = FoundInput(place, moments, located.file, equal)
    return tuple(checks), found


def _local(folder: Path, path: str) -> str:
    return os.path.normpath(folder.resolve() / path)


def _moments(folder: Path, entry: LockedInput, place: Path | None = None) -> Path | None:
    """Return the file of second moments; one of the same name next to an adapter that was given anew is preferred."""
    if entry.moments is None:
        return None
    locked = Path(_local(folder, entry.moments.path))
    candidate = place / locked.name if place is not None else locked
    return candidate if candidate.is_file() else locked


def _digest(path: Path) -> str | None:
    return sha256(path) if path.is_file() else None
