"""The parts of the demo's leaderboard that need no model."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from plait.recipes.request import read_request

DEMO = Path(__file__).parents[2] / "examples" / "demo"


@pytest.fixture
def board(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("leaderboard")


@pytest.fixture
def contestants(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    return importlib.import_module("contestants")


def test_every_setting_of_every_contestant_is_a_recipe(contestants):
    adapters = {n: DEMO / "adapters" / n for n in ("sentiment", "supersense", "langid")}
    for contestant in contestants.CONTESTANTS:
        assert list(contestant.scales) == sorted(contestant.scales)
        for settings in contestant.variants if not contestant.by_peft else ():
            recipe, _ = read_request(None, adapters, dict(settings))
            assert recipe.method_name == settings["method"]
            assert contestant.label.startswith(f"`{recipe.method_name}`")
    names = [c.name for c in contestants.CONTESTANTS]
    assert len(set(names)) == len(names) > 25
    assert set(contestants.QUICK) <= set(names)


@pytest.mark.parametrize(
    ("peak", "tried"),
    [
        (1.0, [0.5, 1.0, 2.0]),
        (2.0, [0.5, 1.0, 2.0, 2.8]),
        (3.5, [0.5, 1.0, 2.0, 2.8, 3.92, 5.49]),
        (0.34, [0.5, 1.0, 0.36, 0.26]),
    ],
)
def test_scales_are_tried_around_the_best(board, peak, tried):
    found = []

    def score(scale):
        found.append(scale)
        return -0.3 * abs(np.log(scale / peak))

    board.scan(score, (0.5, 1.0, 2.0))
    assert found == tried


def test_one_scale_is_not_extended(board):
    found = []
    board.scan(lambda scale: found.append(scale) or 1.0, (1.0,))
    assert found == [1.0]


def outcome(board, merged):
    right = np.arange(100)
    return board.Outcome(right < 20, right < 90, right < merged)


def placed(board, name, merged, test):
    contestant = next(c for c in board.CONTESTANTS if c.name == name)
    tasks = ("sentiment", "supersense", "langid")
    sides = [{t: outcome(board, m) for t, m in zip(tasks, values, strict=True)} for values in (merged, test)]
    return board.Placed(contestant, board.Setting(contestant.variants[0], 1.5), 4, *sides)


def test_the_table_is_ordered_by_the_mean_on_the_test_texts(board):
    rows = [placed(board, "linear", (90, 90, 90), (50, 55, 60)), placed(board, "regmean", (60, 60, 60), (80, 80, 90))]
    lines = board.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| `regmean` | texts | ridge 0.01, scale 1.5 (4) | 0.57 / 0.57 | .800 | .800 | .900 | 0.90 (")
    assert "| +0.40 (+0.3" in lines[2]
    assert lines[3].startswith("| `linear` | – | scale 1.5 (4) | 1.00 / 1.00 | .500 | .550 | .600 | 0.50 (")
    assert lines[3].endswith(" | – |")


def test_merges_that_are_right_on_the_same_texts_do_not_differ(board):
    tasks = {t: outcome(board, 60) for t in ("a", "b", "c")}
    assert board.advantage(tasks, tasks) == (0.0, (0.0, 0.0))
    value, (low, high) = board.advantage({t: outcome(board, 70) for t in tasks}, tasks)
    assert value == pytest.approx(1 / 7)
    assert 0.05 < low < value < high < 0.25


def test_only_generated_parts_are_replaced(board):
    page = "a\n<!-- x -->\nold\n<!-- /x -->\nb\n<!-- y -->\n<!-- /y -->\n"
    made = board.written(page, {"x": "new\n", "y": "\\1\n"})
    assert made == "a\n<!-- x -->\nnew\n<!-- /x -->\nb\n<!-- y -->\n\\1\n<!-- /y -->\n"
    with pytest.raises(ValueError, match="0 parts named 'z'"):
        board.written(page, {"z": ""})


def test_the_page_has_the_parts_that_are_generated(board):
    page = board.RESULTS.read_text(encoding="utf-8")
    made = board.written(page, {"references": "first\n", "leaderboard": "second\n"})
    for name, text in (("references", "first\n"), ("leaderboard", "second\n")):
        assert f"<!-- {name} -->\n{text}<!-- /{name} -->\n" in made
        assert f"<!-- {name} -->\n{text}" not in page


def test_scores_are_kept_by_everything_that_decides_them(board, tmp_path):
    scores = board.Scores(tmp_path / "scores")
    scores.put(np.array([True, False, True]), "model", "candidate", 1.0)
    assert scores.get("model", "candidate", 1.0).tolist() == [True, False, True]
    assert scores.get("model", "candidate", 1.5) is None
    assert [p.suffix for p in (tmp_path / "scores").iterdir()] == [""]


def test_texts_for_moments_are_training_texts_and_no_label_chooses_them(monkeypatch):
    monkeypatch.syspath_prepend(str(DEMO))
    moments, scoring = importlib.import_module("moments"), importlib.import_module("scoring")
    for task in scoring.load_tasks():
        texts = [e.text for e in moments.unlabelled(task)]
        assert texts == [e.text for e in task.examples("train")[: moments.TEXTS]]
        assert not {*texts} & {e.text for split in ("validation", "test") for e in task.examples(split)}
