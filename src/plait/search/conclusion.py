"""The best of all candidates: chosen on one split, asked once on another, and written down with what it was chosen among."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from plait.evaluation.card import put_results
from plait.evaluation.pipeline import Evaluator
from plait.evaluation.record import Evaluation
from plait.evaluation.recovery import BootstrapDraws, central_interval, mean_and_worst
from plait.evaluation.workspace import link_study, write_evaluation
from plait.libraries.optuna import without_password
from plait.merging.pipeline import run_recipe
from plait.recipes.schema import Recipe
from plait.recipes.writing import recipe_json, to_yaml
from plait.records import ShortRepr
from plait.results.older_keys import study_with_older_keys
from plait.results.writing import write_json_atomic, write_text_atomic
from plait.search.record import STUDY, Difference, Final, Run, StudyRecord
from plait.search.request import RECIPE, Sweep
from plait.search.selection import front, ranked
from plait.search.study import Study
from plait.version import __version__
from plait.views import Viewed


@dataclass(frozen=True, repr=False)
class SweepResult(Viewed, ShortRepr):
    """A search that has ended.

    Attributes:
        folder: of the study: `study.json`, `recipe.yaml` (the best), `study.db`.
        recipe: the best.
        record: what `study.json` holds.
        evaluation: of the best, on the split that nothing was chosen on; None where candidates were compared on `test`.
        merged: where the merge of the best was written; None where it was not.
    """

    folder: Path
    recipe: Recipe
    record: StudyRecord
    evaluation: Evaluation | None
    merged: Path | None = None


def conclude(sweep: Sweep, study: Study, start: Run, reason: str | None) -> SweepResult:
    """Choose the best of all candidates, ask it once on the other split, and write everything down; in the end its merge.

    Args:
        sweep: what was asked for.
        study: its candidates.
        start: the recipe as it was given.
        reason: why the search ended before its budget; None where it did not.

    Raises:
        OutputError: the record or the merge cannot be written.
    """
    finished = study.finished()
    runs = [f.run() for f in finished if f.outcome.repeats is None]
    if all(run.phase != "start" for run in runs):
        runs.insert(0, start)
    order = ranked(runs, sweep.spec)
    best, second = runs[order[0]], runs[order[1]] if len(order) > 1 else None
    recipe = sweep.recipe_of(best)
    evaluation, final = None, None
    if sweep.final is not None:
        others = {
            "start": start if best.phase != "start" else None,
            "second": second if second is not None and second.phase != "start" else None,
        }
        evaluation, final = _asked_once(sweep, sweep.final, best, others)
    asked = [run for run in runs if run.phase in ("start", "point", "search") and run.score is not None]
    record = StudyRecord(
        plait=__version__,
        study=sweep.name,
        setting=sweep.setting,
        storage=None if sweep.options.storage is None else without_password(sweep.options.storage),
        adapters=tuple(entry.name for entry in sweep.recipe.adapters),
        base_model=sweep.evaluator.base,
        method=sweep.recipe.method_name,
        merge_mode=sweep.recipe.merge_mode,
        recipe=recipe_json(sweep.placed(sweep.recipe)),
        eval_tasks=tuple(entry.task.name for entry in sweep.evaluator.tasks),
        split=sweep.spec.split,
        eval_subset=None if sweep.spec.subset is None else sweep.spec.subset.model_dump(mode="json"),
        selected_on_test=sweep.final is None,
        search=sweep.spec.model_dump(mode="json", exclude_unset=True),
        grid={p.path: list(p.choices.values()) for p in sweep.space.parameters if p.kind == "categorical"},
        parallel=study.parallel,
        maximize=sweep.spec.maximize,
        constraint_nonnegative=sweep.spec.constraint_nonnegative,
        early_stopped=reason is not None,
        early_stop_reason=reason,
        candidates=len(asked),
        failed=sum(f.outcome.error is not None for f in finished),
        repeated=sum(f.outcome.repeats is not None for f in finished),
        examples_asked=sum(run.examples for run in asked),
        examples_of_all=len(asked) * sweep.judge.total,
        runs=tuple(runs),
        best_index=order[0],
        best_score=best.score or 0.0,
        second_index=order[1] if len(order) > 1 else None,
        front=tuple(front(runs, sweep.spec)),
        importance=study.importance(),
        post_sweep_eval=final,
        notes=tuple(_notes(sweep, evaluation, best, asked)),
        timestamp=datetime.now().astimezone().isoformat(timespec="seconds"),
        seconds=round(sum(run.seconds for run in runs), 3),
    )
    write_text_atomic(sweep.out / RECIPE, to_yaml(sweep.placed(recipe)))
    write_json_atomic(sweep.out / STUDY, study_with_older_keys(record.model_dump(mode="json")))
    link_study(sweep.options.workspace, record.method, record.adapters, record.study, sweep.out / STUDY)
    merged = _write_merged(sweep, recipe, evaluation) if sweep.saves else None
    return SweepResult(sweep.out, recipe, record, evaluation, merged)


def _write_merged(sweep: Sweep, recipe: Recipe, evaluation: Evaluation | None) -> Path:
    """Write the merge of the best, with its results in the card: what `plait merge` makes of the study's `recipe.yaml`."""
    made = run_recipe(
        sweep.placed(recipe), out=sweep.merged, force=True, workers=sweep.options.workers, progress=sweep.progress
    )
    if evaluation is not None:
        put_results(made.folder, evaluation)
    return made.folder


def _asked_once(sweep: Sweep, final: Evaluator, best: Run, others: Mapping[str, Run | None]) -> tuple[Evaluation, Final]:
    """Evaluate the best on the other split, and how much better it is there than others, on the same examples."""
    subject = sweep.final_subject(final, best, "best")
    compared = [(name, run, sweep.final_subject(final, run, name)) for name, run in others.items() if run is not None]
    final.prepare([subject, *(other for _, _, other in compared)])
    evaluation = final.evaluate(subject)
    mine = final.draws(subject)
    differences = []
    for name, run, other in compared:
        found = final.evaluate(other)
        differences.append(_difference(name, run, evaluation, found, mine, final.draws(other)))
    place = write_evaluation(sweep.options.workspace, evaluation)
    return evaluation, Final(
        split=evaluation.split,
        worst_recovery=evaluation.worst_recovery,
        worst_interval=evaluation.worst_interval,
        worst_task=evaluation.worst_task,
        mean_recovery=evaluation.mean_recovery,
        mean_interval=evaluation.mean_interval,
        recovery={t.task: t.recovery for t in evaluation.tasks},
        differences=tuple(differences),
        run=str(place),
    )


def _notes(sweep: Sweep, evaluation: Evaluation | None, best: Run, asked: Sequence[Run]) -> list[str]:
    notes = list(sweep.evaluator.notes)
    if sweep.final is None:
        notes.append(
            "candidates were compared on the split 'test': the best score is the largest of "
            f"{len(asked)}, and not what the merge will keep on other examples."
        )
    if evaluation is not None and evaluation.undefined:
        notes.append(
            f"no recovery on {evaluation.split!r} of {', '.join(evaluation.undefined)}: the own adapter is not better than the "
            "base there; worst and mean are of the other tasks."
        )
    if not best.nonnegative:
        notes.append("no candidate is at least as good as the base model on every task.")
    if best.phase == "start":
        notes.append("no candidate was better than the recipe that the search started from.")
    return notes


def _difference(
    name: str,
    run: Run,
    best: Evaluation,
    other: Evaluation,
    mine: Mapping[str, BootstrapDraws],
    theirs: Mapping[str, BootstrapDraws],
) -> Difference:
    means, worsts = zip(*(mean_and_worst({t: d.recovery for t, d in drawn.items()}) for drawn in (mine, theirs)), strict=True)
    mean, worst = (
        None if a is None or b is None else a - b
        for a, b in ((best.mean_recovery, other.mean_recovery), (best.worst_recovery, other.worst_recovery))
    )
    return Difference(
        than="start" if name == "start" else "second",
        params=run.params,
        worst=worst,
        worst_interval=None if worst is None else central_interval(worsts[0] - worsts[1], worst),
        mean=mean,
        mean_interval=None if mean is None else central_interval(means[0] - means[1], mean),
    )
