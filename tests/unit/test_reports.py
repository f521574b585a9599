"""The report: what is read, what is said of it, what is drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
from html import escape, unescape
from html.parser import HTMLParser

import pytest

import plait
from plait.errors import OutputError, ReportError
from plait.evaluation.comparison import Leaderboard, LeaderboardEntry
from plait.evaluation.record import Evaluation, InterferenceMatrix, Sample, SingleAdapter, TaskResult
from plait.evaluation.workspace import write_comparison, write_evaluation
from plait.merging.record import RunRecord
from plait.reports.charts import energy_map, recovery_bars, show_interval, show_share, task_recoveries
from plait.reports.colors import css, diverging, text_color
from plait.reports.page import render
from plait.reports.reading import Report, read_report
from plait.reports.verdict import certainty, verdict
from plait.results.digests import sha256
from plait.results.records import ModuleRecord
from plait.testing import cohort
from tests.every import every

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
WIDTHS = (360, 500, 1200)  # of a phone, of a small window, of a desk
_PROBE = """<script>addEventListener("load", () => {
  document.title = JSON.stringify([...document.querySelectorAll("iframe")].map(({contentWindow: frame}) => {
    const root = frame.document.documentElement, all = what => [...frame.document.querySelectorAll(what)];
    const widths = what => all(what).map(b => b.getBoundingClientRect().width);
    return {
      width: frame.innerWidth, needed: root.scrollWidth, bars: widths("#recovery .fill"), cells: widths(".cells i"),
      hidden: all("#recovery ~ .scroll").map(t => t.scrollWidth - t.clientWidth)[0],
      fetched: frame.performance.getEntriesByType("resource").length,
    };
  }));
});</script>"""
HOSTILE = "<script>document.title='broken'</script> & \"quoted\""


def task(name: str, recovery: float | None, **changes) -> TaskResult:
    fields = {
        "task": name, "kind": "classification", "metric": "accuracy", "higher_is_better": True, "adapter": name, "examples": 40,
        "subset": None, "base": 0.2, "single": 0.9, "merged": 0.8, "base_interval": (0.1, 0.3), "single_interval": (0.8, 1.0),
        "merged_interval": (0.7, 0.9), "recovery": recovery, "recovery_interval": (0.7, 1.05) if recovery is not None else None,
        "undefined": None if recovery is not None else "its own adapter is no better than the base", "below_base": False,
        "samples": (Sample(id="1", prompt=HOSTILE, target="yes", base="no", single="yes", merged="perhaps"),),
    }  # fmt: skip
    return TaskResult(**{**fields, **changes})


def evaluation(*tasks: TaskResult, **changes) -> Evaluation:
    known = {t.task: t.recovery for t in tasks if t.recovery is not None}
    worst = min(known, key=known.get) if known else None
    fields = {
        "plait": plait.__version__, "name": "ties", "kind": "merge", "tag": "ties_1", "method": "ties", "space": "core",
        "recipe": None, "base_model": "base", "split": "test", "dtype": "float32", "batch_size": 8, "draws": 100, "seed": 0,
        "sources": (SingleAdapter(name="a", path="./a", repo=None, commit=None, sha256="0" * 64),), "tasks": tasks,
        "mean_recovery": sum(known.values()) / len(known) if known else None, "mean_interval": (0.7, 0.9),
        "worst_recovery": known.get(worst), "worst_interval": (0.5, 0.9) if known else None, "worst_task": worst,
        "below_base": tuple(t.task for t in tasks if t.below_base), "undefined": (), "matrix": None, "notes": (HOSTILE,),
        "finished": "2026-01-02T03:04:05+00:00", "seconds": 1.0,
    }  # fmt: skip
    return Evaluation(**{**fields, **changes})


WHOLE = evaluation(
    task("maths", 0.95),
    task("code", -0.3, below_base=True, recovery_interval=(-0.6, 0.1)),
    task("none", None, samples=()),
    matrix=InterferenceMatrix(
        adapters=("maths", "code"),
        tasks=("maths", "code"),
        values=((0.9, 0.1), (0.3, 0.8)),
        recovery=((1.0, -0.5), (None, 1.0)),
    ),
)


def run_folder(folder, found: Evaluation):
    folder.mkdir(parents=True)
    (folder / "eval_results_test.json").write_text(found.model_dump_json())
    return folder


class Page(HTMLParser):
    """The texts of a page, what it would fetch, and whether its tags are closed."""

    VOID = frozenset({"meta", "link", "br", "img", "input", "hr"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.fetched: list[str] = []
        self.tags: list[str] = []
        self.texts: list[str] = []
        self.feed(text)
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.fetched += [v for k, v in attrs if k in ("src", "href") and v != "data:,"]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.texts).split())


def test_the_page_stands_alone_and_says_what_the_numbers_say():
    page = Page(render(Report(evaluations=(WHOLE,)), title=HOSTILE))
    assert page.fetched == []
    assert "script" not in page.tags, "text of a task became markup"
    assert page.text.count(HOSTILE) >= 3, "title, prompt and note are shown as they are"
    for message in ("Not good enough: worse than the bare base model on code", "−30 %", "95 %",
                 "none: its own adapter is no better", "0.900 (100 %)", "0.100 (−50 %)", "perhaps"):  # fmt: skip
        assert message in page.text, message


@every(
    ("tasks", "begins"),
    [
        ([task("a", 0.95), task("b", 0.92)], "Good: every task"),
        ([task("a", 0.95), task("b", 0.75)], "Fair: every task is better"),
        ([task("a", 0.95), task("b", 0.2)], "Weak: b loses"),
        ([task("a", 0.95), task("b", 0.9, below_base=True)], "Not good enough: worse than the bare base model on b."),
        ([task("a", None)], "No task has a recovery: its own adapter"),
    ],
)
def test_the_verdict(tasks, begins):
    found = verdict(evaluation(*tasks))
    assert found.startswith(begins)
    if tasks[-1].recovery is not None:
        assert "the worst task, b, keeps" in found


def test_a_share_of_nearly_nothing_has_no_sign():
    assert show_share(-0.003).startswith("0")
    assert show_share(-0.3).startswith("−30")
    assert show_interval((-0.004, 0.2)).startswith("0 – 20")


def test_certainty_names_examples_and_a_wide_interval():
    found = certainty(evaluation(task("a", 0.9), task("b", 0.7)))
    assert "With 80 examples the worst recovery is between 50\xa0% and 90\xa0% (95\xa0%)" in found
    assert "more examples" in found
    assert "more examples" not in certainty(evaluation(task("a", 0.9), worst_interval=(0.8, 0.95)))


def test_bars_begin_at_zero_and_stay_on_the_axis():
    axis = recovery_bars(task_recoveries([task("a", 0.5), task("b", -0.25, recovery_interval=(-9.0, 9.0)), task("c", None)]))
    a, b, c = axis.bars
    assert a.left == pytest.approx(axis.zero)
    assert a.left + a.width == pytest.approx((axis.zero + axis.one) / 2, abs=0.02)
    assert b.left + b.width == pytest.approx(axis.zero, abs=0.02), "a loss is drawn to the left"
    assert (b.low, b.spread) == (0, 100), "an interval beyond the axis ends at its ends"
    assert (c.width, c.low, c.text) == (0, None, "–")


@every("value", [-5, -1, -0.5, 0, 0.3, 1, 7])
def test_colors_are_colors_and_text_on_them_reads(value):
    color = diverging(value)
    assert re.fullmatch("#[0-9a-f]{6}", css(color))
    linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in color]
    luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
    contrast = (luminance + 0.05) / 0.05 if text_color(color) == "#000" else 1.05 / (luminance + 0.05)
    assert contrast >= 4.5


def pair_on_disk(folder, **recipe) -> Evaluation:
    """Write two adapters, and return the evaluation of a merge of them."""
    cohort([(12, 10), (8, 12)], [2, 2], seed=3).save(folder)
    places = {name: folder / name for name in ("adapter0", "adapter1")}
    adapters = [{"name": name, "path": str(place)} for name, place in places.items()]
    sources = tuple(
        SingleAdapter(name=name, path=str(place), repo=None, commit=None, sha256=sha256(place / "adapter_model.safetensors"))
        for name, place in places.items()
    )
    return evaluation(task("a", 0.9), recipe={"adapters": adapters, **recipe}, sources=sources)


def test_adapters_are_compared_where_they_still_are(tmp_path):
    weights = {"policy": "per_layer", "layers": {"1": {"adapter0": 0.25}}}
    run = run_folder(tmp_path / "run", pair_on_disk(tmp_path, weights=weights))
    report = read_report([run])
    assert report.conflict is not None
    assert report.conflict.layers[0].overlap_a[0][1] is not None
    assert report.weights is not None
    assert report.weights.values == ((1.0, 1.0), (0.25, 1.0))
    text = Page(render(report, title="t")).text
    assert "Coefficients Weights. What each adapter is multiplied by" in text
    assert "1 0.25 1.00" in text, "layer 1 among the numbers"
    assert "adapter0 · adapter1" in text
    shutil.rmtree(tmp_path / "adapter0")
    gone = read_report([run])
    assert gone.conflict is None
    assert "adapter0" in gone.notes[0]


def _other_bytes(folder, found):
    return {"sources": (found.sources[0].model_copy(update={"sha256": "0" * 64}), found.sources[1])}


def _no_source(folder, found):
    return {"sources": found.sources[1:]}


def _pipe(folder, found):
    (folder / "adapter0" / "adapter_model.safetensors").unlink()
    os.mkfifo(folder / "adapter0" / "adapter_model.safetensors")
    return {}


def _endless(folder, found):
    (folder / "adapter0" / "adapter_model.safetensors").unlink()
    (folder / "adapter0" / "adapter_model.safetensors").symlink_to("/dev/zero")
    return {}


def _neighbor(folder, found):
    recipe = found.recipe | {"adapters": [found.recipe["adapters"][0] | {"path": str(folder / "adapter")}]}
    return {"recipe": recipe, "sources": (found.sources[0].model_copy(update={"path": str(folder / "adapter")}),)}


@every("change", [_other_bytes, _no_source, _pipe, _endless, _neighbor])
def test_a_run_from_elsewhere_shows_nothing_of_a_folder_whose_contents_it_does_not_know(tmp_path, change):
    folder = tmp_path / change.__name__
    found = pair_on_disk(folder)
    found = found.model_copy(update=change(folder, found))
    report = read_report([run_folder(folder / "run", found)])
    assert report.conflict is None
    assert report.weights is None
    (note,) = report.notes
    assert "adapter 'adapter0'" in note
    assert "not on this machine with the bytes that the run was made of" in note
    assert "adapter1" not in note, "no neighbor is named"


def test_a_run_from_elsewhere_asks_no_network(tmp_path, monkeypatch):
    """Neither for adapters, nor for the base of a DoRA merge or second moments."""

    def asked(*args, **kwargs):
        raise AssertionError("the network is asked")

    monkeypatch.setattr(socket.socket, "connect", asked)
    monkeypatch.setattr(socket, "getaddrinfo", asked)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", asked)
    adapters = [{"name": name, "path": f"stranger/{name}@main", "moments": "/dev/zero"} for name in ("a", "b")]
    recipe = {"adapters": adapters, "base_model": "stranger/base", "method": {"name": "regmean"}}
    sources = [
        SingleAdapter(name=name, path=f"stranger/{name}@main", repo=f"stranger/{name}", commit="0" * 40, sha256="0" * 64)
        for name in ("a", "b")
    ]
    report = read_report([run_folder(tmp_path / "run", evaluation(task("t", 0.9), recipe=recipe, sources=tuple(sources)))])
    assert report.conflict is None
    assert "'stranger/a@main' is not on this machine" in report.notes[0]


def test_an_adapter_of_the_hub_is_compared_from_the_cache(tmp_path, monkeypatch):
    found = pair_on_disk(tmp_path)
    storage = tmp_path / "cache" / "models--org--adapter0"
    commit = "1" * 40
    (storage / "snapshots").mkdir(parents=True)
    (tmp_path / "adapter0").rename(storage / "snapshots" / commit)
    (storage / "refs").mkdir()
    (storage / "refs" / "main").write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    first = {"name": "adapter0", "path": "org/adapter0"}
    source = found.sources[0].model_copy(update={"path": "org/adapter0", "repo": "org/adapter0", "commit": commit})
    recipe = found.recipe | {"adapters": [first, found.recipe["adapters"][1]]}
    found = found.model_copy(update={"recipe": recipe, "sources": (source, found.sources[1])})
    assert read_report([run_folder(tmp_path / "run", found)]).conflict is not None


def test_a_recipe_that_cannot_be_read_costs_only_what_is_drawn_from_it(tmp_path):
    """One of a later version, or of a method that is not installed here."""
    found = read_report([run_folder(tmp_path / "run", WHOLE.model_copy(update={"recipe": {"methd": "ties"}}))])
    assert found.evaluations[0].recipe == {"methd": "ties"}
    (note,) = found.notes
    assert note.startswith("the conflict between the adapters is not shown: recipe: adapters: 'adapters' is missing.")


@pytest.mark.parametrize("entry", ["kws", {"name": "x", "path": "kws"}, {"name": "x", "path": "a=kws"}])
def test_a_word_in_a_recipe_is_not_looked_up(tmp_path, monkeypatch, entry):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts" / "kws" / "adapters" / "secret").mkdir(parents=True)
    (tmp_path / "kwss").mkdir()
    found = read_report([run_folder(tmp_path / "run", WHOLE.model_copy(update={"recipe": {"adapters": [entry]}}))])
    (note,) = found.notes
    assert "is not on this machine with the bytes that the run was made of" in note
    assert not re.search("secret|kwss|artifacts", note)


def test_a_written_merge_brings_its_energy_and_its_lock(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    done = plait.report([tmp_path / "merged"], out=tmp_path / "r.html")
    page = Page(done.page.read_text())
    assert "Energy kept svd at rank 1." in page.text
    assert "plait.lock" in page.text


def test_the_run_record_of_a_bake_is_not_a_merges(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "made")
    lock, record = tmp_path / "made" / "plait.lock", tmp_path / "made" / "merge_metadata.json"
    lock.write_text(json.dumps({**json.loads(lock.read_text()), "kind": "bake"}))
    record.write_text(json.dumps({**json.loads(record.read_text()), "shards": {"model.safetensors": "0"}}))
    page = Page(plait.report([tmp_path / "made"], out=tmp_path / "r.html").page.read_text())
    assert "plait.lock" in page.text
    assert "Energy kept" not in page.text


@pytest.mark.parametrize("content", ["[" * 10_000, "{}", "a text", None])
def test_a_lock_that_is_none_is_refused_by_name(tmp_path, content):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    lock = tmp_path / "merged" / "plait.lock"
    lock.unlink()
    if content is None:
        lock.symlink_to(tmp_path / "nowhere")
    else:
        lock.write_text(content)
    with pytest.raises(ReportError, match=re.escape(str(lock))):
        plait.report([tmp_path / "merged"], out=tmp_path / "r.html")
    assert not (tmp_path / "r.html").exists()


def test_weights_that_are_the_same_everywhere_are_said_once(tmp_path):
    found = pair_on_disk(tmp_path, scale=1.5)
    found.recipe["adapters"][0]["weight"] = 0.7
    run = run_folder(tmp_path / "run", found)
    text = Page(render(read_report([run]), title="t")).text
    assert "0.7 × adapter0, 1 × adapter1, the same in all 2 layers; the merged delta is then multiplied by 1.5." in text


def test_an_exact_merge_lost_nothing(tmp_path):
    cohort([(12, 10)], [2, 2], seed=3).save(tmp_path)
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], out=tmp_path / "merged")
    text = Page(plait.report(tmp_path / "merged", out=tmp_path / "r.html").page.read_text()).text
    assert "linear in delta space: nothing was lost. Factors of rank 4 hold the complete merge of 1 modules." in text


def test_energy_is_weighed_by_kind_and_layer():
    def module(target: str, energy: float, kept: float) -> ModuleRecord:
        return ModuleRecord(target=target, rank=2, result="truncated", energy=energy, kept=kept)

    modules = (
        module("model.layers.0.mlp.experts.0.up", 3.0, 1.0),
        module("model.layers.0.mlp.experts.1.up", 1.0, 0.6),
        module("model.layers.1.mlp.up", 5.0, 0.5),
        module("lm_head", 1.0, 0.9),
    )
    record = RunRecord(
        plait="0", recipe={}, sources=(), method="svd", space="delta", result="truncated", rank=2, max_lora_rank=8, kept=0.7,
        lowest_kept=0.5, modules=modules, notes=(), finished="", seconds=0.0,
    )  # fmt: skip
    found = energy_map(record)
    assert found.columns == ("model.layers.0", "model.layers.1", "–")
    assert {name: [cell.text for cell in cells] for name, cells in found.rows} == {
        "up": ["90.0\xa0%", "50.0\xa0%", "–"],
        "lm_head": ["–", "–", "90.0\xa0%"],
    }
    up = found.rows[0][1]
    assert up[1].background == found.legend[0].background, "the least that was kept has the color of the scale's end"
    assert up[2].background == "transparent"


def board_of(*evaluations: Evaluation) -> Leaderboard:
    places = tuple(
        LeaderboardEntry(
            name=f"{e.name}!", tag=e.tag, method=e.method, space=e.space, mean_recovery=e.mean_recovery,
            worst_recovery=e.worst_recovery, worst_interval=e.worst_interval, worst_task=e.worst_task, below_base=e.below_base,
            recovery={t.task: t.recovery for t in e.tasks}, metric={t.task: t.merged for t in e.tasks},
        )
        for e in evaluations
    )  # fmt: skip
    first = evaluations[0]
    return Leaderboard(
        plait=plait.__version__, split="test", adapters=("a",), base={t.task: t.base for t in first.tasks},
        single={t.task: t.single for t in first.tasks}, places=places, skipped={"slerp": "takes two"}, notes=(),
    )  # fmt: skip


@pytest.fixture
def sweep(tmp_path):
    """Two merges on a leaderboard, in a workspace: the leaderboard's folder, and the second one's own run."""
    best = evaluation(task("maths", 0.95), task("code", 0.9), name="best", tag="ties_1")
    other = evaluation(task("maths", 0.8), task("code", 0.5), name="other", tag="ties_2")
    runs = [write_evaluation(tmp_path / "ws", e) for e in (best, other)]
    return write_comparison(tmp_path / "ws", ["a"], board_of(best, other).model_dump(mode="json")), runs[1]


def test_a_leaderboard_brings_what_stands_behind_its_places(sweep, tmp_path):
    board, _ = sweep
    report = read_report([board])
    assert [e.name for e in report.evaluations] == ["best!", "other!"]
    text = Page(plait.report(board, out=tmp_path / "r.html").page.read_text()).text
    for message in (
        "What best! kept",
        "best! is the best of 2 merges",
        "Compared with other merges",
        "not done: slerp: takes two",
        "perhaps",
    ):
        assert message in text, message
    assert read_report([board / "leaderboard.json"]) == report
    shutil.copytree(board, tmp_path / "elsewhere")
    alone = read_report([tmp_path / "elsewhere"])
    assert alone.evaluations == ()
    assert "Merges of a" in Page(plait.report(tmp_path / "elsewhere", out=tmp_path / "s.html").page.read_text()).text


def test_a_leaderboard_reads_results_of_its_own_workspace_alone(sweep, tmp_path):
    """Wherever it was unpacked, and whatever the workspace links to."""
    board, _ = sweep
    other = tmp_path / "ws" / "downloads" / "a" / "run_1"
    shutil.copytree(board, other)
    assert read_report([other]).evaluations == (), "the folder is none that plait eval writes"
    (result,) = (tmp_path / "ws").glob("merged/*/*/eval/test/eval_results_ties_1_test.json")
    result.rename(tmp_path / "secret.json")
    result.symlink_to(tmp_path / "secret.json")
    with pytest.raises(ReportError, match="outside the folder"):
        read_report([board])


@every("tag", ["a**b", "[x", "../../../../results", "\0"])
def test_a_leaderboard_from_elsewhere_leads_nowhere_else(tmp_path, tag):
    board = board_of(evaluation(task("a", 0.9)))
    board = board.model_copy(update={"places": (board.places[0].model_copy(update={"tag": tag}),)})
    file = tmp_path / "leaderboard.json"
    file.write_text(json.dumps(board.model_dump(mode="json")))
    if tag in ("a**b", "[x"):  # names of files, which are not there
        assert read_report([file]).evaluations == ()
    else:
        with pytest.raises(ReportError, match=r"leaderboard\.json"):
            read_report([file])


def test_the_run_that_is_named_first_is_what_the_page_is_about(sweep, tmp_path):
    board, other = sweep
    report = read_report([other, board])
    assert [e.tag for e in report.evaluations] == ["ties_2", "ties_1"], "each once"
    text = Page(render(report, title="t")).text
    assert "other is number 2 of 2 merges that were compared; best! is the best." in text


def test_figures_are_drawn_and_the_same_twice(tmp_path):
    run = run_folder(tmp_path / "run", WHOLE)
    first = plait.report(run, out=tmp_path / "a.html", figures=tmp_path / "a")
    second = plait.report(run, out=tmp_path / "b.html", figures=tmp_path / "b")
    names = [f.name for f in first.figures]
    assert names == ["recovery.svg", "recovery.png", "interference.svg", "interference.png"]
    for one, other in zip(first.figures, second.figures, strict=True):
        assert one.read_bytes() == other.read_bytes(), one.name
    assert first.figures[1].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(OutputError, match=rf"has {names[0]}, .* already"):
        plait.report(run, out=tmp_path / "c.html", figures=tmp_path / "a")
    assert not (tmp_path / "c.html").exists()
    plait.report(run, out=tmp_path / "c.html", figures=tmp_path / "a", force=True)
    assert "maths" in first.figures[0].read_text()


def test_what_layers_have_is_drawn_layer_by_layer(sweep, tmp_path):
    run = run_folder(tmp_path / "run", pair_on_disk(tmp_path, weights={"policy": "lines", "alpha": 0.3, "beta": 0.7}))
    plait.merge([tmp_path / "adapter0", tmp_path / "adapter1"], method="svd", rank=1, out=tmp_path / "merged")
    done = plait.report([run, sweep[0], tmp_path / "merged"], out=tmp_path / "r.html", figures=tmp_path / "figures")
    drawn = {f.stem for f in done.figures}
    layers = {"layers_cosine", "layers_sign_conflict", "layers_overlap_a", "layers_overlap_b"}
    assert drawn == {"recovery", "leaderboard", "weights", "energy", *layers}
    assert "sign conflict" in (tmp_path / "figures" / "layers_sign_conflict.svg").read_text().lower()


def test_what_is_no_run_is_told_all_at_once(tmp_path):
    (tmp_path / "empty").mkdir()
    broken = tmp_path / "eval_results_test.json"
    broken.write_text(json.dumps({"version": 1}))
    with pytest.raises(ReportError) as caught:
        plait.report([tmp_path / "nowhere", tmp_path / "empty", broken], out=tmp_path / "r.html")
    for message in ("nowhere: is not a file or folder", "empty: holds no run", "not a result that this version of plait wrote"):
        assert message in str(caught.value)
    assert not (tmp_path / "r.html").exists()


def test_a_page_is_replaced_only_when_asked(tmp_path):
    run = run_folder(tmp_path / "run", WHOLE)
    page = tmp_path / "r.html"
    page.write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        plait.report(run, out=page)
    with pytest.raises(OutputError, match="was not written by plait report"):
        plait.report(run, out=page, force=True)
    assert page.read_text() == "mine"
    page.unlink()
    plait.report(run, out=page, title="the first")
    plait.report(run, out=page, force=True)
    assert "What ties kept" in page.read_text()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["r.html", "run"]


@pytest.mark.skipif(BROWSER is None, reason="no browser: install Chromium (apt-get install chromium) to have the page drawn")
def test_chromium_draws_it_without_errors_or_requests(sweep, tmp_path):
    """The page's own bars have widths, nothing is fetched, nothing is logged; at the width of a phone nothing sticks out."""
    assert BROWSER is not None
    page = tmp_path / "r.html"
    pair = pair_on_disk(tmp_path)
    long = "a-task-with-a-very-long-name_that_does_not_end_and_has_no_blank"
    tasks = (WHOLE.tasks[0].model_copy(update={"task": long}), *WHOLE.tasks[1:])
    found = WHOLE.model_copy(update={"recipe": pair.recipe, "sources": pair.sources, "tasks": tasks})
    plait.report([run_folder(tmp_path / "run", found), sweep[0]], out=page)
    frames = "".join(f'<iframe width={w} height=900 srcdoc="{escape(page.read_text())}"></iframe>' for w in WIDTHS)
    frame = tmp_path / "frame.html"
    frame.write_text(f"<!doctype html><meta charset=utf-8><title></title>{frames}{_PROBE}", encoding="utf-8")
    done = subprocess.run(
        [
            *(BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"),
            *("--disable-component-update", "--disable-sync", "--disable-quic", "--disable-dev-shm-usage"),
            f"--user-data-dir={tmp_path / 'profile'}",
            *("--enable-logging=stderr", "--virtual-time-budget=2000", "--dump-dom", frame.as_uri()),
        ],
        env={**os.environ, "HOME": str(tmp_path), "XDG_CONFIG_HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr
    found = re.search(r"<title>(.+?)</title>", done.stdout)
    assert found is not None
    drawn = json.loads(unescape(found[1]))
    assert [d["width"] for d in drawn] == list(WIDTHS)
    for one in drawn:
        assert one["fetched"] == 0
        assert one["needed"] <= one["width"], "the page sticks out at the side"
        assert one["hidden"] == 0, "numbers pushed out of sight by a long name"
        assert [width > 0 for width in one["bars"]] == [True, True, False]
        assert len(one["cells"]) == 4 * 2, "four measures, two layers"
        assert all(width > 50 for width in one["cells"])


def test_a_page_names_no_folder_of_this_machine():
    recipe = {"adapters": [{"name": "a", "path": "/home/me/runs/a"}], "method": {"name": "ties"}, "tasks": ["/home/me/a.yaml"]}
    sources = (SingleAdapter(name="a", path="/home/me/runs/a", repo=None, commit=None, sha256="0" * 64),)
    page = render(Report(evaluations=(evaluation(task("a", 0.9), recipe=recipe, sources=sources),)), title="t")
    assert "/home/me" not in page
    assert "path: a\n" in page
