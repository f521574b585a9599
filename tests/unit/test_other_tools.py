"""Words of other tools: read, or answered with plait's own; the page of all of them says the same."""

from __future__ import annotations

from functools import cache

import pytest
import typer
from transformers import AutoModelForCausalLM

import plait
from plait.cli.main import app
from plait.cli.spellings import translate_flags
from plait.errors import RecipeError
from plait.methods import METHODS
from plait.recipes.importers.other_tools import TABLE, command_hint, flag_row, keyword_hints, page
from plait.recipes.schema import Output, Recipe
from tests.baking_models import make_adapter, save_model
from tests.command_line import exit_code
from tests.every import every

FLAGS = [(row, command) for row in TABLE if row.kind == "flag" for command in row.commands]


@cache
def options(command: str) -> set[str]:
    parameters = typer.main.get_command(app).commands[command].params
    return {name for p in parameters for name in (*p.opts, *p.secondary_opts)}


@every(("row", "command"), FLAGS)
def test_every_flag_is_read_or_answered_as_the_page_says(row, command):
    assert row.old not in options(command), "plait has the flag itself"
    arguments = [command, "x", row.old, "1"]
    if row.old in ("--a1-sub", "--a1-name"):
        arguments += ["--a1-repo", "org/repo"]
    if not row.read:
        with pytest.raises(RecipeError) as error:
            translate_flags(arguments, options(command))
        assert str(error.value) == row.hint
        assert row.new in str(error.value)
    else:
        words, notes = translate_flags(arguments, options(command))
        assert row.old not in words
        assert words[0] == command
        assert words != [command, "x"] or notes
    assert f"| `{row.old}` |" in page()


@pytest.mark.parametrize("row", [r for r in TABLE if r.kind == "command"], ids=lambda r: r.old)
def test_every_command_is_answered(row, capsys):
    assert exit_code(row.old, "--config", "x.yaml") == 2
    assert row.new in " ".join(capsys.readouterr().err.split())
    assert command_hint(row.old)
    assert row.old not in typer.main.get_command(app).commands


@every("row", [r for r in TABLE if r.kind == "keyword"])
def test_every_keyword_is_answered_in_python(row):
    own = {n for m in METHODS.values() for n in m.params.model_fields} | {*Recipe.model_fields, *Output.model_fields}
    assert row.old not in own
    assert keyword_hints([row.old]) == [row.hint]
    with pytest.raises(RecipeError, match=row.old):
        plait.plan(["./a", "./b"], **{row.old: 1})


def test_commands_that_hints_name_exist():
    commands = set(typer.main.get_command(app).commands)
    named = {row.new.split()[1] for row in TABLE if row.new.startswith("plait ")}
    assert named <= commands
    for row in TABLE:
        for word in row.new.replace(",", " ").split():
            if word.startswith("--") and row.kind == "flag" and not row.new.startswith("plait "):
                assert any(word in options(command) for command in row.commands), row


@every(
    ("given", "read"),
    [
        (
            "--base-id o/b --a1-repo o/x --a1-sub checkpoint-9 --a1-name m --a2-repo o/y --method ties --out z",
            "--base-id o/b --method ties --out z m=o/x/checkpoint-9 o/y",
        ),
        ("--a10-repo o/j --a2-repo o/b --a1-repo=o/a", "o/a o/b o/j"),
        ("--a2_repo ./dir --a2_sub sub/ -o z", "-o z ./dir/sub"),
        ("--config r.yaml --output z", "r.yaml --out z"),
        ("--adapters a b --method weighted --lambda 0.4", "--method weighted --lambda 0.4 a b"),
        ("--adapters a b -- ", "-- a b"),
        ("r.yaml --adapters=a --lambda=1", "r.yaml --lambda=1 a"),
        ("a b --weights 1,-1", "a b --weights 1,-1"),
    ],
)
def test_what_is_certain_is_read(given, read):
    assert translate_flags(["merge", *given.split()], options("merge"))[0] == ["merge", *read.split()]


def test_a_sweep_is_typed_as_there_or_answered():
    read = translate_flags(["sweep", "--config", "r.yaml", "--output", "z"], options("sweep"))[0]
    assert read == ["sweep", "r.yaml", "--out", "z"]
    assert translate_flags(["sweep", "--adapters", "a", "b", "--grid", "lambda=0.1,0.5"], options("sweep"))[0] == [
        "sweep", "--grid", "lambda=0.1,0.5", "a", "b",
    ]  # fmt: skip
    with pytest.raises(RecipeError) as error:
        translate_flags(
            ["sweep", "r.yaml", "--search-type", "grid", "--allow-negative", "--output-dir", "o", "--eval-tasks", "a"],
            options("sweep"),
        )
    for word in ("--type bayes", "--constraint-nonnegative false", "-o STUDY", "--tasks TASK..."):
        assert word in str(error.value)


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        ("--a1-name m", "--a1-name is given without --a1-repo"),
        ("a --output", "--output needs a value"),
        ("a --k 20 --grid x", "2 problems"),
    ],
)
def test_what_is_not_is_refused(given, problem):
    with pytest.raises(RecipeError, match=problem):
        translate_flags(["merge", *given.split()], options("merge"))


def test_a_flag_of_another_command_is_left_to_it():
    assert flag_row("--model_name_or_path", "sft") is None
    assert flag_row("--model_name_or_path", "merge") is not None
    assert flag_row("--frobnicate", "merge") is None


@pytest.mark.parametrize("command", ["merge", "bake"])
def test_trust_is_noted_once_where_no_model_is_loaded(command, tmp_path, capsys):
    base = save_model("llama", tmp_path / "base")
    pair = [str(make_adapter(base, tmp_path / n, s, AutoModelForCausalLM)) for s, n in enumerate("ab")]
    assert exit_code(command, *pair, "--base-id", str(base), "--trust-remote-code", "-o", str(tmp_path / "out")) == 0
    assert " ".join(capsys.readouterr().err.split()).count("--trust-remote-code changes nothing here") == 1


def test_what_another_command_takes_is_not_called_unknown():
    with pytest.raises(RecipeError, match="grid: a merge has one value of everything; `plait sweep`"):
        plait.plan(["./a", "./b"], grid={"scale": [1, 2]})
