"""The script behind the table of docs/tuning.md: its rows are tunings that exist, and its counts are those of a record."""

from __future__ import annotations

import shlex
from types import ModuleType
from typing import Any

import pytest

from plait.recipes.tuning import TuneSpec
from tests.demo import module

KEYS = {"--count": int, "--steps": int, "--split": str, "--texts": str, "--objective": str, "--granularity": str}
OTHERS = {"--rank", "--method"}


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return module("tuning_table", monkeypatch)


def test_every_row_is_a_tuning(script: ModuleType) -> None:
    for options in script.ROWS.values():
        words, settings = iter(shlex.split(options)), {}
        for word in words:
            if word in KEYS:
                settings[word[2:]] = KEYS[word](next(words))
            elif word == "--set":
                key, value = next(words).removeprefix("tune.").split("=")
                settings[key] = int(value)
            elif word in OTHERS:
                next(words)
            else:
                assert word == "--controls"
        TuneSpec.model_validate(settings)


def test_counts_what_was_read(script: ModuleType) -> None:
    spec: dict[str, Any] = {"held_out": 0.2, "prompts": 4, "accumulate": 2}
    record = {
        "recipe": {"tune": spec},
        "texts": [{"count": 100}, {"count": 6}],
        "scales": [[1, 0.1]] * 5,
        "looks": [{}] * 3,
        "losses": [0.0] * 10,
    }
    assert script.passes(record) == {"read": 106 + (50 + 6) + (20 + 6) * (1 + 5 + 3), "learned": 10 * 8 * 2}


def test_writes_a_row_per_name(script: ModuleType) -> None:
    run = {"rank": 8, "mean": 0.986, "worst": -0.0238, "seconds": 84.2, "passes": {"read": 5, "learned": 0}}
    *_, line = script.table({"lines": {0: run, 1: run}})
    assert line == "| lines | `--texts lines` | 8 | .99 / -.02 · .99 / -.02 | 5 / 0 | 84 s |"
