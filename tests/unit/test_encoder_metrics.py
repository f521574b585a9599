"""Metrics of labels per word and of numbers: seqeval's and scipy's values, and the bootstrap's sums behind them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import pearsonr, spearmanr

from plait.errors import TaskError
from plait.evaluation.recovery import PairedStatistics
from plait.tasks.answers import Answer, Metric
from plait.tasks.encoding import encode_readings
from plait.tasks.examples import read_examples
from plait.tasks.inputs import Words
from plait.tasks.kinds import KINDS
from plait.tasks.loading import load_task
from plait.tasks.metrics import entities, metric_of
from tests.language_models import tokenizer

TAGS = ("O", "B-X", "I-X", "B-Y", "I-Y", "S-X", "E-X")
#: right, given, and what seqeval 1.2.2 says of both: entities of the right, F1
SEQEVAL = [
    ("O B-X I-X O", "O B-X I-X O", [("X", 1, 3)], 1.0),
    ("O B-X I-X O", "O I-X I-X O", [("X", 1, 3)], 1.0),
    ("B-X B-X I-X", "B-X I-X I-X", [("X", 0, 1), ("X", 1, 3)], 0.0),
    ("B-X I-Y I-X", "B-X I-Y O", [("X", 0, 1), ("Y", 1, 2), ("X", 2, 3)], 0.8),
    ("S-X B-X E-X I-X", "S-X S-X O I-X", [("X", 0, 1), ("X", 1, 3), ("X", 3, 4)], 2 / 3),
    ("B-X I-X E-X E-X B-Y", "B-X I-X I-X E-X I-Y", [("X", 0, 3), ("X", 3, 4), ("Y", 4, 5)], 0.4),
    ("O O", "O B-Y", [], 0.0),
    ("O O", "O O", [], 0.0),
]


def metric(kind: str, name: str) -> Metric:
    fields = {
        "token_classification": {"labels": TAGS},
        "regression": {"prompt": "{{ x }}", "target": "{{ y }}"},
    }[kind]
    splits: Any = {"data": {"path": "x"}, "splits": {"test": "x"}}
    return metric_of(KINDS[kind].model_validate({"name": "t", "kind": kind, "metric": name, **splits, **fields}))


def tagged(pairs: list[tuple[str, str]]) -> list[Answer]:
    return [Answer(id=str(i), target=right, given=given) for i, (right, given) in enumerate(pairs)]


def numbered(given: Any, right: Any) -> list[Answer]:
    return [
        Answer(id=str(i), target=str(y), given="", scores=(float(x),))
        for i, (x, y) in enumerate(zip(given, right, strict=True))
    ]


@pytest.mark.parametrize(("right", "given", "found", "f1"), SEQEVAL)
def test_entities_are_those_of_seqeval(right: str, given: str, found: list[tuple[str, int, int]], f1: float) -> None:
    assert entities(right.split()) == set(found)
    assert metric("token_classification", "entity_f1").value(tagged([(right, given)])) == pytest.approx(f1)


def test_f1_is_over_all_texts_and_words_are_counted_one_by_one() -> None:
    answers = tagged([("B-X O", "B-X O"), ("B-Y I-Y O O", "B-Y O B-X O")])
    assert metric("token_classification", "entity_f1").value(answers) == pytest.approx(2 * 1 / (2 + 3))
    assert metric("token_classification", "word_accuracy").value(answers) == pytest.approx(4 / 6)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_correlations_are_scipys_and_so_are_their_intervals(name: str) -> None:
    """Sums over all examples give the value itself; the spread of draws is that of resampled correlations."""
    random = np.random.default_rng(0)
    right = np.round(random.normal(size=300) * 3)  # with ties
    given = right + random.normal(size=300) * 2
    own, answers = metric("regression", name), numbered(given, right)
    plain = {"pearson": pearsonr, "spearman": spearmanr}[name]
    assert own.value(answers) == pytest.approx(plain(given, right).statistic)
    statistics = own.statistics(answers)
    assert float(own.from_sums(statistics.sum(0))) == pytest.approx(own.value(answers))
    draws = PairedStatistics(own, statistics, None, statistics).draws(2000, (1,)).merged
    again = []
    for _ in range(400):
        some = random.integers(0, 300, 300)
        again.append(plain(given[some], right[some]).statistic)
    assert draws.std() == pytest.approx(np.std(again), rel=0.15)


def test_pseudo_values_leave_out_one_answer_each() -> None:
    right, given = np.array([1.0, 2, 2, 5, 4, 4, 3]), np.array([0.5, 0.5, 3, 2, 9, 1, 1])
    own = metric("regression", "spearman")
    whole = own.value(numbered(given, right))
    without = np.array([spearmanr(np.delete(given, i), np.delete(right, i)).statistic for i in range(len(right))])
    expected = whole + (len(right) - 1) * (without.mean() - without)
    np.testing.assert_allclose(own.statistics(numbered(given, right))[:, 0], expected, atol=1e-12)


@pytest.mark.parametrize("name", ["pearson", "spearman"])
def test_nothing_correlates_with_one_number(name: str) -> None:
    own = metric("regression", name)
    for given, right in (([2.0] * 4, [1.0, 2, 3, 4]), ([1.0, 2, 3, 4], [2.0] * 4), ([1.0], [2.0])):
        answers = numbered(given, right)
        assert own.value(answers) == float(own.from_sums(own.statistics(answers).sum(0))) == 0.0


def test_squared_errors_are_better_where_smaller() -> None:
    own = metric("regression", "mean_squared_error")
    assert own.value(numbered([1.0, 3.0], [2.0, 3.0])) == 0.5
    assert not own.higher_is_better


HEAD = "name: t\nkind: token_classification\ndata: {path: rows.jsonl}\nsplits: {test: {rows: [0, 1]}}\n"
BAD_ROWS = {
    '{"words": "w1 w2", "tags": ["O"]}': "tags: 1 labels of 2 words",
    '{"words": ["w1"], "tags": [7]}': "tags: 7 is none of 'O', 'B-X', nor the number of one",
    '{"words": [], "tags": []}': "words: column 'words' is not a list of words; the row has words, tags",
    '{"text": "w1"}': "words: column 'words' is not a list of words; the row has text",
    '{"words": ["w1"], "tags": 3}': "tags: column 'tags' is not a list of labels",
}


@pytest.mark.parametrize("row", BAD_ROWS)
def test_rows_that_do_not_fit_are_named(tmp_path: Path, row: str) -> None:
    (tmp_path / "t.yaml").write_text(HEAD + "labels: [O, B-X]\n")
    (tmp_path / "rows.jsonl").write_text(row + "\n")
    with pytest.raises(TaskError) as error:
        read_examples(load_task(tmp_path / "t.yaml"), "test")
    assert BAD_ROWS[row] in str(error.value)
    assert "row 0 of split 'test'" in str(error.value)


BAD_FILES = {
    "labels: [O, NOUN]\n": "'NOUN' is not O, B-…, I-…, E-… or S-…, of which 'entity_f1' makes entities; use 'word_accuracy'",
    "labels: [O, 'B- X']\n": "'B- X' has a blank",
    "labels: [O, B-X]\nprompt: '{{ x }}'\n": "'prompt' has no place here",
}


@pytest.mark.parametrize("rest", BAD_FILES)
def test_what_has_no_place_in_a_file_is_said(tmp_path: Path, rest: str) -> None:
    (tmp_path / "t.yaml").write_text(HEAD + rest)
    with pytest.raises(TaskError) as error:
        load_task(tmp_path / "t.yaml")
    assert BAD_FILES[rest] in str(error.value)


def test_a_target_must_be_a_number(tmp_path: Path) -> None:
    place = "data: {path: rows.jsonl}\nsplits: {test: {rows: [0, 2]}}\n"
    (tmp_path / "t.yaml").write_text(f"name: t\nkind: regression\n{place}prompt: '{{{{ x }}}}'\ntarget: '{{{{ y }}}}'\n")
    (tmp_path / "rows.jsonl").write_text('{"x": "a", "y": "1.5"}\n{"x": "b", "y": "nan"}\n')
    with pytest.raises(TaskError, match="target 'nan' is not a number"):
        read_examples(load_task(tmp_path / "t.yaml"), "test")


def test_a_word_without_a_token_is_an_error() -> None:
    task: Any = KINDS["token_classification"].model_validate({"name": "t", "kind": "token_classification", "labels": TAGS})
    with pytest.raises(TaskError, match="makes no token of the word ' '"):
        encode_readings(tokenizer(), task, task.ask, [Words(("w1", " "))])
