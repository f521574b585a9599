"""A working directory that was deleted: complete paths work, and what starts there is refused by name."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import plait
from plait.errors import AddressError, PlaitError
from plait.folders import absolute, working_folder
from plait.hub.references import parse_reference
from plait.recipes.loading import load_recipe
from tests.bad_input import adapter
from tests.command_line import exit_code

GONE = "the working directory does not exist any more"


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with two adapters, a recipe and a merge, from a working directory that is gone."""
    for seed, name in enumerate("ab"):
        adapter(tmp_path / name, seed=seed)
    (tmp_path / "recipe.yaml").write_text("adapters: [./a, ./b]\n")
    plait.merge([tmp_path / "a"], out=tmp_path / "merged")
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    return tmp_path


@pytest.mark.parametrize(
    "words",
    [
        "merge {0}/a {0}/b -o {0}/out",
        "merge {0}/recipe.yaml -o {0}/out",
        "merge {0}/recipe.yaml -o {0}/out --base-id base --dry-run",
        "merge {0}/merged --add {0}/b -o {0}/out",
        "inspect {0}/a {0}/b",
        "compress {0}/a --rank 1 -o {0}/out",
        "convert {0}/a --to mlx -o {0}/out",
        "verify {0}/merged",
        "recipe check {0}/recipe.yaml",
    ],
)
def test_complete_paths_need_none(words, place, capsys):
    assert exit_code(*words.format(place).split()) == 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("merge {0}/a {0}/b -o out", "out"),
        ("merge {0}/a {0}/b", "artifacts/merged/linear/a_b/runs"),
        ("merge ./a ./b -o {0}/out", "a"),
        ("merge a b -o {0}/out", "a"),
        ("merge x=a {0}/b -o {0}/out", "a"),
        ("merge recipe.yaml -o {0}/out", "recipe.yaml"),
        ("merge {0}/recipe.yaml a -o {0}/out", "a"),
        ("merge {0}/recipe.yaml -o {0}/out --moments moments", "moments/a.safetensors"),
        ("inspect a", "a"),
        ("verify merged", "merged"),
        ("compress {0}/a --rank 1 -o out", "out"),
        ("convert {0}/a --to mlx -o out", "out"),
        ("bake {0}/a --base-id {0}/a -o out", "out"),
        ("bake {0}/a --base-id ./base -o {0}/out", "base"),
        ("eval {0}/a {0}/b --tasks task.yaml --base-id {0}/a", "task.yaml"),
        ("sweep {0}/a {0}/b --tasks task.yaml -o {0}/out", "task.yaml"),
        ("tune {0}/a {0}/b --tasks task.yaml -o {0}/out", "task.yaml"),
        ("calibrate {0}/a {0}/b --tasks task.yaml -o {0}/out", "task.yaml"),
        ("train {0}/phases.yaml -o out", "out"),
        ("train phases.yaml -o {0}/out", "phases.yaml"),
        ("recipe check recipe.yaml", "recipe.yaml"),
        ("tasks check task.yaml", "task.yaml"),
        ("push merged org/x", "merged"),
    ],
)
def test_what_starts_there_is_refused(words, what, place, capsys):
    assert exit_code(*words.format(place).split()) == 2
    shown = capsys.readouterr().err
    assert f"{GONE}, and {what!r} starts there. Change to a folder that exists (cd), or give complete paths." in shown
    assert not (place / "out").exists()


def test_a_library_that_asks_for_it(place, capsys, monkeypatch):
    def imported(*_: object, **__: object) -> None:
        try:
            os.getcwd()  # noqa: PTH109 (as libraries do)
        except OSError as error:
            raise RuntimeError("Failed to import") from error

    monkeypatch.setattr("plait.commands.merge.MergeOrder.run", imported)
    assert exit_code("merge", place / "a", place / "b", "-o", place / "out") == 2
    assert f"error: {GONE}, and is needed here." in capsys.readouterr().err


def test_a_place_on_the_hub_needs_none(place):
    assert parse_reference("org/repo").repo == "org/repo"


def test_functions(place):
    assert working_folder() == Path()
    assert absolute("a", place) == place / "a"
    assert absolute(place) == place
    for path, start in (("a", None), ("a", Path("b"))):
        with pytest.raises(AddressError, match=GONE):
            absolute(path, start)
    with pytest.raises(PlaitError, match=GONE):
        plait.merge([place / "a"], out="out")
    assert plait.merge(load_recipe(f"adapters: [{place / 'a'}]\nmethod: ties\n"), out=place / "out")


def test_torch_is_imported_where_there_is_none(place):
    """MKL finds its parts by the working directory at the time of the import."""
    (place / "there").mkdir()
    run = f"rmdir {place}/there && exec {sys.executable} -m plait merge {place}/a {place}/b -o {place}/out"
    environment = os.environ | {"PYTHONPATH": str(Path(plait.__file__).parents[1])}
    done = subprocess.run(["sh", "-c", run], cwd=place / "there", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
