"""The Makefile names tests that exist: a file that was renamed would silently be left out of what runs with other releases."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variable", ["LIBRARY_TESTS", "TRAINING_TESTS"])
def test_the_tests_that_run_with_other_releases_exist(variable: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{variable} := $(addprefix tests/,$(addsuffix .py, ")
    assert found
    words = rest.partition("))")[0].replace("\\", " ").split()
    assert len(words) > 5
    assert not [word for word in words if not (ROOT / "tests" / f"{word}.py").is_file()]
