"""Every key of a recipe has a flag in the commands where it has an effect; its help is the field's description."""

from __future__ import annotations

import json
from typing import Any

import pytest
import typer

from plait.cli.main import app
from plait.cli.options import _DESCRIPTIONS, TABLE, flags_of, switches_of
from plait.cli.spellings import complete_switches
from plait.methods import METHODS
from plait.recipes.calibration import CalibrationSpec
from plait.recipes.evaluation import EvalSpec, Subset
from plait.recipes.keys import recipe_keys
from plait.recipes.schema import Heads, Output, Recipe
from plait.recipes.search import EarlyStop, SearchSpec
from plait.recipes.tuning import TuneSpec
from tests.command_line import exit_code

MERGES = ("merge", "bake", "eval", "ask", "mix", "tune", "sweep")
PARTS = {
    "heads": (Heads, MERGES),
    "output": (Output, ("merge", "eval", "ask", "mix", "tune", "sweep")),
    "eval": (EvalSpec, ("eval", "mix", "sweep")),
    "eval.subset": (Subset, ("eval", "mix", "sweep")),
    "calibration": (CalibrationSpec, ("merge", "bake", "eval", "ask", "mix", "calibrate")),
    "tune": (TuneSpec, ("tune",)),
    "search": (SearchSpec, ("sweep",)),
    "search.subset": (Subset, ("sweep",)),
    "search.early_stop": (EarlyStop, ("sweep",)),
}
NOT_FLAGS = {
    "version",
    "adapters",
}  # adapters are arguments of the command; their weights --weights, moments --moments


def expected() -> list[tuple[str, str, str]]:
    """Return command, key and description of all that must be flags, from the schema itself."""
    fields = {name: field for name, field in Recipe.model_fields.items() if name not in (NOT_FLAGS | {*PARTS, "method"})}
    found = [(c, name, str(field.description)) for name, field in fields.items() for c in MERGES]
    found += [("calibrate", name, str(fields[name].description)) for name in ("base_model", "tasks")]
    for part, (model, commands) in PARTS.items():
        found += [
            (c, f"{part}.{name}", str(field.description))
            for name, field in model.model_fields.items()
            if f"{part}.{name}" not in PARTS
            for c in commands
        ]
    found += [(c, "method.name", str(Recipe.model_fields["method"].description)) for c in MERGES]
    for method in METHODS.values():
        names = {
            field.alias or name: str(field.description) for name, field in method.spec.model_fields.items() if name != "name"
        }
        found += [(c, f"method.{name}", text) for name, text in names.items() for c in MERGES]
    return found


def options(name: str) -> dict[str, Any]:
    """Return flag → option of a command."""
    command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]
    pairs = [(flag, p) for p in command.params if p.param_type_name == "option" for flag in (*p.opts, *p.secondary_opts)]
    assert len(pairs) == len(dict(pairs)), "two options with one flag"
    return dict(pairs)


def test_the_table_is_that_of_the_schema() -> None:
    assert json.loads(TABLE.read_text(encoding="utf-8")) == recipe_keys(), "run `make docs`"


def test_every_key_has_a_flag_with_its_description() -> None:
    missing = []
    for name in (*MERGES, "calibrate"):
        flags = {key.path: flag for flag, key in flags_of(name).items()}
        found = options(name)
        for _, path, text in (row for row in expected() if row[0] == name):
            assert text not in ("", "None"), f"{path} has no description"
            help_ = (found[flags[path]].help or "").replace(r"\[", "[") if flags.get(path) in found else ""
            if text not in help_ and (name, path) not in _DESCRIPTIONS:
                missing.append((name, path))
    assert not missing


#: The flags of recipe keys that commands had before all keys were flags: their names and meanings stay.
KEPT = {
    "merge": {
        "--method": "method.name", "--space": "method.space", "--weights": "weights", "--scale": "scale",
        "--density": "method.density", "--sign": "method.sign", "--flavor": "method.flavor", "--rank": "output.rank",
        "--dtype": "output.dtype", "--kind": "output.kind", "--merge-mode": "merge_mode", "--base-id": "base_model",
        "--seed": "seed", "--tasks": "tasks",
    },
    "bake": {
        "--method": "method.name", "--space": "method.space", "--weights": "weights", "--scale": "scale",
        "--density": "method.density", "--merge-mode": "merge_mode", "--seed": "seed", "--base-id": "base_model",
        "--tasks": "tasks",
    },
    "eval": {
        "--split": "eval.split", "--subset": "eval.subset.max_samples", "--seed": "eval.subset.seed", "--tasks": "tasks",
        "--batch-size": "eval.batch_size", "--method": "method.name", "--space": "method.space", "--weights": "weights",
        "--scale": "scale", "--density": "method.density", "--base-id": "base_model",
    },
    "tune": {
        "--texts": "tune.texts", "--count": "tune.count", "--split": "tune.split", "--steps": "tune.steps",
        "--learning-rate": "tune.learning_rate", "--rank": "output.rank", "--method": "method.name", "--scale": "scale",
        "--seed": "tune.seed", "--objective": "tune.objective", "--train": "tune.train", "--granularity": "tune.granularity",
        "--link": "tune.link", "--dtype": "output.dtype", "--base-id": "base_model", "--tasks": "tasks",
    },
    "calibrate": {
        "--texts": "calibration.texts", "--count": "calibration.count", "--split": "calibration.split",
        "--seed": "calibration.seed", "--base-id": "base_model", "--tasks": "tasks",
    },
    "compress": {
        "--rank": "output.rank", "--dtype": "output.dtype", "--layout": "output.layout", "--base-id": "base_model",
    },
}  # fmt: skip


def test_flags_keep_their_meaning() -> None:
    for name, flags in KEPT.items():
        found = {flag: key.path for flag, key in flags_of(name).items()}
        assert {flag: found.get(flag) for flag in flags} == flags
        assert set(found) <= set(options(name))
    assert "--coefficients" in options("tune")


def test_a_key_that_is_true_or_false_is_true_where_its_flag_has_no_value() -> None:
    line = ["sweep", "a", "--save-merged", "-o", "out", "--race", "false", "--allow-test"]
    assert complete_switches(line, switches_of("sweep")) == [
        "sweep", "a", "--save-merged", "true", "-o", "out", "--race", "false", "--allow-test", "true"
    ]  # fmt: skip
    assert complete_switches(line, switches_of("inspect")) == line


def test_the_help_has_no_types_of_flags_and_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["--help"], ["merge", "--help"], ["recipe", "migrate", "--help"]):
        assert exit_code(*words) == 0
        shown = capsys.readouterr().out
        assert "--help" in shown
        assert "<bool>" not in shown
        assert "list[" not in shown
