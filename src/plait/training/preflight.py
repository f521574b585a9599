"""A plan with everything at hand that training needs: data read, arguments understood, what earlier runs left found.

All that can be wrong before a model is loaded is found here, in all phases, and raised at once.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, partial
from pathlib import Path
from typing import Any, TypeVar

from plait.errors import OutputError, PlaitError, collect
from plait.extras import require
from plait.hub.download import resolve_model
from plait.hub.task_adapters import PHASES
from plait.libraries.transformers.quiet import silence
from plait.parsing import read_object
from plait.reports.losses import CURVES
from plait.reports.pipeline import page_problem
from plait.results.staging import kind_problem, output_problem, place_problem
from plait.tasks.examples import read_examples
from plait.training.encoding import EncodedSplits
from plait.training.folder import TRAINING_RECORD, finished, folder_problem, last_checkpoint, named_checkpoint
from plait.training.job import PACKAGES, ResolvedJob, TrainingRecord, resolve_job
from plait.training.kinds import KINDS
from plait.training.phases import LOGS, PlannedPhase, TrainingPlan
from plait.training.post_training import EVALUATION, MERGED, RECIPE, REPORT
from plait.training.results import RESULT

T = TypeVar("T")
EARLIER = "earlier"
_FOLDERS, _FILES = (PHASES, EVALUATION, EARLIER, LOGS), (RESULT, RECIPE, CURVES, REPORT)


@dataclass(frozen=True)
class ResolvedPhase:
    """A phase that can be trained.

    Attributes:
        phase: as planned.
        opened: its job with data and base.
        settings: `SFTConfig` or `TrainingArguments`.
        record: of an earlier run that finished it; None when there is something to do.
        checkpoint: step where an earlier run stopped; None for a beginning.
    """

    phase: PlannedPhase
    opened: ResolvedJob
    settings: Any
    record: TrainingRecord | None = None
    checkpoint: int | None = None

    @cached_property
    def encoded(self) -> EncodedSplits:
        """The examples, and those that the loss is also measured on, as tokens; taken once.

        Raises:
            PlaitError: an example cannot be encoded, or none is left.
        """
        return KINDS[self.opened.job.kind].encode_data(self.opened, self.settings)


def resolve_phases(plan: TrainingPlan) -> tuple[ResolvedPhase, ...]:
    """Read every phase's data, and look at what is in its folder.

    Raises:
        MissingPackageError: a package is not installed that training needs, or what comes after hours of it.
        AddressError: the base model cannot be found.
        RecipeError: data or arguments cannot be used; of all phases, with their lines.
        OutputError: the output folder, or a phase's, holds what no run of plait wrote.
    """
    require("plait train", {"train": PACKAGES})
    check_output(plan.out)
    with plan.origins.at("base_model"):
        base = resolve_model(plan.base)
    if plan.out.exists() and plan.out.samefile(base.folder):
        raise OutputError(f"{plan.out} is the base model's folder. Choose another output folder.")
    resolved: list[ResolvedPhase] = []
    problems: list[tuple[int, str, str]] = []
    occupied: list[str] = []
    for index, phase in enumerate(plan.phases):
        # a column that is missing in what the phase is evaluated on must not be found after training
        evaluated = None if phase.task is None else cache(partial(read_examples, phase.task, plan.recipe.eval.split))
        found, errors = resolve_phase(phase, force=True, also=evaluated)
        occupied += [text for key, text in errors if key == "folder"]
        problems += [(index, key, text) for key, text in errors if key != "folder"]
        if found is None:
            continue
        resolved.append(found)
        if found.record is None and not errors:
            try:
                with silence():
                    asked = None if evaluated is None else evaluated()
                    KINDS[phase.job.kind].check_first(found.opened, found.settings, asked)
            except PlaitError as error:
                problems.append((index, "arguments", str(error)))
    collect(OutputError, occupied, f"{plan.out} cannot take this run")
    plan.refuse(problems)
    return tuple(resolved)


def resolve_phase(
    phase: PlannedPhase, *, force: bool, also: Callable[[], object] | None = None
) -> tuple[ResolvedPhase | None, list[tuple[str, str]]]:
    """Find everything that can be known of a phase before its model is loaded: the one way of a cohort and of a single run.

    Args:
        phase: as planned.
        force: give up what another job left in its folder.
        also: looks at what else the phase needs, once its data and base are found, and may raise an error of plait.

    Returns:
        The phase, None where it cannot be trained; and all that is wrong: (`data`, `arguments` or `folder`, what).
    """
    problems: list[tuple[str, str]] = []

    def step(key: str, action: Callable[[], T]) -> T | None:
        try:
            return action()
        except PlaitError as error:
            problems.append((key, str(error)))
            return None

    opened = step("data", lambda: resolve_job(phase.job))
    settings = step("arguments", lambda: KINDS[phase.job.kind].settings_of(phase.job, phase.folder))
    if also is not None and opened is not None:
        step("data", also)
    if problem := folder_problem(phase.folder, opened, force=force):
        problems.append(("folder", problem))
    if opened is None or settings is None:
        return None, problems
    found = with_folder_state(ResolvedPhase(phase, opened, settings))
    if found.record is None:
        step("arguments", lambda: named_checkpoint(settings.resume_from_checkpoint))
    return found, problems


def move_outdated(plan: TrainingPlan, phases: Sequence[ResolvedPhase]) -> list[str]:
    """Move finished adapters of other settings out of the way, and back where these settings made them; return notes of it.

    They go to `earlier/NAME-DIGEST`: hours of training are not thrown away because a line of the file changed.

    Raises:
        OutputError: one would take the place of an adapter whose record cannot be read.
    """
    notes = []
    for phase in phases:
        folder, digest = phase.phase.folder, phase.opened.digest
        present = _digest(folder)
        if present is not None and present != digest:
            away = plan.out / EARLIER / f"{folder.name}-{present[:12]}"
            _move(folder, away)
            notes.append(f"{folder.name}: an adapter with other settings was there; it was moved to {EARLIER}/{away.name}.")
        kept = plan.out / EARLIER / f"{folder.name}-{digest[:12]}"
        if kept.is_dir() and _digest(folder) is None:
            if os.path.lexists(folder / TRAINING_RECORD):
                raise OutputError(
                    f"{folder / TRAINING_RECORD} cannot be read, and {kept} holds an adapter of these settings: which one is "
                    "wanted is not known. Move one of the two folders away."
                )
            _move(kept, folder)
            notes.append(f"{folder.name}: these settings had been trained before; the adapter was restored from {EARLIER}/.")
    return notes


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _digest(folder: Path) -> str | None:
    try:
        digest = read_object(folder / TRAINING_RECORD, OutputError).get("digest")
    except OutputError:
        return None
    return digest if isinstance(digest, str) else None


def with_folder_state(phase: ResolvedPhase) -> ResolvedPhase:
    """Return a phase with what is in its folder now."""
    folder, job = phase.phase.folder, phase.opened
    record = finished(folder, job)
    same = record is None and folder.is_dir() and folder_problem(folder, job, force=False) is None
    checkpoint = last_checkpoint(folder) if same else None
    return replace(phase, record=record, checkpoint=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))


def check_output(out: Path) -> None:
    """Make sure that everything which comes after hours of training can be written.

    Raises:
        OutputError: something is in the way; all of it.
    """
    try:
        problems = [f"{path} {what}" for path, what in _in_the_way(out)]
    except OSError as error:
        problems = [f"{out} cannot be read: {error.strerror or error}."]
    collect(OutputError, problems, f"{out} cannot take this run; move what is in the way, or choose another output folder")


def _in_the_way(out: Path) -> Iterator[tuple[Path, str]]:
    if problem := place_problem(out):
        yield out, problem.removeprefix(f"{out} ")
        return
    if not out.is_dir() and (problem := kind_problem(out, "output folder")):
        yield out, problem.removeprefix(f"{out} ")
        return
    for path in (out / name for name in _FOLDERS):
        if path.exists() and not path.is_dir():
            yield path, "is a file; a folder of results has that name. Move it away, or choose another output folder."
    try:
        ours = "phases" in read_object(out / RESULT, OutputError)  # of whatever version
    except OutputError:
        ours = False
    for path in (out / name for name in _FILES):
        if path.is_dir():
            yield path, "is a folder; a file of results has that name. Move it away, or choose another output folder."
        elif path.exists() and not ours:
            yield path, "was not written by plait train, and would be replaced. Move it away, or choose another output folder."
        elif path.name == REPORT and page_problem(path, force=True):
            yield path, "was not written by plait report, and would be replaced. Move it away, or choose another output folder."
    if problem := output_problem(out / MERGED, force=True):
        reason = problem.removeprefix(f"{out / MERGED} ")
        yield out / MERGED, f"{reason} The merge goes there. Move it away, or choose another output folder."
