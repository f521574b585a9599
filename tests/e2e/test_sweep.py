"""`plait sweep` on a small model: what it finds, what it does not ask twice, and what it refuses."""

from __future__ import annotations

import contextlib
import gc
import json
import os
import shutil
import sqlite3
import warnings
from pathlib import Path
from typing import Any
from weakref import WeakSet

import optuna
import pytest
from optuna.exceptions import StorageInternalError

import plait
from plait.adapters.adapter import Adapter
from plait.errors import OutputError, PlanError, RecipeError, TaskError
from plait.mixture import Mixture
from plait.mixture.placing import PlacedMerge
from plait.notices import PlaitWarning
from plait.search.conclusion import SweepResult
from plait.search.record import read_study
from tests.command_line import exit_code
from tests.every import begin_anew
from tests.language_models import train_adapter
from tests.searched import RANDOM, sweep, tried, write_tasks

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("sweep")]


def test_finds_the_best_of_a_grid_and_asks_it_once_on_other_examples(pair: Path, tmp_path: Path) -> None:
    found = sweep(pair, tmp_path / "study", {"grid": {"scale": [0.25, 0.5, 1]}, "race": False})
    record = found.record
    assert [r.params["scale"] for r in record.runs] == [1.0, 0.25, 0.5]  # the start is one of them, and not asked again
    for run in record.runs:
        alone = evaluate(pair, tmp_path, run.params["scale"], "validation")
        assert (run.score, run.mean) == (alone.worst_recovery, alone.mean_recovery)
        assert run.results["sort"].interval == alone.tasks[0].recovery_interval
    assert record.best.score == max(r.score or 0.0 for r in record.runs)
    best, start = (evaluate(pair, tmp_path, scale, "test") for scale in (record.best.params["scale"], 1.0))
    final = record.post_sweep_eval
    assert final is not None
    assert (final.worst_recovery, final.worst_interval) == (best.worst_recovery, best.worst_interval)
    assert [d.than for d in final.differences] == ["start", "second"]
    assert final.differences[0].mean == (best.mean_recovery or 0.0) - (start.mean_recovery or 0.0)
    low, high = final.differences[0].mean_interval or (0.0, 0.0)
    assert low <= (final.differences[0].mean or 0.0) <= high
    assert record.candidates == 3
    assert found.recipe.scale == record.best.params["scale"]
    assert plait.load_recipe(tmp_path / "study" / "recipe.yaml").scale == found.recipe.scale
    assert Path(final.run, "summary.json").is_file()
    (summary,) = tmp_path.glob("artifacts/merged/linear/rate_sort/sweeps/sweep_*.json")  # where the earlier framework had it
    written = json.loads(summary.read_text())
    assert [r["results"]["sort"]["interference_delta"] for r in written["runs"]] == [
        r.results["sort"].recovery for r in record.runs
    ]
    assert read_study(tmp_path / "study") == record


def test_the_merge_of_the_best_is_written_where_it_is_asked_for(pair: Path, tmp_path: Path, drawn: SweepResult) -> None:
    shutil.copytree(drawn.folder, tmp_path / "study")
    assert drawn.merged is None
    found = sweep(pair, tmp_path / "study", {**RANDOM, "save_merged": True})
    assert found.merged == tmp_path / "study" / "merged"
    alone = plait.merge(tmp_path / "study" / "recipe.yaml", out=tmp_path / "alone")
    written = (found.merged / "adapter_model.safetensors").read_bytes()
    assert written == (alone.folder / "adapter_model.safetensors").read_bytes()
    assert plait.verify(found.merged).ok
    assert "recovery" in (found.merged / "README.md").read_text(), "its results are in its card"
    assert json.loads((found.folder / "study.json").read_text())["post_sweep_eval"]["save_merged"] is True
    (found.merged / "mine.txt").touch()
    with pytest.raises(OutputError, match=r"search\.save_merged: .* also holds what plait did not write: 'mine\.txt'"):
        sweep(pair, tmp_path / "study", {**RANDOM, "save_merged": True})
    (found.merged / "mine.txt").unlink()
    further = sweep(pair, tmp_path / "study", {**RANDOM, "budget": 5, "points": [{"scale": 2.5}], "maximize": "mean_recovery"},
                    force=True)  # fmt: skip
    assert further.recipe.scale != found.recipe.scale
    assert further.merged == found.merged, "a merge that is there is that of the best"
    assert (found.merged / "adapter_model.safetensors").read_bytes() != written
    with pytest.raises(OutputError, match=r"merged is an input of this search \(adapter 'merged'\)"):
        plait.sweep([pair / "sort", found.merged], out=tmp_path / "study", tasks=[pair / "sort.yaml"], force=True,
                    base_model=str(pair / "base"), search=RANDOM, workspace=tmp_path / "artifacts")  # fmt: skip


def evaluate(pair: Path, tmp_path: Path, scale: float, split: str) -> plait.Evaluation:
    return plait.evaluate(
        [pair / "sort", pair / "rate"], tasks=[pair / "sort.yaml", pair / "rate.yaml"], base=pair / "base",
        scale=scale, split=split, workspace=tmp_path / "artifacts",
    )  # fmt: skip


def test_a_trial_costs_its_evaluation(
    pair: Path, tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, opened, merges, most = [], [], WeakSet[PlacedMerge](), [0, 0]
    load, read, put = Mixture.load, Adapter.open, Mixture.placed

    def noted(mixture: Mixture, merged: Any) -> PlacedMerge:
        found = put(mixture, merged)
        merges.add(found)
        gc.collect()
        most[:] = [max(most[0], len(merges)), most[1] + 1]
        return found

    monkeypatch.setattr(Mixture, "load", lambda *a, **k: loads.append(a) or load(*a, **k))
    monkeypatch.setattr(Adapter, "open", lambda *a, **k: opened.append(a) or read(*a, **k))
    monkeypatch.setattr(Mixture, "placed", noted)
    record = sweep(pair, tmp_path / "study", {**RANDOM, "race": False}).record
    final = record.post_sweep_eval
    assert final is not None
    assert (len(loads), len(opened)) == (1, 2)
    assert most[1] == 5 + 1 + len(final.differences)  # once per candidate, whatever it is asked
    assert most[0] <= 3  # the start, the one that is asked, and in the end the best
    # base, own adapter, start and 4 candidates on validation; base, own adapter, the best and what it is compared with on test
    assert len(asked) == 2 * (2 + 5) + 2 * (2 + 1 + len(final.differences))
    assert not [*tmp_path.rglob("*.safetensors")]
    assert record.examples_asked == record.examples_of_all == 5 * 48
    del asked[:]
    again = sweep(pair, tmp_path / "study", {**RANDOM, "race": False}).record
    assert asked == []  # finished, it asks nothing
    assert tried(again) == tried(record)


@pytest.mark.parametrize("goal", ["mean_recovery", "worst_recovery", "rate.recovery"])
def test_candidates_that_cannot_win_are_stopped_and_the_best_is_the_same(pair: Path, tmp_path: Path, goal: str) -> None:
    wanted = {**RANDOM, "budget": 7, "maximize": goal, "constraint_nonnegative": False}
    answers = pair / "answers"  # of all three goals: candidates and examples are the same
    races = sweep(pair, tmp_path / "races", wanted, workspace=answers).record
    whole = sweep(pair, tmp_path / "whole", {**wanted, "race": False}, workspace=answers).record
    assert races.best.params == whole.best.params
    assert races.best.score == whole.best.score
    stopped = [r for r in races.runs if r.stopped]
    assert stopped
    assert all(r.examples < 48 and (r.score or 0) <= (races.best.score or 0) for r in stopped)
    assert races.examples_asked == races.examples_of_all - sum(48 - r.examples for r in stopped)
    scores = {json.dumps(r.params): r.score or 0 for r in whole.runs}
    assert all(scores[json.dumps(r.params)] <= (whole.best.score or 0) for r in stopped)
    if goal != "mean_recovery":  # the others were asked nothing of the task that cannot decide any more
        assert all(len(r.results) == 1 for r in stopped)


def test_points_that_are_wanted_come_first_and_the_base_is_known(pair: Path, tmp_path: Path) -> None:
    search = {"type": "random", "budget": 2, "space": {"scale": "0..3"}, "points": [{"scale": 0.4}], "zero_baseline": True}
    record = sweep(pair, tmp_path / "study", search).record
    assert [(r.phase, r.params["scale"]) for r in record.runs[:3]] == [("start", 1.0), ("zero", 0.0), ("point", 0.4)]
    assert [r.phase for r in record.runs[3:]] == ["search"]
    assert record.runs[1].score == 0.0
    assert record.runs[1].examples == 0


def test_a_space_that_is_exhausted_ends_the_search(pair: Path, tmp_path: Path) -> None:
    search = {"type": "random", "budget": 20, "space": {"scale": [0.5, 1, 2]}}
    record = sweep(pair, tmp_path / "study", search).record
    assert record.early_stop_reason == "all 3 candidates were tried"
    assert len(record.runs) == 3


def test_methods_with_their_own_parameters(pair: Path, tmp_path: Path) -> None:
    search = {"grid": {"method": ["ties", "linear"], "density": [0.3, 0.6]}}
    record = sweep(pair, tmp_path / "study", search, method="ties").record
    assert sorted(json.dumps(r.params, sort_keys=True) for r in record.runs if r.phase == "point") == [
        '{"method": "linear"}', '{"method": "ties", "method.density": 0.3}', '{"method": "ties", "method.density": 0.6}',
    ]  # fmt: skip
    assert record.runs[0].number is None  # the start's density is not among them
    assert record.grid == {"method": ["ties", "linear"], "method.density": [0.3, 0.6]}


def test_candidates_that_are_no_merge_are_counted_and_left_out(pair: Path, tmp_path: Path) -> None:
    record = sweep(pair, tmp_path / "study", {"grid": {"method": ["linear", "svd"], "space": ["delta", "factors"]}}).record
    failed = [r for r in record.runs if "error" in r.score_details]
    assert [r.params for r in failed] == [{"method": "svd", "method.space": "factors"}]
    assert record.failed == 1
    assert "must be" in str(failed[0].score_details["error"])


def test_several_goals_have_a_front(pair: Path, tmp_path: Path) -> None:
    goals = ["sort.recovery", "rate.recovery"]
    record = sweep(pair, tmp_path / "study", {**RANDOM, "maximize": goals}).record
    found = [tuple(record.runs[i].goal(g) or 0.0 for g in goals) for i in record.front]
    assert found == sorted(found, reverse=True)
    assert not [a for a in found for b in found if a != b and all(x >= y for x, y in zip(b, a, strict=True))]
    assert not [r for r in record.runs if r.stopped]


def test_without_a_space_the_method_and_the_scale_are_searched(
    pair: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = [pair / "sort", pair / "rate", "--tasks", pair / "sort.yaml", pair / "rate.yaml", "--base-id", pair / "base"]
    line += ["--type", "random", "--budget", "2", "--workspace", tmp_path / "artifacts", "-o", tmp_path / "study"]
    assert exit_code("sweep", *line) == 0
    shown = capsys.readouterr()
    message = " ".join(shown.err.split())
    assert "nothing says what is searched (--space, --grid): the method (iso_cts, dc_merge, tsv, ties, linear)" in message
    assert "best of 3 candidates on validation" in shown.out
    assert "asked once" in shown.out
    assert exit_code("sweep", "--status", tmp_path / "study") == 0
    assert "trials: 3 ended, 0 begun, 0 waiting · finished" in capsys.readouterr().out
    assert exit_code("sweep", *line, "--json") == 0
    assert json.loads(capsys.readouterr().out)["best_score"] is not None


def test_a_search_on_test_is_refused_unless_insisted_on(pair: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="split 'test' judges the result"):
        sweep(pair, tmp_path / "study", {**RANDOM, "split": "test"})
    record = sweep(pair, tmp_path / "study", {**RANDOM, "budget": 1, "split": "test", "allow_test": True}).record
    assert record.selected_on_test
    assert record.post_sweep_eval is None
    assert any("compared on the split 'test'" in note for note in record.notes)
    with pytest.raises(RecipeError, match=r"search\.split and eval\.split are both 'validation'"):
        sweep(pair, tmp_path / "other", eval={"split": "validation"})


def test_a_score_leaves_no_task_out(pair: Path, tmp_path: Path) -> None:
    write_tasks(tmp_path, adapter="other")
    with pytest.raises(TaskError, match=r"no adapter of these tasks' own is known: 'sort' \('other'\)"):
        sweep(pair, tmp_path / "study", tasks=[tmp_path / "sort.yaml", pair / "rate.yaml"])
    train_adapter(tmp_path / "flat", "sort", steps=0)
    write_tasks(tmp_path, adapter="flat")
    with pytest.raises(TaskError, match=r"no recovery on split 'validation': the own adapter is not better .* on sort"):
        plait.sweep(
            [tmp_path / "flat", pair / "rate"], tasks=[tmp_path / "sort.yaml", pair / "rate.yaml"], out=tmp_path / "study",
            base_model=str(pair / "base"), search=RANDOM, workspace=tmp_path / "artifacts",
        )  # fmt: skip


def test_moments_are_taken_once_for_all_candidates(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    search = {"grid": {"method": ["linear", "regmean"], "scale": [0.5, 1]}, "subset": {"max_samples": 12}, "race": False}
    judged = {"subset": {"max_samples": 12}}
    with pytest.warns(UserWarning, match=r"second moments of sort, rate, taken now .* are kept in"):
        found = sweep(pair, tmp_path / "study", search, calibration={"texts": "lines"}, eval=judged)
    assert [(r.params["method"], r.complete) for r in found.record.runs] == [
        ("linear", True), ("linear", True), ("regmean", True), ("regmean", True)
    ]  # fmt: skip
    assert len([*tmp_path.rglob("*.safetensors")]) == 2  # the moments
    assert all(Path(entry.moments or "").is_file() for entry in plait.load_recipe(tmp_path / "study" / "recipe.yaml").adapters)
    with pytest.warns(UserWarning, match="taken by an earlier run"):
        again = sweep(pair, tmp_path / "study", search, calibration={"texts": "lines"}, eval=judged)
    assert tried(again.record) == tried(found.record)


def test_a_subset_is_not_that_of_the_end(pair: Path, tmp_path: Path) -> None:
    search = {**RANDOM, "budget": 1, "subset": {"max_samples": 4}}
    count = sum(len((pair / task / "other.jsonl").read_text().splitlines()) for task in ("sort", "rate"))
    with pytest.warns(PlaitWarning, match=rf"In the end the best, .* are asked all {count} examples of test; --eval-subset"):
        sweep(pair, tmp_path / "study", search)
    begin_anew()
    with warnings.catch_warnings():
        warnings.simplefilter("error", PlaitWarning)
        found = sweep(pair, tmp_path / "other", search, eval={"subset": {"max_samples": 5}})
        sweep(pair, tmp_path / "whole", {**RANDOM, "budget": 1})
    assert found.record.post_sweep_eval is not None


def test_what_else_is_refused(pair: Path, tmp_path: Path) -> None:
    one = {**RANDOM, "budget": 1}
    sweep(pair, tmp_path / "study", one)
    with pytest.raises(OutputError, match="holds another search"):
        sweep(pair, tmp_path / "study", {**one, "seed": 2})
    assert len(sweep(pair, tmp_path / "study", {**one, "seed": 2}, force=True).record.runs) == 2
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes.txt").touch()
    with pytest.raises(OutputError, match="not a study of plait sweep"):
        sweep(pair, tmp_path / "full")
    with pytest.raises(TaskError, match=r"'sorting' is not one of the tasks sort, rate\. Did you mean 'sort'"):
        sweep(pair, tmp_path / "new", {**RANDOM, "maximize": "sorting.recovery"})
    with pytest.raises(PlanError, match="'auto' is found on texts"):
        sweep(pair, tmp_path / "new", scale="auto", search={"grid": {"merge_mode": ["union", "common"]}})
    with pytest.raises(PlanError, match="with the layers below already merged, which are others for every candidate"):
        sweep(pair, tmp_path / "new", {"grid": {"method": ["linear", "regmean", "regmean_sequential"]}})
    with pytest.raises(OutputError, match=r"--storage \(storage=\): Optuna cannot open this storage"):
        sweep(pair, tmp_path / "new", storage="nowhere://x")
    with pytest.raises(RecipeError, match=r"`plait sweep` \(plait\.sweep\)"):
        plait.plan([pair / "sort", pair / "rate"], grid={"scale": [1]})
    with pytest.raises(OutputError, match=r"there is no study\.db"):
        plait.sweep_status(tmp_path)
    assert not (tmp_path / "new" / "study.json").exists()


#: SQL → what is reported of a storage in which it was done.
DAMAGE = {
    "UPDATE trial_user_attributes SET value_json = '{}' WHERE key = 'plait'": r"trial 0: not a candidate .*outcome\.params",
    "UPDATE trial_user_attributes SET value_json = '{\"params\": {}}' WHERE key = 'plait'": "trial 0: not a candidate .*score",
    "UPDATE trial_user_attributes SET value_json = '{' WHERE key = 'plait'": "Optuna cannot .* this storage",
    "UPDATE trial_user_attributes SET value_json = '\"x\"' WHERE key = 'phase'": "trial 0: not a candidate .*phase",
    "UPDATE trial_values SET value = 7": r"trial 0: its value is 7\.0, and its score",
    "DELETE FROM trial_values": "trial 0: its value is None, and its score",
    "UPDATE trials SET state = 'x'": "Optuna cannot .* this storage",
}


def test_a_storage_that_is_damaged_is_refused(pair: Path, tmp_path: Path, drawn: SweepResult) -> None:
    study = tmp_path / "studies" / "drawn"  # next to the kept answers
    shutil.copytree(drawn.folder.parent / "artifacts", study.parent / "artifacts")

    def refused(message: str) -> None:
        with pytest.raises(OutputError, match=rf"study\.db: {message}"):
            plait.sweep_status(study)
        with pytest.raises(OutputError, match=rf"study\.db: {message}"):
            sweep(pair, study)

    for statement, message in DAMAGE.items():
        shutil.rmtree(study, ignore_errors=True)
        shutil.copytree(drawn.folder, study)
        with contextlib.closing(sqlite3.connect(study / "study.db")) as base, base:
            base.execute(statement)
        refused(message)
    for statement, message in {
        "UPDATE trial_user_attributes SET value_json = '5' WHERE key = 'batch'": "trial 1: not a batch",
        "UPDATE studies SET study_id = -1": "the goals of the study must be 1 × maximize, got none",
        "UPDATE study_user_attributes SET value_json = '\"x\"' WHERE key = 'parallel'": "the number of trials .* is 'x'",
    }.items():
        shutil.copy(drawn.folder / "study.db", study)
        with contextlib.closing(sqlite3.connect(study / "study.db")) as base, base:
            base.execute(statement)
        with pytest.raises(OutputError, match=rf"study\.db: {message}"):
            sweep(pair, study)
    (study / "study.db").write_bytes(b"no database" * 100)
    refused("Optuna cannot .* this storage")
    (study / "study.db").unlink()
    os.mkfifo(study / "study.db")
    refused("a folder, a pipe, a device or a link that leads nowhere")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("best_index", 99, "best_index is 99; there are"),
        ("second_index", -2, "second_index is -2"),
        ("front", [0, 50], r"front\.1 is 50"),
        ("version", 2, "of version 2; this plait reads 1"),
        ("runs", 5, r"\(runs: Input should be a valid tuple"),
        ("eval_tasks", ["sort", "other"], r"runs\.0\.results lacks 'other'"),
        ("search", {"space": {"scale": "x..y"}}, "not the record of a search|not a result"),
        ("best_score", "much", r"\(best_score: "),
        ("recovery", None, r"runs\.0: a candidate that was asked everything has a recovery of every task"),
    ],
)
def test_a_record_that_is_damaged_is_refused(
    pair: Path, tmp_path: Path, drawn: SweepResult, field: str, value: Any, message: str
) -> None:
    data = json.loads((drawn.folder / "study.json").read_text())
    if field == "recovery":
        data["runs"][0]["results"]["sort"][field] = value
    (tmp_path / "study.json").write_text(json.dumps(data if field == "recovery" else {**data, field: value}))
    with pytest.raises(plait.ReportError, match=rf"study\.json: .*({message})"):
        plait.report([tmp_path], out=tmp_path / "page.html")
    with pytest.raises(OutputError, match=rf"study\.json: .*({message})"):
        sweep(pair, tmp_path / "new", warm_start=[tmp_path])
    assert {path.name for path in tmp_path.iterdir()} == {"study.json"}


def test_an_earlier_recipe_that_is_damaged_is_refused_before_anything_is_written(
    pair: Path, tmp_path: Path, drawn: SweepResult
) -> None:
    data = json.loads((drawn.folder / "study.json").read_text())
    data["recipe"]["wieghts"] = data["recipe"].pop("weights")
    (tmp_path / "study.json").write_text(json.dumps(data))
    with pytest.raises(RecipeError, match=r"study\.json: wieghts: .*weights"):
        sweep(pair, tmp_path / "new", warm_start=[tmp_path], workspace=drawn.folder.parent / "artifacts")
    assert {path.name for path in tmp_path.iterdir()} == {"study.json"}


def test_a_full_disk_ends_a_search_with_its_reason(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise StorageInternalError("during the commit") from sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(optuna.Study, "tell", full)
    with pytest.raises(OutputError, match=r"study\.db: Optuna's storage failed: database or disk is full"):
        sweep(pair, tmp_path / "studies" / "new")


def test_a_page_of_a_study(pair: Path, tmp_path: Path, drawn: SweepResult) -> None:
    page = plait.report([drawn.folder], out=tmp_path / "study.html").page.read_text()
    assert "plait merge recipe.yaml -o OUT" in page
    record = drawn.record
    complete = [run for run in record.runs if run.complete]
    stopped = [run for run in record.runs if run.stopped]
    assert "What was searched" in page
    assert f"The best of <b>{record.candidates}</b> candidates on validation" in page
    assert "Asked once on test" in page
    # history; both tasks over the scale; the front
    assert page.count("<circle") == len(complete) + len(stopped) + 2 * len(complete) + len(complete)
    assert page.count('fill="none" stroke="#7f7f7f"') == len(stopped)
    for task in ("sort", "rate"):
        recovery = f"{100 * complete[-1].results[task].recovery:.1f}\N{NO-BREAK SPACE}%"
        assert f"{task}: {recovery} at scale {complete[-1].params['scale']:.3g}" in page
    with pytest.raises(plait.ReportError, match=r"or of a search \(study\.json\)"):
        plait.report([pair / "base"], out=tmp_path / "none.html")
