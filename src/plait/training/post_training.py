"""Finished adapters → merge, evaluation on every phase's task, report. What an earlier run did of that is not done again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from plait.evaluation.candidates import merge_key
from plait.evaluation.card import put_results
from plait.evaluation.pipeline import EvaluateOptions, recipe_evaluator
from plait.evaluation.record import Evaluation
from plait.evaluation.request import recipe_name
from plait.evaluation.workspace import write_evaluation
from plait.merging.inventory import take_inventory
from plait.merging.pipeline import run_recipe
from plait.recipes.writing import to_yaml
from plait.reports.losses import CURVES, LossCurve, LossCurves
from plait.reports.pipeline import make_report
from plait.results.checks import is_complete
from plait.results.progress import Progress
from plait.results.records import read_earlier
from plait.results.writing import write_json_atomic, write_text_atomic
from plait.training.job import TrainingRecord
from plait.training.phases import TrainingPlan
from plait.training.results import TrainResult

RECIPE, MERGED, EVALUATION, REPORT = "recipe.yaml", "merged", "evaluation", "report.html"


def merge_and_report(
    plan: TrainingPlan,
    result: TrainResult,
    records: Mapping[str, TrainingRecord],
    *,
    before: TrainResult | None,
    evaluation: EvaluateOptions,
    progress: Progress,
) -> TrainResult:
    """Merge, evaluate and report.

    Args:
        plan: whose adapters are all finished.
        result: what is known so far.
        records: of the trainings.
        before: what the last run in the same folder wrote.
        evaluation: how, besides what the plan says; the workspace is the plan's own.
        progress: receives stages and steps.

    Returns:
        The result with what was made.

    Raises:
        PlaitError: the merge cannot be done, or evaluated; the adapters are kept.
    """
    # adapters' paths start at the recipe's own folder
    here = [e.model_copy(update={"path": f"./{Path(e.path).relative_to(plan.out).as_posix()}"}) for e in plan.recipe.adapters]
    write_text_atomic(plan.out / RECIPE, to_yaml(plan.recipe.model_copy(update={"adapters": tuple(here)})))
    curves = tuple(
        LossCurve(name=name, steps=r.steps, tokens=r.tokens, seconds=r.seconds, points=r.losses, held_out=r.eval_losses)
        for name, r in records.items()
    )
    write_json_atomic(plan.out / CURVES, LossCurves(curves=curves).model_dump(mode="json"))
    merged = plan.out / MERGED
    key = merge_key(take_inventory(plan.recipe))
    if before is None or before.merge_key != key or not is_complete(merged):
        run_recipe(plan.recipe, out=merged, force=True, progress=progress)
    runs = [merged, plan.out / CURVES]
    result = result.model_copy(update={"recipe": RECIPE, "merged": MERGED, "merge_key": key})
    if plan.recipe.tasks:
        found, run = _evaluate(plan, before, evaluation, progress)
        put_results(merged, found)
        runs.insert(0, run)
        result = result.model_copy(update={"evaluation": found, "run": run.relative_to(plan.out).as_posix()})
    make_report(runs, out=plan.out / REPORT, force=True, progress=progress)
    return result.model_copy(update={"report": REPORT})


def _evaluate(
    plan: TrainingPlan, before: TrainResult | None, evaluation: EvaluateOptions, progress: Progress
) -> tuple[Evaluation, Path]:
    """Evaluate on every phase's task; a run folder that holds the same already is the run's."""
    options = replace(evaluation, workspace=plan.out / EVALUATION)
    evaluator, inventory = recipe_evaluator(plan.recipe, None, options, progress)
    found = evaluator.evaluate(evaluator.merge(inventory, recipe_name(plan.recipe)))
    if before is not None and before.run is not None:
        file = plan.out / before.run / f"eval_results_{found.split}.json"
        earlier = read_earlier(Evaluation, file)
        if earlier is not None and (earlier.tag, earlier.matrix, earlier.tasks) == (found.tag, found.matrix, found.tasks):
            return earlier, file.parent
    return found, write_evaluation(plan.out / EVALUATION, found)
