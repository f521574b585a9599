"""Module patterns: what PEFT matches, in bounded time."""

from __future__ import annotations

import random
import re
from contextlib import suppress
from pathlib import Path

import pytest

from plait.adapters import patterns
from plait.adapters.config import AdapterConfig
from plait.adapters.patterns import PatternError, PatternTable, full_path_pattern, module_pattern
from tests.every import every

PARTS = [
    "a", "b", ".", r"\.", "[ab]", "[^a]", r"[\d-z]", r"\d", r"\D", r"\w", r"\W", r"\s", r"\S", "a*", "b+", "(a|b)", "(ab)?",
    "(a*)*", "a{2}", "a{0,3}", "(?:a|ab)+?", "^", "$", r"\A", r"\Z", r"\b", r"\B", "(?=a)", "(?!b)", "(?<=a)", "(?<!b.)",
    "q_proj", "layers", r"[0-9]+", "x|y",
]  # fmt: skip
MODULES = ["a", "ab", "aab.ab", "layers.0.q_proj", "model.layers.11.a.b", "b.b.b", "aaaaab", "x.layers", "1a", "a1b", "a b.a"]


def test_patterns_mean_what_peft_reads_in_them():
    chosen = random.Random(0)
    compared = 0
    for _ in range(3000):
        pattern = "".join(chosen.choice(PARTS) for _ in range(chosen.randint(1, 5)))
        try:
            asked = re.compile(rf"(.*\.)?({pattern})$")
        except re.error:
            continue
        matches = module_pattern(pattern)
        for module in MODULES:
            assert matches(module) is bool(asked.match(module)), (pattern, module)
            compared += 1
    assert compared > 20_000


@pytest.mark.parametrize("pattern", ["(a+)+b", "(a|a)*b", "(a|aa)+$b", "(.*)*(.*)*(.*)*x", "([a-z]+)*7", "(a|a)" * 200 + "b"])
def test_patterns_that_take_for_ever_are_answered(pattern):
    assert not module_pattern(pattern)("a" * 200)


@every(
    ("pattern", "message"),
    [
        ("[", "not a regular expression"),
        ("(" * 1500, r"not a regular expression|nested too deeply"),
        ("a" * 3000 + "*", "3001 characters"),
        ("a{99999999999999999999}", "the repetition number is too large"),
        ("(?i)a", "flags"),
        ("(?i:a)", "it has subpattern"),
        (r"(a)\1", "it has groupref"),
        ("(((((a?){99}){99}){99}){99}){99}", "too long to match"),
        ("(?=(((((a?){99}){99}){99}){99}){99})b", "too long to match"),
    ],
)
def test_patterns_that_are_refused(pattern, message):
    with pytest.raises(PatternError, match=message):
        module_pattern(pattern)("a" * 100)


@pytest.mark.parametrize("pattern", [r".*\.(q|v)_proj", "model.layers.[0-3].q_proj", r"(?!.*vision).*q_proj$", "q_proj"])
def test_a_whole_path_is_matched_as_python_does(pattern: str) -> None:
    for module in ("model.layers.0.q_proj", "model.layers.7.q_proj", "vision.layers.0.q_proj", "q_proj", "model.v_proj"):
        assert full_path_pattern(pattern)(module) is (re.fullmatch(pattern, module) is not None), module


def test_an_expensive_selection_is_matched_at_once() -> None:
    assert not full_path_pattern("(a+)+b")("a" * 200)


def test_a_table_of_patterns_answers_as_each_of_them_does():
    chosen = random.Random(1)
    words = [*PARTS, "model.layers", ".0.", "a.b", "layers.0.q_proj", "q_proj", "x.layers"]
    for _ in range(60):
        drawn = []
        for _ in range(8):
            pattern = "".join(chosen.choice(words) for _ in range(chosen.randint(1, 3)))
            with suppress(PatternError):
                module_pattern(pattern)
                drawn.append(pattern)
        table = PatternTable(drawn)
        for module in [*MODULES, "model.layers", "model_layers.0.q_proj", "axb", "layersx0.q_proj", ""]:
            fits = [number for number, pattern in enumerate(drawn) if module_pattern(pattern)(module)]
            assert list(table.matching(module)) == fits, (drawn, module)


@pytest.mark.parametrize("form", ["{}", r"language_model\.(?:model\.)?{}"])
def test_as_many_patterns_as_modules_take_as_long_as_modules(form, monkeypatch):
    """As `layout: pattern` writes them: no module may be matched with every pattern."""
    modules = [f"model.language_model.layers.{i}.{name}" for i in range(200) for name in ("q_proj", "k_proj", "up_proj")]
    tails = [m.removeprefix("model.language_model.") for m in modules]
    ranks = {form.format(t if form == "{}" else re.escape(t)): i + 1 for i, t in enumerate(tails)}
    config = AdapterConfig({"rank_pattern": ranks}, Path("adapter_config.json"))
    asked = []
    before = patterns.module_pattern
    monkeypatch.setattr(patterns, "module_pattern", lambda p: (asked.append(p), before(p))[1])
    assert [config.rank(m) for m in modules] == list(range(1, len(modules) + 1))
    assert not config.idle_patterns("rank_pattern", modules)
    assert len(asked) <= 4 * len(modules)
