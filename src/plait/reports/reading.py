"""Files of runs → what a report shows. Independent of how it is drawn.

A run may come from elsewhere, so nothing is read on its word alone: adapters that it names are opened only where they are on
this machine with the very bytes that the run was made of, and no network is asked.
"""

from __future__ import annotations

import glob
import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from plait.adapters.adapter import Adapter
from plait.adapters.names import LayerKey, layer_key
from plait.errors import AdapterError, AddressError, PlaitError, PlanError, ReportError, collect
from plait.evaluation.comparison import Leaderboard
from plait.evaluation.record import Evaluation, SingleAdapter
from plait.evaluation.workspace import COMPARED
from plait.folders import file_in, file_name_problem
from plait.hub.download import folder_at_hand
from plait.inspection.comparison import AdapterComparison
from plait.inspection.compatibility import check_compatibility
from plait.inspection.report import inspect_adapters
from plait.merging.record import RunRecord
from plait.merging.weighting import module_weights, towers_of
from plait.parsing import open_bytes, read_record, read_text, shown
from plait.recipes.loading import build_recipe
from plait.recipes.schema import Recipe
from plait.records import Record
from plait.reports.losses import CURVES, LossCurve, LossCurves
from plait.results.lock import LOCK, RUN_RECORD, ResultKind, read_lock
from plait.results.progress import Progress
from plait.search.record import STUDY, StudyRecord
from plait.tensorfiles.formats import TENSOR_FORMATS
from plait.tuning.record import TUNING, TuneRecord

LEADERBOARD = "leaderboard.json"
RESULTS = "eval_results_*.json"


class LayerCoefficients(Record):
    """What each adapter is multiplied by, layer by layer.

    Attributes:
        adapters: names.
        layers: `tower.index`, in order.
        values: (layers, adapters): the mean over the layer's modules.
    """

    adapters: tuple[str, ...]
    layers: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]

    @property
    def constant(self) -> bool:
        """Whether they are the same in all layers."""
        return len(set(self.values)) == 1


class Report(Record):
    """Everything that one page shows.

    Attributes:
        evaluations: of merges, adapters or models; the first is the one that the verdict is about.
        comparison: a leaderboard of many merges.
        merges: run records of written merges, for the energy that they kept.
        tunings: records of tuned merges, for what they learned and kept.
        studies: records of searches.
        conflict: the conflict between the adapters; None where their files are not at hand.
        weights: per layer; None where they are not known.
        losses: how the adapters were trained, where that is known.
        kinds: of the results whose locks are shown.
        locks: file → text.
        notes: what could not be shown, and why.
    """

    evaluations: tuple[Evaluation, ...] = ()
    comparison: Leaderboard | None = None
    merges: tuple[RunRecord, ...] = ()
    tunings: tuple[TuneRecord, ...] = ()
    studies: tuple[StudyRecord, ...] = ()
    conflict: AdapterComparison | None = None
    weights: LayerCoefficients | None = None
    losses: tuple[LossCurve, ...] = ()
    kinds: tuple[ResultKind, ...] = ()
    locks: dict[str, str] = {}  # noqa: RUF012 (frozen)
    notes: tuple[str, ...] = ()


def read_report(paths: Sequence[Path], progress: Progress | None = None) -> Report:
    """Read runs.

    Args:
        paths: run folders and result files of evaluations (`eval_results_*.json`), leaderboards (`leaderboard.json`; what
            is behind their entries is found in the workspace), folders of written merges, loss curves
            (`loss_curves.json`), and studies of searches (`study.json`).
        progress: receives stages of the adapters' comparison, where their files are still at hand.

    Raises:
        ReportError: a path holds no run, or one of another version; all of them at once.
    """
    evaluations: list[Evaluation] = []
    comparisons: list[Leaderboard] = []
    merges: list[RunRecord] = []
    tunings: list[TuneRecord] = []
    studies: list[StudyRecord] = []
    losses: list[LossCurve] = []
    kinds: list[ResultKind] = []
    locks: dict[str, str] = {}
    problems: list[str] = []
    for path in paths:
        try:
            found = _files(path)
            for file in (f for f in found if f.name == LOCK):
                kinds.append(_kind_of(file, {f.name for f in found} if path.is_dir() else None))
                locks[str(file)] = read_text(file, ReportError)
            evaluations += [_read(Evaluation, f) for f in found if f.match(RESULTS)]
            boards = {f: _read(Leaderboard, f) for f in found if f.name == LEADERBOARD}
            comparisons += boards.values()
            for file, board in boards.items():
                evaluations += _places(file, board)
            merges += [_read(RunRecord, f) for f in found if f.name == RUN_RECORD and _is_merge(f.parent)]
            tunings += [_read(TuneRecord, f) for f in found if f.name == TUNING]
            studies += [_read(StudyRecord, f) for f in found if f.name == STUDY]
            losses += [curve for f in found if f.name == CURVES for curve in _read(LossCurves, f).curves]
        except (AdapterError, ReportError) as error:
            problems.append(str(error))
    once: dict[str, Evaluation] = {}
    for evaluation in evaluations:  # a place of a leaderboard may also be given by itself
        once.setdefault(evaluation.tag, evaluation)
    if len(comparisons) > 1:
        problems.append(f"{len(comparisons)} leaderboards; a page shows one")
    collect(ReportError, problems, "these runs cannot be reported")
    conflict, weights, notes = _adapters(tuple(once.values()), progress)
    learned = next((w for w in map(_learned, tunings) if w is not None), None)
    return Report(
        evaluations=tuple(once.values()),
        comparison=comparisons[0] if comparisons else None,
        merges=tuple(merges),
        tunings=tuple(tunings),
        studies=tuple(studies),
        conflict=conflict,
        weights=learned or weights,
        losses=tuple(losses),
        kinds=tuple(kinds),
        locks=locks,
        notes=tuple(notes),
    )


def _files(path: Path) -> list[Path]:
    if path.is_dir():
        named = [path / name for name in (LEADERBOARD, RUN_RECORD, TUNING, LOCK, CURVES, STUDY)]
        found = [*sorted(path.glob(RESULTS)), *(f for f in named if os.path.lexists(f))]
        if found == [path / RUN_RECORD]:  # evaluations leave one too; a merge's is next to its lock
            raise ReportError(f"{path}: holds {RUN_RECORD} and no {LOCK}: not a complete result. Make it again.")
        for file in found:
            try:
                file_in(path, file.name)
            except OSError as error:
                raise ReportError(f"{file}: {error}. A page shows only files inside the run's own folder.") from None
    else:
        found = [path] if path.match(RESULTS) or path.name in (LEADERBOARD, RUN_RECORD, TUNING, LOCK, CURVES, STUDY) else []
        found = [f for f in found if f.is_file()]
    if not found:
        what = "is not a file or folder" if not path.exists() else "holds no run"
        raise ReportError(
            f"{path}: {what}. Give a run folder of `plait eval` (it holds {RESULTS} or {LEADERBOARD}), or the "
            f"folder of a merge ({RUN_RECORD}) or of a search ({STUDY})."
        )
    return found


def _is_merge(folder: Path) -> bool:
    """Return whether the run record of a folder is that of a merge: a bake, an extraction and a tuning have others."""
    return (folder / LOCK).is_file() and read_lock(folder).kind == "merge"


def _kind_of(file: Path, others: set[str] | None) -> ResultKind:
    """Return what a lock is of; refuse one that is none, and that of a merge or a tuning whose record is gone.

    Args:
        file: the lock.
        others: names of what was found with it; None where the lock alone is given.

    Raises:
        AdapterError: it is not a lock.
        ReportError: there is no record of what was done.
    """
    kind = read_lock(file.parent).kind
    record = {"merge": RUN_RECORD, "tune": TUNING}.get(kind)
    if others is not None and record is not None and record not in others:
        raise ReportError(f"{file.parent}: there is no {record}, which says what was done. Make the result again.")
    return kind


def _places(file: Path, board: Leaderboard) -> list[Evaluation]:
    """Read the evaluations behind a leaderboard's entries, as far as the workspace that it is in still holds them."""
    places = file.absolute().parents  # of <workspace>/compared/<adapters>/run_<time>/leaderboard.json
    workspace = places[3] if len(places) > 3 and places[2].name == COMPARED else None
    found = []
    for place in board.places:
        name = f"eval_results_{place.tag}_{board.split}.json"
        if file_name_problem(name) or "/" in name:
            raise ReportError(f"{file}: {shown(place.tag)} cannot be the tag of results. Evaluate again.")
        if workspace is None:
            continue
        for result in sorted(workspace.glob(f"merged/*/*/eval/{board.split}/{glob.escape(name)}"))[:1]:
            try:
                file_in(workspace, result.relative_to(workspace).as_posix())
            except OSError as error:
                raise ReportError(f"{result}: {error}. A page shows only files inside the leaderboard's workspace.") from None
            found.append(_read(Evaluation, result).model_copy(update={"name": place.name}))
    return found


def _read(kind: type[Any], file: Path) -> Any:
    what = "a result that this version of plait wrote, nothing else"
    return read_record(kind, file, ReportError, what=what, advice="Evaluate again.")


def _adapters(
    evaluations: Sequence[Evaluation], progress: Progress | None
) -> tuple[AdapterComparison | None, LayerCoefficients | None, list[str]]:
    """Look at the adapters again, where they still are."""
    evaluation = next((e for e in evaluations if e.recipe is not None), None)
    if evaluation is None or evaluation.recipe is None:
        return None, None, []
    try:
        _check_places(evaluation.recipe)
        recipe = build_recipe(evaluation.recipe)
        sources = {s.name: s for s in evaluation.sources}
        adapters = [_open_known(entry.name, entry.path, sources.get(entry.name)) for entry in recipe.adapters]
        problems = check_compatibility(adapters, base_model=recipe.base_model).problems
        collect(PlanError, problems, "these adapters do not fit together")
    except (PlaitError, OSError) as error:  # a page without the picture is what was asked for, but for this
        head, *listed = str(error).splitlines()
        why = listed[0].strip(" -") if listed else head
        return None, None, [f"the conflict between the adapters is not shown: {why}"]
    weights = _weights(recipe, sorted({path for a in adapters for path in a.targets}))
    if len(adapters) < 2:
        return None, weights, []
    return inspect_adapters(adapters, base_model=recipe.base_model, progress=progress).comparison, weights, []


def _check_places(recipe: Mapping[str, Any]) -> None:
    """Refuse adapters that are named by a word: plait writes none, and what is looked up for one tells what is on this machine.

    Raises:
        AddressError: there is one.
    """
    entries = recipe.get("adapters")
    for entry in entries if isinstance(entries, list) else ():
        path = entry.get("path") if isinstance(entry, Mapping) else entry
        if isinstance(path, str) and "/" not in path and not path.startswith((".", "~")):
            raise AddressError(_not_at_hand(path))


def _open_known(name: str, path: str, source: SingleAdapter | None) -> Adapter:
    """Open an adapter that a run names, where this machine has it with the bytes that the run was made of.

    Whoever wrote the run may have named any folder. Nothing of it is shown, not even whether it is there, unless its tensors
    have the sha256 in the run: then their contents were known before.

    Raises:
        AddressError: it is not at hand.
        AdapterError: it cannot be read.
    """
    if source is not None:
        for text in dict.fromkeys((path, source.path)):
            folder = folder_at_hand(text, commit=source.commit)
            if folder is not None and _digest(folder) == source.sha256:
                return Adapter.open(folder, name)
    raise AddressError(f"adapter {name!r}: {_not_at_hand(path)}")


def _not_at_hand(path: str) -> str:
    return (
        f"{shown(path)} is not on this machine with the bytes that the run was made of. plait inspect compares adapters "
        "wherever they are."
    )


def _digest(folder: Path) -> str | None:
    """Return the sha256 of the file that an adapter's tensors are read from; None where there is none, or it cannot be read."""
    for kind in TENSOR_FORMATS:
        try:
            with open_bytes(folder / kind.adapter_name) as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except FileNotFoundError:
            continue
        except OSError:
            break
    return None


def _learned(record: TuneRecord) -> LayerCoefficients | None:
    """Return learned coefficients per layer: the mean over its modules where they are per module."""
    found = record.coefficients
    if found is None or not found.values:
        return None
    if found.granularity == "task":
        return LayerCoefficients(adapters=found.columns, layers=found.rows, values=found.values)
    rows: dict[str, list[tuple[float, ...]]] = {}
    for name, values in zip(found.rows, found.values, strict=True):
        rows.setdefault(name if found.granularity == "layer" else str(layer_key(name) or ""), []).append(values)
    means = [tuple(mean(column) for column in zip(*lines, strict=True)) for lines in rows.values()]
    order = sorted(range(len(rows)), key=lambda i: _depth(list(rows)[i]))
    names = list(rows)
    return LayerCoefficients(
        adapters=found.columns, layers=tuple(names[i] or "–" for i in order), values=tuple(means[i] for i in order)
    )


def _depth(layer: str) -> tuple[str, int]:
    tower, _, index = layer.rpartition(".")
    return (tower, int(index)) if index.isdigit() else ("\uffff", 0)


def _weights(recipe: Recipe, modules: Sequence[str]) -> LayerCoefficients | None:
    towers = towers_of(modules)
    rows: dict[LayerKey, list[list[float]]] = {}
    for module in sorted(modules):
        key = layer_key(module)
        if key is not None:
            rows.setdefault(key, []).append(module_weights(recipe, module, towers))
    values = [tuple(mean(column) for column in zip(*rows[key], strict=True)) for key in sorted(rows)]
    if not values:
        return None
    return LayerCoefficients(
        adapters=tuple(a.name for a in recipe.adapters), layers=tuple(map(str, sorted(rows))), values=tuple(values)
    )
