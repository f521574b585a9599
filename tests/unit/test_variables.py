"""Variables of the environment that are misspelled or invalid; options that are given twice; widths that are not one."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from plait.cli.variables import forget_impossible_widths
from plait.testing import cohort
from tests.command_line import exit_code
from tests.every import every


@pytest.fixture
def pair(tmp_path, monkeypatch) -> list[str]:
    """Two adapters in the working directory."""
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    return ["./adapter0", "./adapter1"]


@every("width", ["0", "00", "-3", "x", "²", "1e2", "", "9" * 30])
def test_a_width_that_is_not_a_positive_number_is_not_set(width, monkeypatch):
    for name in ("COLUMNS", "LINES", "TERMINAL_WIDTH"):
        monkeypatch.setenv(name, width)
    forget_impossible_widths()
    assert not {"COLUMNS", "LINES", "TERMINAL_WIDTH"} & os.environ.keys()


def test_a_width_that_is_one_is_kept(monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    forget_impossible_widths()
    assert os.environ["COLUMNS"] == "40"


@every(
    ("words", "code", "shown"),
    [
        (("methods",), 0, ["dc_merge"]),
        (("merge", "./nowhere", "./neither", "-o", "out"), 2, ["nowhere"]),
        (("methods", "--nonsense"), 2, ["No such option", "--nonsense"]),
    ],
)
def test_a_terminal_of_no_width(words, code, shown):
    environment = os.environ | {"COLUMNS": "0", "TERMINAL_WIDTH": "no"}
    command = [sys.executable, "-m", "plait", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == code
    assert [text for text in shown if text not in done.stdout + done.stderr] == []


@pytest.mark.parametrize("name", ["PLAIT_QUIET", "PLAIT_VERBOSE", "PLAIT_TRACEBACK"])
def test_a_switch_is_on_or_off(name, pair, capsys, monkeypatch):
    monkeypatch.setenv(name, "nonsense")
    assert exit_code("merge", *pair, "-o", "out", "--dry-run") == 2
    shown = capsys.readouterr()
    assert shown.err == f"error: the variable {name} is 'nonsense'; it must be 1 or true, or 0 or false.\n"
    assert shown.out == ""


@every(("word", "quiet"), [("on", True), ("Yes", True), ("off", False), ("no", False), ("", False)])
def test_words_of_switches(word, quiet, pair, capsys, monkeypatch):
    monkeypatch.setenv("PLAIT_QUIET", word)
    assert exit_code("merge", *pair, "-o", "out", "--force") == 0
    assert (capsys.readouterr().err == "") is quiet


@every(
    ("given", "meant"),
    [
        ("PLAIT_MERGE_SCLAE", "PLAIT_MERGE_SCALE"),
        ("PLAIT_QIUET", "PLAIT_QUIET"),
        ("PLAIT_TASKS_CHECK_MODLE", "PLAIT_TASKS_CHECK_MODEL"),
    ],
)
def test_a_misspelled_variable_is_noted(given, meant, pair, capsys, monkeypatch):
    monkeypatch.setenv(given, "1")
    assert exit_code("merge", *pair, "-o", "out", "--dry-run") == 0
    assert f"note: the variable {given} changes nothing: no option has it. Did you mean {meant!r}?" in capsys.readouterr().err


def test_variables_of_others_are_not_noted(pair, capsys, monkeypatch):
    for name in ("PLAIT_HOME", "PLAIT_NOTHING_SKIPPED", "PLAITS_MERGE_SCALE", "PLAIT_MERGE_SCALE", "PLAIT_QUIET"):
        monkeypatch.setenv(name, "0")
    assert exit_code("merge", *pair, "-o", "out", "--dry-run") == 0
    assert "the variable" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "value", "option"),
    [
        ("WEIGHTS", "1,2,3", "--weights"),
        ("SCALE", "x", "--scale"),
        ("METHOD", "tise", "--method"),
        ("OUT", "adapter0", "--out"),
    ],
)
def test_what_is_refused_of_a_variable_names_it(name, value, option, pair, capsys, monkeypatch):
    monkeypatch.setenv(f"PLAIT_MERGE_{name}", value)
    monkeypatch.setenv("PLAIT_MERGE_SEED", "7")
    assert exit_code("merge", *pair, *(() if name == "OUT" else ("-o", "out"))) == 2
    shown = capsys.readouterr().err
    assert f"{option} is given by the variable PLAIT_MERGE_{name}={value}." in shown
    assert "SEED" not in shown, "the error is not about it"


@every(("name", "value"), [("WORKERS", "x"), ("FORCE", "nonsense")])
def test_a_value_of_another_type_is_that_of_the_variable(name, value, pair, capsys, monkeypatch):
    monkeypatch.setenv(f"PLAIT_MERGE_{name}", value)
    assert exit_code("merge", *pair, "-o", "out") == 2
    assert f"the variable PLAIT_MERGE_{name}" in capsys.readouterr().err
    monkeypatch.delenv(f"PLAIT_MERGE_{name}")
    assert exit_code("merge", *pair, "-o", "out", "--workers", "x") == 2
    assert "'--workers'" in capsys.readouterr().err


def test_an_option_with_one_value_is_given_once(pair, tmp_path, capsys):
    assert exit_code("merge", *pair, "-o", "A", "--out", "B", "--scale", "1", "--scale=2") == 2
    shown = capsys.readouterr().err
    assert "--out is given more than once; it takes one value." in shown
    assert "--scale is given more than once" in shown
    assert not (tmp_path / "B").exists()
    assert exit_code("merge", *pair, "-o", "A", "--force", "--force", "--set", "scale=2", "--set", "seed=3") == 0


def test_a_name_that_begins_like_an_option_may_be_a_file(pair, tmp_path, capsys):
    (tmp_path / "adapter0").rename(tmp_path / "-x")
    assert exit_code("inspect", "-x") == 2
    assert "of that name is written ./-x" in " ".join(capsys.readouterr().err.split())
    assert exit_code("inspect", "./-x") == 0
    capsys.readouterr()
    assert exit_code("inspect", "-y") == 2
    assert "written" not in capsys.readouterr().err
