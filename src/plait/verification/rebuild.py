"""Make a result again from its lock, and compare it file by file, tensor by tensor."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from plait.baking.pipeline import run_bake
from plait.baking.plan import BakeOptions
from plait.checkpoints.distance import tensor_distance
from plait.errors import PlaitError, RecipeError
from plait.extraction.pipeline import run_extract
from plait.extraction.request import make_request
from plait.folders import entries, file_in
from plait.merging.conversion import run_convert
from plait.merging.pipeline import run_recipe
from plait.recipes.schema import Recipe
from plait.records import Record
from plait.results.digests import sha256
from plait.results.lock import CARD, LEARNED_RECIPE, LEARNED_START, LOCK, Lock, read_lock
from plait.results.progress import Progress
from plait.tensorfiles.reader import SafetensorsFile
from plait.verification.inputs import BASE, FoundInput
from plait.verification.public import public_digest
from plait.version import __version__

_LEARNED = (LEARNED_RECIPE, "tuning.json")


#: (lock, its folder, inputs, output folder, workers, progress): does what a lock says, as `rebuild` does.
Rebuilder = Callable[[Lock, Path, Mapping[str, FoundInput], Path, int | None, Progress], None]


class RebuiltFile(Record):
    """One file, made again.

    Attributes:
        name: its path.
        state: against the lock.
        tensors: how many tensors differ from those of the folder; None where they are not, or cannot be, compared.
        difference: the largest |Δ| among them.
        where: the tensor with it.
    """

    name: str
    state: Literal["equal", "differs", "missing", "extra"]
    tensors: int | None = None
    difference: float | None = None
    where: str | None = None


def rebuild(
    lock: Lock,
    inputs: Mapping[str, FoundInput],
    out: Path,
    workers: int | None,
    progress: Progress,
    unchanged: Collection[str] = (),
) -> None:
    """Do what a lock says, with the inputs where they are now.

    Args:
        lock: of the result.
        inputs: of the lock.
        out: where to write.
        workers: as when it was made; never changes a byte.
        progress: receives stages and steps.
        unchanged: files of the result that are as the lock has them: of a model they are left empty where they come out so.

    Raises:
        PlaitError: it cannot be done.
    """
    if lock.kind == "extract":
        places = {side: str(inputs[side].folder) for side in ("base", "finetuned")}
        try:
            request = make_request(**lock.recipe | places)
        except TypeError as error:
            raise RecipeError(f"this version of plait cannot read the lock's request ({error}).") from None
        run_extract(request, out=out, workers=workers, progress=progress, written_as=_base_name(lock))
        return
    if lock.kind == "convert":
        ((_, source),) = inputs.items()
        run_convert(
            str(source.path), out=out, **{key: lock.recipe[key] for key in ("to", "tower", "base_model") if key in lock.recipe}
        )
        return
    recipe = located_recipe(lock, inputs)
    base = inputs[BASE].path if BASE in inputs else None
    known = {path: digest for found in inputs.values() for path, digest in found.digests.items()}
    if lock.kind == "bake":
        options = BakeOptions.model_validate({**lock.options, "hash_base": False})  # of its lock only `outputs` are read
        based = recipe.model_copy(update={"base_model": str(base)})
        expected = {name: lock.outputs[name] for name in unchanged if name in lock.outputs}
        run_bake(based, options, out=out, workers=workers, progress=progress, known=known, expected=expected)
        return
    run_recipe(recipe, out=out, workers=workers, progress=progress, base_folder=base, known=known)


def located_recipe(lock: Lock, inputs: Mapping[str, FoundInput], name: str = LOCK) -> Recipe:
    """Return a lock's recipe with the adapters where they are now.

    Raises:
        RecipeError: this plait does not read it; another version wrote it. Or it is a training, which no lock repeats.
    """
    if lock.kind == "train":
        raise RecipeError("a training is repeated by training again, not from its lock; its files were checked.")
    if lock.kind == "calibrate":
        raise RecipeError(
            "moments are taken again by `plait calibrate`, from the texts that calibration.json names; its files were checked."
        )
    if lock.kind == "tune" and LEARNED_RECIPE not in lock.outputs:
        raise RecipeError(
            "a tuning is repeated by `plait tune`, with the recipe and texts that tuning.json names; its files were checked."
        )
    try:
        adapters = [inputs[entry["name"]].located(entry) for entry in lock.recipe["adapters"]]
        return Recipe.model_validate(lock.recipe | {"adapters": adapters})
    except (ValidationError, KeyError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise RecipeError(
            f"{name}: this version of plait ({__version__}) cannot read its recipe, written by plait {lock.plait}: {reason}."
        ) from None


def compare_rebuilt(folder: Path, rebuilt: Path, lock: Lock, unchanged: Collection[str]) -> tuple[RebuiltFile, ...]:
    """Compare what was made again with the lock; the card, which names places and versions, is not compared.

    Nor is what a tuning learned: its recipe is made again, not the learning of it. Files are not hashed again: the lock of what
    was made again has the hashes that were taken as it was written.

    Args:
        folder: with the lock.
        rebuilt: what was made again.
        lock: of the folder.
        unchanged: files of the folder that are as the lock has them.
    """
    again = read_lock(rebuilt).outputs
    here = set(entries(rebuilt))
    not_compared = {"plait.lock", "merge_metadata.json", "summary.json", "calibration.json", CARD}
    learned = {n for n in lock.outputs if n in _LEARNED or n.startswith(f"{LEARNED_START}/")} if lock.kind == "tune" else set()
    names = sorted((here | {*lock.outputs}) - not_compared - learned)
    return tuple(
        _compared(folder, rebuilt, name, lock.outputs.get(name), again.get(name), unchanged=name in unchanged) for name in names
    )


def _compared(folder: Path, rebuilt: Path, name: str, digest: str | None, known: str | None, *, unchanged: bool) -> RebuiltFile:
    again = rebuilt / name
    if digest is None:
        return RebuiltFile(name=name, state="extra")
    if not again.is_file():
        return RebuiltFile(name=name, state="missing")
    try:
        own = file_in(folder, name)
    except OSError:
        own = None
    # as locked: here, or where it was published
    equal = (known or sha256(again)) == digest or (name.endswith((".json", ".safetensors")) and public_digest(again) == digest)
    if own is None or not name.endswith(".safetensors") or (equal and unchanged):
        return RebuiltFile(name=name, state="equal" if equal else "differs")
    # also where it comes out as locked and the folder's own was changed since: how far it is from it
    found = _differences(name, own, again)
    return found.model_copy(update={"state": "equal"}) if equal else found


def _differences(name: str, first: Path, second: Path) -> RebuiltFile:
    """Return how far two tensor files are unequal; only names and numbers where shapes or dtypes differ."""
    try:
        one, two = SafetensorsFile(first), SafetensorsFile(second)
    except PlaitError:  # the folder's own file is broken; reported already
        return RebuiltFile(name=name, state="differs")
    described = [{n: (i.shape, i.dtype) for n, i in file.tensors.items()} for file in (one, two)]
    if described[0] != described[1]:
        return RebuiltFile(name=name, state="differs")
    unequal = {n: size for n in sorted(one.tensors) if (size := tensor_distance(one, two, n).largest) > 0}
    where = max(unequal, key=lambda n: unequal[n], default=None)
    largest = unequal[where] if where is not None else 0.0
    return RebuiltFile(name=name, state="differs", tensors=len(unequal), difference=largest, where=where)


def _base_name(lock: Lock) -> tuple[str, str | None]:
    """Return the base model's name and revision that an extraction wrote."""
    if lock.recipe["base_id"]:
        return lock.recipe["base_id"], None
    base = lock.inputs["base"]
    return base.repo or lock.recipe["base"], base.commit
