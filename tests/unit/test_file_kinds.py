"""Files that are given as what they are not: the message names what they are, and what takes them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from plait.cli.main import main
from plait.errors import PlaitError, RecipeError
from plait.recipes.file_kinds import refuse_other_kind
from plait.recipes.loading import load_recipe
from plait.recipes.schema import Recipe
from plait.tasks.loading import load_task
from plait.training.reading import read_phases
from tests.bad_input import adapter

EXAMPLES = Path(__file__).parents[2] / "examples"
RECIPE, TASK, PHASES = EXAMPLES / "recipes/lines.yaml", EXAMPLES / "demo/tasks/langid.yaml", EXAMPLES / "phases.yaml"


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Name → a file of every kind, as plait and others write them."""
    place = tmp_path_factory.mktemp("kinds")
    adapter(place / "a")
    adapter(place / "b")
    with pytest.raises(SystemExit):
        main(["merge", str(place / "a"), str(place / "b"), "-o", str(place / "out")])
    found = {path.name: path for path in (place / "out").iterdir()}
    shutil.copy(found["plait.lock"], place / "lock.json")
    (place / "config.json").write_text(json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama"}))
    (place / "study.json").write_text(json.dumps({"plait": "0.1.0", "study": "x", "adapters": [], "recipe": {}, "runs": []}))
    (place / "mergekit.yaml").write_text("merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}, {model: b}]\n")
    training = EXAMPLES / "demo/adapters/langid/training.json"
    own = {path.name: path for path in place.iterdir() if path.is_file()}
    return {**found, **own, "training.json": training, "recipe": RECIPE, "task": TASK, "phases": PHASES}


KINDS = {
    "task": "is a task, not ",
    "phases": "is a file of phases, not ",
    "plait.lock": "is a lock, the record of a result's inputs and outputs, not ",
    "lock.json": "is a lock, the record of a result's inputs and outputs, not ",
    "merge_metadata.json": "is a record of what plait did, not ",
    "summary.json": "is a record of what plait did, not ",
    "study.json": "is the record of a search, not ",
    "training.json": "is the record of a training, not ",
    "adapter_config.json": "is the configuration of an adapter, not ",
    "config.json": "is the configuration of a model, not ",
}


@pytest.mark.parametrize("name", KINDS)
def test_a_file_that_is_no_recipe(files, name, tmp_path, capsys):
    with pytest.raises(RecipeError) as caught:
        load_recipe(files[name])
    words = f"{files[name]} {KINDS[name]}a recipe. "
    assert str(caught.value).startswith(words)
    assert "`" in str(caught.value).removeprefix(words)  # what takes it
    for command in (["recipe", "check", str(files[name])], ["merge", str(files[name]), "-o", str(tmp_path / "out")]):
        with pytest.raises(SystemExit) as left:
            main(command)
        assert left.value.code == 2
        assert capsys.readouterr().err.strip().endswith(str(caught.value))


@pytest.mark.parametrize("name", [*sorted(KINDS.keys() - {"task"}), "recipe", "mergekit.yaml"])
def test_a_file_that_is_no_task(files, name):
    with pytest.raises(PlaitError, match=f" {KINDS.get(name, 'is a recipe, not ')}a task"):
        load_task(files[name])


@pytest.mark.parametrize("name", [*sorted(KINDS.keys() - {"phases"}), "recipe", "mergekit.yaml"])
def test_a_file_that_holds_no_phases(files, name, tmp_path):
    with pytest.raises(PlaitError, match=f" {KINDS.get(name, 'is a recipe, not ')}a file of phases"):
        read_phases(files[name], out=tmp_path)


def is_refused_as_recipe(content: dict[str, int]) -> bool:
    try:
        refuse_other_kind(content, "a recipe", "recipe")
    except PlaitError:
        return True
    return False


def test_no_key_of_a_recipe_is_of_another_kind():
    """However many keys a recipe has, and whether or not it has adapters yet."""
    contents = [dict.fromkeys(Recipe.model_fields, 1), *({key: 1} for key in Recipe.model_fields)]
    assert [content for content in contents if is_refused_as_recipe(content)] == []
    assert is_refused_as_recipe({"prompt": 1}), "what a task has"
