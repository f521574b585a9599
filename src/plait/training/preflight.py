"""A plan with everything at hand that training needs: data read, arguments understood, what earlier runs left found.

All that can be wrong before a model is loaded is found here, in all phases, and raised at once.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from plait.errors import OutputError, PlaitError, collect
from plait.extras import optional, require
from plait.hub.download import resolve_model
from plait.libraries.transformers import silence
from plait.parsing import read_object
from plait.tasks.examples import read_examples
from plait.training.causal import encoder_of, model_config
from plait.training.classification import settings_of, tokenizer_of
from plait.training.folder import TRAINING_RECORD, JobFolder, folder_problem, last_checkpoint, named_checkpoint
from plait.training.job import PACKAGES, ResolvedJob, TrainingJob, TrainingRecord, resolve_job
from plait.training.output import EARLIER, check_output
from plait.training.phases import PlannedPhase, TrainingPlan
from plait.training.settings import trainer_settings

T = TypeVar("T")


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
    """Read every phase's data, and look at what is in its folder.

    Raises:
        MissingPackageError: a package is not installed that training needs, or what comes after hours of it.
        AddressError: the base model cannot be found.
        RecipeError: data or arguments cannot be used; of all phases, with their lines.
        OutputError: the output folder, or a phase's, holds what no run of plait wrote.
    """
    require("plait train", {"train": PACKAGES})
    check_output(plan.out)
    resolve_model(plan.base)
    resolved: list[ResolvedPhase] = []
    problems: list[tuple[int, str, str]] = []
    occupied: list[str] = []
    for index, phase in enumerate(plan.phases):
        found, errors = resolve_phase(phase, force=True, also=partial(_read_eval_rows, plan, phase))
        occupied += [text for key, text in errors if key == "folder"]
        problems += [(index, key, text) for key, text in errors if key != "folder"]
        if found is None:
            continue
        resolved.append(found)
        if found.record is None and not errors:
            try:
                _try_tokenizer(found)
            except PlaitError as error:
                problems.append((index, "arguments", str(error)))
    collect(OutputError, occupied, f"{plan.out} cannot take this run")
    plan.refuse(problems)
    return tuple(resolved)


def resolve_phase(
    phase: PlannedPhase, *, force: bool, also: Callable[[ResolvedJob], object] | None = None
) -> tuple[ResolvedPhase | None, list[tuple[str, str]]]:
    """Find everything that can be known of a phase before its model is loaded: the one way of a cohort and of a single run.

    Args:
        phase: as planned.
        force: give up what another job left in its folder.
        also: looks at the job with its inputs at hand, and may raise an error of plait.

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
    settings = step("arguments", lambda: _settings(phase.job, phase.folder))
    if also is not None and opened is not None:
        step("data", lambda: also(opened))
    if problem := folder_problem(phase.folder, opened, force=force):
        problems.append(("folder", problem))
    if opened is None or settings is None:
        return None, problems
    found = with_folder_state(ResolvedPhase(phase, opened, settings, None, None))
    if found.record is None:
        step("arguments", lambda: named_checkpoint(settings.resume_from_checkpoint))
    return found, problems


def move_outdated(plan: TrainingPlan, phases: Sequence[ResolvedPhase]) -> list[str]:
    """Move finished adapters of other settings out of the way, and back where these settings made them; return notes of it.

    They go to `earlier/NAME-DIGEST`: hours of training are not thrown away because a line of the file changed.
    """
    notes = []
    for phase in phases:
        folder, digest = phase.phase.folder, phase.opened.digest
        standing = _digest(folder)
        if standing is not None and standing != digest:
            away = plan.out / EARLIER / f"{folder.name}-{standing[:12]}"
            _move(folder, away)
            notes.append(f"{folder.name}: an adapter of other settings was there; it is now in {EARLIER}/{away.name}.")
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
        digest = read_object(folder / TRAINING_RECORD, OutputError).get("digest")
    except OutputError:
        return None
    return digest if isinstance(digest, str) else None


def _read_eval_rows(plan: TrainingPlan, phase: PlannedPhase, _: ResolvedJob) -> None:
    """Render what the phase is evaluated on: a column that is missing there must not be found after training."""
    if phase.task is not None:
        read_examples(phase.task, plan.recipe.eval.split)


def _try_tokenizer(phase: ResolvedPhase) -> None:
    """Read the first example as training will: a template that is missing, or refuses it, must not be found hours later."""
    with silence():
        if phase.opened.job.kind == "causal":
            model_config(phase.opened.job.model)
            encoder_of(phase.opened, phase.settings).encode(phase.opened.data.examples[0])
        else:
            tokenizer_of(phase.opened)


def with_folder_state(phase: ResolvedPhase) -> ResolvedPhase:
    """Return a phase with what is in its folder now."""
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
