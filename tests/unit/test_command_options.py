"""What every command takes: less and more output, variables, completion; and what `plait` is called by."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys

import pytest

import plait
from plait.cli.main import command_tree
from plait.cli.options import _DESCRIPTIONS, _help, flags_of, recipe_keys
from plait.mixer.mixer import EXAMPLES
from plait.testing import cohort
from tests.command_line import exit_code
from tests.every import every


@pytest.fixture
def pair(tmp_path, monkeypatch) -> list[str]:
    """Two adapters with another alpha each, which a merge notes, in the working directory."""
    cohort([(6, 4)], [2, 2]).save(tmp_path)
    monkeypatch.chdir(tmp_path)
    return ["./adapter0", "./adapter1"]


@every("place", ["before", "after", "short", "variable"])
def test_a_quiet_command_prints_its_result_alone(place, pair, capsys, monkeypatch):
    merge = ["merge", *pair, "--trust-remote-code", "--force", "-o"]
    assert exit_code(*merge, "loud") == 0
    assert "merge:" in (loud := capsys.readouterr()).err, "a line per stage"
    assert "note: --trust-remote-code changes nothing" in loud.err
    if place == "variable":
        monkeypatch.setenv("PLAIT_QUIET", "1")
    words = {"before": ["--quiet", *merge, "out"], "after": [*merge, "out", "--quiet"], "short": ["-q", *merge, "out"]}
    assert exit_code(*words.get(place, [*merge, "out"])) == 0
    quiet = capsys.readouterr()
    assert quiet.err == ""
    seconds = re.compile(r"[\d.]+ s$", re.MULTILINE)
    assert seconds.sub("", quiet.out.replace("out", "loud")) == seconds.sub("", loud.out)


def test_a_quiet_command_still_prints_errors(pair, capsys):
    assert exit_code("-q", "merge", *pair, "--method", "tise", "-o", "out") == 2
    assert "tise" in capsys.readouterr().err


@every("words", [["--verbose"], ["-v"], ["--traceback"]])
def test_a_verbose_command_shows_where_an_error_was_raised(words, pair, capsys):
    assert exit_code(*words, "merge", *pair, "--scale", "x", "-o", "out") == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_variable_gives_an_option_and_the_command_line_goes_before_it(pair, monkeypatch, tmp_path):
    monkeypatch.setenv("PLAIT_MERGE_OUT", "from-variable")
    monkeypatch.setenv("PLAIT_MERGE_SCALE", "0.5")
    assert exit_code("merge", *pair) == 0
    assert plait.Adapter.open(tmp_path / "from-variable", "a")
    assert exit_code("merge", *pair, "-o", "given") == 0
    assert plait.verify(tmp_path / "given", rebuild=False).ok
    assert '"scale": 0.5' in (tmp_path / "given" / "plait.lock").read_text()


def test_help_names_no_variables(capsys):
    assert exit_code("eval", "--help") == 0
    assert "PLAIT_EVAL" not in capsys.readouterr().out


def test_python_m_plait_is_the_same_command_and_completes() -> None:
    run = [sys.executable, "-m", "plait"]
    version = subprocess.run([*run, "--version"], capture_output=True, text=True, check=True).stdout
    assert version.split() == ["plait", plait.__version__]
    asked = {"_PLAIT_COMPLETE": "complete_bash", "COMP_WORDS": "plait ver", "COMP_CWORD": "1"}
    code = "import sys; sys.argv[0] = 'plait'; from plait.cli.main import main; main([])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=os.environ | asked)
    assert done.stdout.split() == ["verify"]


def test_every_command_has_two_examples_whose_options_it_has():
    for name, command in command_tree().commands.items():
        if hasattr(command, "commands"):
            continue
        examples = re.findall(r"Example: (plait [^\n]+)", command.help)
        assert len(examples) == 2, name
        known = {option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)}
        words = {word for example in examples for word in shlex.split(example) if word.startswith("-")}
        assert name == "sft" or not words - known, name
        assert {example.split()[1] for example in examples} == {name}


def test_options_and_commands_are_in_groups(capsys):
    assert exit_code("merge", "--help") == 0
    shown = capsys.readouterr().out
    for panel in ("Input", "The merge", "What is written", "This machine"):
        assert f" {panel} " in shown
    assert exit_code("--help") == 0
    assert " Judge and tune " in capsys.readouterr().out


def test_help_says_what_a_key_is_in_its_command():
    assert {path for _, path in _DESCRIPTIONS} <= {key.path for key in recipe_keys()}
    shown = {(command, key.path): _help(command, key) for command in ("mix", "tune") for key in flags_of(command).values()}
    assert f"; {EXAMPLES} when not given." in shown["mix", "eval.subset.max_samples"]
    assert "energy" not in shown["tune", "output.rank"]


def test_a_merge_without_a_method_says_what_the_default_is(pair, capsys):
    assert exit_code("merge", *pair, "-o", "plain") == 0
    assert "no --method is given: linear, the plain sum. dc_merge keeps more" in capsys.readouterr().err
    assert exit_code("merge", *pair, "--method", "linear", "-o", "chosen") == 0
    assert exit_code("merge", *pair, "--weights", "0.7", "0.3", "-o", "weighted") == 0
    assert exit_code("merge", pair[0], "-o", "one") == 0
    assert "no --method" not in capsys.readouterr().err
