"""A plan with everything at hand that training needs: data read, arguments understood, what earlier runs left found.

All that can be wrong before a model is loaded is found here, in all phases, and said at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from plait.errors import OutputError, PlaitError
from plait.extras import optional, require
from plait.hub.download import resolve_model
from plait.libraries.transformers import silence
from plait.parsing import read_object
from plait.tasks.examples import read_examples
from plait.training.causal import encoder_of, model_config
from plait.training.classification import settings_of, tokenizer_of
from plait.training.folder import RECORD, JobFolder, folder_problem, last_checkpoint, named_checkpoint
from plait.training.job import PACKAGES, ResolvedJob, TrainingJob, TrainingRecord, resolve_job
from plait.training.output import EARLIER, check_output
from plait.training.phases import PlannedPhase, TrainingPlan
from plait.training.settings import trainer_settings


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
    record: TrainingRecord | None
    checkpoint: int | None


def resolve_phases(plan: TrainingPlan) -> tuple[ResolvedPhase, ...]:
    """Read every phase's data, and look at what stands in its folder.

    Raises:
        MissingPackageError: a package is not installed that training needs, or what comes after hours of it.
        AddressError: the base model cannot be found.
        RecipeError: data or arguments cannot be used; of all phases, with their lines.
        OutputError: the output folder, or a phase's, holds what no run of plait wrote.
    """
    require("plait train", {"train": PACKAGES})
    check_output(plan.out)
    resolve_model(plan.base)
    opened: list[ResolvedPhase] = []
    problems: list[tuple[int, str, str]] = []
    for index, phase in enumerate(plan.phases):
        try:
            job = resolve_job(phase.job)
            _judged(plan, phase)
        except PlaitError as error:
            problems.append((index, "data", str(error)))
            continue
        try:
            opened.append(_opened(phase, job))
        except OutputError:
            raise
        except PlaitError as error:
            problems.append((index, "arguments", str(error)))
    plan.refuse(problems)
    return tuple(opened)


def set_aside(plan: TrainingPlan, phases: Sequence[ResolvedPhase]) -> list[str]:
    """Move finished adapters of other settings out of the way, and back where these settings made them; tell which.

    They go to `earlier/NAME-DIGEST`: hours of training are not thrown away because a line of the file changed.
    """
    notes = []
    for phase in phases:
        folder, digest = phase.phase.folder, phase.opened.digest
        standing = _digest(folder)
        if standing is not None and standing != digest:
            away = plan.out / EARLIER / f"{folder.name}-{standing[:12]}"
            _move(folder, away)
            notes.append(f"{folder.name}: an adapter of other settings stood there; it is in {EARLIER}/{away.name} now.")
        kept = plan.out / EARLIER / f"{folder.name}-{digest[:12]}"
        if kept.is_dir() and _digest(folder) is None:
            _move(kept, folder)
            notes.append(f"{folder.name}: these settings had been trained before; the adapter is taken back from {EARLIER}/.")
    return notes


def _move(source: Path, target: Path) -> None:
    shutil.rmtree(target, ignore_errors=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    source.rename(target)


def _digest(folder: Path) -> str | None:
    try:
        digest = read_object(folder / RECORD, OutputError).get("digest")
    except OutputError:
        return None
    return digest if isinstance(digest, str) else None


def _judged(plan: TrainingPlan, phase: PlannedPhase) -> None:
    """Render what the phase is judged by: a column that is missing there must not be found after training."""
    if phase.task is not None:
        read_examples(phase.task, plan.recipe.eval.split)


def _opened(phase: PlannedPhase, job: ResolvedJob) -> ResolvedPhase:
    problem = folder_problem(phase.folder, job, force=True)
    if problem:
        raise OutputError(problem)
    found = look(ResolvedPhase(phase, job, _settings(job.job, phase.folder), None, None))
    if found.record is None:
        named_checkpoint(found.settings.resume_from_checkpoint)
        _try_tokenizer(found)
    return found


def _try_tokenizer(phase: ResolvedPhase) -> None:
    """Read the first example as training will: a template that is missing, or refuses it, must not be found hours later."""
    with silence():
        if phase.opened.job.kind == "causal":
            model_config(phase.opened.job.model)
            encoder_of(phase.opened, phase.settings).encode(phase.opened.data.examples[0])
        else:
            tokenizer_of(phase.opened)


def look(phase: ResolvedPhase) -> ResolvedPhase:
    """Return a phase with what stands in its folder now."""
    folder, job = phase.phase.folder, phase.opened
    record = JobFolder(folder, job).finished()
    checkpoint = last_checkpoint(folder) if record is None and _same_job(folder, job) else None
    return replace(phase, record=record, checkpoint=None if checkpoint is None else int(checkpoint.name.rpartition("-")[2]))


def _same_job(folder: Path, job: ResolvedJob) -> bool:
    return folder.is_dir() and folder_problem(folder, job, force=False) is None


def _settings(job: TrainingJob, folder: Path) -> Any:
    if job.kind == "causal":
        return trainer_settings(optional("trl", "train", "training").SFTConfig, job, folder)
    return settings_of(job, folder)
