"""The Makefile names tests that exist, the workflows rules that exist, the container files that exist.

A file that was renamed would silently be left out of what runs with other releases.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("variable", ["LIBRARY_TESTS", "TRAINING_TESTS"])
def test_the_tests_that_run_with_other_releases_exist(variable: str) -> None:
    text = (ROOT / "Makefile").read_text(encoding="utf-8")
    _, found, rest = text.partition(f"\n{variable} := $(addprefix tests/,$(addsuffix .py, ")
    assert found
    words = rest.partition("))")[0].replace("\\", " ").split()
    assert len(words) > 5
    assert not [word for word in words if not (ROOT / "tests" / f"{word}.py").is_file()]


def test_workflows_call_what_is_there_and_try_every_python():
    workflows = {path.stem: yaml.safe_load(path.read_text()) for path in (ROOT / ".github" / "workflows").glob("*.yml")}
    assert set(workflows) == {"test", "release"}
    lines = [step["run"] for w in workflows.values() for job in w["jobs"].values() for step in job["steps"] if "run" in step]
    targets = {word.replace("${{ matrix.versions }}", name) for line in lines for word in re.findall(r"^make (\S.*)$", line)
               for name in ("newest", "oldest")}  # fmt: skip
    assert {"check", "test", "test-newest", "test-oldest", "site", "package"} == targets
    rules = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert targets <= rules
    assert workflows["test"]["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]
    tests = [word for line in lines if "pytest" in line for word in line.split() if word.startswith("tests/")]
    assert tests
    assert all((ROOT / path).exists() for path in tests)


def test_the_container_copies_what_is_there():
    copied = [
        word
        for line in (ROOT / "Dockerfile").read_text().splitlines()
        if line.startswith("COPY")
        for word in line.split()[1:-1]
    ]
    assert {"src", "examples", "pyproject.toml"} <= {*copied}
    assert all((ROOT / path).exists() for path in copied)
