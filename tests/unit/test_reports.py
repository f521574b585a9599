"""The report: what is read, what it shows, what is drawn."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from html import escape, unescape

import pytest

import plait
from plait.errors import OutputError
from plait.evaluation.record import SingleAdapter
from plait.evaluation.workspace import write_evaluation
from plait.merging.record import RunRecord
from plait.reports.charts import _confusion_map, energy_map, recovery_bars, show_interval, show_share, task_recoveries
from plait.reports.colors import css, diverging, text_color
from plait.reports.page import render
from plait.reports.reading import Report
from plait.reports.verdict import certainty, verdict
from plait.results.records import ModuleRecord
from tests.evaluated import HOSTILE, WHOLE, Page, evaluation, leaderboard_on_disk, pair_on_disk, run_folder, task
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


def test_a_label_that_was_never_given_is_not_colored():
    """A pale color is the brightest there is on a dark page."""
    cells = dict(_confusion_map("t", ("a", "b"), ((3, 1), (0, 0))).rows)
    assert [cell.background for cell in cells["a"]] == [css(diverging(0.75)), css(diverging(-0.25))]
    assert [(cell.text, cell.background, cell.ink) for cell in cells["b"]] == 2 * [("0", "transparent", "inherit")]


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


def test_what_a_model_says_may_hold_the_character_nul(tmp_path):
    first, *others = WHOLE.tasks
    sample = first.samples[0].model_copy(update={"merged": "a\0b"})
    found = WHOLE.model_copy(update={"tasks": (first.model_copy(update={"samples": (sample,)}), *others)})
    plait.report(run_folder(tmp_path / "run", found), out=tmp_path / "r.html")
    page = (tmp_path / "r.html").read_text()
    assert "a␀b" in page
    assert "\0" not in page
    for _ in range(2):  # nothing is announced to be written again
        write_evaluation(tmp_path / "work", found)


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
def test_chromium_draws_it_without_errors_or_requests(tmp_path):
    sweep = leaderboard_on_disk(tmp_path)
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
