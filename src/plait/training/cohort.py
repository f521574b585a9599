"""A cohort: adapters of one base trained phase by phase, merged, and evaluated on every phase's task.

Everything is in one folder, and everything there under its name is complete:

    phases/NAME/adapter/    as PEFT loads it, with card and lock; next to it training.json and, while it trains, checkpoints
    recipe.yaml             of the merge, for `plait merge` and `plait eval` with other methods
    merged/                 the merge
    evaluation/             run folders and finished answers
    loss_curves.json, report.html, train.json
    earlier/, logs/         adapters of other settings; what libraries printed

A run that was killed continues: finished phases are found by their digest, begun ones start from their last checkpoint, answers
are asked for once.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

from plait.cluster.connection import check_address
from plait.errors import OutputError, RecipeError
from plait.evaluation.pipeline import EvaluateOptions
from plait.extras import require
from plait.hub.task_adapters import ADAPTER, PHASES
from plait.results.locking import locked
from plait.results.progress import Progress, SilentProgress, progress_of_part
from plait.results.records import read_earlier
from plait.results.writing import write_json_atomic
from plait.training.estimate import estimate
from plait.training.job import PACKAGES
from plait.training.phases import PlannedPhase, TrainingPlan
from plait.training.post_training import merge_and_report
from plait.training.preflight import ResolvedPhase, move_outdated, resolve_phases, with_folder_state
from plait.training.processes import run_in_processes
from plait.training.results import RESULT, PhaseResult, TrainResult
from plait.training.runners import PhaseStatus, run_sequentially
from plait.version import __version__

_MADE = ("recipe", "merged", "merge_key", "run", "report")
_IN_USE = ".in-use"
_PATIENCE = 10.0  # seconds that the processes of a killed run get to notice it
_SPARE = 100_000_000  # bytes besides adapters and checkpoints: merge, answers, logs


@dataclass(frozen=True)
class Scheduling:
    """Where phases run.

    Attributes:
        workers: phases at a time; None is one here, and as many as the cluster has capacity for.
        cluster: `ray`, or `ray://HOST:PORT`; None is this machine.
    """

    workers: int | None = None
    cluster: str | None = None


def train_cohort(
    plan: TrainingPlan,
    *,
    only: Sequence[str],
    scheduling: Scheduling,
    evaluation: EvaluateOptions,
    progress: Progress | None,
) -> TrainResult:
    """Train what is missing; when nothing is missing any more, merge, evaluate and report.

    A phase that fails does not keep the others from being trained; the result names which did.

    Args:
        plan: what is asked for.
        only: phases to train, and nothing more; all, and then the rest of the work, when empty.
        scheduling: where phases run.
        evaluation: how merge and adapters are evaluated.
        progress: receives stages and steps; those of phases as its parts.

    Raises:
        PlaitError: anything wrong with what was asked for, all of it before the first step; or merge or evaluation cannot be
            done, with all adapters finished and kept.
    """
    started = time.perf_counter()
    chosen = [plan.phase(name) for name in only] or list(plan.phases)
    check_scheduling(scheduling)
    if (plan.out / _IN_USE).exists():
        with _alone(plan.out):  # before anything is read: the workers of a run that was killed may need a moment to leave
            pass
    phases = resolve_phases(plan)
    with _alone(plan.out) as lock:
        before = read_earlier(TrainResult, plan.out / RESULT)
        notes = [*plan.notes, *move_outdated(plan, phases)]
        phases = tuple(with_folder_state(p) for p in phases)  # now that no other run can change what is there
        for phase in phases:
            if phase.record is not None:
                _remove_checkpoints(phase.phase.folder)  # killed after its last step, it could not do so itself
        missing = [p for p in phases if p.record is None and p.phase in chosen]
        _check_space(plan.out, missing, scheduling)
        ended = {o.name: o for o in _run([p.phase for p in missing], scheduling, progress, lock)}
        result = TrainResult(
            plait=__version__,
            source=plan.source,
            out=str(plan.out),
            base_model=plan.base,
            phases=tuple(_result(p, ended.get(p.phase.name)) for p in phases),
            notes=tuple(notes),
            seconds=0.0,
        )
        same = before is not None and [(p.name, p.digest) for p in before.phases] == [(p.name, p.digest) for p in result.phases]
        if same and all(p.state == "found" for p in result.phases):  # what the last run made of the very same adapters
            result = result.model_copy(update={name: getattr(before, name) for name in _MADE})
        _write(plan.out, result, started)
        if not only and all(r.state in ("done", "found") for r in result.phases):
            records = {p.phase.name: p.record or ended[p.phase.name].record for p in phases}
            known = {name: record for name, record in records.items() if record is not None}
            progress = progress or SilentProgress()
            result = merge_and_report(plan, result, known, before=before, evaluation=evaluation, progress=progress)
        return _write(plan.out, result, started)


def check_scheduling(scheduling: Scheduling) -> None:
    """Refuse numbers of phases, clusters and missing packages.

    Raises:
        PlaitError: phases cannot run so.
    """
    if scheduling.workers is not None and scheduling.workers < 1:
        raise RecipeError(f"--workers {scheduling.workers}: at least one phase must run at a time.")
    check_address(scheduling.cluster)
    require("plait train", {"train": PACKAGES, "ray": ["ray"] * (scheduling.cluster is not None)})


def _alone(out: Path) -> AbstractContextManager[int | None]:
    """Hold the output folder: one run at a time, its workers included; those of a run that was killed get a moment to leave."""
    return locked(out / _IN_USE, "phases are trained there", patience=_PATIENCE)


def _check_space(out: Path, missing: Sequence[ResolvedPhase], scheduling: Scheduling) -> None:
    """Refuse to begin what the disk cannot hold; all phases have the same parameters, and a finished one keeps no checkpoints.

    Raises:
        OutputError: it cannot.
        PlanError: PEFT finds no layer to adapt.
    """
    if not missing:
        return
    found = estimate(missing[0], out, examples=len(missing[0].opened.data.examples))
    together = min(len(missing), scheduling.workers or (1 if scheduling.cluster is None else len(missing)))
    if problem := found.problem(out, phases=len(missing), together=together, spare=_SPARE):
        raise OutputError(problem)


def _run(
    phases: Sequence[PlannedPhase], scheduling: Scheduling, progress: Progress | None, lock: int | None
) -> Iterator[PhaseStatus]:
    if not phases:
        return
    ended: Iterator[PhaseStatus]
    parts = {p.name: progress_of_part(progress, p.name) for p in phases}
    devices, workers = _devices(), scheduling.workers or 1
    if scheduling.cluster is not None:
        from plait.training.on_cluster import run_on_cluster

        ended = run_on_cluster(phases, parts, address=scheduling.cluster, workers=scheduling.workers)
    elif workers > 1 or len(devices) > 1:  # a trainer that sees several GPUs would take them all, for larger batches
        ended = run_in_processes(phases, parts, workers=workers, lock=lock, devices=devices)
    else:
        ended = run_sequentially(phases, parts)
    folders = {p.name: p.folder for p in phases}
    for status in ended:
        if status.record is not None:
            _remove_checkpoints(folders[status.name])
        parts[status.name].start("failed" if status.record is None else "done", 0)
        parts[status.name].finish()
        yield status


def _remove_checkpoints(folder: Path) -> None:
    """Remove what only a run that is not finished needs."""
    for checkpoint in folder.glob("checkpoint-*"):
        shutil.rmtree(checkpoint, ignore_errors=True)
    (folder / "README.md").unlink(missing_ok=True)  # the trainer's card of its checkpoints; the adapter has its own


def _devices() -> list[str]:
    """Return the GPUs that may be used, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    count = torch.cuda.device_count()
    named = [word.strip() for word in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if word.strip()]
    return named[:count] if named else [str(i) for i in range(count)]


def _result(phase: ResolvedPhase, status: PhaseStatus | None) -> PhaseResult:
    name, digest = phase.phase.name, phase.opened.digest
    adapter = f"{PHASES}/{name}/{ADAPTER}"
    if phase.record is not None:
        return PhaseResult.of(name, "found", phase.record, adapter)
    if status is None:
        return PhaseResult(name=name, state="waiting", digest=digest)
    if status.record is None:
        return PhaseResult(name=name, state="failed", digest=digest, error=status.error)
    return PhaseResult.of(name, "done", status.record, adapter)


def _write(out: Path, result: TrainResult, started: float) -> TrainResult:
    timed = result.model_copy(update={"seconds": round(time.perf_counter() - started, 3)})
    write_json_atomic(out / RESULT, timed.model_dump(mode="json", exclude={"evaluation"}))
    return timed
