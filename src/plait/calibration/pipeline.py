"""recipe + tasks → second moments of every adapter's inputs: for `plait calibrate`, and for merges that need them."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime
from itertools import count, takewhile
from pathlib import Path

from plait.adapters.adapter import Adapter
from plait.calibration.inputs import check_texts, encode_texts, load_for_texts
from plait.calibration.moments import take_moments
from plait.calibration.record import CALIBRATION, CalibratedAdapter, CalibrationRecord
from plait.calibration.request import CalibrationRequest, locked_request, read_calibration
from plait.calibration.sequential import merge_layer_by_layer
from plait.errors import AdapterError, OutputError, TaskError
from plait.evaluation.scores import digest
from plait.extras import require
from plait.hub.pretrained import LoadOptions
from plait.merging.moments import MomentsFile, MomentsOrigin, write_moments
from plait.merging.pipeline import input_folders
from plait.merging.record import adapter_inputs, input_digests
from plait.mixture import Mixture
from plait.notices import announce
from plait.recipes.naming import naming_its_file
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json
from plait.records import ShortRepr
from plait.results.digests import sha256
from plait.results.disk import check_not_an_input, check_space, writing
from plait.results.lock import LOCK, locked_input, new_lock, output_digests
from plait.results.locking import locked
from plait.results.progress import Progress, SilentProgress
from plait.results.records import write_json
from plait.results.staging import calibrating_folder, output_problem, publish, recover
from plait.results.versions import library_versions
from plait.version import __version__


@dataclass(frozen=True, repr=False)
class CalibrateResult(ShortRepr):
    """A finished calibration.

    Attributes:
        folder: where the moments were written, `<adapter>.safetensors` each.
        record: what was done.
    """

    folder: Path
    record: CalibrationRecord


@naming_its_file
def run_calibrate(
    recipe: Recipe,
    *,
    folder: Path | None,
    out: Path,
    force: bool = False,
    options: LoadOptions | None = None,
    progress: Progress | None = None,
) -> CalibrateResult:
    """Take the second moments of every adapted module's inputs, each adapter on its own tasks' texts.

    A run that was killed is taken up by the next one with the same output, adapter by adapter.

    Args:
        recipe: adapters, tasks and `calibration`.
        folder: what its relative paths are relative to; the current folder when None.
        out: where to write.
        force: replace a result at `out`.
        options: how, on this machine.
        progress: receives stages and steps.

    Raises:
        PlaitError: anything wrong with what was given; nothing is left at `out` then.
    """
    require("plait calibrate", {"eval": ["transformers", "accelerate", "jinja2"]})
    started, progress = time.perf_counter(), progress or SilentProgress()
    if problem := output_problem(out, force=force):
        raise OutputError(problem)
    request = read_calibration(recipe, folder, options or LoadOptions())
    check_not_an_input(out, input_folders(request.inventory), command="calibration")
    check_space(out, request.plan().bytes, what="second moments", advice="fewer adapters, or --set calibration.tokens=N")
    with _work(out, force=force) as place:
        taken = take_all_moments(
            request, lambda a: place / f"{a.name}.safetensors", lambda: load_base(request, progress), progress
        )
        record = _record(request, taken, started)
        for stale in set(place.iterdir()) - {place / a.file for a in taken}:
            stale.unlink()
        write_json(place / CALIBRATION, record)
        inventory = request.inventory
        digests = input_digests(inventory)
        lock = new_lock(
            "calibrate",
            recipe={
                "base": record.base,
                "calibration": request.spec.model_dump(mode="json"),
                "texts": {t.task: t.digest for t in record.texts},
            },
            inputs=adapter_inputs(inventory, [digests[a.file.path] for a in inventory.adapters], out),
            outputs=output_digests(place, {a.file: a.sha256 for a in taken}),
            options={
                **locked_request(recipe, folder, out, "calibration", {t.task: t.digest for t in record.texts}),
                "dtype": request.options.dtype,
                "device_map": request.options.device_map,
            },
            base=locked_input(request.base, request.base_files, out),
        )
        write_json(place / LOCK, lock)
        publish(place, Path(os.path.abspath(out)), force=force)  # noqa: PTH100 (resolve() would follow links)
    return CalibrateResult(out, record)


def take_all_moments(
    request: CalibrationRequest, place: Callable[[Adapter], Path], base: Callable[[], Mixture], progress: Progress
) -> tuple[CalibratedAdapter, ...]:
    """Take the moments of every adapter whose file is not there yet; the base is loaded only for these.

    Args:
        request: what is to be taken.
        place: adapter → its file; one with another content is replaced.
        base: loads the base with the adapters.
        progress: receives stages and steps.
    """
    adapters = request.inventory.adapters
    keys = {a.name: request.key(a) for a in adapters}
    missing = [a for a in adapters if not _is_usable(place(a), keys[a.name])]
    if missing:
        mixture = base()
        for adapter in missing:
            _take(request, mixture, adapter, keys[adapter.name], place(adapter), progress)
    lacking = {a.name for a in missing}
    return tuple(_described(request, a, place(a), reused=a.name not in lacking) for a in adapters)


def _take(request: CalibrationRequest, mixture: Mixture, adapter: Adapter, key: str, file: Path, progress: Progress) -> None:
    name = adapter.name
    passages = [p for task in request.tasks_of(name) for p in encode_texts(mixture, request.texts[task], name)]
    progress.start(f"inputs of {name}", len(passages), "texts")
    try:
        with mixture.active({name: 1.0}) as model:
            moments = take_moments(
                model,
                {target: mixture.module(target) for target in request.targets},
                passages,
                head=request.has_head(name),
                most_rows=request.spec.tokens,
                seed=request.spec.seed,
                report=progress.advance,
            )
    finally:
        progress.finish()
    found = moments.found()
    if lacking := [target for target in request.targets if target in adapter.targets and target not in found]:
        raise TaskError(
            f"adapter {name!r}: its texts do not reach {len(lacking)} of its modules ({', '.join(lacking[:3])}"
            f"{', …' * (len(lacking) > 3)}), so that these have no second moments. Give it a task whose texts do, such as one "
            "with images or sounds for what sees or hears, or take a method without moments."
        )
    origin = MomentsOrigin(
        adapter=adapter.sha256(),
        base=request.base_digest,
        texts=request.text_digests(name),
        tokens=max(sum(p.tokens for p in passages), moments.seen),
        sampled=len(moments.sampled),
        key=key,
        plait=__version__,
    )
    write_moments(file, found, origin)


def take_sequential_moments(
    request: CalibrationRequest, store: Path, base: Callable[[], Mixture], workers: int, progress: Progress
) -> tuple[dict[str, str], list[str]]:
    """Take the moments of all adapters layer by layer, with the layers below already merged, where they are not there yet.

    A run that was killed is taken up by the next one with the same request, layer by layer and adapter by adapter.

    Returns:
        Adapter → name of its file in the store, and the adapters whose moments were taken now.
    """
    inventory = request.inventory
    recipe = inventory.recipe.with_values({"scale": 1.0})
    asked = {k: v for k, v in recipe_json(recipe).items() if k not in ("adapters", "base_model", "heads")}
    weights = [entry.weight for entry in recipe.adapters]
    key = digest("sequential", asked, weights, [request.key(a) for a in inventory.adapters])
    names = {a.name: f"{a.name}-{key}.safetensors" for a in inventory.adapters}
    if all(_is_usable(store / name, key) for name in names.values()):
        return names, []
    mixture = base()
    passages = {
        a.name: [p for task in request.tasks_of(a.name) for p in encode_texts(mixture, request.texts[task], a.name)]
        for a in inventory.adapters
    }
    place = store / f".sequential-{key}"
    with writing(store, store), locked(place / "lock", "these moments are being taken", out=store):
        for _ in merge_layer_by_layer(
            replace(inventory, recipe=recipe),
            mixture,
            passages,
            {name: request.has_head(name) for name in names},
            tokens=request.spec.tokens,
            seed=request.spec.seed,
            workers=workers,
            progress=progress,
            parts=place,
        ):
            pass
        for adapter in inventory.adapters:
            files = (place / f"{layer}-{adapter.name}.safetensors" for layer in count())
            parts = [MomentsFile(file) for file in takewhile(Path.exists, files)]
            origins = [part.origin for part in parts if part.origin is not None]
            origin = MomentsOrigin(
                adapter=adapter.sha256(),
                base=request.base_digest,
                texts=request.text_digests(adapter.name),
                tokens=max([sum(p.tokens for p in passages[adapter.name]), *(o.tokens for o in origins)]),
                sampled=sum(o.sampled for o in origins),
                key=key,
                plait=__version__,
                sequential=True,
            )
            write_moments(store / names[adapter.name], {k: v for part in parts for k, v in part.read_all().items()}, origin)
        shutil.rmtree(place, ignore_errors=True)
    return names, list(names)


def load_base(request: CalibrationRequest, progress: Progress) -> Mixture:
    """Load the base with the adapters of a request.

    Raises:
        PlaitError: its processor does not take the texts, it cannot be loaded, or texts are longer than its context.
    """
    adapters, texts = request.inventory.adapters, request.texts.values()
    mixture = load_for_texts(request.base.folder, adapters, request.options, texts, progress)
    check_texts(mixture, request.texts)
    return mixture


def _is_usable(file: Path, key: str) -> bool:
    """Return whether a file holds the moments of a key, whole; a damaged one is announced, and made again."""
    if not file.is_file():
        return False
    try:
        moments = MomentsFile(file)
        if moments.origin is None or moments.origin.key != key:
            return False
        moments.check()
    except AdapterError as error:
        announce(f"{file} is made again: {error}")
        return False
    return True


def _described(request: CalibrationRequest, adapter: Adapter, file: Path, *, reused: bool) -> CalibratedAdapter:
    moments = MomentsFile(file)
    if moments.origin is None:
        raise AssertionError(f"{file} was written without its origin")
    return CalibratedAdapter(
        name=adapter.name,
        file=file.name,
        sha256=sha256(file),
        bytes=file.stat().st_size,
        modules=len(request.targets),
        stored=len(moments.entries),
        rows=sum(is_rows for _, is_rows in moments.entries.values()),
        sampled=moments.origin.sampled,
        tokens=moments.origin.tokens,
        reused=reused,
    )


def _record(request: CalibrationRequest, taken: tuple[CalibratedAdapter, ...], started: float) -> CalibrationRecord:
    plan = request.plan()
    notes = [
        f"{a.name}: of {a.tokens} tokens, evenly spread ones are used in {a.sampled} modules: {2 * request.spec.tokens}, "
        f"or {request.spec.tokens} where inputs are wider than that and are kept themselves."
        for a in taken
        if a.sampled
    ]
    if plan.left_out:
        notes.append(
            f"{len(plan.left_out)} target modules have no vectors as inputs, or none that can be collected, and were left out, "
            f"such as {plan.left_out[0]}."
        )
    return CalibrationRecord(
        plait=__version__,
        libraries=library_versions("transformers"),
        base=request.options.base or request.inventory.base_model or str(request.base.folder),
        base_digest=request.base_digest,
        dtype=request.options.dtype,
        settings=request.spec,
        texts=plan.texts,
        adapters=taken,
        notes=tuple(notes),
        seconds=round(time.perf_counter() - started, 2),
        finished=datetime.now().astimezone().isoformat(timespec="seconds"),
    )


@contextmanager
def _work(out: Path, *, force: bool) -> Iterator[Path]:
    """Hold the folder in which moments are collected; what is finished in it stays for the next run with this output."""
    work = calibrating_folder(Path(os.path.abspath(out)))  # noqa: PTH100 (resolve() would follow links)
    if work.is_symlink():
        raise OutputError(f"{work} is a link, and moments are collected there. Delete it, or choose another output.")
    with writing(out, work), locked(work / "lock", "these adapters are being calibrated", out=out):
        recover(out, force=force)
        place = work / "moments"
        place.mkdir(exist_ok=True)
        try:
            yield place
        except BaseException as error:
            if any(place.glob("*.safetensors")):
                error.add_note(f"The moments that are finished are kept in {work}; the same command takes the others.")
            raise
        finally:
            if not any(place.glob("*.safetensors")):  # published, or nothing was finished
                shutil.rmtree(work, ignore_errors=True)
