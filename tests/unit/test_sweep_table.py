"""The script that compares searches with grids: its studies are searches that exist, and its table is made of their records."""

from __future__ import annotations

import json
import shlex
from types import ModuleType

import pytest

from plait.recipes.search import SearchSpec
from tests.demo import module


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("sweep_table", monkeypatch)


def test_every_study_is_a_search_of_twenty_candidates(script: ModuleType) -> None:
    for options in script.ROWS.values():
        words, given = shlex.split(options), {"space": {}, "grid": {}}
        for flag, value in zip(words[::2], words[1::2], strict=True):
            if flag in ("--space", "--grid"):
                path, _, values = value.partition("=")
                given[flag[2:]][path] = values
            elif flag == "--points":
                given["points"] = json.loads(value)
            elif flag == "--race":
                given["race"] = value
            else:
                assert flag in ("--method", "--method-space", "--subset", "--per-task")
        spec = SearchSpec.model_validate(given)
        size = 1
        for values in spec.grid.values():
            size *= len(values)
        assert (size if spec.used_type == "grid" else spec.used_budget) == 20
        assert len(spec.points) in (0, 20)
        assert len({json.dumps(point) for point in spec.points}) == len(spec.points)


def test_writes_a_row_per_study_and_seed(script: ModuleType) -> None:
    def run(phase: str, score: float, scale: float) -> dict[str, object]:
        return {
            "phase": phase, "score": score, "params": {"scale": scale}, "score_details": {"mean_interference_delta": score},
        }  # fmt: skip

    record = {
        "runs": [run("start", 0.5, 1), run("search", 0.4, 2), run("search", 0.75, 0.3)],
        "best_index": 2,
        "examples_asked": 700,
        "examples_of_all": 1200,
        "post_sweep_eval": {"worst_recovery": 0.7, "worst_interval": [0.6, 0.8], "mean_recovery": 0.9},
    }
    *_, line = script.table({"ties, bayes": {1: script.row(record)}})
    assert line == "| ties, bayes | 1 | scale 0.3 | .75 / .75 | 2 | 700 of 1200 | .70 (.60 – .80) / .90 |"
