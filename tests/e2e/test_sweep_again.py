"""`plait sweep` that was stopped, killed or shared: it ends as one that was not, and nothing is asked twice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import plait
import plait.evaluation.session as session
from plait.errors import RecipeError
from plait.search.conclusion import SweepResult
from plait.search.record import StudyRecord, read_study
from plait.search.study import Study
from tests.command_line import exit_code
from tests.searched import RANDOM, noted_questions, sweep, tried
from tests.warm import check_killed, run_forked

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.xdist_group("sweep again")]


def test_the_same_seed_gives_the_same_study_from_flags_a_recipe_and_python(
    pair: Path, tmp_path: Path, drawn: SweepResult, asked: list[tuple[str, int]]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        f"version: 1\nbase_model: {pair}/base\nadapters: [{pair}/sort, {pair}/rate]\nmethod: linear\n"
        f"tasks: [{pair}/sort.yaml, {pair}/rate.yaml]\nsearch: {json.dumps(RANDOM)}\n"
    )
    flags = [pair / "sort", pair / "rate", "--tasks", pair / "sort.yaml", pair / "rate.yaml", "--base-id", pair / "base"]
    flags += ["--method", "linear", "--type", "random", "--seed", "1", "--budget", "4", "--space", "scale=0.1..3"]
    assert exit_code("sweep", *flags, "--workspace", tmp_path / "artifacts", "-o", tmp_path / "study") == 0
    assert tried(read_study(tmp_path / "study")) == tried(drawn.record)
    del asked[:]
    assert exit_code("sweep", recipe, "--workspace", tmp_path / "artifacts", "-o", tmp_path / "study") == 0
    assert tried(read_study(tmp_path / "study")) == tried(drawn.record)
    assert asked == []  # the recipe asks for the study that is there
    other = sweep(pair, tmp_path / "other", {**RANDOM, "seed": 2, "budget": 1}).record
    assert other.runs[1].params != drawn.record.runs[1].params


def test_a_search_that_was_stopped_goes_on_as_if_it_had_not_been(
    pair: Path, tmp_path: Path, asked: list[tuple[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"budget": 4, "init_points": 3, "space": {"scale": "0.1..3"}}  # by the Gaussian process
    whole = sweep(pair, tmp_path / "whole" / "study", wanted).record
    total = len(asked)
    del asked[:]
    answer = session.answer_examples

    def stop(*given: Any, **how: Any) -> Any:
        if len(asked) == 11:
            raise KeyboardInterrupt
        return answer(*given, **how)

    monkeypatch.setattr(session, "answer_examples", stop)
    with pytest.raises(KeyboardInterrupt):
        sweep(pair, tmp_path / "cut" / "study", wanted)
    monkeypatch.setattr(session, "answer_examples", answer)
    status = plait.sweep_status(tmp_path / "cut" / "study")
    assert status.begun == 1
    assert not status.finished
    assert tried(sweep(pair, tmp_path / "cut" / "study", wanted).record) == tried(whole)
    assert len(asked) == total  # nothing was asked twice


BATCHED = {"budget": 5, "init_points": 2, "parallel": 2, "space": {"scale": "0.1..3"}}


@pytest.fixture(scope="module")
def batched(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[StudyRecord, int]:
    """Return an undisturbed study in batches, and how often it asked a model."""
    with pytest.MonkeyPatch.context() as patch:
        asked = noted_questions(patch)
        return sweep(pair, tmp_path_factory.mktemp("whole") / "study", BATCHED).record, len(asked)


@pytest.mark.parametrize("cut", [10, 14])
def test_a_batch_that_was_stopped_is_completed_with_what_was_known_when_it_began(
    pair: Path,
    tmp_path: Path,
    batched: tuple[StudyRecord, int],
    asked: list[tuple[str, int]],
    monkeypatch: pytest.MonkeyPatch,
    cut: int,
) -> None:
    whole, total = batched
    assert whole.parallel == 2
    assert [r.phase for r in whole.runs] == ["start", *["search"] * 5]
    assert len({r.params["scale"] for r in whole.runs}) == 6, "what is suggested together is not suggested twice"
    tell = Study.tell

    def stop_asking(*given: Any, **how: Any) -> Any:
        if len(asked) == cut:
            raise KeyboardInterrupt
        return answer(*given, **how)

    def stop_telling(self: Study, trial: Any, *what: Any) -> None:
        tell(self, trial, *what)
        if trial.number == 3:  # the first of the second batch
            raise KeyboardInterrupt

    answer = session.answer_examples
    for stopped in ((session, "answer_examples", stop_asking), (Study, "tell", stop_telling)):
        with monkeypatch.context() as patch:
            patch.setattr(*stopped)
            with pytest.raises(KeyboardInterrupt):
                sweep(pair, tmp_path / "cut" / "study", BATCHED)
    assert plait.sweep_status(tmp_path / "cut" / "study").begun == 1
    assert tried(sweep(pair, tmp_path / "cut" / "study", {**BATCHED, "parallel": None}).record) == tried(whole)
    assert len(asked) == total  # nothing was asked twice


def test_a_batch_races_against_what_was_known_when_it_began(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wanted = {"type": "random", "budget": 2, "maximize": "mean_recovery", "space": {"scale": "0..3"}}
    wanted |= {"constraint_nonnegative": False, "points": [{"scale": 0.2}, {"scale": 0.02}]}
    alone = sweep(pair, tmp_path / "alone" / "study", wanted, scale=3.0).record
    assert [r.stopped for r in alone.runs] == [False, False, True], "the first stops the second where it is known"
    batch = sweep(pair, tmp_path / "batch" / "study", {**wanted, "parallel": 2}, scale=3.0).record
    assert [r.stopped for r in batch.runs] == [False, False, False]
    tell = Study.tell

    def stop(self: Study, *what: Any) -> None:
        tell(self, *what)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Study, "tell", stop)
        with pytest.raises(KeyboardInterrupt):
            sweep(pair, tmp_path / "cut" / "study", {**wanted, "parallel": 2}, scale=3.0)
    again = sweep(pair, tmp_path / "cut" / "study", {**wanted, "parallel": 2}, scale=3.0).record
    assert tried(again) == tried(batch)


# Waits when three trials have ended: the start, and two that were suggested.
HELD = """
import optuna
from plait.cli.main import main
tell = optuna.Study.tell
known = []
def tell_and_wait(self, *outcome, **settings):
    trial = tell(self, *outcome, **settings)
    known.append(trial)
    if len(known) == 2:
        hold()
    return trial
optuna.Study.tell = tell_and_wait
main()
"""


def test_killed_and_started_again(pair: Path, tmp_path: Path) -> None:
    wanted = ["--type", "random", "--seed", "3", "--budget", "4", "--space", "scale=0.1..3", "--method", "linear"]
    tasks = [str(pair / "sort.yaml"), str(pair / "rate.yaml")]
    line = ["sweep", str(pair / "sort"), str(pair / "rate"), "--tasks", *tasks, "--base-id", str(pair / "base"), *wanted]
    line += ["--workspace", str(tmp_path / "artifacts"), "-o", str(tmp_path / "study")]
    check_killed(run_forked(HELD, *line))
    assert plait.sweep_status(tmp_path / "study").trials == 3
    assert exit_code(*line) == 0
    search = {"type": "random", "seed": 3, "budget": 4, "space": {"scale": "0.1..3"}}
    whole = sweep(pair, tmp_path / "whole" / "study", search).record
    assert tried(read_study(tmp_path / "study")) == tried(whole)
    assert not plait.sweep_status(tmp_path / "study").running


def test_several_machines_share_a_storage(pair: Path, tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    url = f"sqlite:///{tmp_path / 'shared.db'}"
    one = sweep(pair, tmp_path / "one" / "study", {**RANDOM, "budget": 2}, storage=url).record
    del asked[:]
    two = sweep(pair, tmp_path / "two" / "study", {**RANDOM, "budget": 2}, storage=url).record
    assert tried(two) == tried(one)
    assert len(asked) <= 4 + 2 * 2 + 4 + 3 * 2  # base, own adapters, start; and on test the best, the second and the start
    assert plait.sweep_status(tmp_path / "two" / "study", storage=url).trials == 3
    assert not (tmp_path / "one" / "study" / "study.db").exists()


def test_earlier_studies_are_not_evaluated_again(pair: Path, tmp_path: Path, asked: list[tuple[str, int]]) -> None:
    earlier = sweep(pair, tmp_path / "one", {"grid": {"scale": [0.25, 0.5, 1]}, "race": False})
    del asked[:]
    wider = {"grid": {"scale": [0.25, 0.5, 0.75, 1]}, "race": False}
    found = sweep(pair, tmp_path / "two", wider, workspace=tmp_path / "empty", warm_start=[tmp_path / "one"]).record
    assert {r.params["scale"]: r.phase for r in found.runs} == {
        1.0: "start", 0.25: "warm_start", 0.5: "warm_start", 0.75: "point"
    }  # fmt: skip
    scores = {r.params["scale"]: r.score for r in found.runs}
    assert all(scores[r.params["scale"]] == r.score for r in earlier.record.runs)
    assert [name for name, _ in asked[:8]] == ["sort", "sort", "rate", "rate", "sort", "rate", "sort", "rate"]
    sample = {"subset": {"max_samples": 12}}
    with pytest.warns(UserWarning, match="answered other examples"):
        sweep(pair, tmp_path / "three", wider | sample, warm_start=[tmp_path / "one"], eval=sample)
    study = tmp_path / "one" / "study.json"
    record = json.loads(study.read_text())
    record["runs"][1]["params"]["scale"] = [0, 1]
    study.write_text(json.dumps(record))
    with pytest.raises(RecipeError, match=r"one.study\.json: runs\.1\.params: scale: .* must be a number"):
        sweep(pair, tmp_path / "four", wider, warm_start=[tmp_path / "one"])
