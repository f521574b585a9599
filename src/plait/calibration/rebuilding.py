"""What a lock keeps of a request for texts, and the request that is read from it again: for `plait verify`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ValidationError

from plait.calibration.pipeline import run_calibrate
from plait.calibration.request import task_texts
from plait.calibration.texts import Texts
from plait.errors import RecipeError, collect
from plait.hub.pretrained import LoadOptions
from plait.recipes.schema import Recipe
from plait.results.lock import LOCK, Lock
from plait.results.progress import Progress
from plait.verification.inputs import BASE, FoundInput


def rebuild_calibration(
    lock: Lock, folder: Path, inputs: Mapping[str, FoundInput], out: Path, workers: int | None, progress: Progress
) -> None:
    """Take moments again, from their lock.

    Args:
        lock: of a calibration.
        folder: where it is.
        inputs: where adapters and base are now.
        out: where to write.
        workers: not used.
        progress: receives stages and steps.

    Raises:
        PlaitError: it cannot be done; the texts are others now.
    """
    recipe, options, locked = request_of(lock, folder, inputs, "calibration")
    texts, _ = task_texts(recipe, None, [a.name for a in recipe.adapters])
    check_same_texts(texts, locked)
    run_calibrate(recipe, folder=None, out=out, options=LoadOptions(**options), progress=progress)


def request_of(
    lock: Lock, folder: Path, inputs: Mapping[str, FoundInput], part: Literal["calibration", "tune"]
) -> tuple[Recipe, dict[str, Any], dict[str, str]]:
    """Return the recipe that `locked_request` kept, with everything where it is now.

    Args:
        lock: of a calibration or a tuning.
        folder: where it is.
        inputs: where adapters and base are now.
        part: which of the recipe's parts is about texts.

    Returns:
        The recipe, the options of the run (`dtype`, `device_map`), and task → digest of its texts.

    Raises:
        RecipeError: the lock holds no such request, or one of another version.
    """

    def absolute(reference: str) -> str:
        return os.path.normpath(folder.resolve() / reference) if reference[:1] == "." else reference

    if "request" not in lock.options:
        raise RecipeError(f"{LOCK}: plait {lock.plait} kept no names of texts in it; its files were checked.")
    try:
        given = {**lock.options["request"]}
        given["adapters"] = [inputs[entry["name"]].located(entry) for entry in given["adapters"]]
        given["tasks"] = [absolute(task) for task in given["tasks"]]
        if files := given.get(part, {}).get("files"):
            given[part] = {**given[part], "files": {task: absolute(file) for task, file in files.items()}}
        recipe = Recipe.model_validate({**given, "base_model": str(inputs[BASE].folder)})
        locked = {str(task): str(digest) for task, digest in lock.options["texts"].items()}
        options = {key: str(lock.options[key]) for key in ("dtype", "device_map")}
        options["dtype"] = {"auto": "stored"}.get(options["dtype"], options["dtype"])  # what it was on the machine of the lock
    except (ValidationError, AttributeError, KeyError, TypeError) as error:
        first = str(error).splitlines()[0]
        raise RecipeError(f"{LOCK}: its request is of plait {lock.plait}, which this plait cannot read: {first}.") from None
    return recipe, options, locked


def check_same_texts(texts: Mapping[str, Texts], locked: Mapping[str, str]) -> None:
    """Make sure that texts are those of a lock.

    Args:
        texts: task → its texts now.
        locked: task → digest of what was read.

    Raises:
        RecipeError: they are others; all tasks are named.
    """
    changed = [name for name, t in texts.items() if t.digest != locked.get(name)]
    problems = [f"task {name!r}: its texts ({texts[name].source}) are not those that were read." for name in changed]
    collect(RecipeError, problems, "texts changed since")
