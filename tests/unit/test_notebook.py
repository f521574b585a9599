"""Results in a notebook: HTML in its colors, tables, figures, progress."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

import plait
from plait.errors import MissingPackageError
from plait.evaluation.replies import AskedPrompt, AskResult, Reply
from plait.merging.record import RunRecord
from plait.notices import PlaitWarning, forget_announcements
from plait.results.records import ModuleRecord
from plait.search.conclusion import SweepResult
from plait.search.record import Run, StudyRecord, TaskOutcome
from plait.testing import cohort
from plait.tuning.held_out import HeldOutScore
from plait.tuning.pipeline import TuneResult
from plait.tuning.record import SeenTexts, TuneRecord
from tests.evaluated import HOSTILE, WHOLE, Page, board_of, evaluation, task
from tests.every import every


def run(number: int, score: float) -> Run:
    kept = {"min_interference_delta": score, "mean_interference_delta": score}
    return Run(
        number=number,
        phase="search",
        params={HOSTILE: number + 0.5, "scale": 1.0},
        score=score,
        score_details=kept,
        key=str(number),
        results={HOSTILE: TaskOutcome(metric=0.5, recovery=score, interval=(0.1, 0.9))},
        examples=40,
        stopped=number == 2,
        nonnegative=True,
        seconds=1.0,
    )


STUDY = StudyRecord(
    plait="0",
    study="s",
    setting="s",
    storage=None,
    adapters=(HOSTILE, "b"),
    base_model="base",
    method="ties",
    merge_mode="union",
    recipe={},
    eval_tasks=(HOSTILE,),
    split="validation",
    eval_subset=None,
    selected_on_test=False,
    search={"budget": 4},
    grid={},
    maximize=("worst_recovery",),
    constraint_nonnegative=True,
    early_stopped=False,
    early_stop_reason=None,
    candidates=3,
    failed=0,
    repeated=0,
    examples_asked=120,
    examples_of_all=120,
    runs=(run(0, 0.3), run(1, 0.7), run(2, 0.1)),
    best_index=1,
    best_score=0.7,
    second_index=0,
    front=(1,),
    importance={},
    post_sweep_eval=None,
    notes=(HOSTILE,),
    timestamp="",
    seconds=1.0,
)


def look(step: int, divergence: float) -> HeldOutScore:
    return HeldOutScore(step=step, divergence={HOSTILE: divergence}, share=divergence, kept={HOSTILE: 1 - divergence})


TUNED = TuneRecord(
    plait="0",
    recipe={},
    sources=(),
    scale=1.0,
    scales=(),
    base={HOSTILE: 1.0},
    looks=(look(0, 0.5), look(8, 0.25)),
    losses=(0.5,),
    texts=(SeenTexts(task=HOSTILE, adapter="a", kind="lines", source="lines", count=8, learned=6, digest="", shown=()),),
    kept_step=8,
    rank=8,
    distance=0.1,
    outside=0.0,
    notes=(HOSTILE,),
    seconds={},
    finished="",
)
ASKED = AskResult(
    plait="0",
    base_model="base",
    names=(HOSTILE,),
    max_new_tokens=8,
    temperature=0.0,
    top_p=1.0,
    seed=0,
    dtype="float32",
    prompts=(AskedPrompt(prompt="?", text=HOSTILE, replies={HOSTILE: Reply(text=HOSTILE, tokens=3, complete=True)}),),
    seconds=1.0,
)
TRUNCATED = RunRecord(
    plait="0",
    recipe={},
    sources=(),
    method="svd",
    space="delta",
    result="truncated",
    rank=2,
    max_lora_rank=8,
    kept=0.7,
    lowest_kept=0.5,
    modules=(ModuleRecord(target=f"model.layers.0.{HOSTILE}", rank=2, result="truncated", energy=3.0, kept=0.5),),
    notes=(HOSTILE,),
    finished="",
    seconds=0.0,
)
EVALUATED = evaluation(task(HOSTILE, 0.9), task("b", None), name=HOSTILE)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Any]:
    """What is made from files: two adapters inspected, a plan and a merge of them."""
    place = tmp_path_factory.mktemp("made")
    cohort([(6, 4), (4, 6)], [2, 1]).save(place)
    pair = {"one": place / "adapter0", "two": place / "adapter1"}
    found = plait.inspect(pair)
    hostile = {"name": HOSTILE, "base_model": HOSTILE, "writer": HOSTILE, "warnings": (HOSTILE,)}
    first = found.adapters[0].model_copy(update=hostile)
    return {
        "inspection": found.model_copy(update={"adapters": (first, *found.adapters[1:])}),
        "one adapter": plait.inspect([place / "adapter0"]),
        "plan": plait.plan(pair),
        "merge": plait.merge(pair, out=place / "out"),
    }


RECORDS = {
    "evaluation": EVALUATED,
    "board": board_of(EVALUATED, WHOLE.model_copy(update={"tasks": EVALUATED.tasks})),
    "study": STUDY,
    "sweep": SweepResult(Path(), None, STUDY, None),  # type: ignore[arg-type]
    "tuning": TUNED,
    "tuned": TuneResult(Path(), TUNED),
    "asked": ASKED,
    "truncated": TRUNCATED,
}
NAMES = [*RECORDS, "inspection", "one adapter", "plan", "merge"]


@pytest.mark.parametrize("name", NAMES)
def test_a_result_shows_itself_in_the_notebooks_colors_with_every_text_escaped(name, made):
    html = (RECORDS | made)[name]._repr_html_()
    page = Page(html)
    assert "script" not in page.tags
    assert HOSTILE in page.text or name in ("one adapter", "plan", "merge")
    assert not page.fetched
    assert "prefers-color-scheme" not in html, "a dark notebook may be on a light desktop"
    rules, depth = [], 0
    for line in html.partition("<style>")[2].partition("</style>")[0].strip().splitlines():
        rules += [line] * (depth == 0)
        depth += line.count("{") - line.count("}")
    assert depth == 0
    assert all(rule.startswith(".plait {") for rule in rules if rule != "}"), "nothing outside of the result changes its look"


@pytest.mark.parametrize("name", NAMES)
def test_a_result_is_a_table_and_a_figure(name, made):
    result = (RECORDS | made)[name]
    assert len(result.to_pandas())
    assert result.plot()._repr_png_().startswith(b"\x89PNG")
    assert "pyplot" not in str(type(result.plot()))


def test_tables_hold_the_numbers(made):
    table = EVALUATED.to_pandas().set_index("task")
    assert table.loc[HOSTILE, ["recovery", "recovery_low", "recovery_high"]].tolist() == [0.9, 0.7, 1.05]
    assert table.loc["b", "recovery"] != table.loc["b", "recovery"], "NaN where it is not defined"
    assert RECORDS["sweep"].to_pandas()[f"recovery.{HOSTILE}"].tolist() == [0.3, 0.7, 0.1]
    assert RECORDS["tuned"].to_pandas().loc[0, ["base", "start", "tuned", "kept"]].tolist() == [1.0, 0.5, 0.25, 0.75]
    assert made["inspection"].to_pandas()["name"].tolist() == [HOSTILE, "two"]
    assert made["inspection"].comparison.to_pandas()["cosine"].tolist() == pytest.approx(
        [layer.cosine[0][1] for layer in made["inspection"].comparison.layers]
    )
    assert made["merge"].to_pandas()["rank"].tolist() == [m.rank for m in made["merge"].record.modules]


def test_results_of_runs_have_a_short_repr():
    for result in (RECORDS["sweep"], RECORDS["tuned"]):
        assert len(repr(result)) < 500


@every(("package", "show"), [("pandas", "to_pandas"), ("matplotlib", "plot")])
def test_a_package_that_is_missing_is_named_with_what_installs_it(package, show, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(MissingPackageError, match=rf"{show}\(\) needs the package '{package}': .*plait\[notebook\]"):
        getattr(EVALUATED, show)()


def test_without_jinja2_there_is_the_repr_and_one_note(monkeypatch):
    forget_announcements()
    monkeypatch.setitem(sys.modules, "jinja2", None)
    with pytest.warns(PlaitWarning, match="plait\\[notebook\\]"):
        assert EVALUATED._repr_html_() is None
    assert EVALUATED._repr_html_() is None, "announced once"
    forget_announcements()


@pytest.fixture
def notebook(monkeypatch) -> list[str]:
    """IPython's display: what is shown at present, in order."""
    shown: list[str] = []

    def display(html: str, *, display_id: bool) -> Any:
        assert display_id
        shown.append(html)
        place = len(shown) - 1
        return SimpleNamespace(update=lambda html: shown.__setitem__(place, html))

    module = ModuleType("IPython.display")
    module.display, module.HTML = display, str  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    return shown


def test_progress_is_a_bar_per_stage_and_then_a_line(notebook):
    progress = plait.NotebookProgress()
    progress.start("<merge>", 3)
    assert '&lt;merge&gt; <progress value="0" max="3"' in notebook[0]
    progress.advance(2)
    progress.finish()
    assert "2 steps" in notebook[0]
    assert "<progress" not in notebook[0]
    progress.start("copy", 2_000_000, "B")
    assert "of 2.0 MB" in notebook[1]
    part = progress.part("phase")
    part.start("train", 4)
    part.start("done", 0)
    assert [line.replace("<div>", "")[:13] for line in notebook[2:]] == ["phase · train", "phase · done "]


def test_a_merge_reports_to_it(notebook, tmp_path):
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    plait.merge([tmp_path / f"adapter{i}" for i in (0, 1)], out=tmp_path / "out", progress=plait.NotebookProgress())
    assert any("merge" in line for line in notebook)


def test_outside_of_notebooks_progress_says_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "IPython.display", None)
    with pytest.raises(MissingPackageError, match=r"NotebookProgress needs the package 'IPython.*plait\[notebook\]"):
        plait.NotebookProgress()
