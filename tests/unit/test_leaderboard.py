"""The demo's leaderboard, without its model."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from plait.calibration.texts import overlap_with_evaluation, read_texts
from plait.evaluation.recovery import BootstrapDraws
from plait.recipes.request import read_request
from plait.tasks.examples import read_examples
from plait.tasks.loading import load_tasks
from tests.demo import DEMO, TASKS, module
from tests.evaluated import evaluation
from tests.evaluated import task as result


@pytest.fixture
def board(monkeypatch):
    return module("leaderboard", monkeypatch)


@pytest.fixture
def contestants(monkeypatch):
    return module("contestants", monkeypatch)


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


def judged(recoveries, metrics=(0.8, 0.8, 0.9)):
    tasks = (result(name, r, merged=m) for name, r, m in zip(TASKS, recoveries, metrics, strict=True))
    return evaluation(*tasks, mean_interval=(0.7, 0.9), worst_interval=(0.4, 0.6))


def placed(board, name, validation, test, seed=0):
    """Return a contestant with these recoveries; those of the bootstrap lie around the ones on the test."""
    contestant = next(c for c in board.CONTESTANTS if c.name == name)
    noise = np.random.default_rng(seed).normal(0, 0.05, (3, 400))
    none = np.zeros(400)
    drawn = {n: BootstrapDraws(none, none, none, r + e) for n, r, e in zip(TASKS, test, noise, strict=True)}
    return board.Placed(contestant, board.Setting(contestant.variants[0], 1.5), 4, judged(validation), judged(test), drawn)


def test_the_table_is_ordered_by_the_mean_on_the_test_texts(board):
    rows = [placed(board, "linear", (1, 1, 1), (0.4, 0.5, 0.6)), placed(board, "regmean", (0.5, 0.6, 0.7), (0.8, 0.9, 1.0))]
    lines = board.table(rows).splitlines()
    assert len(lines) == 4
    assert lines[2].startswith("| `regmean` | texts | ridge 0.01, scale 1.5 (4) | 0.60 / 0.50 | .800 | .800 | .900 |")
    assert "| 0.90 (0.70 – 0.90) | 0.80 (0.40 – 0.60) | +0.40 (+0.40 – +0.40) |" in lines[2], "paired: the noise is the same"
    assert lines[3].startswith("| `linear` | – | scale 1.5 (4) | 1.00 / 1.00 |")
    assert lines[3].endswith(" | – |")


def test_the_difference_to_the_sum_has_an_interval_of_its_own(board):
    rows = [placed(board, "linear", (1, 1, 1), (0.4, 0.5, 0.6), seed=1), placed(board, "tsv", (1, 1, 1), (0.5, 0.6, 0.7))]
    message = board.table(rows).splitlines()[2].split(" | ")[-1]
    value, low, high = (float(x) for x in re.findall(r"[+-]\d\.\d\d", message))
    assert value == 0.1
    width = 1.96 * 0.05 * np.sqrt(2 / 3)  # of a difference of two means of three
    assert (value - low, high - value) == pytest.approx((width, width), abs=0.02)


def test_references_of_both_splits(board):
    message = board.references([placed(board, "linear", (1, 1, 1), (0.4, 0.5, 0.6))]).splitlines()
    assert message[2] == "| validation | base model | .200 | .200 | .200 |"
    assert message[5] == "| test | its own adapter | .900 | .900 | .900 |"


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


def test_texts_for_moments_are_training_texts_and_no_label_chooses_them(board, tmp_path):
    files = board.texts_of_moments(tmp_path)
    for task in load_tasks([DEMO / "tasks" / f"{name}.yaml" for name in TASKS]):
        texts = read_texts(task, kind="file", count=board.TEXTS, seed=0, file=files[task.name])
        taken = [str(e.prompt) for e in read_examples(task, "train").items[: board.TEXTS]]
        assert [str(p) for p in texts.prompts] == taken
        assert overlap_with_evaluation(texts) == []
        assert "label" not in Path(files[task.name]).read_text(encoding="utf-8")
